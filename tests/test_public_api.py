"""Three tasks of a new user, with the public API alone, and what a mistake of theirs looks like."""

import inspect
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import grpo_jax

EOS = np.array([1])


def make_model():
    config = grpo_jax.ModelConfig(
        vocab_size=20, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp_width=32
    )
    return grpo_jax.Transformer(config)


def train(algorithm, optimizer=None, steps=3, with_reference=False):
    """The mean reward (even tokens) of each step, and the parameters before and after."""
    model, optimizer = make_model(), optimizer or optax.adam(1e-2)
    params = grpo_jax.init_params(model, jax.random.key(0))
    state = grpo_jax.init_state(model, optimizer, params)
    step = grpo_jax.make_train_step(model, optimizer, algorithm)
    prompts = grpo_jax.Prompts(
        tokens=np.array([[5, 6, 7], [8, 9, 0]]), length=np.array([3, 2]), index=np.arange(2)
    )
    rewards = []
    for k in range(steps):
        rollout = grpo_jax.sample(
            model, state.params, prompts, seed=0, step=k, sampling=grpo_jax.Sampling(),
            eos_ids=EOS, group_size=8, max_tokens=6,
        )  # fmt: skip
        even = np.mean(rollout.mask & (rollout.tokens % 2 == 0), -1).astype(np.float32)
        state, metrics = step(state, params if with_reference else None, rollout, even)
        assert np.isfinite(metrics['loss'])
        rewards.append(float(metrics['reward']))
    return rewards, params, state.params


def moved(before, after):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(abs(x - y).max()), before, after)))


# A loss of one's own, in at most 15 lines


def my_loss(logprobs, old_logprobs, advantages, *, clip_high):
    """PPO's loss without the lower bound."""
    ratio = jnp.exp(logprobs - old_logprobs)
    return -jnp.minimum(ratio, 1 + clip_high) * advantages


def test_a_loss_of_ones_own():
    algorithm = grpo_jax.Algorithm(loss=my_loss, clip_high=0.3)
    _, before, after = train(algorithm)
    assert moved(before, after) > 1e-3
    assert len(inspect.getsource(my_loss).splitlines()) <= 15


def test_a_loss_of_ones_own_equals_the_built_in():
    def clipped(logprobs, old_logprobs, advantages, *, clip_low, clip_high):
        return grpo_jax.losses.clipped(
            logprobs, old_logprobs, advantages, clip_low=clip_low, clip_high=clip_high
        )

    _, _, ours = train(grpo_jax.Algorithm(loss=clipped, inner_updates=2))
    _, _, expected = train(grpo_jax.Algorithm(inner_updates=2))
    assert moved(ours, expected) < 1e-6


def sequence_loss(logprobs, old_logprobs, advantages, mask):
    """REINFORCE with the ratio of the whole completion, which compares all of its tokens."""
    ratio = jnp.exp(jnp.where(mask, logprobs - old_logprobs, 0.0).sum(-1, keepdims=True))
    return -ratio * advantages


def test_a_loss_of_whole_completions():
    _, before, after = train(grpo_jax.Algorithm(loss=sequence_loss))
    assert moved(before, after) > 1e-3


# An advantage estimator of one's own, in at most 10 lines


def best_of_group(rewards, mask):
    """Pass@k: the best gets its lead over the second, the others nothing."""
    second, best = jnp.sort(rewards)[-2:]
    return jnp.where(rewards == best, best - second, 0.0)


def test_an_advantage_estimator_of_ones_own():
    _, before, after = train(grpo_jax.Algorithm(advantage_estimator=best_of_group), steps=5)
    assert moved(before, after) > 1e-3
    assert len(inspect.getsource(best_of_group).splitlines()) <= 10


# An optimizer of one's own, in one line


def test_an_optimizer_of_ones_own():
    optimizer = optax.contrib.muon(1e-2)
    _, before, after = train(grpo_jax.preset('dapo'), optimizer)
    assert moved(before, after) > 1e-3


# Presets learn


def test_training_raises_the_reward():
    rewards, _, _ = train(grpo_jax.preset('grpo'), steps=30, with_reference=True)
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1


# Mistakes


def broken(logprobs, advantages):
    raise RuntimeError('a mistake in a loss')


def test_a_traceback_from_the_step_to_the_loss_is_short():
    """Frames of this package from `train_step` to the loss, both counted.

    The loss is traced before the engine's loops, which then reuse the trace: see test_checks.py.
    """
    with pytest.raises(RuntimeError, match='a mistake in a loss') as caught:
        train(grpo_jax.Algorithm(loss=broken))
    frames = traceback.extract_tb(caught.tb)
    names = [f.name for f in frames if '/grpo_jax/' in f.filename or f.name == 'broken']
    assert names.count('train_step') == 1
    inside = names[names.index('train_step') :]
    assert inside[-1] == 'broken'
    assert len(inside) <= 6, inside


def one_number(logprobs, advantages):
    return (logprobs * advantages).sum()


def unknown_name(logprobs, temperature):
    return -logprobs * temperature


def without_reference(logprobs, ref_logprobs, advantages):
    return -(logprobs - ref_logprobs) * advantages


@pytest.mark.parametrize(
    ('loss', 'message'),
    [
        (one_number, r"'one_number' returned shape \(\): .* \[G, T\] = \(8, 6\)"),
        (unknown_name, r"'unknown_name' has a parameter 'temperature', which is unknown: choose"),
        (without_reference, r"ref_params=None with loss='without_reference', which needs a refer"),
    ],
)
def test_a_loss_that_does_not_fit(loss, message):
    with pytest.raises(ValueError, match=message):
        train(grpo_jax.Algorithm(loss=loss))


def test_a_loss_of_the_wrong_shape_is_not_broadcast_by_other_terms():
    """Adding the KL term would make [G, T] of it."""
    with pytest.raises(ValueError, match=r"'one_number' returned shape \(\)"):
        train(grpo_jax.Algorithm(loss=one_number, beta=0.1), with_reference=True)


def test_a_kl_term_needs_a_reference():
    with pytest.raises(ValueError, match=r'ref_params=None with beta=.*, which needs a reference'):
        train(grpo_jax.Algorithm(beta=0.1))


def test_every_public_name_has_a_docstring():
    assert 16 <= len(grpo_jax.__all__) <= 30
    for name in grpo_jax.__all__:
        assert getattr(grpo_jax, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'samples'"):
        getattr(grpo_jax, 'samples')  # noqa: B009
