"""Methods by name: each is a choice of the same handful of options.

`apply(config, 'dapo')` sets what makes the method; everything else (model, data, rules, learning
rate, sizes) stays. It begins from plain settings, so presets do not pile up, but for β: it stays as
it is wherever a preset does not set it. Where papers and code
bases differ the preset has the paper's choice and its comment says who does otherwise; how the
standard deviation is taken is `CONVENTIONS`.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from grpo_jax.algorithm import Algorithm
from grpo_jax.config import defaults
from grpo_jax.types import Objective

# What no preset that leaves it away has, so that one can follow another.
_PLAIN = {
    'algorithm': {
        name: getattr(Algorithm, name)
        for name in (
            'loss', 'ratio', 'importance', 'supervision', 'baseline', 'scale', 'aggregation', 'kl',
            'kl_place', 'entropy_mask', 'step', 'advantage_eps',
        )
    },
    'objective': {
        name: value for name, value in Objective()._asdict().items() if name not in ('beta',)
    },
    'source': 'policy',
    'refill': 0,
    'drop': (),
}  # fmt: skip
_NO_KL = {'kl': 'none'}
_COPY = {'loss': 'nll', 'baseline': 'none', 'scale': 'none', 'aggregation': 'token_mean', **_NO_KL}
_PAIRS = {'scale': 'none', **_NO_KL}

PRESETS: dict[str, dict[str, Any]] = {
    # The unified table of DeepSeekMath (arXiv 2402.03300, table 10). SFT is a stage of its own.
    'rft': {  # Yuan et al., arXiv 2308.01825
        'algorithm': _COPY,
        'objective': {'beta': 0.0},
        'source': 'reference',
        'drop': ('wrong', 'duplicates'),
    },
    'online_rft': {'algorithm': _COPY, 'objective': {'beta': 0.0}, 'drop': ('wrong',)},
    'dpo': {  # Rafailov et al., arXiv 2305.18290
        'algorithm': {'loss': 'dpo', **_PAIRS},
        'objective': {'beta': 0.1},
        'source': 'reference',
    },
    'ipo': {  # Azar et al., arXiv 2310.12036
        'algorithm': {'loss': 'ipo', **_PAIRS},
        'objective': {'beta': 0.1},
        'source': 'reference',
    },
    'dpo_hinge': {  # SLiC, arXiv 2305.10425
        'algorithm': {'loss': 'hinge', **_PAIRS},
        'objective': {'beta': 0.1},
        'source': 'reference',
    },
    'dpo_smoothed': {  # conservative DPO: a share of the pairs is the wrong way round
        'algorithm': {'loss': 'dpo', **_PAIRS},
        'objective': {'beta': 0.1, 'label_smoothing': 0.1},
        'source': 'reference',
    },
    'ppo': {  # Ouyang et al., arXiv 2203.02155: GAE, whitened advantages, KL in the reward
        'algorithm': {
            'baseline': 'critic',
            'scale': 'batch',
            'aggregation': 'token_mean',
            'kl': 'k1',
            'kl_place': 'reward',
        },
    },
    'trpo': {  # Schulman et al., arXiv 1502.05477: the trust region takes the place of clip and KL
        'algorithm': {'loss': 'surrogate', 'step': 'trust_region', **_NO_KL},
        'objective': {'beta': 0.0},
        'optimizer': defaults().grpo.optimizer.to_dict(),  # has none
    },
    'grpo': {},  # outcome supervision
    'grpo_process': {'algorithm': {'supervision': 'process'}},
    # Variants of GRPO
    'dr_grpo': {  # Liu et al., arXiv 2503.20783
        'algorithm': {'scale': 'none', 'aggregation': 'constant', **_NO_KL},
        'objective': {'beta': 0.0},
    },
    'dapo': {  # Yu et al., arXiv 2503.14476; soft overlong punishment is the reward `soft_overlong`
        'algorithm': {'aggregation': 'token_mean', **_NO_KL},
        'objective': {'beta': 0.0, 'clip_low': 0.2, 'clip_high': 0.28},
        'refill': 3,
    },
    'bnpo': {'algorithm': {'aggregation': 'microbatch_token_mean'}},  # TRL's loss_type='bnpo'
    'rloo': {  # Ahmadian et al., arXiv 2402.14740: KL in the reward, log-probs of whole completions
        'algorithm': {
            'baseline': 'leave_one_out',
            'scale': 'none',
            'aggregation': 'constant',  # their sum, but for the constant 1 / T
            'kl': 'k1',
            'kl_place': 'reward',
        },
    },
    'reinforce_pp': {  # Hu, arXiv 2501.03262: a token's reward less the KL from it on
        'algorithm': {
            'baseline': 'none',
            'scale': 'batch',
            'aggregation': 'token_mean',
            'kl': 'k1',
            'kl_place': 'reward',
        },
    },
    'gspo': {  # Zheng et al., arXiv 2507.18071, section 5.1
        'algorithm': {'ratio': 'sequence', **_NO_KL},
        'objective': {'beta': 0.0, 'clip_low': 3e-4, 'clip_high': 4e-4},
    },
    'gspo_token': {
        'algorithm': {'ratio': 'sequence_token', **_NO_KL},
        'objective': {'beta': 0.0, 'clip_low': 3e-4, 'clip_high': 4e-4},
    },
    'cispo': {  # MiniMax-M1, arXiv 2506.13585: no lower bound, token mean, no KL
        'algorithm': {'loss': 'cispo', 'aggregation': 'token_mean', **_NO_KL},
        'objective': {'beta': 0.0, 'clip_low': 1.0, 'clip_high': 2.0},
    },
    'sapo': {  # arXiv 2511.20347
        'algorithm': {'loss': 'sapo', **_NO_KL},
        'objective': {'beta': 0.0},
    },
    'dual_clip': {'objective': {'dual_clip': 3.0}},  # Ye et al., arXiv 1912.09729; verl's default
    'tis': {'algorithm': {'importance': 'token'}},  # truncated importance sampling, min(w, 2)
    'tis_sequence': {'algorithm': {'importance': 'sequence'}},
    'masked_is': {'algorithm': {'importance': 'token_mask'}},  # w outside [1/2, 2] counts as 0
    'masked_is_sequence': {'algorithm': {'importance': 'sequence_mask'}},
    'entropy_bonus': {'objective': {'entropy_bonus': 1e-3}},
    'top_entropy': {'objective': {'top_entropy': 0.2}},  # Wang et al., arXiv 2506.01939
}

# How code bases standardise rewards in a group and bound the KL term.
CONVENTIONS: dict[str, dict[str, Any]] = {
    'trl': {'algorithm': {'scale': 'std', 'advantage_eps': 1e-4}, 'objective': {'kl_clamp': 0.0}},
    'verl': {'algorithm': {'scale': 'std', 'advantage_eps': 1e-6}, 'objective': {'kl_clamp': 10.0}},
    'open_instruct': {
        'algorithm': {'scale': 'population_std', 'advantage_eps': 1e-8},
        'objective': {'kl_clamp': 0.0},
    },
}


def apply(config: ConfigDict, name: str) -> ConfigDict:
    """Sets the `grpo` section to the preset or convention `name`, and returns the config.

    Set clip bounds and the rest afterwards to differ.

    Args:
      config: from `config.defaults()`.
      name: a key of `PRESETS`; or of `CONVENTIONS`, which changes only what it names, where the
        method in `config` divides by a standard deviation of the group, or has a KL term.

    Raises:
      ValueError: unknown name.
    """
    if name in CONVENTIONS:
        return _follow(config, **CONVENTIONS[name])
    if name not in PRESETS:
        known = ', '.join((*PRESETS, *CONVENTIONS))
        raise ValueError(f'preset {name!r} is unknown: use one of {known}')
    _set(config, _PLAIN)
    _set(config, PRESETS[name])
    return config


def _follow(
    config: ConfigDict, algorithm: Mapping[str, Any], objective: Mapping[str, Any]
) -> ConfigDict:
    if config.grpo.algorithm.scale in ('std', 'population_std'):
        config.grpo.algorithm.update(algorithm)
    if config.grpo.algorithm.kl != 'none' and config.grpo.objective.beta:
        config.grpo.objective.update(objective)
    return config


def _set(config: ConfigDict, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            config.grpo[key].update(value)
        else:
            config.grpo[key] = value
