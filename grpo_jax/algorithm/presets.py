"""Methods by name, each a value of `Algorithm`.

`preset('dapo')` is DAPO with the paper's coefficients; `preset('dapo', clip_high=0.3)` changes one.
Where papers and code bases differ, a preset follows the paper; `CONVENTIONS` lists how code bases
normalize rewards and bound the KL term. Options of a run rather than of the
update, such as which policy samples, are set by `run.methods.apply`.
"""

from typing import Any

from grpo_jax.algorithm.config import Algorithm

BETA = 0.04  # of the KL term: DeepSeekMath (arXiv 2402.03300), section 4.2

_KL = {'beta': BETA}
_NO_KL = {'kl': 'none'}
_KL_IN_REWARD = {'kl': 'k1', 'kl_place': 'reward', 'beta': BETA}
_IMITATION: dict[str, Any] = {
    'loss': 'nll', 'baseline': 'none', 'scale': 'none', 'aggregation': 'token_mean', **_NO_KL,
}  # fmt: skip
_PREFERENCE = {'scale': 'none', 'beta': 0.1, **_NO_KL}
_GSPO = {'clip_low': 3e-4, 'clip_high': 4e-4, **_NO_KL}

PRESETS: dict[str, dict[str, Any]] = {
    # The unified table of DeepSeekMath (arXiv 2402.03300, table 10); its first row is `SFT`.
    'rft': _IMITATION,  # Yuan et al., arXiv 2308.01825
    'online_rft': _IMITATION,  # the same on the policy's own samples
    'dpo': {'loss': 'dpo', **_PREFERENCE},  # Rafailov et al., arXiv 2305.18290
    'ipo': {'loss': 'ipo', **_PREFERENCE},  # Azar et al., arXiv 2310.12036
    'dpo_hinge': {'loss': 'hinge', **_PREFERENCE},  # SLiC, arXiv 2305.10425
    # Conservative DPO: a fraction of the preference labels is assumed to be wrong.
    'dpo_smoothed': {'loss': 'dpo', 'label_smoothing': 0.1, **_PREFERENCE},
    'ppo': {  # Ouyang et al., arXiv 2203.02155: GAE, whitened advantages, KL in the reward
        'baseline': 'critic', 'scale': 'batch', 'aggregation': 'token_mean', **_KL_IN_REWARD,
    },
    # Schulman et al., arXiv 1502.05477: the trust region replaces clip and KL term.
    'trpo': {'loss': 'surrogate', 'step': 'trust_region', **_NO_KL},
    'grpo': _KL,  # Shao et al., arXiv 2402.03300: outcome supervision
    'grpo_process': {'supervision': 'process', **_KL},  # the same with a reward for each step
    # Variants of GRPO.
    'dr_grpo': {'scale': 'none', 'aggregation': 'constant', **_NO_KL},  # Liu et al., 2503.20783
    'dapo': {'aggregation': 'token_mean', 'clip_high': 0.28, **_NO_KL},  # Yu et al., 2503.14476
    'bnpo': {'aggregation': 'microbatch_token_mean', **_KL},  # TRL's loss_type='bnpo'
    'rloo': {  # Ahmadian et al., arXiv 2402.14740: KL in the reward, sums of log-probs
        'baseline': 'leave_one_out',
        'scale': 'none',
        'aggregation': 'constant',  # the sum over a completion, up to the factor 1 / T
        **_KL_IN_REWARD,
    },
    'reinforce_pp': {  # Hu, arXiv 2501.03262: each token's reward minus the KL from that token on
        'baseline': 'none', 'scale': 'batch', 'aggregation': 'token_mean', **_KL_IN_REWARD,
    },
    'gspo': {'ratio': 'sequence', **_GSPO},  # Zheng et al., arXiv 2507.18071, section 5.1
    'gspo_token': {'ratio': 'sequence_token', **_GSPO},  # its eq. 13 and 14
    'cispo': {  # MiniMax-M1, arXiv 2506.13585: no lower bound, token mean, no KL
        'loss': 'cispo', 'aggregation': 'token_mean', 'clip_low': 1.0, 'clip_high': 2.0, **_NO_KL,
    },
    'sapo': {'loss': 'sapo', **_NO_KL},  # arXiv 2511.20347
    'dual_clip': {'dual_clip': 3.0, **_KL},  # Ye et al., arXiv 1912.09729; verl's default
    'tis': {'importance': 'token', **_KL},  # truncated importance sampling, min(w, 2)
    'tis_sequence': {'importance': 'sequence', **_KL},  # w of the whole completion
    'masked_is': {'importance': 'token_mask', **_KL},  # w outside [1/2, 2] counts as 0
    'masked_is_sequence': {'importance': 'sequence_mask', **_KL},  # w of the whole completion
    'entropy_bonus': {'entropy_bonus': 1e-3, **_KL},  # also maximizes the mean entropy
    'top_entropy': {'top_entropy': 0.2, **_KL},  # Wang et al., arXiv 2506.01939
}  # fmt: skip

SFT = Algorithm(**_IMITATION)  # on demonstrations, with reward 1

# How code bases normalize the rewards of a group and bound the KL term.
CONVENTIONS: dict[str, dict[str, Any]] = {
    'trl': {'scale': 'std', 'advantage_eps': 1e-4, 'kl_clamp': 0.0},
    'verl': {'scale': 'std', 'advantage_eps': 1e-6, 'kl_clamp': 10.0},
    'open_instruct': {'scale': 'population_std', 'advantage_eps': 1e-8, 'kl_clamp': 0.0},
}


def preset(name: str, **changes: Any) -> Algorithm:
    """The `Algorithm` of a preset, with some options changed.

    Args:
      name: a key of `PRESETS`.
      **changes: options of `Algorithm`.

    Raises:
      ValueError: unknown name, or options that `Algorithm` rejects.
    """
    if name not in PRESETS:
        raise ValueError(f'preset {name!r} is unknown: use one of {", ".join(PRESETS)}')
    return Algorithm(**(PRESETS[name] | changes))
