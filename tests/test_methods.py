"""Methods by name and by options: what each is, and which options are rejected without effect."""

import dataclasses
import itertools
import pathlib

import jax
import jax.numpy as jnp
import pytest

from grpo_jax.algorithm import presets
from grpo_jax.algorithm.config import COEFFICIENTS, Algorithm
from grpo_jax.algorithm.preferences import PAIRWISE
from grpo_jax.engine.compute import Compute
from grpo_jax.run import config as grpo_config
from grpo_jax.run import config_checks, methods, saved_config
from grpo_jax.run.methods import algorithm_of, compute_of
from grpo_jax.run.selection import DROPS

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


def arithmetic():
    return grpo_config.load(CONFIGS / 'arithmetic.py')


def plain(**algorithm):
    config = grpo_config.defaults()
    config.grpo.algorithm.update(algorithm)
    if algorithm.get('kl') == 'none' and algorithm.get('loss') not in PAIRWISE:
        config.grpo.algorithm.beta = 0.0
    return config


def of_preset(name, config=None):
    """The algorithm of a preset that was applied to a config."""
    return algorithm_of(methods.apply(config or arithmetic(), name))


# From the config to the algorithm


def test_the_algorithm_is_the_section():
    config = plain(loss='cispo', clip_high=2.0, beta=0.5)
    assert algorithm_of(config) == Algorithm(loss='cispo', clip_high=2.0, beta=0.5)


def test_how_it_is_computed_is_a_section_of_its_own():
    config = plain()
    assert compute_of(config) == Compute()
    config.grpo.compute.update(microbatch=4, logprob_chunk=16)
    assert compute_of(config) == Compute(microbatch=4, logprob_chunk=16)
    config.grpo.compute.microbatch = 0
    with pytest.raises(ValueError, match=r'^grpo.compute.microbatch=0 is out of range'):
        compute_of(config)


def test_a_term_of_weight_zero_is_left_out():
    config = plain(beta=0.0)
    algorithm = algorithm_of(config)
    assert not algorithm.has_kl
    assert not algorithm.uses_reference


def test_a_term_with_a_weight_is_put_in():
    assert not algorithm_of(plain()).needs_entropy
    assert algorithm_of(plain(entropy_bonus=0.01)).needs_entropy
    assert not algorithm_of(plain()).masks_entropy
    assert algorithm_of(plain(top_entropy=0.2)).masks_entropy


def squared(logprobs, advantages):
    """A loss of one's own."""
    return -advantages * logprobs**2


def test_functions_by_their_path():
    config = plain(loss='test_methods:squared', beta=0.0)
    assert algorithm_of(config).loss is squared
    assert algorithm_of(config).name_of_loss == 'squared'
    config.grpo.algorithm.loss = 'test_methods:square'
    with pytest.raises(ValueError, match=r"^grpo.algorithm.loss: .* did you mean 'squared'"):
        algorithm_of(config)


# The options object


def test_coefficients_are_leaves_and_choices_are_not():
    algorithm = Algorithm(beta=0.1, clip_high=0.3)
    assert sorted(map(float, jax.tree.leaves(algorithm))) == sorted(
        getattr(algorithm, name) for name in COEFFICIENTS
    )
    doubled = jax.tree.map(lambda x: jnp.float32(2 * x), algorithm)
    assert float(doubled.beta) == pytest.approx(0.2)
    assert doubled.loss == 'clipped'
    other = dataclasses.replace(algorithm, loss='cispo')
    assert jax.tree.structure(algorithm) != jax.tree.structure(other)


def test_terms_survive_tracing():
    """A program that was compiled with a KL term is given one, whatever beta is then."""
    seen = []

    @jax.jit
    def run(algorithm):
        seen.append(algorithm.terms)
        return algorithm.beta * 2

    run(Algorithm(beta=0.1))
    run(Algorithm(beta=0.2))
    run(Algorithm(beta=jnp.float32(0.3)))
    assert set(seen) == {frozenset({'beta'})}
    run(Algorithm(beta=0.0))
    assert seen[-1] == frozenset()


