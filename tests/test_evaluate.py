"""Evaluation of a policy by hand, and the command on the folder of a run."""

import itertools
import json
import operator

import jax
import numpy as np
import pytest
import runs

from grpo_jax import data, evaluate, rewards
from grpo_jax.data import byte_tokenizer
from grpo_jax.run import checkpoint, evaluation, grading
from grpo_jax.run.problems import Problems
from grpo_jax.types import Rollout

BYTES = byte_tokenizer()


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


def problems(stops=()):
    table = data.tokenize_prompts(ROWS, BYTES, template='{question}', prompt_length=4)
    return Problems(ROWS, table, BYTES, stops)


def test_evaluate_by_hand():
    asked = []

    def sampler(params, prompts, *, step, sampling, group_size):
        rows = [ROWS[i]['question'] for i in prompts.index]
        asked.append((params, rows, step, sampling.temperature, group_size))
        greedy = sampling.temperature == 0
        return make_rollout(prompts, [[GREEDY[q]] if greedy else SAMPLES[q] for q in rows])

    found = evaluation.evaluate(
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
            'eval/avg@3': (1 / 3 + 1 / 3 + 2 / 3 + 1 / 3 + 0) / 5,
            'eval/pass@1': (1 / 3 + 1 / 3 + 2 / 3 + 1 / 3 + 0) / 5,
            'eval/pass@3': 4 / 5,
            'eval/maj@1': (1 / 3 + 1 / 3 + 2 / 3 + 1 / 3 + 0) / 5,
            'eval/maj@3': 2 / 5,  # '2+2=' and '3+3='
        }
    )


def test_equivalent_answers_vote_together():
    written = {'1+1=': ['2', '3', '3'], '7=': ['1', '7.0', '7'], '2+2=': ['5', '4', '4.0']}

    def sampler(params, prompts, *, step, sampling, group_size):
        rows = [ROWS[i]['question'] for i in prompts.index]
        answers = [written.get(q, ['9', '8', '7']) for q in rows]
        return make_rollout(prompts, [texts[:group_size] for texts in answers])

    def near(prompts, completions, answer, **columns):
        pairs = zip(completions, answer, strict=True)
        return [float(float(text) == float(known)) for text, known in pairs]

    found = evaluation.answer_problems(
        sampler,
        None,
        problems(),
        correct=near,
        extract=str,
        batch_size=5,
        samples=3,
        k=(3,),
    )
    assert found.values['eval/maj@3'].tolist() == [0, 1, 1, 0, 0]
    assert found.sampled_extracted[1] == ['1', '7.0', '7']
    rows = [*evaluation.answer_records(found)]
    assert rows[1] == {
        'prompt': '7=',
        'completion': '1',
        'extracted': '1',
        'correct': False,
        'sampled_extracted': ['1', '7.0', '7'],
        'sampled_correct': [False, True, True],
    }
    assert [row['correct'] for row in rows] == [True, False, False, False, False]


def test_evaluate_without_samples():
    def sampler(params, prompts, *, step, sampling, group_size):
        assert (float(sampling.temperature), group_size) == (0.0, 1)
        return make_rollout(prompts, [[GREEDY[ROWS[i]['question']]] for i in prompts.index])

    settings = {'correct': right, 'extract': str, 'batch_size': 5, 'samples': 0, 'k': (1, 8)}
    found = evaluation.evaluate(sampler, None, problems(), **settings)
    assert sorted(found.metrics) == ['eval/accuracy', 'eval/clipped_ratio', 'eval/mean_length']


def greedy_sampler(params, prompts, *, step, sampling, group_size):
    if float(sampling.temperature):
        texts = [SAMPLES[ROWS[i]['question']] for i in prompts.index]
    else:
        texts = [[GREEDY[ROWS[i]['question']]] for i in prompts.index]
    assert len(texts[0]) == group_size
    return make_rollout(prompts, texts)


def test_without_an_extractor_nothing_votes():
    settings = {'correct': right, 'batch_size': 5, 'samples': 3, 'k': (1, 3)}
    found = evaluation.answer_problems(greedy_sampler, None, problems(), **settings)
    assert found.values.keys() == {
        'eval/accuracy', 'eval/clipped_ratio', 'eval/mean_length', 'eval/avg@3', 'eval/pass@1',
        'eval/pass@3',
    }  # fmt: skip
    assert found.values['eval/pass@3'].tolist() == [1, 1, 1, 1, 0]
    (row, *_) = evaluation.answer_records(found)
    assert row == {
        'prompt': '1+1=', 'completion': '2', 'correct': True,
        'sampled_correct': [True, False, False],
    }  # fmt: skip


