"""Reward models: scores and losses against loops in float64, and the program that trains them.

The program is tested with a model whose score looks at one token, so that its gradient can be
written down. The recording optimizer keeps the gradient that it was given.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import tiny

from grpo_jax import models, sharding
from grpo_jax.algorithm.optimizer import adamw
from grpo_jax.algorithm.program import init_state
from grpo_jax.algorithm.reward_model import (
    LOSSES,
    bradley_terry,
    label_loss,
    make_scorer,
    make_step,
    outcome_scores,
    token_scores,
)
from grpo_jax.types import TrainState

RECORDER = optax.sgd(1.0, momentum=0.0)  # its trace is the last gradient
ROLLOUT = tiny.make_rollout()
RNG = np.random.default_rng(5)
SHAPE = ROLLOUT.tokens.shape
LABELS = np.array([[2, 0, 1], [0.5, 0.5, 0.5], [1, 1, 0], [-3, 0, -3]], np.float32)
PROBABILITIES = RNG.uniform(0, 1, SHAPE[:2]).astype(np.float32)
STEP_LABELS = RNG.uniform(0, 1, SHAPE).astype(np.float32)
ENDS = RNG.random(SHAPE) < 0.5
DATA = {
    'bradley_terry': (LABELS, None),
    'label': (PROBABILITIES, None),
    'step': (STEP_LABELS, ENDS),
}


@pytest.fixture(scope='module')
def decoder():
    model = tiny.make_model(scalar_head=True)
    return model, tiny.make_params(model)


class Unigram(tiny.Bigram):
    """A reward model whose score of a token is embedding[token] . score."""

    def apply(self, variables, *args, method):
        if method == 'scores':
            return args[0] @ variables['params']['score'][:, 0]
        return super().apply(variables, *args, method=method)


UNIGRAM = Unigram()
PARAMS = {
    'embedding': RNG.standard_normal((tiny.VOCAB, 6)).astype(np.float32),
    'score': RNG.standard_normal((6, 1)).astype(np.float32),
}


# Scores


def naive_scores(params, rollout, config):
    """[B, G, T] by a plain forward over all sequences, each token's of the state at its place."""
    params = oracle.float64(params)
    rows, places = oracle.sequences(rollout)
    hidden = oracle.hidden_states(params, rows, config)
    hidden = hidden[np.arange(len(rows))[:, None], places + 1]
    return (hidden @ params['score']).reshape(rollout.tokens.shape)


def last_of(scores, mask):
    return np.array(
        [[s[np.flatnonzero(m)[-1]] for s, m in zip(*group, strict=True)] for group in
         zip(scores, mask, strict=True)]
    )  # fmt: skip


@functools.cache
def scorers(model):
    return {
        kind: tiny.jit(functools.partial(function, model))
        for kind, function in (('outcome', outcome_scores), ('process', token_scores))
    }


def test_scores_equal_a_plain_forward(decoder):
    model, params = decoder
    naive = naive_scores(params, ROLLOUT, model.config)
    assert np.abs(naive).max() > 1
    outcome, process = (scorers(model)[kind](params, ROLLOUT) for kind in ('outcome', 'process'))
    assert outcome.dtype == process.dtype == jnp.float32
    np.testing.assert_allclose(outcome, last_of(naive, ROLLOUT.mask), atol=1e-5)
    np.testing.assert_allclose(process, np.where(ROLLOUT.mask, naive, 0), atol=1e-5)