def test_replacing_a_coefficient_changes_the_terms():
    algorithm = Algorithm(beta=0.1)
    assert dataclasses.replace(algorithm, beta=0.0).terms == frozenset()
    assert dataclasses.replace(algorithm, entropy_bonus=0.1).terms == {'beta', 'entropy_bonus'}
    stacked = dataclasses.replace(Algorithm(), beta=jnp.array([0.1, 0.2]))
    assert stacked.terms == {'beta'}  # an array counts as not neutral
    axes = dataclasses.replace(jax.tree.map(lambda _: None, stacked), beta=0)
    assert jax.vmap(lambda a: a.beta, in_axes=(axes,))(stacked).shape == (2,)


# Coefficients without effect

PAIR = {'loss': 'dpo', 'scale': 'none', 'kl': 'none'}
TRUST = {'loss': 'surrogate', 'step': 'trust_region', 'kl': 'none'}
CRITIC = {'baseline': 'critic', 'scale': 'batch'}
CLIP_COV = {'covariance': 'clip'}
KL_COV = {'covariance': 'kl', 'inner_updates': 2}
USED = {  # coefficient -> another value, options that use it, options that do not
    'clip_low': (0.3, [{}, {'loss': 'cispo'}], [{'loss': 'sapo'}, {'loss': 'nll'}, PAIR, TRUST]),
    'clip_high': (0.3, [{}, {'loss': 'cispo'}], [{'loss': 'sapo'}, {'loss': 'nll'}, PAIR, TRUST]),
    'dual_clip': (3.0, [{}], [{'loss': 'cispo'}, {'loss': 'sapo'}, PAIR]),
    'tau_positive': (2.0, [{'loss': 'sapo'}], [{}, {'loss': 'cispo'}]),
    'tau_negative': (2.0, [{'loss': 'sapo'}], [{}, {'loss': 'cispo'}]),
    'vespo_k_positive': (1.0, [{'loss': 'vespo'}], [{}, {'loss': 'gmpo'}]),
    'vespo_k_negative': (1.0, [{'loss': 'vespo'}], [{}, {'loss': 'gmpo'}]),
    'vespo_lambda_positive': (1.0, [{'loss': 'vespo'}], [{}, {'loss': 'gmpo'}]),
    'vespo_lambda_negative': (1.0, [{'loss': 'vespo'}], [{}, {'loss': 'gmpo'}]),
    'off_policy_threshold': (0.5, [{}, {'loss': 'vespo'}], [PAIR, PAIR | {'loss': 'ipo'}]),
    'router_balance': (0.1, [{}, {'loss': 'nll'}], [TRUST]),
    'cov_share': (0.1, [CLIP_COV, KL_COV], [{}]),
    'cov_low': (0.5, [CLIP_COV], [{}, KL_COV]),
    'cov_high': (3.0, [CLIP_COV], [{}, KL_COV]),
    'cov_kl': (0.5, [KL_COV], [{}, CLIP_COV]),
    'importance_cap': (3.0, [{'importance': 'token'}, {'importance': 'sequence_mask'}], [{}]),
    'kl_clamp': (10.0, [{}, {'kl': 'k2'}], [{'kl': 'none'}, PAIR]),
    'reference_decay': (0.9, [{}, PAIR], [{'kl': 'none'}]),
    'top_entropy': (0.5, [{}, {'loss': 'nll'}], [PAIR, PAIR | {'loss': 'hinge'}]),
    'label_smoothing': (0.1, [PAIR], [{}, PAIR | {'loss': 'ipo'}, PAIR | {'loss': 'hinge'}]),
    'gamma': (0.9, [CRITIC], [{}]),
    'lam': (0.9, [CRITIC], [{}]),
    'value_clip': (0.0, [CRITIC], [{}]),
    'max_kl': (0.1, [TRUST], [{}, {'loss': 'surrogate'}]),
    'damping': (0.2, [TRUST], [{}, {'loss': 'surrogate'}]),
}
ALWAYS = {'beta', 'entropy_bonus', 'advantage_eps'}  # see below


