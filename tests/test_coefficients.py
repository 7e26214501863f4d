"""What multiplies each token's grad log pi: DeepSeekMath's unified table, method by method.

The table (arXiv 2402.03300, section 5.2, table 10; appendix A.1) tells methods apart by their data,
reward and gradient coefficient. Here the coefficient is read off the gradient that the real update
program hands to its optimizer, and compared with its closed form in float64 NumPy. It can be read
off because every token of the rollout is different and the policy is a table of logits by the token
before, so that a row of the table is used by one token alone; only the first tokens of a group
share one, that of their prompt's end.
"""

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import tiny

from grpo_jax.algorithm import losses, presets
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.critic import Critic
from grpo_jax.algorithm.presets import SFT, preset
from grpo_jax.algorithm.update import make_batch, train_step
from grpo_jax.engine.compute import Compute, choose
from grpo_jax.engine.policy import Policy, ValueModel
from grpo_jax.models import KeyValues, ModelConfig, Transformer
from grpo_jax.run import config, methods, selection
from grpo_jax.types import (
    BaselinedRewards,
    Batch,
    FunctionRewards,
    Prompts,
    Rollout,
    Sampling,
    StepRewards,
    TrainState,
)

B, G, T = SIZE = (3, 4, 5)
VOCAB = 64  # one for every completion token and every prompt, and one that is unused
BETA = 0.3
RECORDER = optax.sgd(0.1, momentum=0.0)  # its trace is the last gradient


class TableConfig(ModelConfig):
    output_parameter = None


class Table(Transformer):
    """Logits of the next token, or a value, by the token before: a row of `table` each."""

    config: ModelConfig = TableConfig(**vars(tiny.Bigram.config) | {'vocab_size': VOCAB})

    def apply(self, variables, *args, method):
        table = variables['params']['table']
        if method == 'prefill':
            tokens, length = args
            last = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)[:, 0]
            return KeyValues(None, None), table[last]
        if method == 'extend':
            return table[args[0]]
        if method == 'output_matrix':
            return jnp.eye(VOCAB)  # states are logits
        return {'logits': args[0], 'scores': args[0][..., 0]}[method]


def make_world():
    """The rollout, and what the tables say of it in float64."""
    rng = np.random.default_rng(0)
    ids = rng.permutation(VOCAB).astype(np.int32)
    prompts = Prompts(np.repeat(ids[:B, None], 2, 1), np.int32([2, 1, 2]), np.arange(B))
    tokens = ids[B : B + B * G * T].reshape(SIZE)
    before = np.concatenate([np.repeat(ids[:B], G).reshape(B, G, 1), tokens[..., :-1]], -1)
    used = rng.integers(1, T + 1, (B, G))
    used[0, :2] = T, 1
    mask = np.arange(T) < used[..., None]
    policy, reference = rng.standard_normal((2, VOCAB, VOCAB)).astype(np.float32)
    reference = policy + 0.8 * reference
    values = rng.standard_normal((VOCAB, 1)).astype(np.float32)
    logp, ref = (log_softmax(x)[before, tokens] for x in (policy, reference))
    sampled = (logp + 0.7 * rng.standard_normal(SIZE)).astype(np.float32)
    rewards = rng.uniform(-1, 2, (B, G)).astype(np.float32)
    rewards[2] = 0.7  # all completions are equally good
    last = mask & (np.arange(T) == used[..., None] - 1)
    ends = last | (mask & (rng.random(SIZE) < 0.4))
    return SimpleNamespace(
        rollout=Rollout(prompts, tokens, mask, sampled, rng.random((B, G)) < 0.5),
        rewards=rewards,
        functions=FunctionRewards(
            rng.uniform(-1, 2, (B, G, 2)).astype(np.float32), np.float32([[1, 0.5]] * B)
        ),
        correct=np.float32([[1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]]),
        steps=StepRewards(rng.uniform(-1, 2, SIZE).astype(np.float32), ends),
        policy={'table': policy}, reference={'table': reference}, critic={'table': values},
        mask=mask, before=before, tokens=tokens, last=last,
        probabilities=np.exp(log_softmax(policy)), logp=logp, ref=ref,
        values=values.astype(float)[before, 0], sampled=sampled.astype(float),
    )  # fmt: skip