def test_padding_and_other_rows_leave_no_trace(decoder):
    model, params = decoder
    prompts = ROLLOUT.prompts
    behind = np.arange(prompts.tokens.shape[1]) >= prompts.length[:, None]
    other = ROLLOUT._replace(
        prompts=prompts._replace(tokens=np.where(behind, 3, prompts.tokens)),
        tokens=np.where(ROLLOUT.mask, ROLLOUT.tokens, 9),
    )
    order = np.array([2, 0, 1])  # of the completions of each group, the first of which changes
    mixed = jax.tree.map(lambda x: x[:, order] if x.ndim > 1 else x, ROLLOUT)
    mixed = mixed._replace(prompts=prompts)
    mixed.tokens[:, 0] = 11
    for kind, scorer in scorers(model).items():
        as_is = np.asarray(scorer(params, ROLLOUT))
        np.testing.assert_array_equal(scorer(params, other), as_is, err_msg=kind)
        np.testing.assert_allclose(
            scorer(params, mixed)[:, 1:], as_is[:, order[1:]], atol=1e-6, err_msg=kind
        )


# Losses


def cross_entropy(score, label):
    right = 1 / (1 + math.exp(-score))
    return -label * math.log(right) - (1 - label) * math.log(1 - right)


def naive_loss(loss, scores, labels, mask=None, ends=None):
    """Sum, number and how many are right: over pairs, completions or steps of the whole batch."""
    values, right, labels = [], 0, np.asarray(labels, np.float64)
    if loss == 'bradley_terry':
        for s, y in zip(scores, labels, strict=True):
            for i in range(len(s)):
                for j in range(len(s)):
                    if y[i] > y[j]:
                        values.append(math.log(1 + math.exp(s[j] - s[i])))
                        right += s[i] > s[j]
    else:
        chosen = np.ones(labels.shape, bool) if loss == 'label' else mask & ends
        for i in map(tuple, np.argwhere(chosen)):
            values.append(cross_entropy(scores[i], labels[i]))
            right += (scores[i] > 0) if labels[i] > 0.5 else (scores[i] < 0)
    return sum(values), len(values), right


def test_bradley_terry_by_hand():
    """Two pairs: the best is 1 and 3 above the others, which are equal."""
    loss, pairs = bradley_terry(jnp.array([2.0, 1.0, -1.0]), jnp.array([1.0, 0.0, 0.0]))
    assert pairs == 2
    assert loss == pytest.approx((math.log1p(math.exp(-1)) + math.log1p(math.exp(-3))) / 2)
    loss, pairs = bradley_terry(jnp.array([-50.0, 50.0]), jnp.array([1.0, 0.0]))
    assert (float(loss), int(pairs)) == (100.0, 1)


def test_label_loss_by_hand():
    loss, count = label_loss(jnp.array([0.0, 100.0, -100.0, 3.0]), jnp.array([0.3, 1.0, 1.0, 0.0]))
    expected = (math.log(2) + 0 + 100 + math.log1p(math.exp(3))) / 4
    assert (float(loss), int(count)) == (pytest.approx(expected), 4)
    where = jnp.array([[True, False], [True, False]])
    scores = jnp.array([[1.0, 7.0], [-2.0, jnp.inf]])
    loss, count = label_loss(scores, jnp.ones((2, 2)), where)
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(2))) / 2
    assert (float(loss), int(count)) == (pytest.approx(expected), 2)


@pytest.mark.parametrize('seed', range(3))
def test_losses_equal_the_oracle(seed):
    rng = np.random.default_rng(seed)
    scores = 3 * rng.standard_normal(7)
    grades = rng.integers(0, 3, 7).astype(float)
    total, pairs, _ = naive_loss('bradley_terry', scores[None], grades[None])
    ours = bradley_terry(*(jnp.asarray(x, jnp.float32) for x in (scores, grades)))
    assert (float(ours[0]), int(ours[1])) == (pytest.approx(total / pairs, rel=1e-5), pairs)
    total, count, _ = naive_loss('label', scores[None], grades[None] / 2)
    ours = label_loss(*(jnp.asarray(x, jnp.float32) for x in (scores, grades / 2)))
    assert (float(ours[0]), int(ours[1])) == (pytest.approx(total / count, rel=1e-5), count)