def test_every_coefficient_is_checked():
    assert USED.keys() | ALWAYS == set(COEFFICIENTS)


def options_of(options, **more):
    """Options of the library, with a KL term where a reference is possible."""
    beta = {'beta': 0.04} if options.get('kl', 'k3') != 'none' or 'loss' in options else {}
    if options.get('kl') == 'none' and options.get('loss') not in PAIRWISE:
        beta = {}
    return beta | options | more


@pytest.mark.parametrize('name', USED)
def test_coefficients_that_are_used(name):
    value, using, _ = USED[name]
    for options in using:
        assert getattr(Algorithm(**options_of(options, **{name: value})), name) == value
        config = plain(**options, **{name: value})
        assert getattr(algorithm_of(config), name) == value


@pytest.mark.parametrize(
    ('name', 'options'), [(name, o) for name, (_, _, others) in USED.items() for o in others]
)
def test_coefficients_without_effect(name, options):
    assert Algorithm(**options_of(options))
    message = rf'{name}={USED[name][0]} has no effect with .*: remove it'
    with pytest.raises(ValueError, match=f'^{message}'):
        Algorithm(**options_of(options, **{name: USED[name][0]}))
    with pytest.raises(ValueError, match=f'^grpo.algorithm.{message}'):
        algorithm_of(plain(**options, **{name: USED[name][0]}))


@pytest.mark.parametrize('name', ['kl_clamp', 'reference_decay'])
def test_a_part_of_a_term_of_weight_zero_has_no_effect(name):
    with pytest.raises(ValueError, match=rf'^{name}=.* has no effect with beta=0.0, kl=.k3.'):
        Algorithm(**{name: USED[name][0]})


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'beta': 5.0, 'kl': 'none'}, r"^beta=5.0 has no effect with kl='none': remove it"),
        ({'importance_cap': 0.1}, r'^importance_cap=0.1 is out of range: .* at least 1$'),
        ({'importance_cap': 3.0}, r"^importance_cap=3.0 has no effect with importance='none'"),
        ({'scale': 'none', 'advantage_eps': 0.1}, '^advantage_eps=0.1 has no effect with scale'),
        ({'cg_steps': 5}, r"^cg_steps=5 has no effect with step='optimizer': remove it"),
        ({'kl': 'none', 'kl_place': 'reward'}, r"^kl_place='reward' has no effect with kl='none'"),
        ({'loss': 'nll', 'ratio': 'sequence'}, r"^ratio='sequence' has no effect with loss='nll'"),
        ({'loss': 'gmpo', 'ratio': 'sequence'}, "^ratio='sequence' has no effect with loss='gmpo'"),
        ({'loss': 'vespo', 'ratio': 'sequence'}, "^ratio='sequence' has no effect with loss='vesp"),
        ({'loss': 'vespo', 'importance': 'sequence'}, r"^importance='sequence' with loss='vespo'"),
        ({'kl': 'k2'}, r"^kl='k2' has no effect with beta=0.0: remove it$"),
        ({'kl': 'k1', 'kl_place': 'reward'}, r"^kl='k1' has no effect with beta=0.0: remove it$"),
        ({'kl_place': 'reward'}, r"^kl_place='reward' has no effect with beta=0.0: remove it$"),
        ({'unbiased_kl': True}, r'^unbiased_kl=True has no effect with beta=0.0: remove it$'),
        (
            {'unbiased_kl': True, 'beta': 0.1, 'kl': 'k1', 'kl_place': 'reward'},
            r"^unbiased_kl=True has no effect with kl_place='reward': remove it$",
        ),
        ({'unbiased_kl': True, 'beta': 0.1, 'kl': 'k2'}, r"^unbiased_kl=True with kl='k2', whose"),
        ({'kl': 'k1', 'beta': 0.1}, r"^kl='k1' with kl_place='loss' has an expected"),
        ({'covariance': 'kl'}, r"^covariance='kl' has no effect with inner_updates=1: remove it$"),
        ({'covariance': 'all'}, r"^covariance='all' is unknown: use one of none, clip, kl$"),
        ({**PAIR, 'beta': 0.1, **CLIP_COV}, r"^covariance='clip' with loss='dpo': preference"),
        ({'off_policy_threshold': -1.0}, r'^off_policy_threshold=-1.0 is out of range: .* least 0'),
        ({**CLIP_COV, 'cov_high': float('inf')}, r'^cov_high=inf is out of range: make it finite$'),
        ({'loss': squared, 'clip_low': 0.1}, r"^clip_low=0.1 has no effect with loss='squared'"),
        ({'advantage_estimator': abs, 'scale': 'none'}, r"^scale='none' has no effect with an adv"),
        ({'clip_low': -0.1}, r'^clip_low=-0.1 is out of range: make it at least 0$'),
        ({'beta': float('nan')}, r'^beta=nan is out of range'),
        ({'top_entropy': 0.0}, r'^top_entropy=0.0 is out of range: .* above 0 and at most 1$'),
        ({**PAIR, 'beta': 0.1, 'label_smoothing': 0.5}, r'^label_smoothing=0.5 .* below 0.5$'),
        ({**PAIR, 'beta': 0.0}, r"^beta=0 with loss='dpo': set it above 0"),
    ],
)
def test_options_of_the_library_that_are_rejected(options, message):
    with pytest.raises(ValueError, match=message):
        Algorithm(**options)


