"""Accuracy, pass@k and maj@k: by hand, against enumeration, and on a run's folder."""

import itertools
import json

import numpy as np
import pytest
import runs

from grpo_jax import checkpoint, data, evaluate, tokens
from grpo_jax.types import Rollout

BYTES = tokens.byte_tokenizer()


def test_pass_at_k_is_the_mean_over_all_subsets():
    for samples in range(1, 7):
        for correct in range(samples + 1):
            verdicts = [True] * correct + [False] * (samples - correct)
            for k in range(1, samples + 1):
                drawn = [any(subset) for subset in itertools.combinations(verdicts, k)]
                assert evaluate.pass_at_k(samples, correct, k) == pytest.approx(np.mean(drawn))
    for k in (0, 4):
        with pytest.raises(ValueError, match=rf'pass@{k} cannot be estimated from 3 samples: .*3'):
            evaluate.pass_at_k(3, 1, k)


@pytest.mark.parametrize(
    ('answers', 'right', 'k', 'expected'),
    [
        ('abb', 'b', 3, True),
        ('abb', 'b', 1, False),  # only the first k vote
        ('abb', 'a', 2, True),  # a tie goes to the first seen
        ('abba', 'a', 4, True),
        ('baab', 'a', 4, False),
        ('--a', 'a', 3, True),  # no answer, no vote
        ('--a', 'a', 2, False),
        ('---', '-', 3, False),
    ],
)
def test_maj_at_k(answers, right, k, expected):
    votes = [None if answer == '-' else answer for answer in answers]
    assert evaluate.maj_at_k(votes, [answer == right for answer in answers], k) is expected


def test_maj_at_k_needs_k_samples():
    for k in (0, 3):
        with pytest.raises(ValueError, match=f'maj@{k} needs {k} samples, there are 2'):
            evaluate.maj_at_k(['a', 'b'], [True, False], k)


# Four questions that fit in four tokens and one that does not; what a sampler is made to answer.
ROWS = [
    {'question': question, 'answer': answer}
    for question, answer in (('1+1=', '2'), ('7=', '7'), ('too long', '0'), ('2+2=', '4'))
] + [{'question': '3+3=', 'answer': '6'}, {'question': '4+4=', 'answer': '8'}]
GREEDY = {'1+1=': '2', '7=': '1', '2+2=': '4', '3+3=': '600', '4+4=': '8'}
SAMPLES = {
    '1+1=': ['2', '3', '3'],  # 1 of 3 right, the majority wrong
    '7=': ['1', '2', '7'],  # 1 of 3 right, a three-way tie
    '2+2=': ['4', '4', '5'],
    '3+3=': ['', '6', ''],  # those without an answer do not vote
    '4+4=': ['', '', ''],
}


def make_rollout(prompts, texts, length=3):
    """The texts [B][G], each ended by EOS where there is room for it."""
    batch, group_size = len(texts), len(texts[0])
    made = np.full((batch, group_size, length), BYTES.pad_token_id, np.int32)
    mask = np.zeros(made.shape, bool)
    ended = np.zeros(made.shape[:2], bool)
    for place in np.ndindex(batch, group_size):
        ids = [*texts[place[0]][place[1]].encode(), BYTES.eos_token_id]
        ended[place] = len(ids) <= length
        made[place][: len(ids)] = ids[:length]
        mask[place][: len(ids)] = True
    return Rollout(prompts, made, mask, np.zeros(made.shape, np.float32), ended)


def right(prompts, completions, answer, **columns):
    assert all(prompt.endswith('=') for prompt in prompts)
    return [float(text == known) for text, known in zip(completions, answer, strict=True)]


def problems():
    table = data.tokenize_prompts(ROWS, BYTES, template='{question}', prompt_length=4)
    return evaluate.Problems(ROWS, table, BYTES)


def test_evaluate_by_hand():
    asked = []

    def sampler(params, prompts, *, step, sampling, group_size):
        rows = [ROWS[i]['question'] for i in prompts.index]
        asked.append((params, rows, step, sampling.temperature, group_size))
        greedy = sampling.temperature == 0
        return make_rollout(prompts, [[GREEDY[q]] if greedy else SAMPLES[q] for q in rows])

    found = evaluate.evaluate(
        sampler,
        'params',
        problems(),
        correct=right,
        extract=lambda text: text or None,
        batch_size=2,
        samples=3,
        k=(1, 3),
        temperature=0.7,
    )
    pairs = [['1+1=', '7='], ['2+2=', '3+3='], ['4+4=', '4+4=']]  # the last one is filled up
    assert asked == [
        *(('params', pair, 0, 0.0, 1) for pair in pairs),
        *(('params', pair, 0, 0.7, 3) for pair in pairs),
    ]
    assert found.prompts == ['1+1=', '7=', '2+2=', '3+3=', '4+4=']
    assert found.completions == ['2', '1', '4', '600', '8']
    assert found.correct == [True, False, True, False, True]
    assert found.metrics == pytest.approx(
        {
            'eval/accuracy': 3 / 5,
            'eval/mean_length': (2 + 2 + 2 + 3 + 2) / 5,
            'eval/clipped_ratio': 1 / 5,  # '600' leaves no room for EOS
            'eval/pass@1': (1 / 3 + 1 / 3 + 2 / 3 + 1 / 3 + 0) / 5,
            'eval/pass@3': 4 / 5,
            'eval/maj@1': 2 / 5,  # '1+1=' and '2+2=' begin with the right answer
            'eval/maj@3': 2 / 5,  # '2+2=' and '3+3='
        }
    )