def test_nothing_to_compare_is_a_loss_of_zero():
    for function, arguments in (
        (bradley_terry, (jnp.ones(3),)),
        (label_loss, (jnp.ones(3), jnp.zeros(3, bool))),
    ):
        (loss, count), gradient = jax.value_and_grad(function, has_aux=True)(
            jnp.array([1.0, -2.0, 5.0]), *arguments
        )
        assert (float(loss), int(count)) == (0, 0)
        assert (gradient == 0).all()


# The program


def fresh(params, optimizer=RECORDER):
    params = jax.tree.map(jnp.asarray, params)
    return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))


@functools.cache
def outcome(loss, microbatch=1):
    """Gradient and metrics of one step of the unigram model."""
    step = tiny.jit(make_step(UNIGRAM, RECORDER, loss, microbatch=microbatch))
    state, metrics = step(fresh(PARAMS), ROLLOUT, *DATA[loss])
    assert tiny.gap(state.params, jax.tree.map(jnp.subtract, PARAMS, gradient_of(state))) < 1e-6
    return gradient_of(state), {name: float(value) for name, value in metrics.items()}


def gradient_of(state):
    return jax.device_get(state.opt_state[0].trace)


def expected_outcome(loss):
    """The same by loops: slopes of the loss by the scores, pulled back token by token."""
    params, (labels, ends) = oracle.float64(PARAMS), DATA[loss]
    tokens = ROLLOUT.tokens
    if loss != 'step':
        tokens = last_of(tokens, ROLLOUT.mask)
    scores = params['embedding'][tokens] @ params['score'][:, 0]
    total, count, right = naive_loss(loss, scores, labels, ROLLOUT.mask, ends)

    def mean(scores):
        return naive_loss(loss, scores, labels, ROLLOUT.mask, ends)[0] / count

    gradient = {name: np.zeros_like(value) for name, value in params.items()}
    for i, slope in np.ndenumerate(oracle.slope(mean, scores)):
        gradient['embedding'][tokens[i]] += slope * params['score'][:, 0]
        gradient['score'][:, 0] += slope * params['embedding'][tokens[i]]
    return gradient, {'loss': total / count, 'accuracy': right / count}


@pytest.mark.parametrize('loss', LOSSES)
def test_gradient_and_metrics_equal_the_oracle(loss):
    gradient, metrics = outcome(loss)
    expected, expected_metrics = expected_outcome(loss)
    norm = math.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(expected)))
    assert tiny.largest(expected) > 0.05
    assert tiny.gap(gradient, expected) < 1e-5
    assert 0 < metrics['accuracy'] < 1
    assert metrics == pytest.approx(
        expected_metrics | {'grad_norm': norm, 'skipped_updates': 0}, abs=1e-5
    )


@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('microbatch', [2, 4])
def test_microbatches_change_nothing(loss, microbatch):
    """Although the groups hold 3, 0, 2 and 2 pairs, and as different numbers of steps."""
    gradient, metrics = outcome(loss)
    ours, ours_metrics = outcome(loss, microbatch)
    assert tiny.gap(ours, gradient) <= 1e-6
    assert ours_metrics == pytest.approx(metrics, abs=1e-6)


@pytest.mark.parametrize(('microbatch', 'pieces'), [(1, 4), (2, 2)])
def test_microbatches_are_computed_one_after_the_other(microbatch, pieces):
    step = make_step(UNIGRAM, RECORDER, 'label', microbatch=microbatch)
    program = str(jax.make_jaxpr(step)(fresh(PARAMS), ROLLOUT, PROBABILITIES))
    assert re.findall(r'length=(\d+)', program) == [str(pieces)]


def test_scores_of_zero_are_right_about_nothing():
    params = PARAMS | {'score': np.zeros((6, 1), np.float32)}
    for loss, data in DATA.items():
        step = tiny.jit(make_step(UNIGRAM, RECORDER, loss))
        metrics = step(fresh(params), ROLLOUT, *data)[1]
        assert metrics['loss'] == pytest.approx(math.log(2))
        assert metrics['accuracy'] == 0