SECTIONS = [
    ('critic.optimizer', 'learning_rate', {}, "baseline='mean'"),
    ('critic.optimizer', 'warmup_steps', {}, "baseline='mean'"),
    ('reward_model', 'steps', {}, 'reward_model.weight=0'),
    ('reward_model', 'kind', {}, 'reward_model.weight=0'),
    ('reward_model.optimizer', 'b2', {}, 'reward_model.weight=0'),
    ('grpo.optimizer', 'learning_rate', TRUST, "step='trust_region'"),
    ('grpo.entropy_control', 'step', {}, 'grpo.entropy_control.target=0'),
    ('grpo.entropy_control', 'most', {}, 'grpo.entropy_control.target=0'),
]


@pytest.mark.parametrize(
    ('options', 'bonus', 'message'),
    [
        (
            {'target': -1.0},
            0.0,
            r'^grpo.entropy_control.target=-1.0 is out of range: make it a',
        ),
        ({'target': float('nan')}, 0.0, r'^grpo.entropy_control.target=nan is out of range'),
        (
            {'target': 1.0, 'step': -1.0},
            0.0,
            r'^grpo.entropy_control: .*step=-1.0: make ',
        ),
        ({'target': 1.0, 'most': float('nan')}, 0.0, r'^grpo.entropy_control: .*most=nan'),
        ({'target': 1.0, 'least': -1.0}, 0.0, r'^grpo.entropy_control: least=-1.0'),
        ({'target': 1.0, 'least': 2.0}, 0.0, r'^grpo.entropy_control: least=2.0, most=1.0'),
        ({'target': 1.0}, 1.5, r'^grpo.algorithm.entropy_bonus=1.5 is where .* most=1.0$'),
    ],
)
def test_entropy_control_that_cannot_be(options, bonus, message):
    config = plain(entropy_bonus=bonus)
    config.grpo.entropy_control.update(options)
    with pytest.raises(ValueError, match=message):
        algorithm_of(config)


@pytest.mark.parametrize(('section', 'key', 'options', 'reason'), SECTIONS)
def test_sections_without_effect(section, key, options, reason):
    config = plain(**options)
    assert algorithm_of(config)
    place = config
    for name in section.split('.'):
        place = place[name]
    place[key] = 'process' if key == 'kind' else 7
    with pytest.raises(
        ValueError, match=f'{section}.{key}=.* has no effect with {reason}: remove it'
    ):
        algorithm_of(config)


def test_sections_that_are_used():
    config = plain(**CRITIC)
    config.critic.optimizer.learning_rate = 0.5
    config.reward_model.update(weight=0.5, steps=3)
    config.grpo.optimizer.learning_rate = 0.5
    assert algorithm_of(config).has_critic


# Which policy samples, and which samples are trained on