def test_the_reward_alone():
    """Rewards of the greedy answers '2', '1', '4', '600', '8' by hand: their values less one."""

    def value(completions, **columns):
        return [float(text) - 1 for text in completions]

    grader = grading.Grader(problems(), {'value': value}, {'value': 0.5})

    def reward(rollout, groups):
        return grader.grade(rollout, None, groups=groups)

    settings = {'reward': reward, 'batch_size': 2, 'samples': 3, 'k': (1,), 'extract': str.strip}
    found = evaluation.evaluate(greedy_sampler, None, problems(), **settings)
    by_hand = np.array([0.5, 0, 1.5, 299.5, 3.5])
    assert found.rewards == by_hand.tolist()
    assert found.correct == ()
    assert found.metrics == {
        'eval/reward': pytest.approx(61.0),
        'eval/reward_std': pytest.approx(np.std(by_hand, ddof=1)),
        'eval/mean_length': pytest.approx((2 + 2 + 2 + 3 + 2) / 5),
        'eval/clipped_ratio': pytest.approx(1 / 5),
    }
    answers = evaluation.answer_problems(greedy_sampler, None, problems(), **settings)
    assert [row['reward'] for row in evaluation.answer_records(answers)] == by_hand.tolist()
    one = answers._replace(values={'eval/reward': by_hand[:1]})
    assert evaluation.spread(one) == {'eval/reward_std': 0.0}
    with pytest.raises(ValueError, match='nothing grades the answers: give correct or reward'):
        evaluation.evaluate(greedy_sampler, None, problems(), batch_size=2)


def flat(lists):
    return [*itertools.chain.from_iterable(lists)]


class Watching:
    """A reward function: the completion as a number, or None for '1'; keeps what it got."""

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, completions, completion_ids, question, log_metric, log_extra, **_):
        self.calls.append((completions, question, [len(ids) for ids in completion_ids]))
        log_metric('called', len(prompts))
        log_extra('seen', completions)
        return [None if text == '1' else float(text or 0) for text in completions]


@pytest.mark.parametrize('batch_size', [2, 4, 64])
def test_no_function_sees_the_copies_that_fill_a_batch(batch_size):
    """Five problems never fill batches of 2, 4 and 64; each is scored once, at any size."""
    seen, graded = Watching(), []
    step_texts = []

    def steps(prompts, completions, **columns):
        step_texts.extend(completions)
        return [[(len(text), 1.0)] if text else [] for text in completions]

    def scorer(params, rollout):
        assert len(rollout.tokens) == batch_size  # the reward model is one program for a batch
        return np.ones(rollout.mask.shape, np.float32)

    grader = grading.Grader(problems(), {'seen': seen}, {'seen': 0.5})

    def reward(rollout, groups):
        graded.append(grader.grade(rollout, None, groups=groups))
        return graded[-1]

    found = evaluation.evaluate(
        greedy_sampler, None, problems(), reward=reward, batch_size=batch_size
    )
    greedy = ['2', '1', '4', '600', '8']
    assert flat(completions for completions, _, _ in seen.calls) == greedy
    assert flat(rows for _, rows, _ in seen.calls) == ['1+1=', '7=', '2+2=', '3+3=', '4+4=']
    assert flat(lengths for _, _, lengths in seen.calls) == [2, 2, 2, 3, 2]
    by_hand = [1, 0, 2, 300, 4]  # half of the numbers; 0 for the one without a reward
    assert found.rewards == by_hand
    assert found.metrics == {
        'eval/reward': pytest.approx(307 / 5),
        'eval/reward_std': pytest.approx(np.std(by_hand, ddof=1)),
        'eval/mean_length': pytest.approx(11 / 5),
        'eval/clipped_ratio': pytest.approx(1 / 5),
    }
    assert sum(rewards.skipped.sum() for rewards in graded if rewards.skipped is not None) == 1
    logs = [rewards.texts.scores.logs for rewards in graded]
    assert flat(log.metrics['called'] for log in logs) == [len(c) for c, _, _ in seen.calls]
    assert flat(log.extra['seen'] for log in logs) == greedy

    # pass@k with a ranker that has a step function
    seen.calls.clear()
    ranked = grading.Grader(problems(), {}, {}, ('steps', steps, 1.0), scorer, 1.0)
    answers = evaluation.answer_problems(
        greedy_sampler, None, problems(), correct=seen, batch_size=batch_size, samples=3, k=(3,),
        rank=lambda rollout, texts: ranked.score(rollout, texts, None),
    )  # fmt: skip
    sampled = flat(SAMPLES.values())
    assert flat(completions for completions, _, _ in seen.calls) == greedy + sampled
    assert step_texts == sampled
    assert answers.values['eval/rm@3'].shape == (5,)