def test_a_gradient_that_is_not_finite_is_left_out():
    optimizer = optax.adam(0.1)
    step = make_step(UNIGRAM, optimizer, 'label')
    first = fresh(PARAMS, optimizer)
    state, _ = step(first, ROLLOUT, PROBABILITIES)
    assert first.params['score'].is_deleted()  # its memory is the new state's
    before = jax.device_get(state)
    broken = np.where(np.eye(*SHAPE[:2]) > 0, np.nan, PROBABILITIES).astype(np.float32)
    after, metrics = step(state, ROLLOUT, broken)
    assert tiny.same(after.params, before.params)
    assert tiny.same(after.opt_state, before.opt_state)
    assert (int(after.step), int(after.skipped), int(metrics['skipped_updates'])) == (2, 1, 1)
    after, metrics = step(after, ROLLOUT, PROBABILITIES)
    assert tiny.gap(after.params, before.params) > 0.01
    assert (int(after.step), int(metrics['skipped_updates'])) == (3, 1)


def separable(seed, vocab=12):
    """Completions of which those with one of three tokens are the better ones."""
    rollout = tiny.make_rollout(seed=seed, vocab=vocab, groups=4, group_size=4)
    return rollout, ((rollout.tokens < 3) & rollout.mask).any(-1).astype(np.float32)


def test_learning_to_order_separable_pairs():
    """From a language model whose score is 0, to pairs that it has not seen."""
    model = tiny.make_model(vocab_size=12, layers=1, remat=False)
    config = models.with_scalar_head(model.config)
    params = models.scalar_params(tiny.make_params(model, spread=0.3), config)
    scorer = models.Transformer(config)
    optimizer, _ = adamw(learning_rate=2e-2, steps=60)
    state = init_state(scorer, optimizer, params)
    step = make_step(scorer, optimizer, 'bradley_terry', microbatch=4)
    history = []
    for k in range(60):
        state, metrics = step(state, *separable(k % 4))
        history.append({name: float(value) for name, value in metrics.items()})
    assert history[0]['loss'] == pytest.approx(math.log(2))
    assert history[0]['accuracy'] == 0
    assert [metrics['accuracy'] for metrics in history[-4:]] == [1] * 4
    rollout, labels = separable(100)
    scores = np.asarray(make_scorer(scorer)(state.params, rollout))
    _, pairs, right = naive_loss('bradley_terry', scores, labels)
    assert right / pairs > 0.8


# Meshes


MESHED = tiny.make_model(vocab_size=72, scalar_head=True)
BIG = tiny.make_rollout(vocab=72, groups=8)
BIG_LABELS = tiny.make_rewards(groups=8)