def log_softmax(table):
    table = table.astype(float)
    return table - np.log(np.exp(table).sum(-1, keepdims=True))


W = make_world()


# Closed forms


def outcome(rewards=W.rewards, baseline='mean', scale='std'):
    """(r - mean) / std of each group, or what takes their place, at all tokens."""
    rows = np.array([oracle.advantages(r, baseline, scale) for r in rewards])
    return np.broadcast_to(rows[..., None], SIZE)


def every_token(advantages):
    return np.broadcast_to(np.array(advantages)[..., None], SIZE)


def of_groups(estimator, *arrays):
    return every_token([estimator(*group) for group in zip(*arrays, strict=True)])


PASS_AT_2 = functools.partial(oracle.pass_at_k, k=2, eps=1e-4)


def process():
    return np.array([oracle.process_advantages(*group) for group in zip(*W.steps, strict=True)])


def critic(rewards, gamma, lam):
    """A_t from rewards [B, G, T] per token."""
    groups = zip(rewards, W.values, W.mask, strict=True)
    return np.array([oracle.gae(*group, gamma, lam) for group in groups])


def whitened(advantages):
    """By the mean and standard deviation of all completion tokens."""
    tokens = advantages[W.mask]
    return (advantages - tokens.mean()) / (tokens.std() + 1e-4)


def pairs(slope):
    """`slope(m)` at the preferred completion of each pair, its negative at the other, else 0."""
    ratio = np.where(W.mask, W.logp - W.ref, 0)[:, :2].sum(-1)
    sign = np.sign(W.rewards[:, :2] - W.rewards[:, 1::-1])
    m = (sign * ratio).sum(1)
    return np.broadcast_to((sign * slope(m)[:, None])[..., None], (B, 2, T))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


LOG_RATIO = W.logp - W.ref
PULL = BETA * (np.exp(-LOG_RATIO) - 1)  # of k3: beta (ref / pi - 1)
PENALIZED = W.rewards - BETA * np.where(W.mask, LOG_RATIO, 0).sum(-1)  # k1 in the reward
PULLS_TO_GO = np.array([  # of k1 from each token on
    [[BETA * sum(row[t:]) for t in range(T)] for row in group]
    for group in np.where(W.mask, LOG_RATIO, 0)
])  # fmt: skip
OUTCOMES = np.where(W.last, W.rewards[..., None], 0.0)  # r comes with the last token
EVERY = np.ones(SIZE)
MISMATCH = np.exp(W.logp - W.sampled)
WHOLE = np.exp(np.where(W.mask, W.logp - W.sampled, 0).sum(-1, keepdims=True)) * EVERY
TEXTS = [f'{"same" if i in (0, 2) else i}' for i in range(B * G)]  # two right ones
NEW = np.arange(B * G).reshape(B, G) != 2


class Row(NamedTuple):
    """A method, what it learns from, and its coefficient f64[B, G, T]."""

    preset: str
    algorithm: Algorithm
    microbatch: int
    rollout: Rollout
    rewards: Any
    coefficient: np.ndarray


def row(coefficient, name, rewards=W.rewards, *, microbatch=B, sampled=W.sampled, **options):
    """A preset, with what differs from it; by default one microbatch, a loop less to compile.

    As many completions of a prompt as there are coefficients; without those that the preset drops.
    """
    chosen = methods.apply(config.defaults(), name).grpo
    rollout = first(coefficient.shape[1])
    rollout = rollout._replace(logprobs=np.float32(sampled[:, : coefficient.shape[1]]))
    if chosen.drop:
        kept, _ = selection.select_completions(rollout, TEXTS, rewards, chosen.drop)
        rollout = rollout._replace(kept=kept)
    coefficient = np.where(rollout.mask, coefficient, 0)
    return Row(name, preset(name, **options), microbatch, rollout, rewards, coefficient)


def first(size):
    """The rollout with as many completions of each prompt."""
    prompts, whole = W.rollout.prompts, W.rollout._replace(prompts=None)
    return jax.tree.map(lambda x: x[:, :size], whole)._replace(prompts=prompts)


def within(weight):
    """Masked importance weights, C = 2."""
    return np.where((weight > 0.5) & (weight < 2), weight, 0)


