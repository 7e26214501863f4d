"""Methods by name and by options: what each is, and what is refused because nothing reads it."""

import itertools
import pathlib

import pytest

from grpo_jax import config as grpo_config
from grpo_jax import presets
from grpo_jax.algorithm import Algorithm
from grpo_jax.collect import DROPS
from grpo_jax.methods import parts_of
from grpo_jax.preferences import PAIRWISE
from grpo_jax.types import Objective, Sampling

CONFIGS = pathlib.Path(grpo_config.__file__).parents[1] / 'configs'


def arithmetic():
    return grpo_config.load(CONFIGS / 'arithmetic.py')


def plain(**algorithm):
    config = grpo_config.defaults()
    config.grpo.algorithm.update(algorithm)
    if algorithm.get('kl') == 'none' and algorithm.get('loss') not in PAIRWISE:
        config.grpo.objective.beta = 0.0
    return config


def made(name, config=None):
    """The parts of a preset."""
    return parts_of(presets.apply(config or arithmetic(), name))


# From the config to the parts


def test_the_parts_are_the_sections():
    config = plain(loss='cispo', microbatch=4)
    config.grpo.objective.update(clip_high=2.0, beta=0.5)
    config.grpo.sampling.temperature = 0.5
    assert parts_of(config) == (
        Algorithm(loss='cispo', microbatch=4),
        Objective(clip_high=2.0, beta=0.5),
        Sampling(temperature=0.5),
    )


def test_a_term_of_weight_zero_is_left_out():
    config = plain()
    config.grpo.objective.beta = 0.0
    assert parts_of(config).algorithm == Algorithm(kl='none')


def test_a_term_with_a_weight_is_put_in():
    config = plain()
    assert not parts_of(config).algorithm.entropy
    config.grpo.objective.entropy_bonus = 0.01
    assert parts_of(config).algorithm == Algorithm(entropy=True)
    config = plain()
    config.grpo.objective.top_entropy = 0.2
    assert parts_of(config).algorithm == Algorithm(entropy_mask=True)


# Scalars that nothing reads

