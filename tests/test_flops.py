"""The FLOP counter by hand and, where XLA can count, against XLA; then FLOPs of our programs."""

import functools

import jax
import jax.numpy as jnp
import oracle
import pytest
import tiny
from jax.sharding import PartitionSpec

from benchmarks.flops import count_flops
from grpo_jax import models, sharding
from grpo_jax.algorithm.logprobs import completion_logprobs
from grpo_jax.algorithm.sample import sample
from grpo_jax.engine.chunks import map_chunks
from grpo_jax.engine.token_distribution import token_logprobs
from grpo_jax.types import Prompts, Rollout, Sampling


def floats(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def ints(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


ONE = 2 * 4 * 4 * 4  # FLOPs of x @ x for x [4, 4]


def test_products():
    assert count_flops(jnp.matmul, floats(3, 4), floats(4, 5)) == 2 * 3 * 4 * 5
    assert count_flops(jnp.matmul, floats(7, 3, 4), floats(7, 4, 5)) == 7 * 2 * 3 * 4 * 5
    product = functools.partial(jnp.einsum, 'abc,dcb->ad')
    assert count_flops(product, floats(2, 3, 4), floats(5, 4, 3)) == 2 * (2 * 5) * (3 * 4)
    assert count_flops(lambda x: x + jnp.sort(x).sum(), floats(4)) == 0


def test_rows_that_match_one_to_one_are_no_matrix_product():
    rows, scale = jnp.ones((5, 7)), jnp.ones(5)
    assert count_flops(lambda x, s: jnp.einsum('nd,n->nd', x, s), rows, scale) == 0
    assert count_flops(lambda x: jnp.einsum('nd,nd->n', x, x), rows) == 0


def test_loops_count_their_trips():
    def scan(x):
        return jax.lax.scan(lambda c, _: (c @ c, None), x, length=5)[0]

    def nested(x):
        return jax.lax.scan(lambda c, _: (scan(c) @ x, None), x, length=3)[0]

    def loop(x):
        return jax.lax.while_loop(lambda c: (c @ c).sum() > 0, lambda c: c @ c @ c, x)

    assert count_flops(scan, floats(4, 4)) == 5 * ONE
    assert count_flops(nested, floats(4, 4)) == 3 * (5 + 1) * ONE
    assert count_flops(loop, floats(4, 4), while_trips=7) == 7 * (1 + 2) * ONE
    assert count_flops(lambda x: jax.lax.map(lambda y: y @ y, x), floats(6, 4, 4)) == 6 * ONE


def test_cond_counts_its_most_expensive_branch():
    def switch(i, x):
        return jax.lax.switch(i, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)

    assert count_flops(switch, ints(), floats(4, 4)) == 2 * ONE


def test_wrapped_functions_are_counted():
    @jax.custom_vjp
    def square(x):
        return x @ x

    square.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))
    assert count_flops(jax.jit(lambda x: jax.jit(lambda y: y @ y)(x)), floats(4, 4)) == ONE
    assert count_flops(jax.checkpoint(lambda x: x @ x), floats(4, 4)) == ONE
    assert count_flops(square, floats(4, 4)) == ONE
    assert count_flops(jax.grad(lambda x: square(x).sum()), floats(4, 4)) == 3 * ONE


def test_shard_map_counts_all_devices():
    if jax.device_count() < 8:
        pytest.skip('needs eight devices')
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    rows = PartitionSpec('groups')
    product = jax.shard_map(
        jnp.matmul,
        mesh=mesh,
        in_specs=(rows, PartitionSpec()),
        out_specs=rows,
        axis_names={'groups'},
    )
    assert count_flops(jax.jit(product), floats(16, 4), floats(4, 4)) == 2 * 16 * 4 * 4


def test_a_gradient_costs_twice_the_forward_pass():
    forward = count_flops(lambda x, w: (x @ w).sum(), floats(3, 4), floats(4, 5))
    both = count_flops(
        jax.value_and_grad(lambda x, w: jnp.square(x @ w).sum(), argnums=(0, 1)),
        floats(3, 4),
        floats(4, 5),
    )
    assert both == 3 * forward


def test_rejects_operations_that_it_does_not_count():
    def convolve(x, w):
        return jax.lax.conv(x, w, (1, 1), 'SAME')

    with pytest.raises(ValueError, match=r'conv_general_dilated.*not counted'):
        count_flops(convolve, floats(1, 2, 8, 8), floats(2, 2, 3, 3))