LIKELY = 2 * W.logp - W.sampled  # of a sampler with a liking for the bad completions


def near(advantages, threshold):
    """Not both bad and far from the policy of a sampler that says `LIKELY`."""
    gap = np.where(W.mask, LIKELY - W.logp, 0).sum(-1) / W.mask.sum(-1)
    return (advantages >= 0) | (gap <= threshold)[..., None]


def covariance(advantages):
    """Of every token's log-prob and advantage, about their means over all tokens."""
    mean, mean_advantage = W.logp[W.mask].mean(), advantages[W.mask].mean()
    return (W.logp - mean) * (advantages - mean_advantage)


LOW, HIGH = 0.1, 0.9
MIDDLE = (covariance(outcome()) > LOW) & (covariance(outcome()) < HIGH)
TWO = W.rewards[:, :2]
GREEDY = np.float32([0.3, -0.5, 1.1])  # rewards of greedy completions
CRITIC = {'scale': 'none', 'kl': 'none', 'kl_place': 'loss', 'beta': 0.0}
STEPS = np.where(W.steps.ends, W.steps.values, 0.0)
WIDE = {'max_kl': 5e8, 'damping': 1e8}  # the Fisher matrix is negligible against it
ROWS = {
    # The table; SFT has a test of its own
    'RFT': row((W.correct * NEW)[..., None] * EVERY, 'rft', W.correct),
    'online RFT': row(W.correct[..., None] * EVERY, 'online_rft', W.correct),
    'DPO': row(pairs(lambda m: 0.5 * sigmoid(-0.5 * m)), 'dpo', TWO, beta=0.5),
    'PPO': row(whitened(critic(OUTCOMES - BETA * LOG_RATIO, 1.0, 0.95)), 'ppo', beta=BETA),
    'GRPO': row(outcome() + PULL, 'grpo', beta=BETA),
    'GRPO, process': row(process() + PULL, 'grpo_process', W.steps, beta=BETA),
    # Their relatives
    'DPO, smoothed': row(
        pairs(lambda m: 0.5 * (0.8 * sigmoid(-0.5 * m) - 0.2 * sigmoid(0.5 * m))),
        'dpo_smoothed', TWO, beta=0.5, label_smoothing=0.2,
    ),
    'IPO': row(pairs(lambda m: 2 * (1 - m)), 'ipo', TWO, beta=0.5),
    'hinge': row(pairs(lambda m: np.where(0.5 * m < 1, 0.5, 0)), 'dpo_hinge', TWO, beta=0.5),
    'PPO, as it comes': row(critic(OUTCOMES, 0.9, 0.8), 'ppo', **CRITIC, gamma=0.9, lam=0.8),
    'PPO, process': row(
        critic(STEPS, 0.9, 0.8), 'ppo', W.steps,
        **CRITIC, supervision='process', gamma=0.9, lam=0.8,
    ),
    'TRPO': row(outcome(), 'trpo', **WIDE),
    'GRPO, k2': row(outcome() - BETA * LOG_RATIO, 'grpo', kl='k2', beta=BETA),
    # Variants of GRPO
    'Dr. GRPO': row(outcome(scale='none'), 'dr_grpo'),
    'DAPO': row(outcome(), 'dapo'),
    'BNPO': row(outcome() + PULL, 'bnpo', microbatch=1, beta=BETA),
    'RLOO': row(outcome(PENALIZED, 'leave_one_out', 'none'), 'rloo', beta=BETA),
    'REINFORCE++': row(whitened(W.rewards[..., None] - PULLS_TO_GO), 'reinforce_pp', beta=BETA),
    'REINFORCE++, baseline': row(
        whitened(outcome(scale='none')) - BETA * LOG_RATIO, 'reinforce_pp_baseline', beta=BETA
    ),
    'ReMax': row(
        (W.rewards - GREEDY[:, None])[..., None] - PULLS_TO_GO, 'remax',
        BaselinedRewards(W.rewards, GREEDY), beta=BETA,
    ),
    'Lite PPO': row(outcome(scale='none') / (W.rewards.std(ddof=1) + 1e-4), 'lite_ppo'),
    'GPG': row(outcome(scale='none') * 3 / 2, 'gpg'),  # 2 of 3 groups have differences
    'OPO': row(of_groups(oracle.opo, W.rewards, W.mask.sum(-1)), 'opo'),
    'GDPO': row(every_token(oracle.gdpo(*W.functions)) + PULL, 'gdpo', W.functions, beta=BETA),
    'GRPO, pass@k': row(
        of_groups(oracle.best_minus_second, W.rewards) + PULL, 'grpo_passk', beta=BETA
    ),
    'pass@k': row(of_groups(PASS_AT_2, W.rewards) + PULL, 'pass_at_k', pass_k=2, beta=BETA),
    'GSPO': row(outcome(), 'gspo'),
    'GSPO, token': row(outcome(), 'gspo_token'),
    'CISPO': row(outcome(), 'cispo'),
    'SAPO': row(outcome(), 'sapo'),
    'LUSPO': row(outcome(), 'luspo'),
    'VESPO': row(outcome(), 'vespo'),
    'GMPO': row(outcome(), 'gmpo'),
    'Clip-Cov': row(
        outcome() * ~MIDDLE, 'clip_cov', cov_share=1.0, cov_low=LOW, cov_high=HIGH
    ),
    'unbiased KL': row(outcome() - BETA * LOG_RATIO, 'unbiased_kl', beta=BETA),
    'off-policy mask': row(
        outcome() * near(outcome(), 0.05) + PULL, 'off_policy_mask',
        sampled=LIKELY, beta=BETA, off_policy_threshold=0.05,
    ),
    'DeepSeek-V3.2': row(
        outcome(scale='none') * near(outcome(), 0.5) - BETA * LOG_RATIO, 'deepseek_v32',
        sampled=LIKELY, beta=BETA, off_policy_threshold=0.5,
    ),
    'TRL': row(np.where(WHOLE <= 3, WHOLE, 0) * outcome(), 'trl_defaults'),
    'dual clip': row(outcome() + PULL, 'dual_clip', beta=BETA),
    'TIS': row(np.minimum(MISMATCH, 2) * outcome() + PULL, 'tis', beta=BETA),
    'TIS, sequence': row(np.minimum(WHOLE, 2) * outcome() + PULL, 'tis_sequence', beta=BETA),
    'masked': row(within(MISMATCH) * outcome() + PULL, 'masked_is', beta=BETA),
    'masked, sequence': row(within(WHOLE) * outcome() + PULL, 'masked_is_sequence', beta=BETA),
}  # fmt: skip


