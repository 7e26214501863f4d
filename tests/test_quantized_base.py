"""Adapters over a frozen base of one byte or half a byte for each weight."""

import functools
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import runs
import tiny
from jax.extend.core import jaxprs_in_params
from test_quantization import EVERYTHING, EXPERTS, completions, is_quantized, named
from test_transformer import group_logits

from grpo_jax import models, sharding
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.optimizer import adamw
from grpo_jax.algorithm.program import init_state, make_train_step
from grpo_jax.engine.compute import Compute
from grpo_jax.models import Lora, quantization
from grpo_jax.run.export import export, export_adapter
from grpo_jax.run.parameters import newest_policy
from grpo_jax.run.setup import prepare_policy

KINDS = ('int8', 'nf4')
IN_LAYERS = {'query', 'key', 'value', 'out', 'gate', 'up', 'down'}
# Dettmers et al., arXiv 2305.14314, appendix E.
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
])  # fmt: skip


def nf4_by_numpy(weights, axis, size):
    """(nearest levels times scales, scales), one block after the other."""
    moved = np.moveaxis(np.array(weights, np.float64), axis, -1)
    blocks = moved.reshape(-1, size)
    scale = np.abs(blocks).max(-1).astype(np.float32).astype(jnp.bfloat16).astype(np.float64)
    back = np.zeros_like(blocks)
    for i, block in enumerate(blocks):
        if scale[i]:
            back[i] = NF4[np.abs(block[:, None] / scale[i] - NF4).argmin(-1)] * scale[i]
    return np.moveaxis(back.reshape(moved.shape), -1, axis), scale


# Half a byte


def test_nf4_by_hand():
    """Blocks of four along D of [D, M]; codes 15 and 0, 7 and 12 are the bytes 0xF0 and 0x7C."""
    gate = np.float32([[2.0, 0.0], [-2.0, 0.5], [0.0, 0.03], [0.9, -0.25]])
    values, scale = quantization.quantize_matrix(gate, 'gate', 'nf4')
    assert values.dtype == jnp.uint8
    assert scale.dtype == jnp.bfloat16
    # 0.06 is nearer to 0.0796 than to 0; -0.5 lies between -0.525 and -0.395.
    assert values.tolist() == [[0xF0, 0x7F], [0x7C, 0x82]]
    assert scale.tolist() == [[2.0, 0.5]]
    back = models.dequantize({'gate': quantization.Quantized(values, scale)}, 'float32')['gate']
    expected = [[2, 0], [-2, 0.5], [0, NF4[8] / 2], [2 * NF4[12], NF4[2] / 2]]
    np.testing.assert_allclose(back, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ('size', 'block'), [(64, 64), (4096, 64), (80, 40), (96, 48), (6, 6), (2, 2), (134, 2)]
)
def test_block_sizes(size, block):
    assert quantization.block_size(size) == block


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    name=st.sampled_from(sorted(IN_LAYERS)), seed=st.integers(0, 2**31), power=st.integers(-30, 30)
)
def test_nf4_is_the_nearest_level(name, seed, power):
    """In stacks of layers and of experts, for blocks of very different size and blocks of zeros."""
    rng = np.random.default_rng(seed)
    axis = quantization.SUMMED[name][-1]
    shape = [2, 3, 4, 6, 5][: 5 if name in ('query', 'key', 'value', 'out') else 4]
    shape[axis] = 6
    if axis == -3:
        shape[-2:] = 4, 5
    spread = 10.0 ** rng.integers(-3, 4, shape) if seed % 3 else 1.0
    weights = np.float32(rng.standard_normal(shape) * spread * 2.0**power)
    weights[0] *= seed % 2
    made = quantization.quantize_matrix(weights, name, 'nf4')
    assert made.values.size == weights.size // 2
    assert made.scale.size == weights.size // 6
    back = models.dequantize({name: made}, 'float32')[name]
    expected, _ = nf4_by_numpy(weights, axis, 6)
    np.testing.assert_allclose(back, expected, rtol=1e-6, atol=1e-38)
    largest = np.abs(weights).max(axis, keepdims=True)
    assert (np.abs(back - weights) <= 0.16 * largest + 1e-38).all()


def test_what_is_not_finite_shows():
    gate = np.ones((4, 3), np.float32)
    gate[1, 1:] = np.nan, np.inf
    made = quantization.quantize_matrix(gate, 'gate', 'nf4')
    back = models.dequantize({'gate': made}, 'float32')['gate']
    assert np.isfinite(back).all(0).tolist() == [True, False, False]


