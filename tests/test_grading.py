"""Rewards by functions, by steps and by a reward model, by hand; where steps end."""

import dataclasses
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from grpo_jax import data, rewards
from grpo_jax.data import byte_tokenizer, char_to_token
from grpo_jax.run import grading, rollout_rewards
from grpo_jax.run.collector import RolloutCollector
from grpo_jax.run.graded_texts import on_host
from grpo_jax.run.grading import Grader
from grpo_jax.run.problems import Problems
from grpo_jax.run.rollouts import Position, completion_records
from grpo_jax.types import Prompts, Rollout, StepRewards

BYTES = byte_tokenizer()
LENGTH = 6
ROWS = [{'question': f'{i}?', 'answer': str(i)} for i in range(5)]
INDEX = [3, 1]
TEXTS = [['ab;cd', 'é;abcd', ''], ['3;4;5;', ';', 'abc']]  # the second has no room for EOS
LENGTHS = [[6, 6, 1], [6, 2, 4]]  # tokens, with EOS


def make_rollout(texts=TEXTS, index=INDEX):
    index = np.array(index, np.int32)
    made = np.full((len(texts), len(texts[0]), LENGTH), BYTES.pad_token_id, np.int32)
    mask, ended = np.zeros(made.shape, bool), np.zeros(made.shape[:2], bool)
    for row in np.ndindex(ended.shape):
        ids = [*texts[row[0]][row[1]].encode(), BYTES.eos_token_id]
        ended[row] = len(ids) <= LENGTH
        made[row][: len(ids)] = ids[:LENGTH]
        mask[row][: len(ids)] = True
    asked = np.array([[*f'{i}?'.encode()] for i in index], np.int32)
    prompts = Prompts(asked, np.full(len(index), 2, np.int32), index)
    return Rollout(prompts, made, mask, np.zeros(made.shape, np.float32), ended)


def problems(stops=()):
    table = data.tokenize_prompts(ROWS, BYTES, template='{question}', prompt_length=4)
    return Problems(ROWS, table, BYTES, stops)


def length(prompts, completions, answer, **columns):
    """Tells apart where a row's prompt or column are another row's."""
    assert [prompt[:-1] for prompt in prompts] == list(answer)
    return [float(len(text)) for text in completions]


def blanks(prompts, completions, **columns):
    return [None if text else 10.0 for text in completions]


RULES = ({'length': length, 'blanks': blanks}, {'length': 0.5, 'blanks': 1.0})
OUTCOME = [[2.5, 2.5, 10.0], [3.0, 0.5, 1.5]]  # 'é;abc' was cut off: five characters
SILENT = ({'length': length}, {'length': 0.0})


def pieces(prompts, completions, answer, **columns):
    """Steps end after each `;` and at the end; the k-th is worth its prompt's answer + k."""
    found = []
    for text, known in zip(completions, answer, strict=True):
        ends = [i + 1 for i, c in enumerate(text) if c == ';' or i + 1 == len(text)]
        found.append([(end, float(known) + k) for k, end in enumerate(ends)])
    return found


# [B, G, T]: the token at which each step of TEXTS ends, EOS for the last one.
STEPS = np.zeros((2, 3, LENGTH), np.float32)
STEPS[0, 0, [2, 5]] = 3, 4  # 'ab;' and 'cd' with EOS
STEPS[0, 1, [2, 5]] = 3, 4  # 'é;' takes three tokens
STEPS[1, 0, [1, 3, 5]] = 1, 2, 3
STEPS[1, 1, 1] = 1  # ';' with EOS
STEPS[1, 2, 3] = 1
ENDS = STEPS > 0
LAST = np.arange(LENGTH) == np.array(LENGTHS)[..., None] - 1

SCORES = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)
TOKEN_SCORES = np.linspace(-1, 1, STEPS.size, dtype=np.float32).reshape(STEPS.shape)


def scorer(values):
    """A reward model whose parameter is a factor."""
    calls = []

    def score(params, rollout):
        calls.append(np.shape(rollout.tokens))
        return params * values

    return score


# Outcomes


def test_rules_alone():
    graded = Grader(problems(), *RULES).grade(make_rollout(), None)
    np.testing.assert_array_equal(graded.total, OUTCOME)
    assert graded.total.dtype == np.float32
    assert (graded.steps, graded.model_scores) == (None, None)
    assert graded.texts.completions == ['ab;cd', 'é;abc', '', '3;4;5;', ';', 'abc']
    np.testing.assert_array_equal(graded.texts.scores.parts['length'], [5, 5, 0, 6, 1, 3])


