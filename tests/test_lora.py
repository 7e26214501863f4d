"""Adapters: their function, their gradient, what is trained, and that the base exists once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tiny
from test_transformer import group_logits

from grpo_jax import models, sharding
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.optimizer import adamw
from grpo_jax.algorithm.program import init_state, make_train_step
from grpo_jax.algorithm.sample import sample
from grpo_jax.algorithm.update import train_step
from grpo_jax.engine.compute import Compute
from grpo_jax.models import Lora
from grpo_jax.types import Sampling

LORA = Lora(rank=3, alpha=5.0)
MODEL = tiny.make_model(tied_head=False, remat=False, lora=LORA)
BASE_MODEL = MODEL.clone(config=MODEL.config.base)
PARAMS = tiny.make_params(MODEL)  # no adapter is zero
BASE, ADAPTERS = models.split_adapters(PARAMS)
SAMPLING = Sampling(temperature=0.9)
OPTIMIZER, _ = adamw(learning_rate=1e-2, steps=10)

logits_of = tiny.jit(functools.partial(group_logits, MODEL))
base_logits_of = tiny.jit(functools.partial(group_logits, BASE_MODEL))
merge = tiny.jit(functools.partial(models.merge_adapters, MODEL.config))


def logprobs_of(logits, rollout):
    """[B, G, T] in float64."""
    return oracle.logprobs(np.asarray(logits, np.float64), rollout.tokens, SAMPLING.temperature)


def names(tree):
    return {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def plain(tree):
    """Without B: what adapters start with."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros_like(x) if path[-1].key.endswith('_lora_b') else x, tree
    )


def folded(base, adapters):
    """W + alpha / r A B, one projection and layer at a time."""
    block = dict(base['blocks'])
    for name in block:
        if f'{name}_lora_a' in adapters['blocks']:
            layers = []
            for w, a, b in zip(
                block[name],
                adapters['blocks'][f'{name}_lora_a'],
                adapters['blocks'][f'{name}_lora_b'],
                strict=True,
            ):
                layers.append(w + 5.0 / 3 * jnp.tensordot(a, b, 1))
            block[name] = jnp.stack(layers)
    return base | {'blocks': block}


# Trees


def test_split_and_join():
    assert names(ADAPTERS) == {
        f'{name}_lora_{part}'
        for name in ('query', 'key', 'value', 'out', 'gate', 'up', 'down')
        for part in 'ab'
    }
    assert jax.tree.structure(BASE) == jax.tree.structure(tiny.shapes(BASE_MODEL))
    joined = models.join_adapters(BASE, ADAPTERS)
    assert jax.tree.structure(joined) == jax.tree.structure(PARAMS)
    assert all(
        a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(PARAMS), strict=True)
    )
    assert models.split_adapters(BASE) == (BASE, {})


@pytest.mark.parametrize(
    ('targets', 'found'),
    [
        (('q_proj', 'v_proj'), {'query', 'value'}),
        (('[qkvo]_proj',), {'query', 'key', 'value', 'out'}),
        (('*_proj',), {'query', 'key', 'value', 'out', 'gate', 'up', 'down'}),
        (('up_proj', 'd*'), {'up', 'down'}),
    ],
)
def test_targets(targets, found):
    shapes = tiny.shapes(tiny.make_model(lora=Lora(rank=2, targets=targets)))
    _, adapters = models.split_adapters(shapes)
    assert {name.split('_lora_')[0] for name in names(adapters)} == found


def test_shapes():
    """Rank last in A and first in B; in float32 whatever the base is stored in."""
    model = tiny.make_model(lora=LORA, param_dtype='bfloat16')
    base, adapters = models.split_adapters(tiny.shapes(model))
    block = adapters['blocks']
    assert block['query_lora_a'].shape == (2, 16, 3)
    assert block['query_lora_b'].shape == (2, 3, 4, 6)
    assert block['out_lora_a'].shape == (2, 4, 6, 3)
    assert block['out_lora_b'].shape == (2, 3, 16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(adapters)} == {'float32'}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(base)} == {'bfloat16'}


