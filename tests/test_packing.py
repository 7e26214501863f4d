"""Packed completions: each token once, completions whole, at most two prompts, few sequences."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from grpo_jax.algorithm.checks import check_plan
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.critic import Critic
from grpo_jax.algorithm.program import init_state
from grpo_jax.algorithm.update import train_step
from grpo_jax.engine import packing
from grpo_jax.engine.compute import Compute, ComputePlan
from grpo_jax.models import apply
from grpo_jax.types import Batch, Sampling

COLUMNS = 7
MODEL = tiny.make_model()


def masks(lengths):
    return np.arange(COLUMNS) < np.asarray(lengths)[..., None]


def first_fit(lengths, group_size):
    """Places (sequence, start) of rows: group by group, the longest first, at most two groups."""
    filled, held, places = [0] * len(lengths), [set() for _ in lengths], {}
    for row in sorted(range(len(lengths)), key=lambda row: (row // group_size, -lengths[row])):
        group = row // group_size
        fits = next(
            i
            for i, n in enumerate(filled)
            if n + lengths[row] <= COLUMNS and len(held[i] | {group}) <= 2
        )
        places[row] = fits, filled[fits]
        filled[fits] += lengths[row]
        held[fits] |= {group} if lengths[row] else set()
    return places, sum(n > 0 for n in filled)


pack = tiny.jit(packing.pack, static_argnums=1)


@hypothesis.given(
    lengths=st.lists(st.integers(0, COLUMNS), min_size=12, max_size=12),
    shards=st.sampled_from([1, 2, 4]),
)
@hypothesis.settings(max_examples=60)
def test_completions_are_packed_by_first_fit(lengths, shards):
    packed = pack(jnp.asarray(masks(lengths).reshape(4, 3, COLUMNS)), shards)
    rows = 12 // shards
    source = np.asarray(packed.source)
    most = 0
    for shard in range(shards):
        expected = np.full(source[shard].shape, rows * COLUMNS)
        here = lengths[shard * rows : (shard + 1) * rows]
        places, used = first_fit(here, 3)
        for row, (sequence, start) in places.items():
            tokens = row * COLUMNS + np.arange(here[row])
            expected[sequence, start : start + here[row]] = tokens
        np.testing.assert_array_equal(source[shard], expected)
        most = max(most, used)
    assert packed.used == most


def test_contents_of_a_sequence_by_hand():
    """Two groups of two rows; row 3 (length 5) and row 0 (length 2) share a sequence."""
    rollout = tiny.make_rollout(groups=2, group_size=2, max_tokens=COLUMNS)
    rollout = jax.tree.map(jnp.asarray, rollout)
    mask = jnp.asarray(masks([[2, 6], [3, 5]]))
    rollout = rollout._replace(mask=mask, logprobs=None)
    weights = jnp.arange(28.0).reshape(2, 2, 7)
    source = jnp.array([[[21, 22, 23, 24, 25, 0, 1], [7, 8, 9, 10, 11, 12, 28]]])
    sequences = packing.take(Batch(rollout, None, weights), source)
    tokens, prompts = np.asarray(rollout.tokens), rollout.prompts
    last = [int(prompts.tokens[i, prompts.length[i] - 1]) for i in range(2)]
    np.testing.assert_array_equal(
        sequences.tokens[0], [last[1], *tokens[1, 1, :4], last[0], tokens[0, 0, 0]]
    )
    np.testing.assert_array_equal(sequences.tokens[1, :6], [last[0], *tokens[0, 1, :5]])
    start = np.asarray(prompts.length) - 1
    expected = [*(start[1] + np.arange(5)), start[0], start[0] + 1]
    np.testing.assert_array_equal(sequences.positions[0], expected)
    completion, prompt = np.moveaxis(np.asarray(sequences.visible), -1, 0)  # odd and even owners
    np.testing.assert_array_equal(
        completion, [[7] * 5 + [1] * 2, [3] * 6 + [packing._EMPTY_COLUMN]]
    )
    np.testing.assert_array_equal(prompt, [[2] * 5 + [0] * 2, [0] * 6 + [packing._EMPTY_COLUMN]])
    np.testing.assert_array_equal(sequences.groups, [[[0, 1], [0, 0]]])
    np.testing.assert_array_equal(sequences.part.rollout.tokens[0, 0, :5], tokens[1, 1, :5])
    np.testing.assert_array_equal(sequences.part.weights[0, 0], [21, 22, 23, 24, 25, 0, 1])
    np.testing.assert_array_equal(sequences.part.rollout.mask[1, 0], [True] * 6 + [False])
    whole = packing.put_back(jnp.zeros((2, 2, 7)), sequences.part.weights, source)
    np.testing.assert_array_equal(whole[0, 1], [*range(7, 13), 0])
    np.testing.assert_array_equal(whole[1, 1], [21, 22, 23, 24, 25, 0, 0])


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({}, r'packed=True with rows=None: set how many sequences to process'),
        ({'rows': 0}, r'packed=True with rows=0: set how many sequences to process'),
        ({'rows': 2, 'widths': 4}, r'widths=4 has no effect with packed=True: remove it'),
    ],
)
def test_options_that_packing_does_not_have(options, message):
    with pytest.raises(ValueError, match=message):
        Compute(packed=True, **options)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'ratio': 'sequence'}, r"ratio='sequence'.*, which need whole completions"),
        ({'importance': 'sequence'}, r"importance='sequence', which need whole completions"),
        ({'off_policy_threshold': 0.5}, r'off_policy_threshold=0.5, which need whole completions'),
        ({'loss': 'vespo'}, r"loss='vespo', .* which need whole completions"),
        ({'loss': 'gmpo'}, r"loss='gmpo', .* which need whole completions"),
        (
            {'loss': 'dpo', 'scale': 'none', 'kl': 'none', 'beta': 0.1},
            r"rows=2 with loss='dpo', which compares whole groups",
        ),
    ],
)
def test_losses_that_cannot_be_packed(options, message):
    rollout = tiny.make_rollout(group_size=2)
    plan = ComputePlan(microbatch=2, rows=2, packed=True, widths=1, unroll=False, logprob_chunk=128)
    with pytest.raises(ValueError, match=message):
        check_plan(Algorithm(**options), plan, rollout, None)
    check_plan(Algorithm(importance='token_mask'), plan, rollout, None)


def test_kernels_do_not_support_packed_completions():
    rollout = tiny.make_rollout(groups=2, group_size=2, max_tokens=COLUMNS)
    rollout = jax.tree.map(jnp.asarray, rollout)
    model = tiny.make_model(attention='splash')
    source = jnp.zeros((1, 2, COLUMNS), int)

    def hidden_states(params):
        sequences = packing.take(Batch(rollout._replace(logprobs=None), None, None), source)
        prompts = rollout.prompts
        start, _ = apply(MODEL, params, prompts.tokens, prompts.length, method='prefill')
        return packing.hidden_states(model, params, start, sequences)

    with pytest.raises(ValueError, match=r"packed completions with attention='splash'"):
        jax.eval_shape(hidden_states, tiny.shapes(MODEL))


@pytest.mark.parametrize('updates', tiny.some_slow([1, 2], 2))
def test_an_update_is_the_same(updates):
    """Updates of policy and critic: sequences hold all that tokenwise losses need."""
    rollout, rewards = tiny.make_rollout(max_tokens=COLUMNS), tiny.make_rewards()
    options = {
        'baseline': 'critic', 'scale': 'none', 'importance': 'token', 'inner_updates': updates,
        'entropy': True, 'beta': 0.3, 'entropy_bonus': 0.1,
    }  # fmt: skip
    algorithm = Algorithm(**options)
    critic = Critic(tiny.make_model(scalar_head=True), optax.sgd(0.1))
    params = tiny.make_params(MODEL)
    reference = tiny.make_params(MODEL, seed=1)
    states, metrics = [], []
    for cut in ({'widths': 1}, {'widths': 1, 'rows': 2, 'packed': True}):
        step = tiny.jit(
            functools.partial(
                train_step, model=MODEL, optimizer=optax.sgd(0.1), critic_model=critic,
                compute=Compute(microbatch=2, **cut),
            )
        )  # fmt: skip
        values = tiny.make_params(critic.model)
        start = init_state(MODEL, optax.sgd(0.1), params, critic=critic, value_params=values)
        state, scalars = step(start, reference, rollout, rewards, Sampling(), algorithm)
        states.append(state)
        metrics.append(scalars)
    assert tiny.gap(states[0].params, params) > 1e-3
    assert tiny.gap(states[1], states[0]) < 1e-5
    for name, value in metrics[0].items():
        np.testing.assert_allclose(metrics[1][name], value, rtol=1e-4, atol=1e-5, err_msg=name)