# What is quantized


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize(
    'options', [EVERYTHING | {'qk_norm': 'head'}, {'norms': 'both'}, EXPERTS], ids=str
)
def test_matrices_of_layers_and_nothing_else(kind, options):
    params = tiny.make_params(tiny.make_model(**options))
    before, after = dict(named(params)), dict(named(models.quantize_base(params, kind)))
    assert {name for name, leaf in after.items() if is_quantized(leaf)} == IN_LAYERS
    for name, leaf in after.items():
        if not is_quantized(leaf):
            assert leaf is before[name]
            continue
        bytes_per_weight = leaf.values.nbytes / before[name].size
        assert bytes_per_weight == {'int8': 1, 'nf4': 0.5}[kind]
        assert quantization.matrix_shape(leaf, name) == before[name].shape
    again = models.quantize_base(models.quantize_base(params, kind), 'int8')
    assert tiny.same(again, models.quantize_base(params, kind))
    assert models.quantize_base(params, 'model') is params


def test_bits_of_a_weight():
    """4.25 where blocks are whole."""
    gate = jax.ShapeDtypeStruct((2, 128, 256), jnp.float32)
    made = jax.eval_shape(lambda x: quantization.quantize_matrix(x, 'gate', 'nf4'), gate)
    assert 8 * sum(x.size * x.dtype.itemsize for x in made) == 4.25 * 2 * 128 * 256


def test_odd_sizes():
    with pytest.raises(ValueError, match=r"base='nf4' stores two .* model width=15 is odd: use"):
        tiny.make_model(width=15, lora=Lora(rank=2, base='nf4'))
    tiny.make_model(width=15, lora=Lora(rank=2, base='int8'))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'base': 'int8'}, "lora base='int8' with rank=0, .*: set a rank, or base='model'"),
        ({'rank': 2, 'base': 'int4'}, "base='int4' is unknown: use one of model, int8, nf4"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Lora(**options)


# The product and its gradient


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('experts', [0, 3])
def test_products_and_gradients(kind, dtype, experts):
    """Those of the dequantized matrix; small gradients do not underflow in float16."""
    rng = np.random.default_rng(0)
    shape = (experts, 8, 5) if experts else (8, 5)
    weights = np.float32(rng.standard_normal(shape) * 1e-2)
    weights[..., 0] = 0  # scale 0
    made = quantization.quantize_matrix(weights, 'gate', kind)
    exact = np.asarray(models.dequantize({'gate': made}, 'float32')['gate'], np.float64)
    x = jnp.asarray(rng.standard_normal((7, 8)), dtype)
    grad = jnp.asarray(rng.standard_normal((7, 5)) * 0.1, dtype)
    sizes = jnp.int32([3, 0, 4]) if experts else None
    expert = np.repeat(np.arange(3), [3, 0, 4])
    scale = made.scale
    if kind == 'int8':
        scale = scale[expert, 0] if experts else scale[0]
    of_rows = exact[expert] if experts else np.broadcast_to(exact, (7, 8, 5))
    tolerance = {'float32': 1e-6, 'bfloat16': 2e-2, 'float16': 4e-3}[dtype]

    def compare(ours, expected):
        assert ours.dtype == dtype
        gap = np.abs(np.asarray(ours, np.float64) - expected).max()
        assert gap <= tolerance * np.abs(expected).max()

    for multiply in (quantization.multiply, quantization.multiply_frozen):
        y, pull_back = jax.vjp(lambda x, f=multiply: f(x, made.values, scale, sizes), x)
        compare(y, np.einsum('ni,nio->no', np.asarray(x, np.float64), of_rows))
        if multiply is quantization.multiply_frozen or dtype == 'float32':
            compare(pull_back(grad)[0], np.einsum('no,nio->ni', np.float64(grad), of_rows))


# The model

MODELS = {
    'biases': EVERYTHING | {'head_dim': 8},
    'tied, scaled, capped': {'embedding_scaled': True, 'logit_softcap': 3.0, 'norms': 'both'},
    'experts': EXPERTS,
    'second derivatives': {'attention': 'einsum'},
}


@functools.cache
def parts(name, kind, **options):
    """(model, quantized base, the base that it stands for, adapters)."""
    options = MODELS[name] | options
    targets = ('q_proj', 'o_proj') if 'experts' in options else ('*_proj',)
    model = tiny.make_model(**options, lora=Lora(rank=3, alpha=5.0, base=kind, targets=targets))
    base, adapters = models.split_adapters(tiny.make_params(model))
    small = models.quantize_base(base, kind)
    return model, small, models.dequantize(small, 'float32'), adapters


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        ('biases', 'int8'),
        *(
            pytest.param(name, kind, marks=pytest.mark.slow)
            for name in MODELS
            for kind in KINDS
            if (name, kind) != ('biases', 'int8')
        ),
    ],
)
def test_logits_and_gradients_are_those_of_the_dequantized_base(name, kind, rollout):
    model, small, exact, adapters = parts(name, kind)
    seeds = np.random.default_rng(0).standard_normal((*rollout.tokens.shape, tiny.VOCAB))

    @tiny.jit
    def logits_and_gradient(base):
        def loss(adapters):
            logits = group_logits(model, models.join_adapters(base, adapters), rollout)
            return (seeds * logits).sum(), logits

        return jax.grad(loss, has_aux=True)(adapters)

    (gradient, logits), (expected, expected_logits) = map(logits_and_gradient, (small, exact))
    np.testing.assert_allclose(logits, expected_logits, atol=3e-5)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_logits_equal_naive(rollout):
    """By the plain forward pass in float64, over levels that NumPy chooses."""
    model = tiny.make_model(tied_head=False, attention_bias=True, lora=Lora(rank=3, base='nf4'))
    base, adapters = models.split_adapters(tiny.make_params(model))
    adapters = jax.tree.map(jnp.zeros_like, adapters)
    plain, sizes = oracle.float64(base), {'out': 6, 'down': 24}
    blocks = dict(plain['blocks'])
    for name in IN_LAYERS:
        axis = quantization.SUMMED[name][-1]
        blocks[name], _ = nf4_by_numpy(blocks[name], axis, sizes.get(name, 16))
    naive = oracle.completion_logits(plain | {'blocks': blocks}, rollout, model.config)
    params = models.join_adapters(models.quantize_base(base, 'nf4'), adapters)
    np.testing.assert_allclose(
        tiny.jit(functools.partial(group_logits, model))(params, rollout), naive, atol=1e-4
    )