def test_sources():
    for options in ({'loss': 'nll'}, PAIR):
        config = plain(**options)
        config.grpo.source = 'reference'
        assert algorithm_of(config).loss == options['loss']
    config = plain()
    config.grpo.source = 'reference'
    message = "grpo.source='reference' with loss='clipped', .*: use loss='nll' or one of dpo, ipo"
    with pytest.raises(ValueError, match=message):
        algorithm_of(config)
    config.grpo.source = 'model'
    with pytest.raises(
        ValueError, match=r"grpo\.source='model' is unknown: use policy or reference"
    ):
        algorithm_of(config)


def test_samples_of_rounded_weights_need_a_correction():
    config = plain(importance='token_mask')
    config.grpo.weights = 'int8'
    assert algorithm_of(config).importance == 'token_mask'
    for options in ({}, PAIR):
        config = plain(**options)
        config.grpo.weights = 'int8'
        with pytest.raises(
            ValueError, match=r"weights='int8' with .*importance='none'.* weights='model'$"
        ):
            algorithm_of(config)
    config.grpo.weights = 'float8'
    with pytest.raises(ValueError, match="weights='float8' is unknown: use one of model, int8"):
        algorithm_of(config)


def test_drops():
    config = plain()
    config.grpo.drop = DROPS
    assert algorithm_of(config)
    config.grpo.drop = ('wrong', 'long')
    with pytest.raises(
        ValueError, match=r"grpo\.drop names 'long', which is unknown: .* duplicates"
    ):
        algorithm_of(config)


@pytest.mark.parametrize('loss', ['dpo', 'ipo', 'hinge'])
def test_pairs(loss):
    config = plain(**PAIR | {'loss': loss})
    assert algorithm_of(config).uses_reference
    config.grpo.algorithm.beta = 0.0
    with pytest.raises(ValueError, match=f"grpo.algorithm.beta=0 with loss='{loss}': set it above"):
        algorithm_of(config)
    config.grpo.algorithm.beta = 0.1
    config.grpo.group_size = 1
    with pytest.raises(ValueError, match=r'needs pairs: grpo.group_size=1 has to be at least 2'):
        algorithm_of(config)
    config.grpo.group_size = 2
    assert algorithm_of(config)
    config.grpo.drop = ('wrong',)
    with pytest.raises(ValueError, match=r"needs pairs: .* grpo.drop=\('wrong',\) empty"):
        algorithm_of(config)


# Presets


def test_the_presets():
    """All of the variants that the project documents, and DeepSeekMath's unified table."""
    assert set(presets.PRESETS) == {
        'rft', 'online_rft', 'dpo', 'ipo', 'dpo_hinge', 'dpo_smoothed', 'ppo', 'trpo', 'grpo',
        'grpo_process', 'dr_grpo', 'dapo', 'bnpo', 'rloo', 'reinforce_pp', 'gspo', 'gspo_token',
        'cispo', 'sapo', 'dual_clip', 'tis', 'tis_sequence', 'masked_is', 'masked_is_sequence',
        'entropy_bonus', 'top_entropy', 'luspo', 'vespo', 'gmpo', 'clip_cov', 'kl_cov',
        'unbiased_kl', 'off_policy_mask', 'deepseek_v32', 'trl_defaults', 'router_balance',
        'reinforce_pp_baseline', 'lite_ppo', 'gpg', 'opo', 'gdpo', 'grpo_passk', 'pass_at_k',
        'remax',
    }  # fmt: skip