# What the program says


@functools.cache
def compiled(microbatch, has_critic):
    """The update program, and `gradient_coefficient` of the batch that it makes."""
    model, compute = Table(), Compute(microbatch=microbatch)
    critic = Critic(model, RECORDER) if has_critic else None

    def run(state, ref, rollout, rewards, algorithm):
        new, metrics = train_step(
            state, ref, rollout, rewards, Sampling(), algorithm, model=model, optimizer=RECORDER,
            compute=compute, critic_model=critic,
        )  # fmt: skip
        whole = choose(compute, model.config, (B, G, 2, T))
        policy = Policy(model, ref, Sampling(), whole)
        value_model = critic and ValueModel(model, whole)
        batch = make_batch(algorithm, policy, value_model, state, rollout, rewards)
        logprobs = policy.outputs(state.params, batch)['logprobs']
        coefficient = jax.vmap(lambda x, group: losses.gradient_coefficient(algorithm, x, group))(
            logprobs, batch
        )
        return new.opt_state, new.params, metrics['grad_norm'], coefficient

    return tiny.jit(run)


def weights_of(algorithm, rollout):
    """The known weight of every token's loss; that of a pair is a share of the pairs."""
    if algorithm.pairwise:
        return rollout.mask / B
    mask = rollout.mask if rollout.kept is None else rollout.mask & rollout.kept[..., None]
    if algorithm.aggregation == 'microbatch_token_mean':
        return mask / (B * mask.sum((1, 2), keepdims=True))
    return oracle.weights(mask, algorithm.aggregation)