PAIR = {'loss': 'dpo', 'scale': 'none', 'kl': 'none'}
TRUST = {'loss': 'surrogate', 'step': 'trust_region', 'kl': 'none'}
CRITIC = {'baseline': 'critic', 'scale': 'batch'}
READ = {  # scalar -> another value, options that read it, options that do not
    'clip_low': (0.3, [{}, {'loss': 'cispo'}], [{'loss': 'sapo'}, {'loss': 'nll'}, PAIR, TRUST]),
    'clip_high': (0.3, [{}, {'loss': 'cispo'}], [{'loss': 'sapo'}, {'loss': 'nll'}, PAIR, TRUST]),
    'dual_clip': (3.0, [{}], [{'loss': 'cispo'}, {'loss': 'sapo'}, PAIR]),
    'tau_positive': (2.0, [{'loss': 'sapo'}], [{}, {'loss': 'cispo'}]),
    'tau_negative': (2.0, [{'loss': 'sapo'}], [{}, {'loss': 'cispo'}]),
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
ALWAYS = {'beta', 'entropy_bonus'}  # put their term into the program themselves


def test_every_scalar_is_checked():
    assert READ.keys() | ALWAYS == set(Objective._fields)


@pytest.mark.parametrize('name', READ)
def test_scalars_that_are_read(name):
    value, reading, _ = READ[name]
    for options in reading:
        config = plain(**options)
        config.grpo.objective[name] = value
        assert getattr(parts_of(config).objective, name) == value


@pytest.mark.parametrize(
    ('name', 'options'), [(name, o) for name, (_, _, others) in READ.items() for o in others]
)
def test_scalars_that_nothing_reads(name, options):
    config = plain(**options)
    assert parts_of(config)
    config.grpo.objective[name] = READ[name][0]
    message = rf'grpo.objective.{name}={READ[name][0]} does nothing with loss=.*: leave it away'
    with pytest.raises(ValueError, match=message):
        parts_of(config)


@pytest.mark.parametrize('name', ['kl_clamp', 'reference_decay'])
def test_what_belongs_to_a_term_of_weight_zero_does_nothing(name):
    config = plain()
    config.grpo.objective.update({'beta': 0.0, name: READ[name][0]})
    with pytest.raises(ValueError, match=f'grpo.objective.{name}=.* does nothing .* kl=.none.'):
        parts_of(config)


SECTIONS = [
    ('critic.optimizer', 'learning_rate', {}, "baseline='mean'"),
    ('critic.optimizer', 'warmup_steps', {}, "baseline='mean'"),
    ('reward_model', 'steps', {}, 'reward_model.weight=0'),
    ('reward_model', 'kind', {}, 'reward_model.weight=0'),
    ('reward_model.optimizer', 'b2', {}, 'reward_model.weight=0'),
    ('grpo.optimizer', 'learning_rate', TRUST, "step='trust_region'"),
]


@pytest.mark.parametrize(('section', 'key', 'options', 'reason'), SECTIONS)
def test_sections_that_nothing_reads(section, key, options, reason):
    config = plain(**options)
    assert parts_of(config)
    place = config
    for name in section.split('.'):
        place = place[name]
    place[key] = 'process' if key == 'kind' else 7
    with pytest.raises(ValueError, match=f'{section}.{key}=.* does nothing with {reason}: leave'):
        parts_of(config)


def test_sections_that_are_read():
    config = plain(**CRITIC)
    config.critic.optimizer.learning_rate = 0.5
    config.reward_model.update(weight=0.5, steps=3)
    config.grpo.optimizer.learning_rate = 0.5
    assert parts_of(config).algorithm.has_critic


# Who samples, and what of it is learnt from


def test_sources():
    for options in ({'loss': 'nll'}, PAIR):
        config = plain(**options)
        config.grpo.source = 'reference'
        assert parts_of(config).algorithm.loss == options['loss']
    config = plain()
    config.grpo.source = 'reference'
    message = "grpo.source='reference' with loss='clipped', .*: use loss='nll' or one of dpo, ipo"
    with pytest.raises(ValueError, match=message):
        parts_of(config)
    config.grpo.source = 'model'
    with pytest.raises(
        ValueError, match=r"grpo\.source='model' is unknown: use policy or reference"
    ):
        parts_of(config)


def test_samples_of_rounded_weights_need_a_correction():
    config = plain(importance='token_mask')
    config.grpo.weights = 'int8'
    assert parts_of(config).algorithm.importance == 'token_mask'
    for options in ({}, PAIR):
        config = plain(**options)
        config.grpo.weights = 'int8'
        with pytest.raises(
            ValueError, match=r"weights='int8' with .*importance='none'.* weights='model'$"
        ):
            parts_of(config)
    config.grpo.weights = 'float8'
    with pytest.raises(ValueError, match="weights='float8' is unknown: use one of model, int8"):
        parts_of(config)


def test_drops():
    config = plain()
    config.grpo.drop = DROPS
    assert parts_of(config)
    config.grpo.drop = ('wrong', 'long')
    with pytest.raises(
        ValueError, match=r"grpo\.drop names 'long', which is unknown: .* duplicates"
    ):
        parts_of(config)


@pytest.mark.parametrize('loss', ['dpo', 'ipo', 'hinge'])
def test_pairs(loss):
    config = plain(**PAIR | {'loss': loss})
    assert parts_of(config).algorithm.reads_reference
    config.grpo.objective.beta = 0.0
    with pytest.raises(ValueError, match=f"grpo.objective.beta=0 with loss='{loss}': set it above"):
        parts_of(config)
    config.grpo.objective.beta = 0.1
    config.grpo.group_size = 1
    with pytest.raises(ValueError, match=r'needs pairs: grpo.group_size=1 has to be at least 2'):
        parts_of(config)
    config.grpo.group_size = 2
    assert parts_of(config)
    config.grpo.drop = ('wrong',)
    with pytest.raises(ValueError, match=r"needs pairs: .* grpo.drop=\('wrong',\) empty"):
        parts_of(config)


# Presets


def test_the_presets():
    """All of the variants that the project documents, and DeepSeekMath's unified table."""
    assert set(presets.PRESETS) == {
        'rft', 'online_rft', 'dpo', 'ipo', 'dpo_hinge', 'dpo_smoothed', 'ppo', 'trpo', 'grpo',
        'grpo_process', 'dr_grpo', 'dapo', 'bnpo', 'rloo', 'reinforce_pp', 'gspo', 'gspo_token',
        'cispo', 'sapo', 'dual_clip', 'tis', 'tis_sequence', 'masked_is', 'masked_is_sequence',
        'entropy_bonus', 'top_entropy',
    }  # fmt: skip


# What differs from GRPO, from the papers: options, scalars and keys of `grpo`. Without a KL term
# beta is 0.
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
    'dual_clip': ({}, {'dual_clip': 3.0}, {}),
    'tis': ({'importance': 'token'}, {'importance_cap': 2.0}, {}),
    'tis_sequence': ({'importance': 'sequence'}, {'importance_cap': 2.0}, {}),
    'masked_is': ({'importance': 'token_mask'}, {'importance_cap': 2.0}, {}),
    'masked_is_sequence': ({'importance': 'sequence_mask'}, {'importance_cap': 2.0}, {}),
    'entropy_bonus': ({'entropy': True}, {'entropy_bonus': 1e-3}, {}),
    'top_entropy': ({'entropy_mask': True}, {'top_entropy': 0.2}, {}),
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
    """Starting from a config with settings of its own, which stay."""
    options, scalars, keys = TABLE[name]
    parts = made(name)
    assert parts.algorithm == Algorithm(**{'microbatch': 32, 'scale': 'std', **options})
    assert parts.objective == Objective(**{'beta': 0.005, **scalars})
    config, before = presets.apply(arithmetic(), name).to_dict(), arithmetic().to_dict()
    grpo, usual = config.pop('grpo'), before.pop('grpo')
    assert config == before
    if name == 'trpo':  # has no use for the optimizer that the config has set
        keys = keys | {'optimizer': grpo_config.defaults().grpo.optimizer.to_dict()}
    for key in usual.keys() - {'algorithm', 'objective'}:
        assert grpo[key] == keys.get(key, usual[key]), key


def test_no_two_presets_are_the_same():
    found = {}
    for name in presets.PRESETS:
        config = presets.apply(arithmetic(), name)
        found[name] = made(name), config.grpo.source, config.grpo.refill, tuple(config.grpo.drop)
    for one, other in itertools.combinations(found, 2):
        assert found[one] != found[other], (one, other)


@pytest.mark.parametrize('name', presets.PRESETS)
def test_presets_do_not_pile_up(name):
    """Whichever came before: but for beta, which some leave as they find it."""
    alone = presets.apply(arithmetic(), name).to_dict()
    for before in presets.PRESETS:
        config = presets.apply(presets.apply(arithmetic(), before), name)
        if 'beta' not in presets.PRESETS[name].get('objective', {}):
            config.grpo.objective.beta = 0.005
        if before == 'trpo':  # has taken the optimizer's settings away
            config.grpo.optimizer = presets.apply(arithmetic(), name).grpo.optimizer
        assert config.to_dict() == alone, before


def test_an_unknown_preset():
    config = arithmetic()
    with pytest.raises(
        ValueError, match=r"preset 'grop' is unknown: use one of rft, .*, trl, verl"
    ):
        presets.apply(config, 'grop')
    assert config.to_dict() == arithmetic().to_dict()


# Conventions

CONVENTIONS = {  # how the standard deviation is taken, what is added to it, bound of the KL term
    'trl': ('std', 1e-4, 0.0),
    'verl': ('std', 1e-6, 10.0),
    'open_instruct': ('population_std', 1e-8, 0.0),
}


@pytest.mark.parametrize('name', presets.CONVENTIONS)
def test_conventions(name):
    """They change what the method reads of three values and nothing else."""
    scale, eps, clamp = CONVENTIONS[name]
    for before in ('grpo', 'bnpo', 'dual_clip', 'rloo'):
        config = presets.apply(arithmetic(), before)
        config.grpo.objective.kl_clamp = 5.0
        expected = config.to_dict()
        if before != 'rloo':
            expected['grpo']['algorithm'] |= {'scale': scale, 'advantage_eps': eps}
        expected['grpo']['objective'] |= {'kl_clamp': clamp}
        assert presets.apply(config, name).to_dict() == expected
        assert parts_of(config).objective.kl_clamp == clamp
    for before in ('dapo', 'ppo', 'dr_grpo'):
        config = presets.apply(presets.apply(arithmetic(), before), name)
        assert parts_of(config)
        assert config.grpo.algorithm.scale == {'dapo': scale, 'ppo': 'batch'}.get(before, 'none')


# Config files


def test_a_config_file_of_every_preset():
    for name in presets.PRESETS:
        config = grpo_config.load(f'{CONFIGS / "variants.py"}:{name}')
        grpo_config.check_keys(config)
        assert config.to_dict() == presets.apply(arithmetic(), name).to_dict()
    with pytest.raises(ValueError, match=r"variants.py:grop: .*preset 'grop' is unknown"):
        grpo_config.load(f'{CONFIGS / "variants.py"}:grop')


@pytest.mark.parametrize(
    'name', ['rft', 'online_rft', 'dpo', 'ppo', 'trpo', 'grpo_process', 'grpo_iterative']
)
def test_config_files_of_methods(name):
    config = grpo_config.load(CONFIGS / f'{name}.py')
    grpo_config.check_keys(config)
    grpo_config.check_values(config)
    expected = made(name) if name in presets.PRESETS else made('grpo')
    assert parts_of(config).algorithm == expected.algorithm
    assert grpo_config.from_json(grpo_config.to_json(config)).to_dict() == config.to_dict()