@pytest.mark.skipif(jax.device_count() < 8, reason='needs eight devices')
@pytest.mark.parametrize('shape', [pytest.param((8, 1), marks=pytest.mark.slow), (4, 2)], ids=str)
def test_on_a_mesh(shape):
    """The same scores and gradient as on one device; scores lie with their groups."""
    mesh = sharding.make_mesh(fsdp=shape[0], tensor=shape[1])
    params = tiny.make_params(MESHED)
    expected_scores, expected, expected_metrics = alone()
    state = init_state(MESHED, RECORDER, params, mesh)
    layout = jax.tree.map(lambda x: x.sharding, state)
    assert state.params['score'].sharding.spec == jax.sharding.PartitionSpec(sharding.DATA, None)
    rollout, labels = sharding.put_groups((BIG, BIG_LABELS), mesh)
    scores = make_scorer(MESHED, mesh)(state.params, rollout)
    assert {s.data.shape for s in scores.addressable_shards} == {(8 // shape[0], 3)}
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    step = make_step(MESHED, RECORDER, 'bradley_terry', mesh, microbatch=8)
    state, metrics = step(state, rollout, labels)
    assert jax.tree.map(lambda x: x.sharding, state) == layout
    assert tiny.largest(expected) > 0.05
    assert tiny.gap(gradient_of(state), expected) <= 1e-5
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {name: float(value) for name, value in expected_metrics.items()}, abs=1e-5
    )


@pytest.mark.skipif(jax.device_count() < 8, reason='needs eight devices')
def test_groups_stay_on_their_devices():
    """Activations [B, G, T, D] and microbatches [1, B, G, T] are held where their groups lie."""
    mesh = sharding.make_mesh(fsdp=8)
    state = init_state(MESHED, RECORDER, tiny.make_params(MESHED), mesh)
    scorer = make_scorer(MESHED, mesh).lower(state.params, BIG)
    step = make_step(MESHED, RECORDER, 'bradley_terry', mesh, microbatch=8)
    step = step.lower(state, BIG, BIG_LABELS)
    for program, shape in ((scorer, '8x3x5x16xf32'), (step, '8x3x5x16xf32'), (step, '1x8x3x5xi32')):
        held = re.findall(r'sharding_constraint .* : tensor<(.*)>', program.as_text())
        assert shape in held


@functools.cache
def alone():
    """Scores, gradient and metrics on one device."""
    params = tiny.make_params(MESHED)
    step = tiny.jit(make_step(MESHED, RECORDER, 'bradley_terry'))
    state, metrics = step(fresh(params), BIG, BIG_LABELS)
    return scorers(MESHED)['outcome'](params, BIG), gradient_of(state), metrics


# Refusals


def test_unknown_names():
    with pytest.raises(ValueError, match=r"kind='steps' is unknown: use one of outcome, process"):
        make_scorer(UNIGRAM, kind='steps')
    with pytest.raises(ValueError, match=r"loss='mse' is unknown: use one of bradley_terry, label"):
        make_step(UNIGRAM, RECORDER, 'mse')


@pytest.mark.parametrize(
    ('loss', 'labels', 'ends', 'message'),
    [
        ('label', LABELS[:2], None, r"labels have shape \(2, 3\): the loss 'label' needs \[B, G\]"),
        ('step', LABELS, ENDS, r"shape \(4, 3\): the loss 'step' needs \[B, G, T\] = \(4, 3, 5\)"),
        ('step', STEP_LABELS, None, r"ends are None: the loss 'step' needs bool\[B, G, T\] = \(4,"),
        ('step', STEP_LABELS, ENDS[:2], r'ends are of shape \(2, 3, 5\): .* needs bool\[B, G, T\]'),
        ('label', LABELS, ENDS, r"ends are of shape \(4, 3, 5\): the loss 'label' needs None"),
    ],
)
def test_bad_labels(loss, labels, ends, message):
    with pytest.raises(ValueError, match=message):
        make_step(UNIGRAM, RECORDER, loss)(fresh(PARAMS), ROLLOUT, labels, ends)


@pytest.mark.skipif(jax.device_count() < 8, reason='needs eight devices')
def test_a_batch_that_does_not_divide():
    with pytest.raises(ValueError, match=r'microbatch=3 does not cut a batch of 4 prompts'):
        make_step(UNIGRAM, RECORDER, 'label', microbatch=3)(fresh(PARAMS), ROLLOUT, LABELS)
    mesh = sharding.make_mesh(fsdp=8)
    with pytest.raises(ValueError, match=r'batch of 4 prompts does not divide over mesh fsdp=8'):
        make_scorer(MESHED, mesh)(tiny.make_params(MESHED), ROLLOUT)
    state = init_state(MESHED, RECORDER, tiny.make_params(MESHED), mesh)
    step = make_step(MESHED, RECORDER, 'label', mesh)
    with pytest.raises(ValueError, match=r'batch of 4 prompts does not divide over mesh fsdp=8'):
        step(state, ROLLOUT, LABELS)


def test_a_language_model_is_no_reward_model(model, params):
    with pytest.raises(ValueError, match=r'scalar_head=False has no scores'):
        make_scorer(model)(params, ROLLOUT)
