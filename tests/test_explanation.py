"""The terms of an update for each token, against NumPy in float64 and against the update itself."""

import functools

import jax
import numpy as np
import pytest
import tiny
from test_update import BIGRAM, PARAMS, REFERENCE, SAMPLING, compiled, fresh

from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.explanation import explain, make_explain
from grpo_jax.algorithm.logprobs import completion_logprobs
from grpo_jax.algorithm.presets import preset

LOW, HIGH, BETA = 0.1, 0.15, 0.3
UPDATED = jax.tree.map(lambda a, b: a + 0.1 * b, PARAMS, BIGRAM.make_params(2))


@functools.cache
def explained(algorithm, updated=False, kept=False):
    """The terms, and the rollout that they are of."""
    rollout = tiny.make_rollout()
    if kept:
        rollout = rollout._replace(kept=np.arange(12).reshape(4, 3) % 4 > 0)
    rewards = tiny.make_rewards()[:, : rollout.tokens.shape[1]]
    run = tiny.jit(functools.partial(explain, model=BIGRAM))
    terms = run(
        fresh(PARAMS), REFERENCE, rollout, rewards, SAMPLING, algorithm,
        updated=UPDATED if updated else None,
    )  # fmt: skip
    return jax.tree.map(np.asarray, terms), rollout


def in_float64(params, rollout):
    """Log-probs of the bigram model: those of a token given the one before."""
    before = np.concatenate([
        np.repeat(
            np.take_along_axis(
                rollout.prompts.tokens, rollout.prompts.length[:, None] - 1, axis=1
            )[:, None], rollout.tokens.shape[1], 1,
        ), rollout.tokens[..., :-1],
    ], -1)  # fmt: skip
    embedding, head = (np.asarray(params[name], np.float64) for name in ('embedding', 'head'))
    logits = embedding[before] @ head / SAMPLING.temperature
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(logprobs, rollout.tokens[..., None], -1)[..., 0]
    return np.where(rollout.mask, picked, 0.0)


@pytest.mark.parametrize('kept', [False, True])
def test_coefficients_of_clipped_grpo_by_hand(kept):
    algorithm = Algorithm(beta=BETA, clip_low=LOW, clip_high=HIGH, inner_updates=2)
    terms, rollout = explained(algorithm, updated=True, kept=kept)
    b, g, t = rollout.tokens.shape
    logprobs, old, ref = (in_float64(p, rollout) for p in (UPDATED, PARAMS, REFERENCE))
    np.testing.assert_allclose(terms.logprobs, logprobs, atol=2e-5)
    np.testing.assert_allclose(terms.old_logprobs, old, atol=2e-5)
    np.testing.assert_allclose(terms.ref_logprobs, ref, atol=2e-5)
    np.testing.assert_array_equal(
        terms.sampled_logprobs, np.where(rollout.mask, rollout.logprobs, 0)
    )
    clipped = np.zeros((b, g, t), bool)
    for i in range(b):
        rewards = tiny.make_rewards()[i].astype(np.float64)
        relative = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        for j in range(g):
            trained = rollout.mask[i, j] & (not kept or rollout.kept[i, j])
            np.testing.assert_array_equal(terms.trained[i, j], trained)
            for k in np.flatnonzero(rollout.mask[i, j]):
                a, weight = relative[j], trained[k] / (b * g * max(trained.sum(), 1))
                ratio = np.exp(logprobs[i, j, k] - old[i, j, k])
                clipped[i, j, k] = trained[k] and (ratio > 1 + HIGH if a > 0 else ratio < 1 - LOW)
                slope = 0 if clipped[i, j, k] else -a * ratio
                kl = np.exp(ref[i, j, k] - logprobs[i, j, k])
                slope += BETA * (1 - kl)
                kl = kl - (ref[i, j, k] - logprobs[i, j, k]) - 1
                assert terms.advantages[i, j, k] == pytest.approx(a, abs=1e-5)
                assert terms.ratio[i, j, k] == pytest.approx(ratio, abs=1e-4)
                assert terms.kl[i, j, k] == pytest.approx(kl, abs=1e-4)
                assert terms.weights[i, j, k] == pytest.approx(weight, abs=1e-7)
                assert terms.coefficients[i, j, k] == pytest.approx(weight * slope, abs=1e-6)
    np.testing.assert_array_equal(terms.clipped, clipped)
    assert 5 < clipped.sum() < rollout.mask.sum() - 5  # both cases occur


CASES = {
    'grpo': preset('grpo', beta=BETA),
    'dapo': preset('dapo'),
    'top entropy': Algorithm(top_entropy=0.4, entropy=True),
    'entropy bonus': Algorithm(entropy_bonus=0.1),
    'gspo': preset('gspo'),
    'kl in reward': Algorithm(beta=BETA, kl_place='reward', kl='k1'),
}


@pytest.mark.parametrize(
    'name', tiny.some_slow(CASES, 'dapo', 'gspo', 'entropy bonus', 'kl in reward')
)
def test_terms_add_up_to_the_update(name):
    """The weighted losses sum to its loss, and the coefficients are those of its gradient."""
    algorithm = CASES[name]
    terms, rollout = explained(algorithm)
    state, metrics = compiled()(
        fresh(PARAMS), REFERENCE, rollout, tiny.make_rewards(), SAMPLING, algorithm
    )
    assert (terms.weights * terms.losses).sum() == pytest.approx(float(metrics['loss']), abs=1e-5)
    if algorithm.needs_entropy and name == 'entropy bonus':
        return  # whose gradient does not go through the tokens' log-probs alone

    def weighted(params):
        logprobs, _ = completion_logprobs(BIGRAM, params, rollout, SAMPLING)
        return (terms.coefficients * logprobs).sum()

    gradient = jax.grad(weighted)(jax.tree.map(np.asarray, PARAMS))
    assert tiny.gap(gradient, jax.device_get(state.opt_state[0].trace)) < 2e-5
    assert tiny.largest(gradient) > 1e-2
    for value in terms:
        if value is not None:
            assert not value[~rollout.mask].any()


def test_pairs_share_one_coefficient_per_completion():
    """DPO: minus and plus beta * sigmoid(-beta * m) / B at every token of the two completions."""
    algorithm = preset('dpo', beta=BETA)
    rollout = tiny.make_rollout(group_size=2)
    rewards = np.tile(np.float32([1, 0]), (4, 1))
    rewards[-1] = 0.5  # no preference
    terms = make_explain(BIGRAM, algorithm)(fresh(PARAMS), REFERENCE, rollout, rewards, SAMPLING)
    gap = in_float64(PARAMS, rollout) - in_float64(REFERENCE, rollout)
    margin = BETA * (gap[:, 0].sum(-1) - gap[:, 1].sum(-1))
    expected = BETA / (1 + np.exp(margin)) / 4
    expected[-1] = 0
    per_token = expected[:, None, None] * np.array([-1, 1])[:, None] * rollout.mask
    np.testing.assert_allclose(terms.coefficients, per_token, atol=1e-6)
    assert np.abs(per_token).max() > 0.01