@pytest.mark.parametrize(
    ('kind', 'weights'),
    [('int8', 'model'), ('nf4', 'int8'), pytest.param('nf4', 'model', marks=pytest.mark.slow)],
)
def test_the_sampler_agrees_with_the_scorer(kind, weights, rollout):
    """With int8 weights too, embedding and head are rounded in the sampler alone."""
    model, small, _, adapters = parts('biases', kind)
    params = models.join_adapters(small, adapters)
    drawn = completions(model, params, rollout.prompts, weights=weights)
    scored_params = models.quantize(params) if weights == 'int8' else params
    scored = tiny.jit(functools.partial(group_logits, model))(
        scored_params, rollout._replace(tokens=drawn.tokens)
    )
    expected = oracle.logprobs(np.asarray(scored, np.float64), drawn.tokens)
    np.testing.assert_allclose(drawn.logprobs[drawn.mask], expected[drawn.mask], atol=1e-5)
    assert is_quantized(params['blocks']['gate'])
    assert is_quantized(scored_params['head']) == (weights == 'int8')


# Training

ALGORITHM = Algorithm(clip_low=0.2, clip_high=0.2, beta=0.1)
OPTIMIZER, _ = adamw(learning_rate=1e-2, steps=10)


def step_of(model, compute=None, mesh=None):
    return make_train_step(model, OPTIMIZER, ALGORITHM, mesh, compute=compute)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_a_training_step_is_that_over_the_dequantized_base(kind, rollout, rewards):
    """Policy and reference: the metrics hold the KL between them. Microbatches, bundles, widths."""
    model, small, exact, adapters = parts('biases', kind, remat=False)
    step = step_of(model, Compute(microbatch=2, rows=3, widths=2, logprob_chunk=2))
    ends = []
    for base in (small, exact):
        state, metrics = step(init_state(model, OPTIMIZER, adapters), base, rollout, rewards)
        ends.append((state, jax.device_get(metrics)))
    (state, metrics), (expected, wanted) = ends
    assert metrics['kl'] > 1e-3
    for name in ('loss', 'kl', 'grad_norm'):
        assert metrics[name] == pytest.approx(wanted[name], rel=1e-4)
    moments = state.opt_state[1][0].mu, expected.opt_state[1][0].mu
    assert tiny.gap(*moments) <= 1e-5 * tiny.largest(moments[1])