# What differs from GRPO, from the papers: choices, coefficients and keys of `grpo`. Without a KL
# term beta is 0.
NO_KL = {'kl': 'none'}
KL_IN_REWARD = {'kl': 'k1', 'kl_place': 'reward'}
COPY = {'loss': 'nll', 'baseline': 'none', 'scale': 'none', 'aggregation': 'token_mean', **NO_KL}
GSPO = {'beta': 0.0, 'clip_low': 3e-4, 'clip_high': 4e-4}
PREFERENCES = {'source': 'reference'}
TABLE = {
    'grpo': ({}, {}, {}),
    'grpo_process': ({'supervision': 'process'}, {}, {}),
    'dr_grpo': ({'scale': 'none', 'aggregation': 'constant', **NO_KL}, {'beta': 0.0}, {}),
    'dapo': (
        {'aggregation': 'token_mean', **NO_KL},
        {'beta': 0.0, 'clip_low': 0.2, 'clip_high': 0.28},
        {'refill': 3},
    ),
    'bnpo': ({'aggregation': 'microbatch_token_mean'}, {}, {}),
    'rloo': (
        {
            'baseline': 'leave_one_out',
            'scale': 'none',
            'aggregation': 'constant',
            **KL_IN_REWARD,
        },
        {},
        {},
    ),
    'reinforce_pp': (
        {'baseline': 'none', 'scale': 'batch', 'aggregation': 'token_mean', **KL_IN_REWARD},
        {},
        {},
    ),
    'reinforce_pp_baseline': ({'scale': 'batch', 'aggregation': 'token_mean', 'kl': 'k2'}, {}, {}),
    'remax': (
        {
            'loss': 'nll',
            'baseline': 'greedy',
            'scale': 'none',
            'aggregation': 'token_mean',
            **KL_IN_REWARD,
        },
        {},
        {},
    ),
    'lite_ppo': (
        {'scale': 'batch_std', 'aggregation': 'token_mean', **NO_KL},
        {'beta': 0.0},
        {},
    ),
    'gpg': (
        {'loss': 'nll', 'scale': 'informative', 'aggregation': 'token_mean', **NO_KL},
        {'beta': 0.0},
        {},
    ),
    'opo': (
        {'advantage_estimator': 'opo', 'aggregation': 'token_mean', **NO_KL},
        {'beta': 0.0},
        {},
    ),
    'gdpo': ({'reward_aggregation': 'normalize_then_sum', 'scale': 'batch_std'}, {}, {}),
    'grpo_passk': ({'advantage_estimator': 'best_minus_second'}, {}, {}),
    'pass_at_k': ({'advantage_estimator': 'pass_at_k', 'pass_k': 4}, {}, {}),
    'ppo': (
        {'baseline': 'critic', 'scale': 'batch', 'aggregation': 'token_mean', **KL_IN_REWARD},
        {},
        {},
    ),
    'gspo': ({'ratio': 'sequence', **NO_KL}, GSPO, {}),
    'gspo_token': ({'ratio': 'sequence_token', **NO_KL}, GSPO, {}),
    'cispo': (
        {'loss': 'cispo', 'aggregation': 'token_mean', **NO_KL},
        {'beta': 0.0, 'clip_low': 1.0, 'clip_high': 2.0},  # a ratio is above 0: no lower bound
        {},
    ),
    'sapo': (
        {'loss': 'sapo', **NO_KL},
        {'beta': 0.0, 'tau_positive': 1.0, 'tau_negative': 1.05},
        {},
    ),
    'luspo': (
        {'ratio': 'sequence', 'aggregation': 'sequence_sum', **NO_KL},
        {'beta': 0.0, 'clip_low': 2e-3, 'clip_high': 2.5e-3},
        {},
    ),
    'vespo': (
        {'loss': 'vespo', 'aggregation': 'token_mean', **NO_KL},
        {
            'beta': 0.0,
            'vespo_k_positive': 2.0,
            'vespo_lambda_positive': 3.0,
            'vespo_k_negative': 3.0,
            'vespo_lambda_negative': 2.0,
        },
        {},
    ),
    'gmpo': ({'loss': 'gmpo', **NO_KL}, {'beta': 0.0, 'clip_low': 0.4, 'clip_high': 0.4}, {}),
    'clip_cov': (
        {'covariance': 'clip', 'aggregation': 'token_mean', **NO_KL},
        {'beta': 0.0, 'cov_share': 2e-4, 'cov_low': 1.0, 'cov_high': 5.0},
        {},
    ),
    'kl_cov': (
        {
            'loss': 'surrogate',
            'covariance': 'kl',
            'aggregation': 'token_mean',
            'inner_updates': 2,
            **NO_KL,
        },
        {'beta': 0.0, 'cov_share': 2e-4, 'cov_kl': 1.0},
        {},
    ),
    'unbiased_kl': ({'unbiased_kl': True}, {}, {}),
    'off_policy_mask': ({}, {'off_policy_threshold': 0.5}, {}),
    'deepseek_v32': ({'unbiased_kl': True, 'scale': 'none'}, {'off_policy_threshold': 0.5}, {}),
    'trl_defaults': (
        {'aggregation': 'token_mean', 'importance': 'sequence_upper_mask', **NO_KL},
        {'beta': 0.0, 'importance_cap': 3.0, 'clip_low': 0.2, 'clip_high': 0.2},
        {},
    ),
    'dual_clip': ({}, {'dual_clip': 3.0}, {}),
    'tis': ({'importance': 'token'}, {'importance_cap': 2.0}, {}),
    'tis_sequence': ({'importance': 'sequence'}, {'importance_cap': 2.0}, {}),
    'masked_is': ({'importance': 'token_mask'}, {'importance_cap': 2.0}, {}),
    'masked_is_sequence': ({'importance': 'sequence_mask'}, {'importance_cap': 2.0}, {}),
    'router_balance': ({}, {'router_balance': 1e-3}, {}),
    'entropy_bonus': ({}, {'entropy_bonus': 1e-3}, {}),
    'top_entropy': ({}, {'top_entropy': 0.2}, {}),
    'trpo': (
        {'loss': 'surrogate', 'step': 'trust_region', **NO_KL},
        {'beta': 0.0, 'max_kl': 0.01},
        {},
    ),
    'rft': (COPY, {'beta': 0.0}, {'source': 'reference', 'drop': ('wrong', 'duplicates')}),
    'online_rft': (COPY, {'beta': 0.0}, {'drop': ('wrong',)}),
    'dpo': ({'loss': 'dpo', 'scale': 'none', **NO_KL}, {'beta': 0.1}, PREFERENCES),
    'ipo': ({'loss': 'ipo', 'scale': 'none', **NO_KL}, {'beta': 0.1}, PREFERENCES),
    'dpo_hinge': ({'loss': 'hinge', 'scale': 'none', **NO_KL}, {'beta': 0.1}, PREFERENCES),
    'dpo_smoothed': (
        {'loss': 'dpo', 'scale': 'none', **NO_KL},
        {'beta': 0.1, 'label_smoothing': 0.1},
        PREFERENCES,
    ),
}