def test_experts_keep_theirs_out():
    experts = {'experts': 4, 'experts_per_token': 2}
    with pytest.raises(ValueError, match=r'experts have no adapters; use targets='):
        tiny.make_model(lora=LORA, **experts)
    model = tiny.make_model(lora=Lora(rank=2, targets=('q_proj', 'o_proj')), **experts)
    assert names(models.split_adapters(tiny.shapes(model))[1]) == {
        f'{name}_lora_{part}' for name in ('query', 'out') for part in 'ab'
    }


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'alpha': 32.0}, r'lora alpha=32.0 with rank=0, .*: set a rank, or alpha=16.0'),
        ({'targets': ('q_proj',)}, r"lora targets=\('q_proj',\) with rank=0"),
        ({'rank': -1}, r'lora rank=-1: make it 0 \(no adapters\) or more'),
        (
            {'rank': 2, 'targets': ('q_proj', 'lm_head')},
            r"target 'lm_head' matches none of q_proj,",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Lora(**options)


# The function and its gradient


def test_it_starts_as_the_base(rollout):
    """Exactly: what a fresh model adds is 0."""
    fresh = tiny.jit(functools.partial(models.init_params, MODEL))(jax.random.key(0))
    _, adapters = models.split_adapters(fresh)
    assert all((adapters['blocks'][name] == 0).all() for name in names(adapters) if name[-1] == 'b')
    assert all(np.std(adapters['blocks'][name]) > 0 for name in names(adapters) if name[-1] == 'a')
    np.testing.assert_array_equal(
        logits_of(models.join_adapters(BASE, adapters), rollout), base_logits_of(BASE, rollout)
    )


def test_adapters_add_their_product_to_the_weights(rollout):
    weights = folded(oracle.float64(BASE), oracle.float64(ADAPTERS))
    expected = oracle.completion_logits(oracle.float64(weights), rollout, MODEL.config)
    assert np.abs(expected - np.asarray(base_logits_of(BASE, rollout))).max() > 0.5
    np.testing.assert_allclose(logits_of(PARAMS, rollout), expected, atol=3e-5)


def test_merged_parameters_compute_the_same(rollout):
    merged = merge(BASE, ADAPTERS)
    wanted = folded(BASE, ADAPTERS)
    assert jax.tree.structure(merged) == jax.tree.structure(BASE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, wanted)
    np.testing.assert_allclose(
        base_logits_of(merged, rollout), logits_of(PARAMS, rollout), atol=3e-5
    )


def test_merging_rounds_once():
    """The sum of a narrow weight and its adapters is rounded, not the adapters' product."""
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), BASE)
    merged = merge(narrow, ADAPTERS)
    wanted = folded(jax.tree.map(lambda x: x.astype(jnp.float32), narrow), ADAPTERS)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(merged)} == {'bfloat16'}
    differing = [
        np.mean(np.asarray(a) != np.asarray(b.astype(jnp.bfloat16)))
        for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(wanted), strict=True)
    ]
    assert max(differing) < 0.01  # of float32 sums in another order, next to a boundary


def test_gradient_is_that_through_merged_weights(rollout):
    seeds = np.random.default_rng(0).standard_normal((*rollout.tokens.shape, tiny.VOCAB))

    def ours(adapters):
        return (seeds * group_logits(MODEL, models.join_adapters(BASE, adapters), rollout)).sum()

    def through_weights(adapters):
        weights = folded(BASE, adapters)
        return (seeds * oracle.completion_logits(weights, rollout, MODEL.config, jnp)).sum()

    gradient, expected = (tiny.jit(jax.grad(f))(ADAPTERS) for f in (ours, through_weights))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()),
        gradient,
        expected,
    )


def test_sampling_agrees_with_scoring(rollout):
    @tiny.jit
    def draw(params, prompts):
        return sample(
            MODEL, params, prompts, seed=0, step=0, sampling=SAMPLING,
            eos_ids=np.array([3, 11, 40]), group_size=3, max_tokens=5,
        )  # fmt: skip

    sampled = draw(PARAMS, rollout.prompts)
    scored = logprobs_of(logits_of(PARAMS, sampled), sampled)
    base = logprobs_of(base_logits_of(BASE, sampled), sampled)
    mask = np.asarray(sampled.mask)
    np.testing.assert_allclose(sampled.logprobs[mask], scored[mask], atol=2e-5)
    assert np.abs(scored - base)[mask].max() > 0.1


# Training


ALGORITHM = Algorithm(clip_low=0.2, clip_high=0.2, beta=0.1)


def program_of(state, base, rollout, rewards, mesh=None):
    """The update, compiled for its arguments in half the time (without the donation)."""
    step = functools.partial(
        train_step, model=MODEL, optimizer=OPTIMIZER, compute=Compute(microbatch=4), mesh=mesh
    )
    lowered = jax.jit(step).lower(state, base, rollout, rewards, SAMPLING, ALGORITHM)
    return lowered.compile({'xla_backend_optimization_level': 0})


