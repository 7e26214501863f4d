"""No token and no update depends on the mesh: groups x completions x tensor on eight devices.

By default a model with experts and adapters runs on two shapes; the longer proofs run all kinds of
models on all shapes.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from grpo_jax import sharding
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.presets import preset
from grpo_jax.algorithm.reward_model import make_scorer
from grpo_jax.algorithm.sample import sample
from grpo_jax.algorithm.update import train_step
from grpo_jax.engine.compute import Compute
from grpo_jax.models import Lora, Transformer, split_adapters, with_scalar_head
from grpo_jax.run.defaults import defaults
from grpo_jax.run.mesh import check_model, make_mesh
from grpo_jax.run.stages import check_batch_size
from grpo_jax.types import Sampling, TrainState

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason='needs eight devices')

SHAPES = [
    (8, 1, 1), (4, 2, 1), (2, 4, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2), (1, 2, 4),
]  # fmt: skip
BY_DEFAULT = [(2, 2, 2), (1, 8, 1)]
EXPERTS, ADAPTERS = {'experts': 4, 'experts_per_token': 2}, {'lora': Lora(rank=2)}
KINDS = {
    'dense': {},
    'experts': EXPERTS,
    'adapters': ADAPTERS,
    'experts and adapters': EXPERTS | {'lora': Lora(rank=2, targets=('q_proj', 'o_proj'))},
}
GROUP_SIZE, VOCAB = 8, 72
# How far apart updated parameters may be: 1e-5, except where rounding alone is more. Adapters in
# all layers make scores of attention large. One device's update is then 8.8e-5 from that in float64
# and moves by 9.3e-5 with another microbatch: two roundings. In float64, mesh and one device agree
# to 2e-13.
ROUNDING = {'adapters': 2e-4}
OPTIMIZER = optax.sgd(1.0)


def model_of(kind):
    return tiny.make_model(vocab_size=VOCAB, attention_bias=True, tied_head=False, **KINDS[kind])


def mesh_of(shape):
    groups, completions, tensor = shape
    return sharding.make_mesh(fsdp=groups * completions, completions=completions, tensor=tensor)


CASES = [
    *[
        pytest.param('experts and adapters', shape, id=str(shape))
        for shape in ((2, 2, 2), (1, 8, 1))
    ],
    *[
        pytest.param(kind, shape, id=f'{kind}-{shape}', marks=pytest.mark.slow)
        for kind in ('dense', 'experts', 'adapters')
        for shape in SHAPES
    ],
]


def prompts_for(shape):
    """As few as the mesh can hold: two where it has at most two along `groups`."""
    return 2 if shape[0] <= 2 else 8


def placed(tree, mesh):
    return tree if mesh is None else jax.device_put(tree, sharding.shardings(tree, mesh))


def rollout_of(groups):
    return tiny.make_rollout(vocab=VOCAB, groups=groups, group_size=GROUP_SIZE)


def draw(model, params, prompts, mesh=None, **options):
    options = {'max_tokens': 6, 'block': 6} | options
    return sample(
        model, params, prompts, seed=0, step=0, sampling=Sampling(), eos_ids=np.arange(6),
        group_size=GROUP_SIZE, mesh=mesh, **options,
    )  # fmt: skip


def update(model, trained, base, groups, mesh=None):
    """The trained parameters after one step, and its metrics."""
    compute = Compute(microbatch=groups, widths=1, logprob_chunk=8)
    return step_of(model, trained, base, (groups, GROUP_SIZE), Algorithm(), compute, mesh)


def step_of(model, trained, base, shape, algorithm, compute, mesh, **settings):
    groups, group_size = shape
    rollout = tiny.make_rollout(vocab=VOCAB, groups=groups, group_size=group_size)
    rewards = tiny.make_rewards(groups=groups, group_size=group_size)
    state = TrainState(jnp.int32(0), trained, OPTIMIZER.init(trained), jnp.int32(0))
    if mesh is not None:
        state, base = placed((state, base), mesh)
        rollout, rewards = sharding.put_rollout(rollout, rewards, mesh)
    step = functools.partial(
        train_step, model=model, optimizer=OPTIMIZER, compute=compute, mesh=mesh, **settings
    )
    state, metrics = tiny.jit(step)(state, base, rollout, rewards, Sampling(), algorithm)
    return jax.device_get((state.params, metrics))


def parameters(kind):
    """All parameters, the trained ones, and the base of adapters."""
    params = tiny.make_params(model_of(kind))
    base, adapters = split_adapters(params)
    return params, adapters or params, base if adapters else None


@functools.cache
def tokens_alone(kind):
    """Of eight prompts on one device; two prompts have the tokens of the first two."""
    return jax.device_get(draw(model_of(kind), parameters(kind)[0], rollout_of(8).prompts))


@functools.cache
def update_alone(kind, groups):
    _, trained, base = parameters(kind)
    return update(model_of(kind), trained, base, groups)


@pytest.mark.parametrize(('kind', 'shape'), CASES)
def test_tokens_are_those_of_one_device(kind, shape):
    mesh, groups = mesh_of(shape), prompts_for(shape)
    prompts = sharding.put_groups(rollout_of(groups).prompts, mesh)
    rollout = draw(model_of(kind), placed(parameters(kind)[0], mesh), prompts, mesh)
    expected = jax.tree.map(lambda x: x[:groups], tokens_alone(kind)._replace(prompts=None))
    np.testing.assert_array_equal(rollout.tokens, expected.tokens)
    np.testing.assert_array_equal(rollout.mask, expected.mask)
    np.testing.assert_array_equal(rollout.ended, expected.ended)
    np.testing.assert_allclose(rollout.logprobs, expected.logprobs, atol=1e-4)
    parts = {x.data.shape for x in rollout.tokens.addressable_shards}
    assert parts == {(groups // shape[0], GROUP_SIZE // shape[1], 6)}


@pytest.mark.parametrize(('kind', 'shape'), CASES)
def test_an_update_is_that_of_one_device(kind, shape):
    _, trained, base = parameters(kind)
    groups = prompts_for(shape)
    found, metrics = update(model_of(kind), trained, base, groups, mesh_of(shape))
    expected, expected_metrics = update_alone(kind, groups)
    assert tiny.gap(expected, trained) > 0.01
    assert tiny.gap(found, expected) <= ROUNDING.get(kind, 1e-5)
    assert_same_metrics(metrics, expected_metrics)


def assert_same_metrics(metrics, expected):
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-5, rel=1e-5), name


@pytest.mark.slow
def test_blocks_and_compaction_on_slices_of_groups():
    """Completions end at all times; the batch is compacted between blocks of two columns."""
    model, params = model_of('dense'), parameters('dense')[0]
    prompts, mesh = rollout_of(2).prompts, mesh_of((2, 4, 1))
    options = {'block': 2, 'max_tokens': 8}
    expected = draw(model, params, prompts, **options)
    found = draw(model, placed(params, mesh), sharding.put_groups(prompts, mesh), mesh, **options)
    for name in ('tokens', 'mask', 'ended'):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert np.asarray(expected.mask).sum(-1).min() <= 2 < np.asarray(expected.mask).sum(-1).max()


# What compares the completions of a group, and other ways to cut a batch


def against_the_best(logprobs, advantages):
    """A loss that needs whole groups: each completion's log-probs against those of the best one."""
    best = jnp.argmax(advantages.sum(-1))
    return jnp.square(logprobs - logprobs[best])