def test_reward_functions_get_the_row_of_every_completion():
    seen = {}

    def watching(completion_ids, **others):
        seen.update(others, completion_ids=completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    prompts, _ = next(data.in_order(problems().table, 2))
    rollout = make_rollout(prompts, [['2', 'ab'], ['', '7777']])
    texts = grading.grade_texts(rollout, problems(), {'watching': watching}, {'watching': 0.5})
    assert seen == {
        'prompts': ['1+1=', '1+1=', '7=', '7='],
        'completions': ['2', 'ab', '', '777'],
        'completion_ids': [[50, 257], [97, 98, 257], [257], [55, 55, 55]],
        'answer': ['2', '2', '7', '7'],
        'question': ['1+1=', '1+1=', '7=', '7='],
    }
    assert texts.prompts == seen['prompts']
    assert texts.completions == seen['completions']
    np.testing.assert_array_equal(texts.scores.total, [1.0, 1.5, 0.5, 1.5])


def test_texts_end_at_a_stop_string():
    prompts, _ = next(data.in_order(problems().table, 2))
    rollout = make_rollout(prompts, [['2;', ';ab'], ['a;', '7']])
    functions = {'right': lambda completions, **_: [float(len(text)) for text in completions]}
    texts = grading.grade_texts(rollout, problems(stops=('b', ';')), functions, {'right': 1.0})
    assert texts.completions == ['2;', ';', 'a;', '7']
    assert texts.scores.total.tolist() == [2, 1, 2, 1]


def test_batches_are_concatenated():
    whole, _ = next(data.in_order(problems().table, 4))
    written = [['2', '3'], ['7', ''], ['', '4'], ['5', '6']]
    functions = {'right': right}, {'right': 0.5}
    at_once = grading.grade_texts(make_rollout(whole, written), problems(), *functions)
    parts = []
    for groups in (slice(0, 1), slice(1, 4)):
        prompts = jax.tree.map(operator.itemgetter(groups), whole)
        rollout = make_rollout(prompts, written[groups])
        parts.append(grading.grade_texts(rollout, problems(), *functions))
    joined = grading.concatenate_texts(parts)
    assert joined[:2] == at_once[:2]
    np.testing.assert_array_equal(joined.scores.total, at_once.scores.total)
    np.testing.assert_array_equal(joined.scores.parts['right'], at_once.scores.parts['right'])


# The command


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
    found = json.loads(printed[0])
    ends = {name: found.pop(name) for name in [*found] if name.endswith(('/low', '/high'))}
    assert found == {'checkpoint': 'grpo/8', 'problems': 10, **last['metrics']}
    for name, mean in last['metrics'].items():
        assert ends.pop(f'{name}/low') <= mean <= ends.pop(f'{name}/high')
    assert not ends
    rows = runs.lines(finished / 'evaluation.jsonl')
    names = {'prompt': 'prompts', 'completion': 'completions', 'correct': 'correct'}
    for one, many in names.items():
        assert [row[one] for row in rows] == last[many]
    for row in rows:
        assert row['checkpoint'] == 'grpo/8'
        assert row['extracted'] == rewards.final_result(row['completion'])
        assert len(row['sampled_correct']) == len(row['sampled_extracted']) == 4


def test_the_command_asks_other_problems_in_other_words(finished, monkeypatch, capsys):
    changes = ('data.heldout_split=train', 'data.prompt={question} ', 'data.prompt_length=5')
    run(monkeypatch, f'--workdir={finished}', *(f'--config.{change}' for change in changes))
    found = json.loads(capsys.readouterr().out)
    assert found['problems'] == 90
    assert 0 < found['eval/accuracy/low'] < found['eval/accuracy'] < found['eval/accuracy/high']
    prompts = [row['prompt'] for row in runs.lines(finished / 'evaluation.jsonl')]
    assert len(prompts) == 90
    assert all(prompt.endswith('= ') for prompt in prompts)


def test_the_command_takes_another_eval_section(finished, monkeypatch, capsys):
    output = f'--output={finished / "other.jsonl"}'
    before = (finished / 'evaluation.jsonl').exists()
    run(monkeypatch, f'--workdir={finished}', '--config.eval.samples=0', output)
    assert (finished / 'evaluation.jsonl').exists() == before
    last = runs.lines(finished / 'heldout.jsonl')[-1]['metrics']
    found = json.loads(capsys.readouterr().out)
    assert found['eval/accuracy'] == last['eval/accuracy']
    assert 'eval/pass@1' not in found
    assert 'sampled_correct' not in runs.lines(finished / 'other.jsonl')[0]


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('', 'is a folder: name a file'),
        ('heldout.jsonl', 'is a file of the run: name another'),
        ('nowhere/a.jsonl', 'there is no folder'),
    ],
)
def test_an_output_that_is_rejected(finished, name, message, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, f'--workdir={finished}', f'--output={finished / name}')
    assert message in capsys.readouterr().err


def test_the_command_says_how_it_is_used(monkeypatch, capsys):
    run(monkeypatch, '--help')
    printed = capsys.readouterr().out
    assert '--workdir=FOLDER' in printed
    assert '--completions=FILE.jsonl' in printed


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
        ({'correct': 'exact_anwser'}, "unknown reward 'exact_anwser', did you mean 'exact_answer'"),
        (
            {'extract': 'last'},
            "unknown extractor 'last'.*built in are extract_answer, .*final_re",
        ),
    ],
)
def test_options_that_are_rejected(changes, message):
    config = runs.get_config()
    config.eval.update(changes)
    with pytest.raises(ValueError, match=message):
        evaluation.evaluation_options(config.eval)
