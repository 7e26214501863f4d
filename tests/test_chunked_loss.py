"""The loss of logits in chunks: equal to plain autodiff, and computed in one pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.extend.core import jaxprs_in_params

from benchmarks.flops import count_flops
from grpo_jax import models
from grpo_jax.engine import chunked_loss
from grpo_jax.engine.chunked_loss import ChunkedLoss
from grpo_jax.engine.token_distribution import token_logprobs
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
    """Not linear in the log-probs, so that gradients differ between positions."""
    logprobs, entropy = token_logprobs(logits, part.rollout.tokens, SAMPLING, entropy=True)
    loss = part.weights * jnp.exp(0.3 * logprobs) + 0.1 * part.weights * entropy
    return jnp.where(part.rollout.mask, loss, 0.0).sum(), {'logprobs': logprobs}


def make_loss(model, chunk, frozen=False):
    return ChunkedLoss(
        dataclasses.replace(model.config, lora=models.Lora(rank=int(frozen))),
        lambda params: models.apply(model, params, method='output_matrix'),
        loss_of_logits,
        chunk,
    )


def both(name, chunk, frozen=False):
    """(gradients by parameters and states, outputs), chunked and by plain autodiff."""
    model = tiny.make_model(**MODELS[name])
    params, part = tiny.make_params(model), make_part()
    hidden = np.random.default_rng(2).standard_normal((*SHAPE, model.config.width))
    hidden = jnp.asarray(hidden, model.config.dtype)
    loss = make_loss(model, chunk, frozen)
    before = jax.tree.map(lambda x: jnp.full(x.shape, 0.5), params)

    def chunked(params, hidden):
        total, by_states, outputs = loss.add_gradient(params, hidden, part, before)
        return (jax.tree.map(jnp.subtract, total, before), by_states), outputs

    def plain(params, hidden):
        return loss_of_logits(models.apply(model, params, hidden, method='logits'), part)

    plain = jax.grad(plain, argnums=(0, 1), has_aux=True)
    return [tiny.jit(f)(params, hidden) for f in (chunked, plain)]


@pytest.mark.parametrize('name', ['tied', 'untied'])
def test_gpus_add_to_the_total_in_one_product(name, monkeypatch):
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    monkeypatch.setattr(chunked_loss, '_pieces', None)  # nothing is cut
    ours, expected = both(name, 3)
    assert tiny.gap(ours[0], expected[0]) <= 1e-5 * tiny.largest(expected[0])


@pytest.mark.parametrize(
    ('name', 'chunk'), [*((name, 3) for name in MODELS), ('tied', 1), ('tied', 7), ('tied', 20)]
)
def test_chunks_equal_the_plain_gradient(name, chunk):
    ours, expected = both(name, chunk)
    tolerance = 0.03 if name == 'bfloat16' else 1e-5
    scale = tiny.largest(expected[0])
    assert scale > 0.1
    assert tiny.gap(ours[0], expected[0]) <= tolerance * scale
    assert tiny.gap(ours[1], expected[1]) <= 10 * tolerance


@pytest.mark.parametrize('name', ['tied', 'untied'])
def test_the_matrix_gradient_in_pieces_of_columns(name, monkeypatch):
    monkeypatch.setattr(chunked_loss, '_pieces', lambda size: size)
    ours, expected = both(name, 3)
    assert tiny.gap(ours[0], expected[0]) <= 1e-5 * tiny.largest(expected[0])


@pytest.mark.parametrize(
    ('size', 'pieces'),
    [(8191, 1), (8192, 2), (24_576, 6), (131_072, 32), (151_936, 32), (999_983, 1)],
)
def test_pieces_are_equal_and_not_small(size, pieces):
    assert chunked_loss._pieces(size) == pieces


def test_a_frozen_matrix_has_no_gradient():
    ours, expected = both('tied', 3, frozen=True)
    assert not tiny.largest(ours[0][0])
    assert tiny.gap(ours[0][1], expected[0][1]) <= 1e-5 * tiny.largest(expected[0][1])


def one_matrix(chunk, frozen=False):
    """The gradient with the output matrix as the only parameter, and its arguments."""
    config = tiny.make_model(tied_head=False, lora=models.Lora(rank=int(frozen))).config
    loss = ChunkedLoss(config, lambda params: params['head'], loss_of_logits, chunk)
    params, hidden = {'head': jnp.zeros((16, tiny.VOCAB))}, jnp.zeros((*SHAPE, 16))
    return loss.add_gradient, (params, hidden, make_part(), params)


@pytest.mark.parametrize(('frozen', 'products'), [(False, 3), (True, 2)])
def test_logits_are_computed_once(frozen, products):
    """The forward pass and each gradient are one product; the last chunk is padded."""
    gradient, arrays = one_matrix(3, frozen)
    rows = SHAPE[0] * SHAPE[1] * 9  # 7 positions in chunks of 3
    assert count_flops(gradient, *arrays) == products * 2 * rows * 16 * tiny.VOCAB


def test_only_one_chunk_of_logits_exists():
    gradient, arrays = one_matrix(2)
    program = jax.make_jaxpr(gradient)(*arrays)
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