@pytest.fixture(scope='module')
def program(rollout, rewards):
    return program_of(init_state(MODEL, OPTIMIZER, plain(ADAPTERS)), BASE, rollout, rewards)


@pytest.fixture(scope='module')
def trained(program, rollout, rewards):
    """States and metrics of two steps from adapters as they start."""
    states, metrics = [init_state(MODEL, OPTIMIZER, plain(ADAPTERS))], []
    for _ in range(2):
        state, scalars = program(states[-1], BASE, rollout, rewards, SAMPLING, ALGORITHM)
        states.append(state)
        metrics.append(jax.device_get(scalars))
    return states, metrics


def test_the_reference_is_the_base(trained, rollout):
    """KL is 0 where the adapters start, and then that from the base to the trained policy."""
    states, (first, second) = trained
    assert first['kl'] == 0
    assert second['kl'] > 1e-5
    policy = logprobs_of(logits_of(models.join_adapters(BASE, states[1].params), rollout), rollout)
    reference = logprobs_of(base_logits_of(BASE, rollout), rollout)
    gap = (reference - policy)[rollout.mask]
    assert second['kl'] == pytest.approx(np.mean(np.exp(gap) - gap - 1), rel=1e-3)


def test_only_adapters_are_trained(trained):
    start, _, end = trained[0]
    assert names(end.params) == names(ADAPTERS)
    moments = [leaf for leaf in jax.tree.leaves(end.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(x.size for x in jax.tree.leaves(ADAPTERS))
    for name in names(ADAPTERS):
        moved = np.abs(end.params['blocks'][name] - start.params['blocks'][name])
        assert moved.max() > 1e-3, name


def size_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_a_fresh_state_holds_adapters_only():
    state = jax.eval_shape(lambda key: init_state(MODEL, OPTIMIZER, key), jax.random.key(0))
    assert jax.tree.map(jnp.shape, state.params) == jax.tree.map(jnp.shape, ADAPTERS)


def test_the_program_takes_the_base_once(program, rollout, rewards):
    """Its arguments are base, adapters, their two moments and the batch; its results no base."""
    memory = program.memory_analysis()
    base, adapters, batch = size_of(BASE), size_of(ADAPTERS), size_of((rollout, rewards))
    scalars = 4 * 32  # counters, sampling, coefficients
    assert base > batch + adapters  # a second copy of anything but scalars could not hide
    assert 0 <= memory.argument_size_in_bytes - (base + 3 * adapters + batch) <= scalars
    assert 0 <= memory.output_size_in_bytes - 3 * adapters < 1024 < adapters  # metrics, counters


def test_the_base_is_needed(rollout, rewards):
    state = jax.eval_shape(functools.partial(init_state, MODEL, OPTIMIZER), ADAPTERS)
    step = make_train_step(MODEL, OPTIMIZER, ALGORITHM)
    with pytest.raises(ValueError, match='ref_params=None with adapters'):
        step.lower(state, None, rollout, rewards, SAMPLING, ALGORITHM)


@pytest.fixture
def mesh():
    if jax.device_count() < 8:
        pytest.skip('needs eight devices')
    return sharding.make_mesh(fsdp=4, tensor=2)


def test_adapters_lie_like_their_projections(mesh):
    """A is split along the weight's inputs and B along its outputs."""
    specs = jax.tree.map(lambda s: s.spec, sharding.shardings(tiny.shapes(MODEL), mesh))['blocks']
    for name, inputs in (('query', 1), ('up', 1), ('out', 2), ('down', 1)):
        weight, a, b = (specs[f'{name}{part}'] for part in ('', '_lora_a', '_lora_b'))
        assert weight[1 : 1 + inputs] == a[1 : 1 + inputs], name
        assert weight[1 + inputs :] == b[2:], name
        assert (a[-1], b[1]) == (None, None), name  # the rank is whole
        assert any(a), name
        assert any(b), name


@pytest.mark.slow
def test_training_on_a_mesh(mesh, trained, rollout, rewards):
    """Adapters and base split over it, the same step from adapters that are not at their start."""
    start = trained[0][1]
    args = jax.device_put((start, BASE), sharding.shardings((start, BASE), mesh))
    args += sharding.put_groups((rollout, rewards), mesh)
    state, metrics = program_of(*args, mesh=mesh)(*args, SAMPLING, ALGORITHM)
    expected = trained[0][2]
    assert tiny.gap(state.params, expected.params) < 1e-3 * tiny.largest(expected.params)
    for name in ('loss', 'kl', 'grad_norm'):
        assert float(metrics[name]) == pytest.approx(trained[1][1][name], rel=1e-3, abs=1e-6)
