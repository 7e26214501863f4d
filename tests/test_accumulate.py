"""Accumulation: no cut of a batch changes a number, and no cut processes empty columns."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from grpo_jax import sharding
from grpo_jax.engine import bundles
from grpo_jax.engine.accumulate import Decoder, Microbatches, tree_add
from grpo_jax.engine.bundles import check_rows, widths_of
from grpo_jax.models import apply, completion_hidden
from grpo_jax.types import Batch

MODEL = tiny.make_model()
PARAMS = tiny.make_params(MODEL)
COLUMNS = 11


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Compiles the widths 2, 3, 6 and 11."""
    monkeypatch.setattr(bundles, 'NARROWEST', 2)


def make_batch(seed=0, groups=4):
    """Weights are random, also outside the mask, where nothing may depend on them."""
    rollout = tiny.make_rollout(seed, groups=groups, group_size=4, max_tokens=COLUMNS)
    rollout = rollout._replace(logprobs=None)
    weights = np.random.default_rng(seed).standard_normal(rollout.mask.shape, np.float32)
    return Batch(rollout, advantages=None, weights=weights)


def loss(params, hidden, part):
    """A loss of every token's logits, and outputs that show which columns were computed."""
    logits = jax.nn.log_softmax(apply(MODEL, params, hidden, method='logits'))
    chosen = jnp.take_along_axis(logits, part.rollout.tokens[..., None], -1)[..., 0]
    chosen = jnp.where(part.rollout.mask, chosen, 0.0)
    width = jnp.full(chosen.shape, chosen.shape[-1])
    return (part.weights * chosen).sum(), {'logprobs': chosen, 'width': width}


def learner(params, hidden, part, total):
    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    (by_params, by_states), outputs = gradient(params, hidden, part)
    return tree_add(total, by_params), by_states, outputs


def scorer(*args):
    return loss(*args)[1]


DECODER = Decoder(MODEL, lambda params: params)


@functools.cache
def programs(cut):
    """Gradient with outputs, and outputs alone."""
    return (
        tiny.jit(functools.partial(cut.gradient, DECODER, learner)),
        tiny.jit(functools.partial(cut.outputs, DECODER, scorer)),
    )


@tiny.jit
def whole(params, batch):
    """Gradient and outputs of the whole batch at once, by the plain forward pass."""

    def whole_loss(params):
        rollout = batch.rollout
        hidden = completion_hidden(
            MODEL, params, rollout.prompts.tokens, rollout.prompts.length, rollout.tokens
        )
        return loss(params, hidden, batch)

    return jax.grad(whole_loss, has_aux=True)(params)


CUTS = {
    'trimmed': Microbatches(2, widths=2),
    'rows': Microbatches(4, rows=2, widths=4),
    'packed': Microbatches(4, rows=2, packed=True),
    'packed, of several microbatches': Microbatches(2, rows=4, packed=True),
}


@pytest.mark.parametrize(
    'name', tiny.some_slow(CUTS, 'trimmed', 'packed', 'packed, of several microbatches')
)
def test_a_cut_changes_no_number(name):
    for seed in range(3):
        batch = make_batch(seed)
        expected, plain = whole(PARAMS, batch)
        gradient, outputs = programs(CUTS[name])[0](PARAMS, batch)
        assert tiny.largest(expected) > 1
        assert tiny.gap(gradient, expected) < 1e-5 * tiny.largest(expected)
        np.testing.assert_allclose(outputs['logprobs'], plain['logprobs'], atol=1e-5)
        alone = programs(CUTS[name])[1](PARAMS, batch)
        np.testing.assert_allclose(alone['logprobs'], plain['logprobs'], atol=1e-5)