def test_agrees_with_xla_where_no_loop_repeats():
    """One layer, one chunk: every loop runs once, so XLA counts all, elementwise work included."""
    model = tiny.make_model(
        layers=1,
        width=128,
        mlp_width=512,
        heads=4,
        kv_heads=4,
        head_dim=32,
        vocab_size=512,
        remat=False,
    )
    group = group_of(4, 32, 16)

    def run(params, group):
        prompts, tokens = group.prompts, group.tokens
        cache, state = models.apply(model, params, prompts.tokens, prompts.length, method='prefill')
        last = models.last_tokens(prompts.tokens, prompts.length)
        hidden = models.hidden_after_prompt(model, params, cache, last, prompts.length, tokens)

        def piece(states, targets):
            logits = models.apply(model, params, states, method='logits')
            return token_logprobs(logits, targets, Sampling())[0]

        logprobs = map_chunks(piece, (hidden, tokens), 16)
        return logprobs, state  # without it XLA omits most of the prompts' last layer

    params = tiny.shapes(model)
    xla = jax.jit(run).lower(params, group).compile().cost_analysis()['flops']
    assert count_flops(run, params, group) == pytest.approx(xla, rel=0.05)


def test_sampling_counts_prefill_once_and_each_decode_step():
    """By hand: every matrix for each token, all scores and values, and the output matrix."""
    model = tiny.make_model()
    c = model.config
    prompts, group_size, length, max_tokens = 3, 5, 6, 4
    matrices = 2 * c.width * (2 * c.heads + 2 * c.kv_heads) * c.head_dim
    matrices += 2 * 3 * c.width * c.mlp_width
    head = 2 * c.width * c.vocab_size

    def attention(queries, keys):  # scores and values; the full square is computed
        return 2 * 2 * queries * keys * c.heads * c.head_dim

    prefill = c.layers * (length * matrices + attention(length, length))
    decode = c.layers * (matrices + attention(1, length + max_tokens + 1)) + head
    rows = prompts * group_size
    expected = prompts * prefill + rows * head + (max_tokens - 1) * rows * decode
    run = functools.partial(sample, model, group_size=group_size, max_tokens=max_tokens)
    counted = count_flops(
        run,
        tiny.shapes(model),
        Prompts(ints(prompts, length), ints(prompts), ints(prompts)),
        seed=0,
        step=0,
        sampling=Sampling(),
        eos_ids=ints(1),
        while_trips=max_tokens - 1,
    )
    assert counted == expected


def group_of(group_size, length, max_tokens):
    shape = (1, group_size, max_tokens)
    return Rollout(
        Prompts(ints(1, length), ints(1), ints(1)),
        ints(*shape),
        jax.ShapeDtypeStruct(shape, bool),
        floats(*shape),
        jax.ShapeDtypeStruct(shape[:2], bool),
    )


SIZES = {  # Qwen2.5-0.5B, and the size of model that the arithmetic example trains
    'half a billion': {
        'vocab_size': 151_936,
        'width': 896,
        'layers': 24,
        'heads': 14,
        'kv_heads': 2,
        'head_dim': 64,
        'mlp_width': 4864,
        'attention_bias': True,
    },
    'under a million': {
        'vocab_size': 32,
        'width': 128,
        'layers': 4,
        'heads': 4,
        'kv_heads': 4,
        'head_dim': 32,
        'mlp_width': 384,
    },
}


GROUP_SIZE, LENGTH, MAX_TOKENS = 8, 512, 64


@functools.cache
def plain_flops(config):
    """Of log-probs and their gradient where the prompt is processed for each completion."""

    def plain(params, rows, targets):
        hidden = oracle.hidden_states(params, rows, config, jnp)[:, LENGTH - 1 : -1]
        return oracle.logprobs(oracle.logits(params, hidden), targets, xp=jnp).sum()

    rows = ints(GROUP_SIZE, LENGTH + MAX_TOKENS), ints(GROUP_SIZE, MAX_TOKENS)
    return count_flops(jax.value_and_grad(plain), tiny.shapes(models.Transformer(config)), *rows)


@pytest.mark.parametrize('remat', [True, False])
@pytest.mark.parametrize('size', SIZES)
def test_a_shared_prompt_saves_two_thirds_of_the_work(size, remat):
    """Log-probs and their gradient at G = 8, P = 512, T = 64, against G sequences of P + T tokens.

    The plain program computes logits of completion tokens only, and stores everything. With `remat`
    the group program recomputes each layer, and always each chunk of logits, and still stays below.
    """
    model = models.Transformer(models.ModelConfig(**SIZES[size], remat=remat))
    params = tiny.shapes(model)

    def shared(params, group):
        return completion_logprobs(model, params, group, Sampling(), chunk=64)[0].sum()

    group = group_of(GROUP_SIZE, LENGTH, MAX_TOKENS)
    ours = count_flops(jax.value_and_grad(shared), params, group)
    ratio = ours / plain_flops(models.ModelConfig(**SIZES[size]))
    print(f'{size}, remat {remat}: {ratio:.4f} of the FLOPs')
    assert ratio <= 0.35