def memory_of(layers, kind):
    """Memory of the compiled update, bytes of the base and bytes of its matrices in float32."""
    model = tiny.make_model(
        width=64, heads=2, head_dim=32, mlp_width=256, layers=layers,
        lora=Lora(rank=1, base=kind, targets=('q_proj',)),
    )  # fmt: skip
    shapes, adapters = models.split_adapters(tiny.shapes(model))
    base = jax.eval_shape(lambda tree: models.quantize_base(tree, kind), shapes)
    state = jax.eval_shape(lambda tree: init_state(model, OPTIMIZER, tree), adapters)
    rollout = tiny.make_rollout(groups=1, group_size=2)
    step = step_of(model, Compute(widths=1))
    lowered = step.lower(state, base, rollout, tiny.make_rewards(groups=1, group_size=2))
    sizes = [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(base))]
    sizes.append(4 * sum(shapes['blocks'][name].size for name in IN_LAYERS))
    return lowered.compile().memory_analysis(), *sizes


@pytest.mark.parametrize('kind', tiny.some_slow(KINDS, 'nf4'))
def test_the_compiled_update_takes_the_base_as_it_is_stored(kind):
    """8 or 4.5 bits per weight instead of 32 (4.25 in blocks of 64), and no loop dequantizes all.

    A loop would if the compiler moved what does not depend on the turn in front of it.
    """
    (few, *_, few_weights), (most, base, weights) = (memory_of(n, kind) for n in (3, 7))
    rest = base - weights / 4 * {'int8': 1, 'nf4': 4.5 / 8}[kind]
    assert 0 < rest < 0.04 * weights  # embedding, norms, scales of int8
    assert base <= most.argument_size_in_bytes < base + 0.02 * weights
    growth = most.temp_size_in_bytes - few.temp_size_in_bytes
    assert growth < 0.1 * (weights - few_weights)