def test_sums_are_float32():
    """Also for parameters in bfloat16, whose gradient is rounded once."""
    narrow = jax.tree.map(lambda x: jnp.bfloat16(x), PARAMS)
    seen = set()

    def recording_learner(params, hidden, part, total):
        seen.update(x.dtype.name for x in jax.tree.leaves(total))
        return learner(params, hidden, part, total)

    cut = Microbatches(2, widths=2)
    gradient, _ = jax.eval_shape(
        functools.partial(cut.gradient, DECODER, recording_learner), narrow, make_batch()
    )
    assert seen == {'float32'}
    assert {x.dtype.name for x in jax.tree.leaves(gradient)} == {'bfloat16'}


def test_rows_are_processed_in_as_few_columns_as_their_bundle_needs():
    """Bundles hold the microbatch's rows by length; outputs are 0 after the processed columns."""
    batch = make_batch()
    lengths = batch.rollout.mask.sum(-1)
    width = np.asarray(programs(CUTS['rows'])[1](PARAMS, batch)['width'])
    order = np.argsort(-lengths.reshape(-1), kind='stable')
    for pair in order.reshape(-1, 2):
        longest = lengths.reshape(-1)[pair[0]]
        expected = next(n for n in (2, 3, 6, 11) if n >= longest)
        for row in pair:
            actual = width.reshape(-1, COLUMNS)[row]
            np.testing.assert_array_equal(actual, np.where(np.arange(11) < expected, expected, 0))
    assert len(np.unique(width)) > 3


def test_widths():
    assert widths_of(11, 4) == (2, 3, 6, 11)
    assert widths_of(11, 2) == (6, 11)
    assert widths_of(11, 1) == (11,)
    assert widths_of(2, 4) == (2,)


@hypothesis.given(data=st.data(), shards=st.sampled_from([1, 2, 4]))
@hypothesis.settings(max_examples=50)
def test_outputs_return_to_the_places_of_their_rows(data, shards):
    """Each shard keeps its own rows, the longest first."""
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    mask = np.arange(5) < rng.integers(0, 6, (4, 3, 1))
    rows = shards * data.draw(st.sampled_from([n for n in (1, 3, 12) if 12 // shards % n == 0]))
    order = bundles.by_length(jnp.asarray(mask), shards, rows)
    values = jnp.asarray(rng.standard_normal(mask.shape))
    taken = [bundles.take(values.reshape(12, 5), index)[:, None] for index in order]
    assert taken[0].shape == (rows, 1, 5)
    back = bundles.put_back(jnp.stack(taken), order, mask.shape)
    np.testing.assert_array_equal(back, values)
    lengths = mask.sum(-1).reshape(shards, -1)
    for shard in range(shards):
        ordered = lengths[shard][np.asarray(order)[:, shard].reshape(-1)]
        assert (np.diff(ordered) <= 0).all()


@pytest.mark.parametrize(
    ('shape', 'options'),
    [pytest.param((2, 2), {}, marks=pytest.mark.slow), ((4, 1), {'packed': True})],
    ids=str,
)
def test_rows_on_a_mesh(shape, options):
    mesh = sharding.make_mesh(fsdp=shape[0], tensor=shape[1])
    batch = make_batch(groups=8)
    expected, plain = whole(PARAMS, batch)
    cut = Microbatches(8, mesh, rows=8, **options)

    @tiny.jit
    def run(params, batch):
        with sharding.use(mesh):
            return cut.gradient(DECODER, learner, params, batch)

    params = jax.device_put(PARAMS, sharding.shardings(PARAMS, mesh))
    gradient, outputs = run(params, sharding.put_groups(batch, mesh))
    assert tiny.gap(gradient, expected) < 1e-5 * tiny.largest(expected)
    np.testing.assert_allclose(outputs['logprobs'], plain['logprobs'], atol=1e-5)


def test_rows_that_do_not_divide():
    check_rows(0, 12)
    check_rows(6, 12)
    with pytest.raises(ValueError, match=r'rows=5 .* 12 completions .* one of 1, 2, 3, 4, 6, 12'):
        check_rows(5, 12)
    with pytest.raises(ValueError, match=r'rows=3 .* fsdp=2 .* one of 2, 4, 6, 12'):
        check_rows(3, 12, sharding.make_mesh(fsdp=2))