def test_evaluate_without_samples():
    def sampler(params, prompts, *, step, sampling, group_size):
        assert (float(sampling.temperature), group_size) == (0.0, 1)
        return make_rollout(prompts, [[GREEDY[ROWS[i]['question']]] for i in prompts.index])

    settings = {'correct': right, 'extract': str, 'batch_size': 5, 'samples': 0, 'k': (1, 8)}
    found = evaluate.evaluate(sampler, None, problems(), **settings)
    assert sorted(found.metrics) == ['eval/accuracy', 'eval/clipped_ratio', 'eval/mean_length']


def test_judge_gives_every_completion_its_row():
    seen = {}

    def watching(completion_ids, **others):
        seen.update(others, completion_ids=completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    prompts, _ = next(data.in_order(problems().table, 2))
    rollout = make_rollout(prompts, [['2', 'ab'], ['', '7777']])
    judged = evaluate.judge(rollout, problems(), {'watching': watching}, {'watching': 0.5})
    assert seen == {
        'prompts': ['1+1=', '1+1=', '7=', '7='],
        'completions': ['2', 'ab', '', '777'],
        'completion_ids': [[50, 257], [97, 98, 257], [257], [55, 55, 55]],
        'answer': ['2', '2', '7', '7'],
        'question': ['1+1=', '1+1=', '7=', '7='],
    }
    assert judged.prompts == seen['prompts']
    assert judged.completions == seen['completions']
    np.testing.assert_array_equal(judged.scores.total, [1.0, 1.5, 0.5, 1.5])


# The command


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    return runs.finished(tmp_path_factory.getbasetemp())[0]


def run(monkeypatch, *arguments):
    monkeypatch.setattr('sys.argv', ['evaluate', *arguments])
    with runs.compiled_once():
        evaluate.run()


def test_the_command_repeats_the_last_evaluation(finished, monkeypatch, capsys):
    run(monkeypatch, f'--workdir={finished}')
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1
    last = runs.lines(finished / 'heldout.jsonl')[-1]
    assert 0 < last['metrics']['eval/accuracy'] < 1
    assert json.loads(printed[0]) == {'checkpoint': 'grpo/8', 'problems': 10, **last['metrics']}
    rows = runs.lines(finished / 'evaluation.jsonl')
    names = {'prompt': 'prompts', 'completion': 'completions', 'correct': 'correct'}
    for one, many in names.items():
        assert [row[one] for row in rows] == last[many]


def test_the_command_takes_another_eval_section(finished, monkeypatch, capsys):
    run(monkeypatch, f'--workdir={finished}', '--config.eval.samples=0')
    last = runs.lines(finished / 'heldout.jsonl')[-1]['metrics']
    found = json.loads(capsys.readouterr().out)
    assert found['eval/accuracy'] == last['eval/accuracy']
    assert 'eval/pass@1' not in found


def test_the_command_needs_a_checkpoint(tmp_path, monkeypatch, capsys):
    for missing in (f'{tmp_path}/config.json: no such file', f'{tmp_path} holds no checkpoint'):
        with pytest.raises(SystemExit) as stopped:
            run(monkeypatch, f'--workdir={tmp_path}')
        assert stopped.value.code == 2
        captured = capsys.readouterr()
        assert captured.err.startswith(f'error: {missing}')
        assert captured.err.count('\n') == 1
        assert not captured.out
        checkpoint.claim_workdir(tmp_path, runs.get_config())


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'samples': 3}, 'eval.k=4 needs at least 4 samples: eval.samples=3'),
        ({'correct': ''}, 'eval.correct is empty: name the reward function that is 1 where'),
        ({'correct': 'exact_anwser'}, "unknown reward 'exact_anwser', did you mean 'exact_answer'"),
        ({'extract': 'last'}, "unknown extractor 'last'.*; built in are extract_answer, final_re"),
    ],
)
def test_settings_refuses(changes, message):
    config = runs.get_config()
    config.eval.update(changes)
    with pytest.raises(ValueError, match=message):
        evaluate.settings(config.eval)