@pytest.mark.parametrize('name', presets.PRESETS)
def test_presets_by_hand(name):
    """Starting from a config whose other settings stay."""
    choices, coefficients, keys = TABLE[name]
    expected = Algorithm(**{'beta': 0.04} | choices | coefficients)
    assert presets.preset(name) == of_preset(name) == expected
    config, before = methods.apply(arithmetic(), name).to_dict(), arithmetic().to_dict()
    grpo, usual = config.pop('grpo'), before.pop('grpo')
    assert config == before
    if name == 'trpo':  # has no use for the optimizer that the config has set
        keys = keys | {'optimizer': grpo_config.defaults().grpo.optimizer.to_dict()}
    for key in usual.keys() - {'algorithm'}:
        assert grpo[key] == keys.get(key, usual[key]), key


def test_a_preset_with_changes():
    assert presets.preset('dapo', clip_high=0.3) == Algorithm(
        aggregation='token_mean', kl='none', clip_high=0.3
    )
    with pytest.raises(ValueError, match=r"preset 'dpao' is unknown: use one of rft, .*"):
        presets.preset('dpao')


def test_no_two_presets_are_the_same():
    by_name = {}
    for name in presets.PRESETS:
        config = methods.apply(arithmetic(), name)
        grpo = config.grpo
        by_name[name] = algorithm_of(config), grpo.source, grpo.refill, tuple(grpo.drop)
    for one, other in itertools.combinations(by_name, 2):
        assert by_name[one] != by_name[other], (one, other)