VARIANTS = {
    'pairs': (preset('dpo', beta=0.7), (4, 2), {}),
    'a loss of its own': (Algorithm(loss=against_the_best), (2, 4), {}),
    'microbatches': (Algorithm(aggregation='microbatch_token_mean'), (4, 4), {'microbatch': 2}),
    'ratio of sequences': (Algorithm(ratio='sequence'), (4, 4), {'microbatch': 2, 'rows': 4}),
    'packed': (Algorithm(inner_updates=2), (4, 4), {'microbatch': 4, 'rows': 4, 'packed': True}),
    'widths': (Algorithm(scale='batch'), (2, 8), {'rows': 8, 'widths': 4}),
    'trust region': (Algorithm(loss='surrogate', step='trust_region', max_kl=0.01), (2, 4), {}),
    'entropy': (Algorithm(top_entropy=0.5, entropy_bonus=0.01), (2, 4), {}),
}


@pytest.mark.parametrize(
    'name', tiny.some_slow(VARIANTS, *VARIANTS.keys() - {'pairs', 'a loss of its own'})
)
def test_groups_are_split_and_joined(name):
    """On 2 x 2 devices, where each group is split in two."""
    algorithm, shape, options = VARIANTS[name]
    compute = Compute(**({'microbatch': shape[0], 'widths': 1, 'logprob_chunk': 8} | options))
    model, params = tiny.Bigram(), tiny.Bigram.make_params(vocab=VOCAB)
    if compute.packed:  # a bigram has no caches of prompts, which packed completions look up
        model, params = model_of('dense'), parameters('dense')[0]
    base = tiny.Bigram.make_params(seed=1, vocab=VOCAB) if algorithm.uses_reference else None
    expected, metrics = step_of(model, params, base, shape, algorithm, compute, None)
    mesh = mesh_of((2, 2, 1))
    found, metrics_on_mesh = step_of(model, params, base, shape, algorithm, compute, mesh)
    assert tiny.gap(expected, params) > 1e-3
    assert tiny.gap(found, expected) <= 1e-5
    assert_same_metrics(metrics_on_mesh, metrics)