def test_a_reward_model_beside_the_rules():
    grader = Grader(problems(), *RULES, scorer=scorer(SCORES), score_weight=0.25)
    graded = grader.grade(make_rollout(), np.float32(2))
    np.testing.assert_allclose(graded.total, OUTCOME + 0.25 * 2 * SCORES, rtol=1e-6)
    np.testing.assert_array_equal(graded.model_scores, 2 * SCORES.reshape(-1))  # before its weight
    assert graded.total.dtype == np.float32
    np.testing.assert_array_equal(graded.texts.scores.total, np.ravel(OUTCOME))


def test_a_reward_model_alone():
    graded = Grader(problems(), *SILENT, None, scorer(SCORES), 1.0).grade(
        make_rollout(), np.float32(1)
    )
    np.testing.assert_array_equal(graded.total, SCORES)


# Processes


def test_steps_alone():
    graded = Grader(problems(), *SILENT, ('pieces', pieces, 0.5)).grade(make_rollout(), None)
    np.testing.assert_array_equal(graded.steps.values, 0.5 * STEPS)
    np.testing.assert_array_equal(graded.steps.ends, ENDS)
    np.testing.assert_array_equal(graded.total, 0.5 * STEPS.sum(-1))
    assert (graded.steps.values.dtype, graded.steps.ends.dtype) == (np.float32, bool)
    assert graded.model_scores is None


def test_an_outcome_comes_with_the_last_token():
    graded = Grader(problems(), *RULES, ('pieces', pieces, 1.0)).grade(make_rollout(), None)
    expected = STEPS + LAST * np.array(OUTCOME)[..., None]
    np.testing.assert_array_equal(graded.steps.values, expected)
    np.testing.assert_array_equal(graded.steps.ends, ENDS | LAST)  # also where there is no step
    np.testing.assert_allclose(graded.total, expected.sum(-1))
    assert graded.steps.values.dtype == np.float32


def means(scores):
    """The mean over each row's steps; 0 without any."""
    pairs = zip(scores.reshape(-1, LENGTH), ENDS.reshape(-1, LENGTH), strict=True)
    return [row[ends].mean() if ends.any() else 0.0 for row, ends in pairs]


