"""The entropy bonus that follows a target, by hand and in an update."""

import dataclasses
import functools

import jax.numpy as jnp
import optax
import pytest
import tiny

from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.entropy_control import next_entropy_bonus
from grpo_jax.algorithm.program import init_state
from grpo_jax.algorithm.update import train_step
from grpo_jax.engine.compute import Compute
from grpo_jax.types import Sampling


def test_by_hand():
    """Up at and below the target, down above it, where the bonus is 0."""
    coefficient, seen = 0.0, []
    for entropy in (0.1, 0.2, 0.3, 0.1, 0.3, 0.3, 0.3, 0.1):
        coefficient, bonus = next_entropy_bonus(coefficient, entropy, target=0.2, step=0.5, most=1)
        seen.append((coefficient, bonus))
    assert seen == [
        (0.5, 0.5), (1.0, 1.0), (0.5, 0.0), (1.0, 1.0), (0.5, 0.0), (0.0, 0.0), (0.0, 0.0),
        (0.5, 0.5),
    ]  # fmt: skip


def test_bounds():
    assert next_entropy_bonus(0.9, 0.0, target=1.0, step=0.5) == (1.0, 1.0)
    assert next_entropy_bonus(0.2, 2.0, target=1.0, step=0.5, least=0.1) == (0.1, 0.0)
    with pytest.raises(ValueError, match=r'^least=2.0, most=1.0, step=0.005: make least at most'):
        next_entropy_bonus(0.0, 0.0, target=1.0, least=2.0)
    with pytest.raises(ValueError, match=r'step at least 0$'):
        next_entropy_bonus(0.0, 0.0, target=1.0, step=-0.1)


def test_in_a_loop_it_raises_the_entropy_and_compiles_once(rollout, rewards):
    model, optimizer = tiny.Bigram(), optax.sgd(0.5)
    compiled = []

    def train(state, rollout, rewards, algorithm):
        compiled.append(algorithm.terms)
        program = functools.partial(train_step, model=model, optimizer=optimizer, compute=plan)
        return program(state, None, rollout, rewards, Sampling(), algorithm)

    plan, step = Compute(microbatch=4, widths=1), tiny.jit(train)
    state = init_state(model, optimizer, model.make_params())
    algorithm = Algorithm(entropy=True, entropy_bonus=jnp.float32(0))
    coefficient, entropies = 0.0, []
    for _ in range(4):
        state, metrics = step(state, rollout, 0 * rewards, algorithm)
        entropies.append(float(metrics['entropy']))
        target = entropies[0] + 1.0  # a policy that is too certain
        coefficient, bonus = next_entropy_bonus(coefficient, entropies[-1], target=target, step=0.2)
        algorithm = dataclasses.replace(algorithm, entropy_bonus=jnp.float32(bonus))
    assert compiled == [frozenset({'entropy_bonus'})]
    assert entropies[0] == pytest.approx(entropies[1])  # the first bonus is 0
    assert entropies[1] < entropies[2] < entropies[3]