def read_off(gradient, rollout):
    """Weight times coefficient of every token, f64[B, G, T], from the gradient of the table.

    The loss's gradient by the logits of a row is p S - c at the tokens that follow there and p S at
    all others, S being the sum of their c. Nothing else may be in it.
    """
    gradient, p = gradient.astype(float), W.probabilities
    place = W.before[:, : rollout.tokens.shape[1]], rollout.tokens
    follows = np.zeros((VOCAB, VOCAB), bool)
    follows[place] = True
    total = np.where(follows, 0, gradient).sum(1) / np.where(follows, 0, p).sum(1)
    c = (p * total[:, None] - gradient)[place]
    again = np.zeros((VOCAB, VOCAB))
    again[place] = c
    again = p * again.sum(1, keepdims=True) - again
    np.testing.assert_allclose(gradient, again, atol=1e-6 * np.abs(gradient).max())
    return c


class Found(NamedTuple):
    coefficient: np.ndarray  # f64[B, G, T] by the gradient that the optimizer was given
    function: np.ndarray  # f32[B, G, T] by `losses.gradient_coefficient`
    weights: np.ndarray


def find(algorithm, rollout, rewards, microbatch=B):
    state = TrainState(jnp.int32(0), W.policy, RECORDER.init(W.policy), jnp.int32(0))
    if algorithm.has_critic:
        state = state._replace(value_params=W.critic, value_opt_state=RECORDER.init(W.critic))
    program = compiled(microbatch, algorithm.has_critic)
    recorded, params, norm, function = jax.device_get(
        program(state, W.reference, rollout, rewards, algorithm)
    )
    gradient = recorded[0].trace['table']
    if algorithm.step == 'trust_region':  # which went along -gradient; its length is a metric
        step = params['table'].astype(float) - W.policy['table']
        gradient = -step / np.linalg.norm(step) * norm
    weights, c = weights_of(algorithm, rollout), read_off(gradient, rollout)
    assert (np.abs(c[weights == 0]) < 1e-7).all()
    return Found(np.divide(c, weights, out=np.zeros_like(c), where=weights > 0), function, weights)


@functools.cache
def found(name):
    row = ROWS[name]
    return find(row.algorithm, row.rollout, row.rewards, row.microbatch)


def close(ours, expected):
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('name', ROWS)
def test_the_gradient_has_the_coefficient_of_its_row(name):
    close(found(name).coefficient, ROWS[name].coefficient)
    assert np.abs(found(name).coefficient).max() > 0.2


@pytest.mark.parametrize('name', ROWS)
def test_gradient_coefficient_is_that_of_the_program(name):
    """Compares them at the tokens with a weight above 0; the weights decide what is trained on."""
    learnt = found(name).weights > 0
    close(found(name).function[learnt], found(name).coefficient[learnt])
    assert (found(name).function[~ROWS[name].rollout.mask] == 0).all()


def test_imitation_has_the_coefficient_one():
    """SFT: one demonstration of each prompt, by the stage's settings, which read no reference."""
    rollout = first(1)._replace(logprobs=np.zeros((B, 1, T), np.float32))
    demonstrations = find(SFT, rollout, np.ones((B, 1), np.float32))
    close(demonstrations.coefficient, np.where(rollout.mask, 1, 0))
    close(demonstrations.function, np.where(rollout.mask, 1, 0))


def test_a_reward_of_zero_is_as_good_as_dropping():
    """Online RFT without `drop`: wrong completions have the coefficient 0, but count as tokens."""
    row = ROWS['online RFT']
    whole = find(row.algorithm, W.rollout, row.rewards)
    close(whole.coefficient, row.coefficient)
    np.testing.assert_allclose(whole.weights[W.mask], 1 / W.mask.sum())
    assert ROWS['online RFT'].rollout.kept.sum() == W.correct.sum()


def test_every_preset_has_a_row():
    """But for those that change which tokens count, or add what is no multiple of grad log pi.

    KL-Cov differs from the second inner update on, see `test_coefficient_of_held_back_tokens`.
    """
    assert {row.preset for row in ROWS.values()} == set(presets.PRESETS) - {
        'entropy_bonus', 'top_entropy', 'kl_cov', 'router_balance',
    }  # fmt: skip


