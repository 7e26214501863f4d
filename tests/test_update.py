"""The update program, whole, against loops over scalars in float64.

Most tests use `tiny.Bigram`, whose program compiles fast. The recording optimizer keeps the
gradient that it was given, so gradients are compared as they are and not through parameters.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import tiny
import typechecking
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.flops import count_flops
from grpo_jax.algorithm import losses
from grpo_jax.algorithm.config import COEFFICIENTS, Algorithm
from grpo_jax.algorithm.logprobs import completion_logprobs, highest_entropy
from grpo_jax.algorithm.optimizer import adamw
from grpo_jax.algorithm.program import init_state, make_train_step
from grpo_jax.algorithm.update import train_step
from grpo_jax.engine.compute import Compute
from grpo_jax.types import Batch, Prompts, Rollout, Sampling, TrainState

RATE = 3.0  # large: two inner updates must leave the clip range
RECORDER = optax.sgd(RATE, momentum=0.0)  # its trace is the last gradient
ADAM = optax.adam(0.1)

SAMPLING = Sampling(temperature=0.8)
CLIP_LOW, CLIP_HIGH, BETA = 0.2, 0.28, 0.3
COMPUTE = {field.name for field in dataclasses.fields(Compute)}

BIGRAM = tiny.Bigram()
PARAMS = BIGRAM.make_params(0)
REFERENCE = jax.tree.map(lambda a, b: a + 0.3 * b, PARAMS, BIGRAM.make_params(1))


def make_algorithm(ref=REFERENCE, **options):
    """The algorithm of a case: without KL where there is no reference."""
    usual = {'beta': BETA if ref is not None else 0.0}
    if options.get('loss') != 'nll':
        usual |= {'clip_low': CLIP_LOW, 'clip_high': CLIP_HIGH}
    return Algorithm(**usual | {k: v for k, v in options.items() if k not in COMPUTE})


@functools.cache
def program(model, optimizer, compute):
    return tiny.jit(
        functools.partial(train_step, model=model, optimizer=optimizer, compute=compute)
    )


def compiled(model=BIGRAM, optimizer=RECORDER, **options):
    """The step of `make_train_step` without its donation, compiled in half the time."""
    compute = {'microbatch': 1, 'logprob_chunk': 128}
    return program(
        model, optimizer, Compute(**compute | {k: v for k, v in options.items() if k in COMPUTE})
    )


def fresh(params, optimizer=RECORDER):
    params = jax.tree.map(jnp.asarray, params)
    return TrainState(jnp.int32(0), params, optimizer.init(params), jnp.int32(0))


def gradient_of(state):
    return jax.device_get(state.opt_state[0].trace)


class Case:
    """One call of the update program from the same start, its gradient and metrics."""

    def __init__(self, options, rollout, rewards, ref=REFERENCE):
        algorithm = make_algorithm(ref, **options)
        step = compiled(**options)
        state, metrics = step(fresh(PARAMS), ref, rollout, rewards, SAMPLING, algorithm)
        self.gradient = gradient_of(state)
        self.params = jax.device_get(state.params)
        self.metrics = {name: float(value) for name, value in metrics.items()}


class Expected:
    """The same by the oracle, for any number of inner updates."""

    def __init__(self, options, rollout, rewards, ref=REFERENCE):
        a = make_algorithm(ref, **options)
        mask, tokens = rollout.mask, rollout.tokens
        params = oracle.float64(PARAMS)

        def logprobs(params):
            return oracle.logprobs(
                oracle.bigram_logits(params, rollout), tokens, SAMPLING.temperature
            )

        old = logprobs(params)
        kls = None if ref is None else (a.kl, logprobs(oracle.float64(ref)))
        if kls is not None and a.kl_place == 'reward':
            penalty = np.zeros(rewards.shape)
            for b, g, t in np.argwhere(mask):
                penalty[b, g] += oracle.kl(a.kl, old[b, g, t], kls[1][b, g, t])
            rewards = rewards - BETA * penalty
        advantages = [oracle.advantages(r, a.baseline, a.scale, a.advantage_eps) for r in rewards]
        self.advantages = np.broadcast_to(np.array(advantages)[..., None], mask.shape)
        weights = oracle.weights(mask, a.aggregation)
        total = functools.partial(
            oracle.total_loss,
            old=old,
            advantages=self.advantages,
            weights=weights,
            loss=a.loss,
            low=CLIP_LOW,
            high=CLIP_HIGH,
            beta=BETA,
            kls=kls if a.kl_place == 'loss' else None,
        )
        self.losses, self.ratios, estimates = [], [], []
        for _ in range(a.inner_updates):
            current = logprobs(params)
            self.losses.append(total(current))
            self.ratios.append(np.exp(current - old))
            if kls is not None:
                estimates += [
                    oracle.kl(a.kl, current[i], kls[1][i]) for i in map(tuple, np.argwhere(mask))
                ]
            slopes = oracle.slope(total, current)
            self.gradient = oracle.bigram_pull_back(params, rollout, slopes, SAMPLING.temperature)
            params = jax.tree.map(lambda p, g: p - RATE * g, params, self.gradient)
        self.params = params
        self.kl = np.mean(estimates) if estimates else None


CASES = {
    'default': {},
    'nll': {'loss': 'nll', 'inner_updates': 2},  # on-policy it has the gradient of `clipped`
    'leave one out': {'baseline': 'leave_one_out'},
    'no baseline': {'baseline': 'none'},
    'no scale': {'scale': 'none'},
    'eps': {'advantage_eps': 0.5},
    'token mean': {'aggregation': 'token_mean'},
    'constant': {'aggregation': 'constant'},
    'k2': {'kl': 'k2'},
    'k3 in the reward': {'kl_place': 'reward'},
    'k1 in the reward': {'kl_place': 'reward', 'kl': 'k1'},
    'two inner updates': {'inner_updates': 2},
}
NEUTRAL = {
    'entropy': {'entropy': True},
    'microbatch of 2': {'microbatch': 2},
    'two rows at a time': {'microbatch': 2, 'rows': 2},
    'six rows at a time': {'microbatch': 4, 'rows': 6},
    'microbatch of B': {'microbatch': 4},
    'chunk of 2': {'logprob_chunk': 2},
}


@pytest.fixture(scope='module')
def outcome(rollout, rewards):
    """The case of a name, computed once."""
    return functools.cache(lambda name: Case((CASES | NEUTRAL)[name], rollout, rewards))


@pytest.mark.parametrize('name', CASES)
def test_gradient_and_loss_equal_the_oracle(name, outcome, rollout, rewards):
    ours, expected = outcome(name), Expected(CASES[name], rollout, rewards)
    assert tiny.largest(expected.gradient) > 0.02
    assert tiny.gap(ours.gradient, expected.gradient) <= 1e-5
    assert ours.metrics['loss'] == pytest.approx(np.mean(expected.losses), abs=1e-5)
    assert ours.metrics['kl'] == pytest.approx(expected.kl, rel=1e-4)


@pytest.mark.parametrize('name', [name for name in CASES if name != 'default'])
def test_every_option_changes_the_gradient(name, outcome):
    other = outcome('two inner updates' if name == 'nll' else 'default').gradient
    assert tiny.gap(outcome(name).gradient, other) > 0.01 * tiny.largest(other)


@pytest.mark.parametrize('name', NEUTRAL)
def test_options_of_speed_and_of_metrics_do_not(name, outcome):
    default, ours = outcome('default'), outcome(name)
    assert tiny.gap(ours.gradient, default.gradient) <= 1e-6
    metrics = {key: ours.metrics[key] for key in default.metrics}
    assert metrics == pytest.approx(default.metrics, abs=1e-5)


def test_second_inner_update_uses_the_first_ones_logprobs(outcome, rollout, rewards):
    """Parameters after two updates, and the share of tokens that each clip bound has cut."""
    ours = outcome('two inner updates')
    expected = Expected({'inner_updates': 2}, rollout, rewards)
    assert tiny.gap(ours.params, expected.params) <= 1e-4  # RATE times the gradient's tolerance
    low, high = [], []  # of each update and completion, its tokens
    for ratio, *place in itertools.product(expected.ratios, range(4), range(3)):
        place = tuple(place)
        mask, sign = rollout.mask[place], expected.advantages[place]
        low.append(((ratio[place] < 1 - CLIP_LOW) & (sign < 0))[mask])
        high.append(((ratio[place] > 1 + CLIP_HIGH) & (sign > 0))[mask])
    over_tokens = [np.concatenate(x).mean() for x in (low, high)]
    in_completions = [np.array([x.mean() for x in y]).reshape(2, 12) for y in (low, high)]
    assert min(over_tokens) > 0
    metrics = {
        'clip_ratio/low_mean': over_tokens[0],
        'clip_ratio/low_min': in_completions[0].min(1).mean(),
        'clip_ratio/high_mean': over_tokens[1],
        'clip_ratio/high_max': in_completions[1].max(1).mean(),
        'clip_ratio/region_mean': sum(over_tokens),
    }
    assert {name: ours.metrics[name] for name in metrics} == pytest.approx(metrics, abs=1e-6)


def test_without_reference_there_is_no_kl(rollout, rewards):
    ours, expected = Case({}, rollout, rewards, None), Expected({}, rollout, rewards, None)
    assert tiny.gap(ours.gradient, expected.gradient) <= 1e-5
    assert 'kl' not in ours.metrics


def test_entropy_metric(outcome, rollout):
    logits = oracle.bigram_logits(oracle.float64(PARAMS), rollout)
    p = np.stack([oracle.distribution(row, SAMPLING.temperature) for row in logits[rollout.mask]])
    expected = -(p * np.log(p)).sum(-1).mean()
    assert outcome('entropy').metrics['entropy'] == pytest.approx(expected, rel=1e-5)
    assert 'entropy' not in outcome('default').metrics


@pytest.mark.parametrize('shift', [0.0, 9.0, -9.0])
def test_sampling_metrics_look_at_completion_tokens_only(shift, rollout, rewards):
    """With a shift all ratios lie on one side of 1, where padding must not show through."""
    shifted = rollout._replace(logprobs=rollout.logprobs + np.float32(shift))
    metrics = Case({}, shifted, rewards).metrics
    logits = oracle.bigram_logits(oracle.float64(PARAMS), rollout)
    policy = oracle.logprobs(logits, rollout.tokens, SAMPLING.temperature)
    difference = (policy - shifted.logprobs)[rollout.mask]
    expected = {
        'sampling/sampling_logp_difference/mean': np.abs(difference).mean(),
        'sampling/sampling_logp_difference/max': np.abs(difference).max(),
        'sampling/importance_sampling_ratio/min': np.exp(difference).min(),
        'sampling/importance_sampling_ratio/mean': np.exp(difference).mean(),
        'sampling/importance_sampling_ratio/max': np.exp(difference).max(),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-3)


def test_nothing_outside_the_mask_matters(rollout, rewards, outcome):
    rng = np.random.default_rng(7)
    other = rollout._replace(
        tokens=np.where(
            rollout.mask, rollout.tokens, rng.integers(0, tiny.VOCAB, rollout.mask.shape)
        ),
        logprobs=np.where(rollout.mask, rollout.logprobs, np.float32(np.nan)),
    )
    ours = Case({}, other._replace(tokens=np.int32(other.tokens)), rewards)
    assert tiny.same(ours.gradient, outcome('default').gradient)
    assert ours.metrics == pytest.approx(outcome('default').metrics)


SAPO = ('tau_positive', 'tau_negative')
# Read by other programs: a moving reference, preferences, a critic, a trust region, other losses,
# and terms that are off here.
ELSEWHERE = (
    'reference_decay', 'label_smoothing', 'gamma', 'lam', 'value_clip', 'max_kl', 'damping',
    'vespo_k_positive', 'vespo_k_negative', 'vespo_lambda_positive', 'vespo_lambda_negative',
    'off_policy_threshold', 'router_balance', 'cov_share', 'cov_low', 'cov_high', 'cov_kl',
)  # fmt: skip


@pytest.mark.parametrize('loss', ['clipped', 'sapo'])
def test_scalars_change_the_gradient_and_never_recompile(rollout, rewards, loss):
    """The second inner update sees the clip bounds; every other scalar acts from the first."""
    clipped = [name for name in COEFFICIENTS if name not in (*SAPO, *ELSEWHERE)]
    step = compiled()
    step.clear_cache()
    usual = Algorithm(
        loss=loss, inner_updates=2, importance='token', beta=0.5, entropy_bonus=0.3, top_entropy=0.9
    )
    changes = [
        (Sampling(), usual),
        *(
            (Sampling(), dataclasses.replace(usual, **{name: 1.05 if 'cap' in name else 0.05}))
            for name in (SAPO if loss == 'sapo' else clipped)
        ),
        (Sampling(temperature=0.5), usual),
        (Sampling(top_k=40), usual),
        (Sampling(top_p=0.9), usual),
        (Sampling(min_p=0.05), usual),
    ]
    gradients = []
    for sampling, algorithm in changes:
        state, _ = step(fresh(PARAMS), REFERENCE, rollout, rewards, sampling, algorithm)
        gradients.append(gradient_of(state))
    for change, gradient in zip(changes[1:], gradients[1:], strict=True):
        assert tiny.gap(gradient, gradients[0]) > 1e-3, change
    assert step._cache_size() == 1


def test_ten_steps_compile_once(rollout, rewards):
    """From the initial state on, with AdamW, the reference, and every scalar on the move."""
    optimizer, _ = adamw(learning_rate=1e-3, steps=10, warmup_steps=2, decay='cosine')
    usual = Algorithm(clip_high=0.3, beta=0.01)
    step = make_train_step(BIGRAM, optimizer, usual, compute=Compute(microbatch=2))
    state = init_state(BIGRAM, optimizer, PARAMS)
    losses = []
    for i in range(10):
        sampling = Sampling(1.0 - 0.05 * i, top_k=40 - i, top_p=1 - 0.01 * i, min_p=0.001 * i)
        algorithm = dataclasses.replace(
            usual, clip_low=0.2 + 0.01 * i, clip_high=0.3 - 0.01 * i, beta=0.01 * (i + 1)
        )
        before = state
        state, metrics = step(before, REFERENCE, rollout, rewards, sampling, algorithm)
        assert before.params['head'].is_deleted()  # its memory is the new state's
        losses.append(float(metrics['loss']))
    assert step._cache_size() == 1
    assert int(state.step) == 10
    assert len(set(losses)) == 10


# With the real model


def test_gradient_is_the_naive_one_at_any_microbatch(rollout, rewards):
    """To 1e-5 of a plain forward over every prompt and completion concatenated."""
    model = tiny.make_model()
    params = tiny.make_params(model)
    logits = functools.partial(oracle.completion_logits, rollout=rollout, config=model.config)
    current = oracle.logprobs(logits(oracle.float64(params)), rollout.tokens)
    advantages = np.array([oracle.advantages(r) for r in rewards])
    advantages = np.broadcast_to(advantages[..., None], rollout.mask.shape)
    weights = oracle.weights(rollout.mask, 'sequence_mean')
    expected = oracle.pull_back(
        lambda p, xp: logits(p, xp=xp), params, rollout.tokens, -weights * advantages
    )
    assert tiny.largest(expected) > 0.05
    loss = oracle.total_loss(current, current, advantages, weights)
    gradients = []
    for microbatch in (1, 4):
        step = compiled(model, microbatch=microbatch)
        state, metrics = step(fresh(params), None, rollout, rewards, Sampling(), Algorithm())
        gradients.append(gradient_of(state))
        assert metrics['loss'] == pytest.approx(loss, abs=1e-5)
        worst = tiny.gap(gradients[-1], expected), tiny.gap(gradients[-1], gradients[0])
        print(f'microbatch {microbatch}: {worst[0]:.1e} of naive, {worst[1]:.1e} of microbatch 1')
        assert max(worst) <= 1e-5


def shapes_of(model, groups, group_size, length, max_tokens):
    """Arguments of a step, as ShapeDtypeStructs."""
    integers = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    floats = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    shape = (groups, group_size, max_tokens)
    rollout = Rollout(
        Prompts(integers((groups, length)), integers((groups,)), integers((groups,))),
        integers(shape),
        jax.ShapeDtypeStruct(shape, bool),
        floats(shape),
        jax.ShapeDtypeStruct(shape[:2], bool),
    )
    params = tiny.shapes(model)
    state = jax.eval_shape(functools.partial(init_state, model, RECORDER), params)
    return state, params, rollout, floats(shape[:2])


def test_only_the_passes_that_are_needed(model):
    """In exact FLOPs: a reference pass only with a reference, old log-probs where they differ."""
    state, ref, rollout, rewards = shapes_of(model, 4, 3, 6, 5)

    def forward(params, rollout):
        return completion_logprobs(model, params, rollout, Sampling(), chunk=128)[0]

    one_pass = count_flops(forward, ref, rollout)

    def flops(ref, **options):
        algorithm = make_algorithm(ref, **options)
        step = compiled(model, **options)
        return count_flops(step, state, ref, rollout, rewards, Sampling(), algorithm)

    plain = flops(None)
    assert one_pass < plain / 3
    assert flops(ref) == plain + one_pass
    assert flops(ref, kl_place='reward') == plain + 2 * one_pass
    assert flops(None, inner_updates=3) == 3 * plain + one_pass
    assert flops(ref, inner_updates=3) == 3 * plain + 2 * one_pass
    assert flops(None, microbatch=2) == plain


def test_no_buffer_of_full_logits():
    """At V = 32,768 and T = 512 no [B, G, T, V] exists, nor one group's [G, T, V].

    With microbatch = B and a chunk of T it is the program that would: the test tells them apart.
    """
    groups, group_size, max_tokens, vocab = 4, 4, 512, 32_768
    model = tiny.make_model(vocab_size=vocab, layers=1)
    args = shapes_of(model, groups, group_size, 8, max_tokens)
    full = groups * group_size * max_tokens * vocab

    def memory(**options):
        program = (
            compiled(model, **options).lower(*args, Sampling(), Algorithm(beta=BETA)).compile()
        )
        found = re.findall(r'\b[a-z]+\d*\[([\d,]+)\]', program.as_text())
        largest = max(np.prod([int(n) for n in dims.split(',')], dtype=int) for dims in found)
        return int(largest), program.memory_analysis().temp_size_in_bytes

    largest, temporary = memory(microbatch=1, logprob_chunk=32, widths=2)
    print(f'largest {largest / full:.4f}, temporary {temporary / (4 * full):.4f} of B G T V')
    assert largest < full / groups / 8
    assert temporary < 4 * full / 4
    largest, temporary = memory(microbatch=groups, logprob_chunk=max_tokens, widths=1)
    assert largest >= full
    assert temporary > 4 * full


@pytest.mark.slow
def test_a_larger_vocabulary_costs_its_head_and_one_chunk():
    """Temporary memory is the sum of the head's gradient and a chunk's logits.

    With the reduced optimizations of the tests it is up to 1.4 of that; two chunks would be 1.7.
    """
    groups, group_size, chunk = 2, 8, 32

    def memory(vocab):
        model = tiny.make_model(vocab_size=vocab, width=128, layers=1, remat=False)
        args = shapes_of(model, groups, group_size, 8, 64)
        step = compiled(model, logprob_chunk=chunk, widths=1)
        program = step.lower(*args, Sampling(), Algorithm(beta=BETA)).compile()
        return program.memory_analysis().temp_size_in_bytes

    grown = memory(131_072) - memory(4096)
    assert grown < 1.5 * 4 * (131_072 - 4096) * (128 + group_size * chunk)


def test_init_state_copies_parameters_or_makes_them(model, params):
    state = init_state(model, RECORDER, params)
    assert tiny.same(state.params, params)
    assert int(state.step) == int(state.skipped) == 0
    pointers = [
        {x.unsafe_buffer_pointer() for x in jax.tree.leaves(t)} for t in (state.params, params)
    ]
    assert not pointers[0] & pointers[1]
    made = init_state(model, RECORDER, jax.random.key(0))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, state)


# Gradients that are not finite


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('inner_updates', [1, 2])
def test_a_reward_that_is_not_finite_skips_the_update(value, inner_updates, rollout, rewards):
    step = compiled(optimizer=ADAM)
    algorithm = make_algorithm(inner_updates=inner_updates)
    start = fresh(PARAMS, ADAM)
    bad = rewards.copy()
    bad[1, 2] = value
    args = rollout, rewards, SAMPLING, algorithm
    state, metrics = step(start, REFERENCE, rollout, bad, SAMPLING, algorithm)
    assert tiny.same((state.params, state.opt_state), (start.params, start.opt_state))
    assert int(state.skipped) == metrics['skipped_updates'] == inner_updates
    assert int(state.step) == 1
    assert not np.isfinite(metrics['grad_norm'])

    state, metrics = step(state, REFERENCE, *args)
    clean, _ = step(start, REFERENCE, *args)
    assert tiny.same((state.params, state.opt_state), (clean.params, clean.opt_state))
    assert not tiny.same(state.params, start.params)
    assert int(state.skipped) == metrics['skipped_updates'] == inner_updates  # a total
    assert int(state.step) == 2


def test_a_parameter_that_is_not_finite_skips_the_update(rollout, rewards):
    broken = jax.tree.map(np.array, PARAMS)
    broken['head'][0, 0] = np.inf
    step = compiled(optimizer=ADAM)
    start = fresh(broken, ADAM)
    state, _ = step(start, REFERENCE, rollout, rewards, SAMPLING, make_algorithm())
    assert tiny.same((state.params, state.opt_state), (start.params, start.opt_state))
    assert int(state.skipped) == 1


# Bad input


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'loss': 'pdo'}, r"loss='pdo' is unknown: use one of clipped, nll"),
        ({'baseline': 'max'}, r"baseline='max' is unknown: use one of mean, leave_one_out, none"),
        ({'scale': 'iqr'}, r"scale='iqr' is unknown: use one of std, population_std, batch"),
        ({'aggregation': 'sum'}, r"aggregation='sum' is unknown: use one of sequence_mean, "),
        ({'kl': 'k4'}, r"kl='k4' is unknown: use one of k1, k2, k3"),
        ({'kl_place': 'both'}, r"kl_place='both' is unknown: use one of loss, reward"),
        ({'inner_updates': 0}, r'inner_updates=0 is out of range: make it at least 1'),
        ({'kl': 'k1'}, r"kl='k1' with kl_place='loss' .*use kl='k2' or 'k3', or kl_place='reward'"),
    ],
)
def test_bad_algorithm(options, message):
    with pytest.raises(ValueError, match=message):
        Algorithm(**options)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'microbatch': 0}, r'microbatch=0 is out of range: make it at least 1'),
        ({'logprob_chunk': -1}, r'logprob_chunk=-1 is out of range: make it at least 1'),
        ({'packed': True}, r'packed=True with rows=None: set how many sequences'),
        ({'packed': True, 'rows': 2, 'widths': 4}, r'widths=4 has no effect with packed=True'),
    ],
)
def test_bad_compute(options, message):
    with pytest.raises(ValueError, match=message):
        Compute(**options)


def call(algorithm, rollout, rewards, ref=None, **compute):
    settings = {'model': BIGRAM, 'optimizer': RECORDER, 'compute': Compute(**compute)}
    return train_step(fresh(PARAMS), ref, rollout, rewards, SAMPLING, algorithm, **settings)


def test_a_microbatch_that_does_not_divide_the_batch(rollout, rewards):
    with pytest.raises(ValueError, match=r'microbatch=3 .*batch of 4 .*use one of 1, 2, 4$'):
        call(Algorithm(), rollout, rewards, microbatch=3)


@pytest.mark.parametrize('options', [{}, {'scale': 'none'}, {'baseline': 'none'}])
def test_a_group_of_one_with_a_group_baseline(options):
    rollout = tiny.make_rollout(group_size=1)
    with pytest.raises(ValueError, match=r'group_size=1 with .*use group_size >= 2, or'):
        call(Algorithm(**options), rollout, np.ones((4, 1), np.float32))


@pytest.mark.parametrize('shape', [(4,), (4, 1), (3, 3), (4, 2), (4, 3, 1)])
def test_rewards_of_another_shape_than_the_rollout(shape, rollout):
    """One reward for each completion: a single one per prompt must not spread over the group."""
    algorithm = Algorithm(baseline='none', scale='none')
    with typechecking.off(), pytest.raises(ValueError, match=r'rewards.*4, 3'):
        call(algorithm, rollout, np.ones(shape, np.float32))


def test_only_tokens_of_high_entropy_have_a_policy_loss_but_all_have_a_kl(rollout):
    """As in TRL; the bonus is that of the selected tokens."""
    rng = np.random.default_rng(0)
    logprobs, ref, advantages, entropy = (
        jnp.asarray(rng.uniform(-3, -1, rollout.mask.shape[1:]), jnp.float32) for _ in range(4)
    )
    part = Rollout(None, None, jnp.asarray(rollout.mask[0]), logprobs, None)
    group = Batch(part, advantages, logprobs, ref, logprobs)
    selected = jnp.asarray(rng.random(entropy.shape) < 0.5)
    algorithm = Algorithm(beta=0.5, top_entropy=0.5, entropy_bonus=0.25)
    whole, kl = losses.policy_loss(algorithm, logprobs, group, entropy)
    ours, same = losses.policy_loss(algorithm, logprobs, group._replace(selected=selected), entropy)
    np.testing.assert_array_equal(kl, same)
    np.testing.assert_allclose(ours, jnp.where(selected, whole, 0.5 * kl), rtol=1e-6)


@given(seed=st.integers(0, 10**6), share=st.floats(0.01, 1))
def test_high_entropy_is_that_above_a_quantile(seed, share):
    """By linear interpolation, as `np.quantile` and TRL's `torch.quantile` have it."""
    rng = np.random.default_rng(seed)
    entropy = jnp.asarray(rng.random((2, 3, 7)), jnp.float32)
    mask = rng.random(entropy.shape) < 0.7
    mask[0, 0, 0] = True
    position = (1 - share) * (mask.sum() - 1)
    if abs(position - round(position)) < 1e-3:
        return  # where rounding decides
    bound = np.quantile(np.asarray(entropy, np.float64)[mask], 1 - share)
    expected = mask & (np.asarray(entropy) >= bound)
    np.testing.assert_array_equal(highest_entropy(entropy, jnp.asarray(mask), share), expected)
