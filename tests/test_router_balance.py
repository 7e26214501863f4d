"""The load-balancing loss and its gradient, as transformers computes them for Mixtral."""

import copy
import functools

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from grpo_jax.algorithm import router_balance
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.program import init_state
from grpo_jax.algorithm.update import train_step
from grpo_jax.engine.compute import Compute, choose
from grpo_jax.engine.policy import Policy
from grpo_jax.types import Batch, Sampling

torch = checkpoints.torch
WEIGHT = 0.5


def sequences_of(rollout):
    """Prompt and completion one after the other, padded on the right, and the mask."""
    prompts = rollout.prompts
    rows = [
        np.concatenate([prompts.tokens[b, : prompts.length[b]], rollout.tokens[b, g, :used]])
        for b in range(len(rollout.tokens))
        for g, used in enumerate(rollout.mask[b].sum(-1))
    ]
    longest = max(map(len, rows))
    tokens = np.array([np.pad(row, (0, longest - len(row))) for row in rows])
    return tokens, np.arange(longest) < np.array([[len(row)] for row in rows])


def test_sequences_have_no_gap(rollout):
    prompts = rollout.prompts
    parts = jax.tree.map(
        jnp.asarray, router_balance.Sequences(prompts, rollout.tokens, rollout.mask)
    )
    tokens, length = map(np.asarray, parts.joined())
    expected, mask = sequences_of(rollout)
    assert (length == mask.sum(-1)).all()
    width = expected.shape[1]
    np.testing.assert_array_equal(np.where(mask, tokens[:, :width], 0), expected)


@pytest.fixture(scope='module')
def moe(tmp_path_factory, rollout):
    """Our model and parameters, and the loss and gradient by transformers in our layout."""
    folder = tmp_path_factory.mktemp('moe')
    # A padding token would have no gradient.
    config = checkpoints.make_config('mixtral', num_hidden_layers=2, pad_token_id=None)
    reference = checkpoints.make_torch(config)
    model, params, _ = checkpoints.read(checkpoints.save(reference, folder / 'model'))
    tokens, mask = (torch.tensor(x) for x in sequences_of(rollout))
    out = reference(tokens, attention_mask=mask.long(), output_router_logits=True)
    out.aux_loss.backward()
    gradients = copy.deepcopy(reference)
    with torch.no_grad():
        for ours, theirs in zip(gradients.parameters(), reference.parameters(), strict=True):
            ours.copy_(torch.zeros_like(theirs) if theirs.grad is None else theirs.grad)
    _, expected, _ = checkpoints.read(checkpoints.save(gradients, folder / 'gradient'))
    return model, params, float(out.aux_loss.detach()), expected


@functools.cache
def program(model, microbatch, shape):
    compute = choose(Compute(microbatch=microbatch), model.config, shape)

    def run(algorithm, params, rollout):
        policy = Policy(model, None, Sampling(), compute)
        zeros = jax.tree.map(jnp.zeros_like, params)
        batch = Batch(rollout, None, None)
        return router_balance.add_gradient(algorithm, policy, params, batch, zeros)

    return tiny.jit(run)


@pytest.mark.parametrize('microbatch', [4, 1])
def test_loss_and_gradient_of_transformers(microbatch, moe, rollout):
    """For the whole batch, however it is cut."""
    model, params, loss, expected = moe
    run = program(model, microbatch, (4, 3, 6, 5))
    gradient, terms = run(Algorithm(router_balance=WEIGHT), params, rollout)
    assert float(terms['aux_loss']) == pytest.approx(loss, rel=1e-5)
    largest = tiny.largest(expected)
    assert largest > 1e-3
    assert tiny.gap(gradient, jax.tree.map(lambda x: WEIGHT * x, expected)) < 1e-5 * largest
    assert np.abs(gradient['blocks']['router']).max() > 0.1 * WEIGHT * largest


def one_step(model, **options):
    optimizer, compute = optax.sgd(1.0), Compute(microbatch=4, widths=1)
    step = functools.partial(train_step, model=model, optimizer=optimizer, compute=compute)
    return functools.partial(step, sampling=Sampling(), algorithm=Algorithm(**options))


def test_the_update_reports_it(moe, rollout, rewards):
    model, params, *_ = moe
    state = init_state(model, optax.sgd(1.0), params)
    for options in ({'router_balance': WEIGHT}, {}):
        _, metrics = jax.eval_shape(one_step(model, **options), state, None, rollout, rewards)
        assert ('aux_loss' in metrics) == ('router_balance' in options)


@pytest.mark.slow
def test_it_is_added_in_the_update(moe, rollout, rewards):
    """One step of gradient descent with equal rewards, so that nothing else has a gradient."""
    model, params, loss, expected = moe
    step = tiny.jit(one_step(model, router_balance=WEIGHT))
    state, metrics = step(init_state(model, optax.sgd(1.0), params), None, rollout, 0 * rewards)
    assert float(metrics['aux_loss']) == pytest.approx(loss, rel=1e-5)
    moved = jax.tree.map(lambda new, old: old - new, state.params, params)
    gap = tiny.gap(moved, jax.tree.map(lambda x: WEIGHT * x, expected))
    assert gap < 1e-3 * tiny.largest(expected) + 1e-6  # of float32 parameters


def test_a_model_without_experts(rollout, rewards):
    model, optimizer = tiny.Bigram(), optax.sgd(1.0)
    state = init_state(model, optimizer, model.make_params())
    with pytest.raises(ValueError, match=r'^router_balance=0.1 has no effect with a model without'):
        train_step(
            state, None, rollout, rewards, Sampling(), Algorithm(router_balance=0.1),
            model=model, optimizer=optimizer,
        )  # fmt: skip


def test_where_it_has_no_effect():
    options = {'loss': 'surrogate', 'step': 'trust_region', 'router_balance': 0.1}
    with pytest.raises(ValueError, match=r"^router_balance=0.1 has no effect with step='trust"):
        Algorithm(**options)
