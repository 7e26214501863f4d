"""The head's loss by chunks: equal to the plain one, and computed once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.extend.core import jaxprs_in_params

from grpo_jax import models
from grpo_jax.flops import count_flops
from grpo_jax.head import Head, by_chunks
from grpo_jax.score import token_logprobs
from grpo_jax.types import Batch, Sampling

ROLLOUT = tiny.make_rollout(max_tokens=7)
SHAPE = ROLLOUT.tokens.shape
SAMPLING = Sampling(temperature=0.7)
MODELS = {
    'tied': {},
    'untied': {'tied_head': False},
    'capped': {'logit_softcap': 3.0},
    'bfloat16': {'dtype': 'bfloat16'},
}


def make_part():
    weights = np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)
    weights *= ROLLOUT.mask
    return Batch(ROLLOUT, advantages=jnp.zeros(SHAPE), weights=weights).per_token()


def loss_of_logits(logits, part):
    """Not linear in the log-probs, so that slopes differ between the positions."""
    logprobs, entropy = token_logprobs(logits, part.rollout.tokens, SAMPLING, entropy=True)
    loss = part.weights * jnp.exp(0.3 * logprobs) + 0.1 * part.weights * entropy
    return jnp.where(part.rollout.mask, loss, 0.0).sum(), {'logprobs': logprobs}


def both(name, chunk, frozen=False):
    """(loss, outputs, gradients) of the chunked head and of plain autodiff."""
    model = tiny.make_model(**MODELS[name])
    params, part = tiny.make_params(model), make_part()
    hidden = np.random.default_rng(2).standard_normal((*SHAPE, model.config.width))
    hidden = jnp.asarray(hidden, model.config.dtype)
    head = Head(model.config, loss_of_logits, chunk, frozen)

    def chunked(params, hidden):
        matrix = models.apply(model, params, method='output_matrix')
        loss, out = by_chunks(head, matrix, hidden, part)
        return 2.5 * loss, out

    def plain(params, hidden):
        loss, out = loss_of_logits(models.apply(model, params, hidden, method='logits'), part)
        return 2.5 * loss, out

    compute = functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    return [tiny.jit(compute(f))(params, hidden) for f in (chunked, plain)]


@pytest.mark.parametrize(
    ('name', 'chunk'), [*((name, 3) for name in MODELS), ('tied', 1), ('tied', 7), ('tied', 20)]
)
def test_chunks_equal_the_plain_loss_and_gradient(name, chunk):
    ours, expected = both(name, chunk)
    tolerance = 0.03 if name == 'bfloat16' else 1e-5
    scale = tiny.largest(expected[1])
    assert scale > 0.1
    assert tiny.gap(ours[0], expected[0]) <= 10 * tolerance
    assert tiny.gap(ours[1], expected[1]) <= tolerance * scale


def test_a_frozen_matrix_has_no_gradient():
    ours, expected = both('tied', 3, frozen=True)
    assert not np.any(ours[1][0]['embedding'])
    assert tiny.gap(ours[1][1], expected[1][1]) <= 1e-5 * tiny.largest(expected[1][1])


@pytest.mark.parametrize(('frozen', 'products'), [(False, 3), (True, 2)])
def test_logits_are_computed_once(frozen, products):
    """Forward and each gradient are one product, the last chunk is filled up."""
    part, width, chunk = make_part(), 16, 3
    head = Head(tiny.make_model().config, loss_of_logits, chunk, frozen)
    gradient = jax.grad(lambda m, h: by_chunks(head, m, h, part)[0], argnums=(0, 1))
    matrix, hidden = jnp.zeros((width, tiny.VOCAB)), jnp.zeros((*SHAPE, width))
    rows = SHAPE[0] * SHAPE[1] * 9  # 7 positions in chunks of 3
    assert count_flops(gradient, matrix, hidden) == products * 2 * rows * width * tiny.VOCAB


def test_no_more_logits_exist_than_one_chunks():
    part, width = make_part(), 16
    head = Head(tiny.make_model().config, loss_of_logits, 2, False)
    gradient = jax.grad(lambda m, h: by_chunks(head, m, h, part)[0], argnums=(0, 1))
    program = jax.make_jaxpr(gradient)(jnp.zeros((width, tiny.VOCAB)), jnp.zeros((*SHAPE, width)))
    largest = max(
        variable.aval.size
        for jaxpr in all_jaxprs(program.jaxpr)
        for equation in jaxpr.eqns
        for variable in equation.outvars
    )
    assert largest == SHAPE[0] * SHAPE[1] * 2 * tiny.VOCAB


def all_jaxprs(jaxpr):
    yield jaxpr
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            yield from all_jaxprs(inner)