def test_a_process_reward_model_scores_the_ends_of_steps():
    grader = Grader(problems(), *SILENT, ('pieces', pieces, 0.5), scorer(TOKEN_SCORES), 0.25)
    graded = grader.grade(make_rollout(), np.float32(3))
    expected = 0.5 * STEPS + np.where(ENDS, 0.25 * 3 * TOKEN_SCORES, 0)
    np.testing.assert_allclose(graded.steps.values, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(graded.steps.ends, ENDS)
    np.testing.assert_allclose(graded.total, expected.sum(-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(graded.model_scores, means(3 * TOKEN_SCORES), rtol=1e-5)


def test_all_three():
    """The reward model says nothing of a last token where no step ends."""
    grader = Grader(problems(), *RULES, ('pieces', pieces, 1.0), scorer(TOKEN_SCORES), 1.0)
    graded = grader.grade(make_rollout(), np.float32(1))
    expected = STEPS + np.where(ENDS, TOKEN_SCORES, 0) + LAST * np.array(OUTCOME)[..., None]
    np.testing.assert_allclose(graded.steps.values, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(graded.steps.ends, ENDS | LAST)
    np.testing.assert_allclose(graded.model_scores, means(TOKEN_SCORES), rtol=1e-5)


def test_steps_that_end_in_a_stop_string():
    """The text ends with it, and so does its last step, with the token that completed it."""
    grader = Grader(problems((';c',)), *SILENT, ('pieces', pieces, 1.0))
    graded = grader.grade(make_rollout([['ab;cde']], [2]), None)
    assert graded.texts.completions == ['ab;c']
    assert np.flatnonzero(graded.steps.ends[0, 0]).tolist() == [2, 5]


def test_step_functions_that_fail():
    grader = Grader(problems(), *SILENT, ('bad', lambda **columns: [[(99, 1.0)]] * 6, 1.0))
    with pytest.raises(rewards.RewardError, match=r"step rewards 'bad', row 0: .* ends must grow"):
        grader.grade(make_rollout(), None)


# Scores for best of k


def test_scores_of_the_reward_model():
    rollout, texts = make_rollout(), Grader(problems(), *RULES).grade(make_rollout(), None).texts
    outcome = Grader(problems(), *RULES, None, scorer(SCORES), 0.25)
    found = outcome.score(rollout, texts, np.float32(2))
    np.testing.assert_array_equal(found, 2 * SCORES.reshape(-1))
    process = Grader(problems(), *RULES, ('pieces', pieces, 0.5), scorer(TOKEN_SCORES), 0.25)
    found = process.score(rollout, texts, np.float32(2))
    np.testing.assert_allclose(found, means(2 * TOKEN_SCORES), rtol=1e-5)


# Concatenation and selection of groups


def test_informative_outcomes():
    graded = Grader(problems(), *RULES).grade(make_rollout(), None)
    assert graded.informative().tolist() == [True, True]
    total = np.array([[1, 1, 1], [1, 1, 1.0001], [0, 0, 0], [-1, 0, -1]], np.float32)
    assert graded._replace(total=total).informative().tolist() == [False, True, False, True]


def test_what_is_informative_with_a_baseline():
    """Groups in which a completion that has a reward differs from the greedy one."""
    total = np.array([[1, 1, 1], [1, 1, 1], [2, 1, 1], [2, 1, 1], [5, 5, 5]], np.float32)
    baseline = np.array([0, 1, 1, 1, np.nan], np.float32)
    skipped = np.zeros(total.shape, bool)
    skipped[3, 0] = skipped[4] = True
    graded = Grader(problems(), *RULES).grade(make_rollout(), None)
    graded = graded._replace(total=total, baseline=baseline, skipped=skipped)
    assert graded.informative().tolist() == [True, False, True, False, False]


def test_a_greedy_completion_without_a_reward():
    """Its group is skipped, beside completions of others that have none."""
    greedy = make_rollout([['a'], ['b']])
    own = make_grader(1, 2, 3, None, 5, 6).grade(make_rollout(), None)
    graded = own.with_baseline(make_grader(None, 2).grade(greedy, None))
    assert graded.skipped.tolist() == [[True] * 3, [True, False, False]]
    np.testing.assert_array_equal(graded.baseline, np.float32([np.nan, 2]))
    whole = make_grader(*range(6)).grade(make_rollout(), None)
    graded = whole.with_baseline(make_grader(None, 2).grade(greedy, None))
    assert graded.skipped.tolist() == [[True] * 3, [False] * 3]
    assert whole.with_baseline(make_grader(3, 2).grade(greedy, None)).skipped is None
    swapped = rollout_rewards.concatenate_rewards([graded, graded]).select(np.array([3, 2]))
    np.testing.assert_array_equal(swapped.baseline, np.float32([2, np.nan]))


def test_informative_steps():
    """Those of the whole group count, wherever they end; what is not at an end does not."""
    graded = Grader(problems(), *RULES).grade(make_rollout(), None)
    values = np.full((5, 2, 3), 9.0, np.float32)
    ends = np.zeros(values.shape, bool)
    values[0, :, 1], ends[0, :, 1] = -1.0, True  # all alike
    values[1, 0, :2], ends[1, 0, :2] = (0.0, 1.0), True  # two steps of one completion
    values[2, :, 0], ends[2, :, 0] = (0.0, 1.0), True  # of two completions
    values[3, 0, :2], ends[3, 0, :2] = 1.0, True  # equal steps, another sum, no steps in a row
    total = np.where(ends, values, 0).sum(-1)
    found = graded._replace(total=total, steps=StepRewards(values, ends)).informative()
    assert found.tolist() == [False, True, True, False, False]


def test_what_only_the_update_reads_is_not_copied_to_the_host():
    rollout = make_rollout()
    recorded = rollout._replace(
        support=np.zeros((*rollout.mask.shape, 3), np.uint32),
        routing=np.zeros((*rollout.mask.shape, 2, 1), np.uint8),
    )
    host = on_host(recorded, 1)
    assert host.support is host.routing is host.prompts.routing is None
    assert tiny.same(host, jax.tree.map(lambda x: x[:1], rollout))


@pytest.mark.parametrize('kind', ['outcome', 'scored outcome', 'process', 'scored process'])
def test_parts_and_choices_are_those_of_the_whole(kind):
    steps = ('pieces', pieces, 1.0) if 'process' in kind else None
    values = TOKEN_SCORES if steps else SCORES
    model = (scorer(values), 0.5) if 'scored' in kind else (None, 0.0)
    whole = Grader(problems(), *RULES, steps, *model).grade(make_rollout(), np.float32(1))
    parts = []
    for group in range(2):
        some = slice(group, group + 1)
        model = (scorer(values[some]), 0.5) if 'scored' in kind else (None, 0.0)
        grader = Grader(problems(), *RULES, steps, *model)
        parts.append(grader.grade(make_rollout(TEXTS[some], INDEX[some]), np.float32(1)))
    check_equal(rollout_rewards.concatenate_rewards(parts), whole)
    check_equal(rollout_rewards.concatenate_rewards(parts[::-1]).select(np.array([1, 0])), whole)
    check_equal(whole.select(np.array([1])), parts[1])


def check_equal(ours, theirs):
    assert ours.texts[:2] == theirs.texts[:2]
    pairs = [(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True) if not isinstance(b, tuple)]
    if theirs.steps is not None:
        pairs += zip(ours.steps, theirs.steps, strict=True)
    ours, theirs = ours.texts.scores, theirs.texts.scores
    assert ours.parts.keys() == theirs.parts.keys()
    pairs += [(ours.total, theirs.total), *((ours.parts[k], theirs.parts[k]) for k in ours.parts)]
    for a, b in pairs:
        assert (a is None) == (b is None)
        np.testing.assert_array_equal(a, b)


# Where in the tokens a text's characters are complete


def places(texts, ends, room=0):
    """`char_to_token` for texts, each ended by EOS."""
    ids = [[*text.encode(), BYTES.eos_token_id] for text in texts]
    made = np.full((len(ids), max(map(len, ids)) + room), BYTES.pad_token_id, np.int32)
    mask = np.zeros(made.shape, bool)
    for row, some in enumerate(ids):
        made[row, : len(some)], mask[row, : len(some)] = some, True
    return char_to_token(BYTES, made, mask, texts, ends)


@hypothesis.given(
    rows=st.lists(st.text(st.characters(max_codepoint=127), max_size=9), min_size=1, max_size=4)
)
def test_of_ascii_each_character_is_a_token(rows):
    ends = [range(1, len(text) + 1) for text in rows]
    expected = [[*range(len(text) - 1), len(text)] if text else [] for text in rows]
    assert places(rows, ends, room=2) == expected  # the last end takes EOS along


@hypothesis.given(rows=st.lists(st.text('aé答😀;', max_size=6), min_size=1, max_size=4))
def test_characters_of_several_tokens(rows):
    """After a letter of one token the position is exact, otherwise it is inside that letter."""
    ends = [range(1, len(text)) for text in rows]
    for text, found in zip(rows, places(rows, ends), strict=True):
        for end, place in enumerate(found, 1):
            assert place == len(text[:end].encode()) - 1
        assert found == sorted(set(found))


def test_places_by_hand():
    assert places(['ab;c', 'é;b', '', 'x'], [[3, 4], [2], [], [1]]) == [[2, 4], [2], [], [1]]
    assert places(['', ''], [[], []]) == [[], []]
    assert places(['abc'], [[3, 1, 2]]) == [[3, 0, 1]]  # in any order


def test_a_text_without_its_last_token():
    """Cut off by length: the last token that is used."""
    ids, mask = np.array([list(b'abcd')]), np.array([[True, True, True, False]])
    assert char_to_token(BYTES, ids, mask, ['abc'], [[1, 3]]) == [[0, 2]]


# Completions without a reward


def make_grader(*values):
    """A grader whose only reward function returns these values for the completions in order."""
    iterator = iter(values)
    return Grader(problems(), {'f': lambda completions, **_: [next(iterator) for _ in completions]},
                  {'f': 1.0})  # fmt: skip


def test_a_completion_without_a_reward_is_skipped():
    graded = make_grader(1, None, 3, None, None, None).grade(make_rollout(), None)
    assert graded.skipped.tolist() == [[False, True, False], [True, True, True]]
    assert graded.total.tolist() == [[1, 2, 3], [0, 0, 0]]  # the mean of the others; 0 without any
    assert graded.informative().tolist() == [True, False]
    assert rewards.statistics(graded.texts.scores)['rewards/skipped'] == 4
    assert graded.select(np.array([1])).skipped.tolist() == [[True, True, True]]
    records = completion_records(graded, 3)
    assert [record['reward'] for record in records] == [1.0, None, 3.0]
    whole = make_grader(*range(6)).grade(make_rollout(), None)
    assert whole.skipped is None
    joined = rollout_rewards.concatenate_rewards([whole, graded])
    assert joined.skipped.tolist() == [[False] * 3] * 2 + graded.skipped.tolist()


def test_a_batch_without_any_reward():
    with pytest.raises(rewards.RewardError, match='none of the 6 completions of a batch has a rew'):
        make_grader(*[None] * 6).grade(make_rollout(), None)


def test_sums_that_float32_cannot_hold():
    """Of finite rewards and finite scores, each of which it can."""
    scorer = lambda params, rollout: np.full(rollout.ended.shape, 3e38, np.float32)  # noqa: E731
    grader = dataclasses.replace(make_grader(*[3e38] * 6), scorer=scorer, score_weight=1.0)
    with pytest.raises(rewards.RewardError, match=r'is 6e\+38, which does not fit float32: lower'):
        grader.grade(make_rollout(), None)
    grader = dataclasses.replace(make_grader(*[3e38] * 6), scorer=scorer, score_weight=-1.0)
    assert (grader.grade(make_rollout(), None).total == 0).all()


def test_another_reward_is_enough():
    scorer = lambda params, rollout: np.ones(rollout.ended.shape, np.float32)  # noqa: E731
    grader = dataclasses.replace(make_grader(*[None] * 6), scorer=scorer, score_weight=2.0)
    graded = grader.grade(make_rollout(), None)
    assert graded.skipped is None
    assert graded.total.tolist() == [[2.0] * 3] * 2


def test_skipped_completions_are_not_kept(caplog):
    graded = make_grader(1, None, 3, 4, 5, 6).grade(make_rollout(), None)
    config = ConfigDict({'grpo': {'drop': ()}})
    setup, algorithm = (
        SimpleNamespace(config=config),
        SimpleNamespace(pairwise=False, uses_function_rewards=False),
    )
    for drop, kept in (((), [True, False, True]), (('truncated',), [True, False, True])):
        config.grpo.drop = drop
        collector = SimpleNamespace(setup=setup, algorithm=algorithm)
        arguments = (collector, Position(), make_rollout(), graded)
        rollout, totals, _ = RolloutCollector._select(*arguments)
        ended = make_rollout().ended[0] if drop else [True] * 3
        assert rollout.kept[0].tolist() == [a and b for a, b in zip(kept, ended, strict=True)]
        # Not the mean, which would change the deviation that the others are divided by.
        np.testing.assert_array_equal(totals, [[1, np.nan, 3], [4, 5, 6]])
    assert 'step 1: 1 completions have no reward' in caplog.text


def test_conversations_reach_the_functions():
    conversations = [[{'role': 'user', 'content': f'{i}?'}] for i in range(5)]
    seen = []

    def watching(prompts, completions, answer, **columns):
        seen.extend(zip(prompts, completions, answer, strict=True))
        return [0.0] * len(completions)

    functions, weights = {'f': watching}, {'f': 1.0}
    given = problems()._replace(conversations=conversations)
    graded = grading.grade_texts(make_rollout(), given, functions, weights)
    expected = [
        (conversations[i], [{'role': 'assistant', 'content': text}], str(i))
        for i, text in zip(np.repeat(INDEX, 3), graded.completions, strict=True)
    ]
    assert seen == expected
    assert graded.completions[0] == 'ab;cd'


def test_logs_reach_the_records():
    def logging(completions, log_metric, log_extra, trainer_state, **columns):
        log_metric('found', len(completions))
        log_extra('length', [len(text) for text in completions])
        return [float(trainer_state.global_step)] * len(completions)

    state = rewards.TrainerState(5, 9)
    grader = Grader(problems(), {'f': logging}, {'f': 1.0}, trainer_state=state)
    rollout = make_rollout()
    ended = rollout._replace(ended=np.array([[True] * 3, [False] * 3]))
    early = grader.grade_early([ended])  # two calls, each with one group
    graded = grader.grade(rollout, None, early)
    assert rewards.statistics(graded.texts.scores)['found'] == 3
    assert [r['length'] for r in completion_records(graded, 6)] == [5, 5, 0, 6, 1, 3]
    assert graded.total.tolist() == [[5.0] * 3] * 2