@pytest.mark.slow
def test_load_balancing_on_slices_of_groups():
    _, trained, base = parameters('experts')
    algorithm, compute = Algorithm(router_balance=0.1), Compute(microbatch=2, widths=1)
    run = functools.partial(
        step_of, model_of('experts'), trained, base, (2, GROUP_SIZE), algorithm, compute
    )
    (expected, metrics), (found, metrics_on_mesh) = run(None), run(mesh_of((2, 2, 1)))
    assert tiny.gap(found, expected) <= 1e-5
    assert_same_metrics(metrics_on_mesh, metrics)


def test_scores_of_split_groups():
    model = Transformer(with_scalar_head(model_of('dense').config))
    params, rollout = tiny.make_params(model), rollout_of(2)
    expected = make_scorer(model)(params, rollout)
    mesh = mesh_of((2, 4, 1))
    scores = make_scorer(model, mesh)(
        placed(params, mesh), sharding.put_rollout(rollout, None, mesh)[0]
    )
    np.testing.assert_allclose(scores, expected, atol=1e-5)


# The mesh of a config


def config_of(**options):
    config = defaults()
    config.grpo.update(batch_size=2, group_size=8)
    config.mesh.update(fsdp=8)
    config.update_from_flattened_dict(options)
    return config


@pytest.mark.parametrize(
    ('options', 'shape'),
    [
        ({}, (2, 4, 1)),
        ({'mesh.fsdp': -1, 'mesh.tensor': 2}, (2, 2, 2)),
        ({'mesh.fsdp': 2, 'mesh.tensor': -1}, (2, 1, 4)),
        ({'grpo.batch_size': 16}, (8, 1, 1)),
        ({'mesh.completions': 8}, (1, 8, 1)),
        ({'grpo.batch_size': 3}, (1, 8, 1)),
        ({'grpo.group_size': 3}, (8, 1, 1)),  # nothing fits: the check of the batch tells
        ({'grpo.algorithm.baseline': 'greedy'}, (8, 1, 1)),
    ],
)
def test_completions_are_chosen_where_there_are_few_prompts(options, shape):
    assert tuple(make_mesh(config_of(**options)).shape.values()) == shape


def test_a_greedy_completion_cannot_be_split():
    config = config_of(**{'grpo.algorithm.baseline': 'greedy'})
    with pytest.raises(ValueError, match=r'grpo.batch_size of 2 prompts .* fsdp=8: use 8 prompts$'):
        check_batch_size(config, make_mesh(config), 'grpo', 'compute.microbatch', None)


def test_gathering_on_one_device_has_no_effect():
    with pytest.raises(ValueError, match=r'mesh.gather=True has no effect with mesh.fsdp=1'):
        make_mesh(config_of(**{'mesh.fsdp': 1, 'mesh.gather': True}))


def test_what_the_model_does_not_divide_into(caplog):
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    check_model(model_of('dense'), mesh)  # two key/value heads: copies, as documented
    assert not caplog.messages
    check_model(tiny.make_model(vocab_size=67), mesh)
    assert caplog.messages == [
        'each device holds copies of parameters with sizes that the mesh does not divide: '
        'embedding: 67 over tensor=4'
    ]
    with pytest.raises(ValueError, match='tensor=4 does not divide 6 query heads'):
        check_model(tiny.make_model(heads=6), mesh)