@pytest.mark.parametrize('name', presets.PRESETS)
def test_presets_do_not_pile_up(name):
    """Whichever came before; beta too."""
    alone, config = methods.apply(arithmetic(), name), arithmetic()
    for before in presets.PRESETS:
        methods.apply(methods.apply(config, before), name)
        if before == 'trpo':  # has removed the optimizer's settings
            config.grpo.optimizer.update(alone.grpo.optimizer)
        assert config == alone, before


def test_grpo_after_dapo_has_its_kl_term():
    config = methods.apply(methods.apply(arithmetic(), 'dapo'), 'grpo')
    assert config.grpo.algorithm.beta == 0.04


def test_an_unknown_preset():
    config = arithmetic()
    with pytest.raises(
        ValueError, match=r"preset 'grop' is unknown: use one of rft, .*, trl, verl"
    ):
        methods.apply(config, 'grop')
    assert config.to_dict() == arithmetic().to_dict()


# Conventions

# How the standard deviation is taken, what is added to it, bound and ratio of the KL term.
CONVENTIONS = {
    'trl': ('std', 1e-4, 0.0, True),
    'verl': ('std', 1e-6, 10.0, False),
    'open_instruct': ('population_std', 1e-8, 0.0, False),
}


@pytest.mark.parametrize('name', presets.CONVENTIONS)
def test_conventions(name):
    """They change those of four values that the method uses, and nothing else."""
    scale, eps, clamp, unbiased = CONVENTIONS[name]
    for before in ('grpo', 'bnpo', 'dual_clip', 'unbiased_kl', 'rloo'):
        config = methods.apply(arithmetic(), before)
        config.grpo.algorithm.kl_clamp = 5.0
        expected = config.to_dict()
        if before != 'rloo':
            expected['grpo']['algorithm'] |= {'scale': scale, 'advantage_eps': eps}
            expected['grpo']['algorithm'] |= {'unbiased_kl': unbiased}
        expected['grpo']['algorithm'] |= {'kl_clamp': clamp}
        assert methods.apply(config, name).to_dict() == expected
        assert algorithm_of(config).kl_clamp == clamp
    config = plain(kl='k2')  # whose gradient is already that of the reverse KL
    assert not algorithm_of(methods.apply(config, name)).unbiased_kl
    for before in ('dapo', 'ppo', 'dr_grpo', 'grpo'):
        config = methods.apply(arithmetic(), before)
        if before == 'grpo':
            config.grpo.algorithm.beta = 0.0
        methods.apply(config, name)
        assert algorithm_of(config)
        assert config.grpo.algorithm.scale == {'ppo': 'batch', 'dr_grpo': 'none'}.get(before, scale)
        assert not config.grpo.algorithm.unbiased_kl


# Config files

TASK = {'beta': 0.005}  # of the arithmetic task, where the method has a KL term


@pytest.mark.parametrize('name', presets.PRESETS)
def test_a_config_file_of_every_preset(name):
    config = grpo_config.load(f'{CONFIGS / "variants.py"}:{name}')
    config_checks.check_keys(config)
    expected = methods.apply(arithmetic(), name)
    if presets.PRESETS[name].get('beta') == presets.BETA:
        expected.grpo.algorithm.update(TASK)
    assert config.to_dict() == expected.to_dict()


def test_a_config_file_of_no_preset():
    with pytest.raises(ValueError, match=r"variants.py:grop: .*preset 'grop' is unknown"):
        grpo_config.load(f'{CONFIGS / "variants.py"}:grop')


@pytest.mark.parametrize(
    'name', ['rft', 'online_rft', 'dpo', 'ppo', 'trpo', 'grpo_process', 'grpo_iterative']
)
def test_config_files_of_methods(name):
    config = grpo_config.load(CONFIGS / f'{name}.py')
    config_checks.check_keys(config)
    config_checks.check_values(config)
    expected = of_preset(name if name in presets.PRESETS else 'grpo')
    if expected.beta == presets.BETA:
        expected = dataclasses.replace(expected, **TASK)
    assert algorithm_of(config) == expected
    assert saved_config.from_json(saved_config.to_json(config)).to_dict() == config.to_dict()