def test_the_rows_reach_every_case():
    """Both sides of every bound, a group without and with differences, steps inside completions."""
    used = W.mask & (W.rewards != 0.7)[..., None]
    for kind in (MISMATCH, WHOLE):
        for share in (kind < 0.5, (kind > 0.5) & (kind < 2), kind > 2):
            assert share[used].any()
    assert (WHOLE[used] > 3).any()
    for threshold in (0.05, 0.5):
        for share in (near(outcome(), threshold), ~near(outcome(), threshold)):
            assert share[used].any()
    for share in (MIDDLE, covariance(outcome()) < LOW, covariance(outcome()) > HIGH):
        assert share[used].any()
    one, other = ROWS['hinge'].coefficient[:2, 0, 0]
    assert {abs(one), abs(other)} == {0, 0.5}
    assert (ROWS['DPO'].coefficient[2] == 0).all()  # without a preference
    assert {1, T} <= set(W.mask.sum(-1).flat)
    assert (W.steps.ends & ~W.last).sum() > 3
    for advantages in (outcome(), process(), critic(OUTCOMES, 0.9, 0.8)):
        assert (advantages[W.mask] > 0).any()
        assert (advantages[W.mask] < 0).any()


# Off-policy: the closed forms of the ratio

RATIOS = np.array([0.3, 0.6, 0.79, 0.81, 1.0, 1.27, 1.29, 2.0, 2.9, 3.1, 6.0])
CLIP = {'clip_low': 0.2, 'clip_high': 0.28}
TAU = {'tau_positive': 1.5, 'tau_negative': 2.5}


def inside(ratio, advantage):
    """0 where the ratio has left the clip range in the direction that the advantage pushes."""
    left = ratio > 1.28 if advantage > 0 else ratio < 0.8
    return np.where(left, 0, ratio * advantage)


def gate(ratio, tau):
    """Slope of sigmoid(tau (ratio - 1)) 4 / tau by log pi."""
    opened = sigmoid(tau * (ratio - 1))
    return 4 * opened * (1 - opened) * ratio


OFF_POLICY = {
    'nll': ({'loss': 'nll'}, lambda r, a: a * np.ones_like(r)),
    'surrogate': ({'loss': 'surrogate'}, lambda r, a: r * a),
    'clipped': (CLIP, inside),
    'dual clip': (
        CLIP | {'dual_clip': 3.0},
        lambda r, a: np.where((a < 0) & (r > 3), 0, inside(r, a)),
    ),
    'cispo': ({'loss': 'cispo'} | CLIP, lambda r, a: np.clip(r, 0.8, 1.28) * a),
    'sapo': ({'loss': 'sapo'} | TAU, lambda r, a: a * gate(r, 1.5 if a > 0 else 2.5)),
    'vespo': (
        {'loss': 'vespo'},
        lambda r, a: a * (r**2 * np.exp(3 - 3 * r) if a > 0 else r**3 * np.exp(2 - 2 * r)),
    ),
    'gmpo': (
        {'loss': 'gmpo', 'clip_low': -np.log(0.8), 'clip_high': np.log(1.28)},
        inside,
    ),
}


def one_token_each(ratio, advantage, **log_probs):
    """A group of completions of one token, and the token's log-probs now."""
    now = np.linspace(-3, -1, len(ratio))[:, None]
    rollout = Rollout(None, None, np.ones_like(now, bool), None, None)
    group = Batch(rollout, np.full_like(now, advantage), None, **log_probs)
    return now, group._replace(old_logprobs=now - np.log(ratio)[:, None])


def coefficient(logprobs, group, **options):
    arrays = jax.tree.map(jnp.asarray, (logprobs, group))
    return np.asarray(tiny.jit(losses.gradient_coefficient)(Algorithm(**options), *arrays))


@pytest.mark.parametrize('name', OFF_POLICY)
@pytest.mark.parametrize('advantage', [1.5, -1.5])
def test_off_policy(name, advantage):
    options, expected = OFF_POLICY[name]
    now, group = one_token_each(RATIOS, advantage)
    ours = coefficient(now, group, **options)
    close(ours[:, 0], expected(RATIOS, advantage))


