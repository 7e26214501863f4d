"""Tokens of an environment: attention reads them, and losses, metrics and advantages do not."""

import dataclasses
import functools

import jax
import numpy as np
import oracle
import pytest
import test_update
import tiny
from test_update import BIGRAM, CASES, PARAMS, RECORDER, REFERENCE, SAMPLING, Case, Expected

from grpo_jax.algorithm import critic
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.presets import PRESETS, preset
from grpo_jax.algorithm.program import make_train_step
from grpo_jax.types import FunctionRewards, Sampling, StepRewards

NAMES = ('default', 'token mean', 'constant', 'k3 in the reward', 'two inner updates')


@pytest.fixture(scope='module')
def episodes():
    """Random completions; some tokens between the first and the last are not the policy's."""
    rollout = tiny.make_rollout(max_tokens=9, seed=3)
    rng = np.random.default_rng(0)
    length = rollout.mask.sum(-1, keepdims=True)
    column = np.arange(rollout.mask.shape[-1])
    inside = (column > 0) & (column < length - 1)
    trained = rollout.mask & ~(inside & (rng.random(rollout.mask.shape) < 0.5))
    assert (rollout.mask & ~trained).sum() > 10
    logprobs = np.where(trained, rollout.logprobs, np.float32(0))
    return rollout._replace(trained=trained, logprobs=logprobs)


def of_policy_alone(rollout):
    """As if the environment's tokens were no part of the completion, except that they are read."""
    return rollout._replace(mask=rollout.trained)


@pytest.mark.parametrize('name', NAMES)
def test_gradient_and_metrics_are_those_of_the_policys_tokens(name, episodes, rewards):
    ours = Case(CASES[name], episodes, rewards)
    expected = Expected(CASES[name], of_policy_alone(episodes), rewards)
    assert tiny.gap(ours.gradient, expected.gradient) <= 1e-5
    assert ours.metrics['loss'] == pytest.approx(np.mean(expected.losses), abs=1e-5)
    assert ours.metrics['kl'] == pytest.approx(expected.kl, rel=1e-4)
    lengths = episodes.trained.sum(-1)
    assert ours.metrics['completions/mean_length'] == pytest.approx(lengths.mean())
    every = episodes.prompts.length.sum() + episodes.mask.sum()
    assert ours.metrics['step_tokens'] == every


def test_gradient_of_the_model_reads_the_environments_tokens(episodes, rewards):
    """To 1e-5 of a plain forward over the whole texts, scored at the policy's tokens alone."""
    model = tiny.make_model()
    params = tiny.make_params(model)
    logits = functools.partial(oracle.completion_logits, rollout=episodes, config=model.config)
    current = oracle.logprobs(logits(oracle.float64(params)), episodes.tokens)
    advantages = np.array([oracle.advantages(r) for r in rewards])[..., None]
    weights = oracle.weights(episodes.trained, 'sequence_mean')
    total = functools.partial(
        oracle.total_loss, old=current, advantages=np.broadcast_to(advantages, weights.shape),
        weights=weights,
    )  # fmt: skip
    expected = oracle.pull_back(
        lambda p, xp: logits(p, xp=xp), params, episodes.tokens, oracle.slope(total, current)
    )
    step = test_update.compiled(model, microbatch=2, rows=3)
    state, _ = step(
        test_update.fresh(params), None, episodes, rewards, Sampling(), Algorithm(beta=0.0)
    )
    assert tiny.largest(expected) > 0.02
    assert tiny.gap(test_update.gradient_of(state), expected) <= 1e-5


# One of each kind of loss, weight and advantage; `slow` are the rest of the table.
FEW = ('grpo', 'gspo', 'tis_sequence', 'off_policy_mask', 'clip_cov', 'top_entropy', 'grpo_process')
OTHER_MODEL = ('ppo', 'router_balance', 'remax')  # a critic, experts, a baseline


@pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=() if name in FEW else pytest.mark.slow)
        for name in PRESETS
        if name not in OTHER_MODEL
    ],
)
def test_no_method_counts_the_environments_tokens(name, episodes, rewards):
    """Gradient and metrics do not change where the mask leaves the environment's tokens out."""
    a = preset(name)
    rollout = episodes
    if a.pairwise:
        pair = {'tokens', 'mask', 'logprobs', 'ended', 'trained'}
        rollout = rollout._replace(**{field: getattr(rollout, field)[:, :2] for field in pair})
        rewards = rewards[:, :2]
    if name == 'grpo_process':
        ends = rollout.trained & (np.arange(9) % 2 == 0)
        ends |= np.arange(9) == rollout.mask.sum(-1, keepdims=True) - 1
        values = np.random.default_rng(1).random(ends.shape).astype(np.float32)
        rewards = StepRewards(values, ends)
    if a.uses_function_rewards:
        values = np.stack([rewards, rewards**2], axis=-1)
        rewards = FunctionRewards(values, np.ones((len(values), 2), np.float32))
    if name == 'pass_at_k':
        a = dataclasses.replace(a, pass_k=2)
    a = dataclasses.replace(a, inner_updates=2) if a.step != 'trust_region' else a
    step = make_train_step(BIGRAM, RECORDER, a)
    reference = REFERENCE if a.uses_reference else None

    def run(rollout):
        state, metrics = step(test_update.fresh(PARAMS), reference, rollout, rewards, SAMPLING, a)
        del metrics['step_tokens']
        return jax.device_get(state.params), {k: float(v) for k, v in metrics.items()}

    (params, metrics), expected = run(rollout), run(of_policy_alone(rollout))
    assert tiny.gap(params, PARAMS) > 1e-4
    assert tiny.gap(params, expected[0]) <= 1e-6
    assert metrics == pytest.approx(expected[1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize('steps', [False, True])
def test_an_environments_tokens_are_no_steps_of_gae(episodes, rewards, steps):
    """The policy's last token of a turn is followed by its first of the next, by hand."""
    rng = np.random.default_rng(2)
    values, penalty = rng.standard_normal((2, *episodes.mask.shape)).astype(np.float32)
    a = dataclasses.replace(preset('ppo'), gamma=0.9, lam=0.7)
    ends = episodes.trained & (rng.random(values.shape) < 0.5)
    of_steps = StepRewards(rng.standard_normal(values.shape).astype(np.float32), ends)
    given = of_steps if steps else rewards
    ours = np.asarray(critic.estimate(a, given, values, episodes, penalty))
    for place in np.ndindex(rewards.shape):
        mine = np.flatnonzero(episodes.trained[place])
        reward = -penalty[place][mine]
        if steps:
            reward += np.where(ends[place], of_steps.values[place], 0)[mine]
        else:
            reward[-1] += rewards[place]
        value, every = values[place][mine], np.ones(len(mine), bool)
        expected = oracle.gae(reward[None], value[None], every[None], 0.9, 0.7)[0]
        np.testing.assert_allclose(ours[place][mine], expected, atol=1e-5)
        assert (np.delete(ours[place], mine) == 0).all()