def scans_in(jaxpr):
    """All scans of a program, with those inside of others."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'scan':
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from scans_in(inner)


@pytest.mark.parametrize('remat', [True, False])
@pytest.mark.parametrize('kind', ['model', *KINDS])
def test_no_layer_is_kept_dequantized_for_the_backward_pass(kind, remat, rollout):
    """Of the base a loop over layers returns nothing in floats: what it returns is kept."""
    sizes = {'width': 22, 'head_dim': 26, 'mlp_width': 34}  # no activation has a matrix's size
    model = tiny.make_model(**sizes, remat=remat, dtype='bfloat16', lora=Lora(rank=2, base=kind))
    base, adapters = models.split_adapters(tiny.shapes(model))
    small = jax.eval_shape(lambda tree: models.quantize_base(tree, kind), base)

    def loss(adapters, base):
        return group_logits(model, models.join_adapters(base, adapters), rollout).sum()

    program = jax.make_jaxpr(jax.grad(loss))(adapters, small)
    scans = list(scans_in(program.jaxpr))
    assert len(scans) >= 4  # prompts and completions, forward and backward
    kept = {x.aval.size for scan in scans for x in scan.outvars if x.aval.dtype == jnp.bfloat16}
    matrices = {base['blocks'][name].size for name in IN_LAYERS}
    assert bool(kept & matrices) == (kind == 'model' and not remat)


@pytest.mark.slow
def test_the_gradient_of_a_gradient(rollout, rewards):
    """TRPO, whose products with the Fisher matrix need it."""
    algorithm = Algorithm(step='trust_region', loss='surrogate', beta=0.0, kl='none')
    model, small, exact, adapters = parts('second derivatives', 'nf4', remat=False)
    ends = []
    for base in (small, exact):
        step = make_train_step(model, OPTIMIZER, algorithm)
        state, _ = step(init_state(model, OPTIMIZER, adapters), base, rollout, rewards)
        ends.append(state.params)
    assert tiny.gap(*ends) <= 1e-3 * tiny.gap(ends[1], adapters)


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', ['biases', 'experts'])
def test_on_a_mesh(name, kind, rollout, rewards):
    """Values are split like their matrix, and the step is that of one device."""
    if jax.device_count() < 8:
        pytest.skip('needs eight devices')
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    model, small, _, adapters = parts(name, kind)
    where = sharding.shardings(small, mesh)
    plain = sharding.shardings(models.dequantize(small, 'float32'), mesh)
    for matrix in IN_LAYERS:
        if kind == 'int8' or matrix in ('query', 'gate'):
            assert where['blocks'][matrix].values.spec == plain['blocks'][matrix].spec
    assert where['blocks']['gate'].scale.spec[-1] == 'tensor'
    state = init_state(model, OPTIMIZER, adapters, mesh)
    placed = jax.device_put(small, where)
    args = sharding.put_groups((rollout, rewards), mesh)
    made = step_of(model, mesh=mesh)(state, placed, *args)
    alone = step_of(model)(init_state(model, OPTIMIZER, adapters), small, rollout, rewards)
    for metric in ('loss', 'kl', 'grad_norm'):
        assert float(made[1][metric]) == pytest.approx(float(alone[1][metric]), rel=1e-4)
    moments = made[0].opt_state[1][0].mu, alone[0].opt_state[1][0].mu
    assert tiny.gap(*moments) <= 1e-5 * tiny.largest(moments[1])


# Merging


@pytest.mark.parametrize('kind', KINDS)
def test_merged_weights_are_what_was_trained(kind):
    model, small, exact, adapters = parts('biases', kind)
    merged = models.merge_adapters(model.config, small, adapters)
    expected = models.merge_adapters(model.config, exact, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(exact)
    assert tiny.gap(merged, expected) < 1e-6
    narrow = models.merge_adapters(
        tiny.make_model(param_dtype='bfloat16', lora=model.config.lora).config, small, adapters
    )
    assert narrow['blocks']['gate'].dtype == jnp.bfloat16
    assert narrow['embedding'].dtype == jnp.float32  # as it was


def test_critics_and_reward_models_start_from_the_dequantized_base():
    model, small, exact, _ = parts('biases', 'nf4')
    made = models.scalar_params(small, model.config)
    assert tiny.same(made['blocks'], exact['blocks'])


# Runs


def config_of(workdir, kind):
    """GRPO with adapters over the base that SFT of another run has trained."""
    config = runs.get_config()
    config.start = f'{workdir}:sft'
    config.sft.steps = 0
    config.eval.samples = 0
    config.grpo.steps = 4
    config.grpo.algorithm.update(inner_updates=1, entropy=False)
    config.model.lora.update(rank=2, base=kind)
    return config


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_a_run(kind, finished, tmp_path, compiled_once):
    workdir = tmp_path / 'run'
    runs.train(config_of(finished, kind), workdir)
    rows = runs.lines(workdir / 'metrics.jsonl')
    assert max(row['sampling/sampling_logp_difference/max'] for row in rows) < 1e-4
    assert {row['skipped_updates'] for row in rows} == {0}
    setup = prepare_policy(config_of(finished, kind), workdir)
    policy = newest_policy(setup)
    assert {name for name, x in named(policy.base) if is_quantized(x)} == IN_LAYERS
    export(config_of(finished, kind), str(workdir), str(tmp_path / 'merged'))
    config = json.loads((tmp_path / 'merged' / 'config.json').read_text())
    assert 'quantization_config' not in config
    with pytest.raises(ValueError, match='no adapters of a pretrained checkpoint'):
        export_adapter(config_of(finished, kind), str(workdir), str(tmp_path / 'adapter'))
    config = config_of(workdir, kind)
    config.start = f'{workdir}:grpo'
    with pytest.raises(ValueError, match=rf'adapters of a base in {kind}, and merging them into'):
        runs.train(config, tmp_path / 'next')


@pytest.mark.parametrize('change', [{'sft.steps': 5}, {'grpo.iterations': 2}], ids=str)
def test_one_stage_only(change, tmp_path):
    """The adapters of a stage would be rounded away in the base of the next."""
    config = runs.get_config()
    config.sft.steps = 0
    config.model.lora.update(rank=2, base='int8')
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=r"model.lora.base='int8' with sft.steps=.*begin it by"):
        runs.train(config, tmp_path)


def test_small_adapters_vanish_in_a_base_on_the_grid():
    """Why stages are not merged into a quantized base: next to nothing of a change is left.

    It is of rank 4, and a thousandth (with nf4 a hundredth) of the weights' standard deviation.
    """
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((256, 64)).astype(np.float32)
    change = rng.standard_normal((256, 4)) @ rng.standard_normal((4, 64)) / 2

    def rounded(weights, kind):
        made = models.quantize_base({'gate': jnp.asarray(weights, jnp.float32)}, kind)
        return np.asarray(models.dequantize(made, 'float32')['gate'], np.float64)

    for kind, size in (('int8', 1e-3), ('nf4', 1e-2)):
        grid = rounded(weights, kind)
        left = rounded(grid + size * change, kind) - grid
        assert abs(np.sum(left * size * change)) < 0.05 * np.sum((size * change) ** 2)
        left = rounded(weights + size * change, kind) - rounded(weights, kind)
        assert np.sum(left * size * change) > 0.6 * np.sum((size * change) ** 2)  # off the grid