@pytest.mark.parametrize(('name', 'low'), [('k3', 0.0), ('k2', 0.0), ('k3', 0.2), ('k2', 0.2)])
def test_pull_of_the_reference(name, low):
    """Off-policy it has no ratio: beta (ref / pi - 1), or -beta log(pi / ref); 0 beyond a clamp."""
    now, group = one_token_each(RATIOS, 0.0)
    group = group._replace(ref_logprobs=now + np.log(RATIOS)[::-1, None])
    ours = coefficient(now, group, beta=BETA, kl_clamp=low, kl=name)
    ref = RATIOS[::-1]
    pull = {'k3': ref - 1, 'k2': np.log(ref)}[name]
    size = {'k3': ref - np.log(ref) - 1, 'k2': np.log(ref) ** 2 / 2}[name]
    close(ours[:, 0], BETA * np.where((size > low) & (low > 0), 0, pull))


@pytest.mark.parametrize(
    ('name', 'pull'),
    [('k3', lambda log_ratio: log_ratio), ('k1', lambda log_ratio: 1 + log_ratio)],
)
def test_pull_of_the_reference_with_the_ratio(name, pull):
    """The gradient of pi/old * k, over the policy that sampled that of the reverse KL."""
    now, group = one_token_each(RATIOS, 0.0)
    group = group._replace(ref_logprobs=now + np.log(RATIOS)[::-1, None])
    ours = coefficient(now, group, beta=BETA, kl=name, unbiased_kl=True)
    close(ours[:, 0], -BETA * RATIOS * pull(-np.log(RATIOS)[::-1]))


def test_pull_of_the_reference_is_that_of_the_reverse_kl():
    """Over all tokens of a distribution, weighted by how often another policy samples them."""
    rng = np.random.default_rng(0)
    logits, old, ref = rng.standard_normal((3, 9))
    old, ref = (log_softmax(x)[:, None] for x in (old, ref))
    rollout = Rollout(None, None, np.ones((9, 1), bool), None, None)
    group = Batch(rollout, np.zeros((9, 1)), None, ref_logprobs=ref, old_logprobs=old)
    p = np.exp(log_softmax(logits))
    exact = p * (log_softmax(logits) - ref[:, 0] - (p * (log_softmax(logits) - ref[:, 0])).sum())
    for name, unbiased in (('k3', True), ('k1', True), ('k3', False)):
        options = {'beta': 1.0, 'kl': name, 'unbiased_kl': unbiased}
        c = coefficient(log_softmax(logits)[:, None], group, **options)[:, 0]
        loss_gradient = -np.exp(old[:, 0]) * c  # by each token's log-prob
        by_logits = loss_gradient - p * loss_gradient.sum()
        assert np.allclose(by_logits, exact, atol=1e-5) == unbiased


@pytest.mark.parametrize('advantage', [1.5, -1.5])
def test_coefficient_of_held_back_tokens(advantage):
    """KL-Cov: r A, less the slope of |log r| where the covariance is high."""
    now, group = one_token_each(RATIOS, advantage)
    chosen = np.arange(len(RATIOS))[:, None] % 2 == 0
    group = group._replace(high_covariance=chosen)
    options = {'loss': 'surrogate', 'covariance': 'kl', 'inner_updates': 2, 'cov_kl': 0.7}
    ours = coefficient(now, group, **options)
    held = np.where(chosen[:, 0], 0.7 * np.sign(np.log(RATIOS)), 0)
    close(ours[:, 0], RATIOS * advantage - held)


@pytest.mark.parametrize('level', ['sequence', 'sequence_token'])
@pytest.mark.parametrize('advantage', [1.5, -1.5])
def test_off_policy_ratio_of_a_sequence(level, advantage):
    """GSPO: each of |o| tokens has loss -s A and moves s by s / |o|, so s A at each, s inside."""
    rng = np.random.default_rng(0)
    mask = np.arange(4) < np.resize([4, 1, 3, 2], len(RATIOS))[:, None]
    now, spread = rng.uniform(-3, -1, mask.shape), rng.standard_normal(mask.shape)
    mean = np.where(mask, spread, 0).sum(1, keepdims=True) / mask.sum(1, keepdims=True)
    old = now - np.where(mask, spread - mean + np.log(RATIOS)[:, None], 9.0)
    rollout = Rollout(None, None, mask, None, None)
    group = Batch(rollout, np.full(mask.shape, advantage), None, old_logprobs=old)
    ours = coefficient(now, group, **CLIP, ratio=level)
    close(ours, np.where(mask, inside(RATIOS, advantage)[:, None], 0))
