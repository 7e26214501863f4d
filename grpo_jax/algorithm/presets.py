"""Methods by name, each a value of `Algorithm`.

`preset('dapo')` is DAPO with the paper's coefficients; `preset('dapo', clip_high=0.3)` changes one.
Where papers and code bases differ, a preset follows the paper; `CONVENTIONS` lists how code bases
normalize rewards, and bound and weigh the KL term. Options of a run rather than of the
update, such as which policy samples, are set by `run.methods.apply`.
"""

from typing import Any

from grpo_jax import plugins
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
    # Li et al., arXiv 2310.10505: the reward of the greedy completion as baseline, no clip
    'remax': {
        'loss': 'nll', 'baseline': 'greedy', 'scale': 'none', 'aggregation': 'token_mean',
        **_KL_IN_REWARD,
    },
    # REINFORCE++ with a group: its mean as baseline, and k2 in the loss
    'reinforce_pp_baseline': {
        'scale': 'batch', 'aggregation': 'token_mean', 'kl': 'k2', 'beta': BETA,
    },
    'lite_ppo': {  # arXiv 2508.08221: the mean of the group, the deviation of the batch
        'scale': 'batch_std', 'aggregation': 'token_mean', **_NO_KL,
    },
    'gpg': {  # arXiv 2504.02546: no ratio, no clip
        'loss': 'nll', 'scale': 'informative', 'aggregation': 'token_mean', **_NO_KL,
    },
    'opo': {  # arXiv 2505.23585: the mean weighted by length as baseline
        'advantage_estimator': 'opo', 'aggregation': 'token_mean', **_NO_KL,
    },
    # arXiv 2601.05242: each reward function is normalized by itself
    'gdpo': {'reward_aggregation': 'normalize_then_sum', 'scale': 'batch_std', **_KL},
    # arXiv 2503.19595: the best of a group gets its lead over the second
    'grpo_passk': {'advantage_estimator': 'best_minus_second', **_KL},
    # arXiv 2508.10751: the best of k, over all subsets of a group
    'pass_at_k': {'advantage_estimator': 'pass_at_k', 'pass_k': 4, **_KL},
    'gspo': {'ratio': 'sequence', **_GSPO},  # Zheng et al., arXiv 2507.18071, section 5.1
    'gspo_token': {'ratio': 'sequence_token', **_GSPO},  # its eq. 13 and 14
    'cispo': {  # MiniMax-M1, arXiv 2506.13585: no lower bound, token mean, no KL
        'loss': 'cispo', 'aggregation': 'token_mean', 'clip_low': 1.0, 'clip_high': 2.0, **_NO_KL,
    },
    'sapo': {'loss': 'sapo', **_NO_KL},  # arXiv 2511.20347
    # GSPO with the sum over a completion, arXiv 2602.05261, section 5.1
    'luspo': {
        'ratio': 'sequence', 'aggregation': 'sequence_sum', 'clip_low': 2e-3, 'clip_high': 2.5e-3,
        **_NO_KL,
    },
    'vespo': {'loss': 'vespo', 'aggregation': 'token_mean', **_NO_KL},  # arXiv 2602.10693
    'gmpo': {'loss': 'gmpo', 'clip_low': 0.4, 'clip_high': 0.4, **_NO_KL},  # arXiv 2507.20673
    # Cui et al., arXiv 2505.22617, section 4
    'clip_cov': {'covariance': 'clip', 'aggregation': 'token_mean', **_NO_KL},
    'kl_cov': {  # the same; several inner updates, without which it has no effect
        'loss': 'surrogate', 'covariance': 'kl', 'aggregation': 'token_mean', 'inner_updates': 2,
        **_NO_KL,
    },
    'unbiased_kl': {'unbiased_kl': True, **_KL},  # DeepSeek-V3.2, arXiv 2512.02556, eq. 7
    'off_policy_mask': {'off_policy_threshold': 0.5, **_KL},  # DeepSeek-V3.2, eq. 9
    # Both, and no division by the standard deviation; arXiv 2512.02556, section 3.1
    'deepseek_v32': {
        'scale': 'none', 'unbiased_kl': True, 'off_policy_threshold': 0.5, **_KL,
    },
    'dual_clip': {'dual_clip': 3.0, **_KL},  # Ye et al., arXiv 1912.09729; verl's default
    'tis': {'importance': 'token', **_KL},  # truncated importance sampling, min(w, 2)
    'tis_sequence': {'importance': 'sequence', **_KL},  # w of the whole completion
    'masked_is': {'importance': 'token_mask', **_KL},  # w outside [1/2, 2] counts as 0
    'masked_is_sequence': {'importance': 'sequence_mask', **_KL},  # w of the whole completion
    # The defaults of TRL's GRPOConfig, version 1.16, with use_vllm=True
    'trl_defaults': {
        'aggregation': 'token_mean', 'importance': 'sequence_upper_mask', 'importance_cap': 3.0,
        **_NO_KL,
    },
    # Fedus et al., arXiv 2101.03961, eq. 4, as in transformers; only for models with experts
    'router_balance': {'router_balance': 1e-3, **_KL},
    'entropy_bonus': {'entropy_bonus': 1e-3, **_KL},  # also maximizes the mean entropy
    'top_entropy': {'top_entropy': 0.2, **_KL},  # Wang et al., arXiv 2506.01939
}  # fmt: skip

SFT = Algorithm(**_IMITATION)  # on demonstrations, with reward 1

# How code bases normalize the rewards of a group, and bound and weigh the KL term in the loss.
# TRL: the defaults of version 1.16 and later; before, unbiased_kl was False.
CONVENTIONS: dict[str, dict[str, Any]] = {
    'trl': {'scale': 'std', 'advantage_eps': 1e-4, 'kl_clamp': 0.0, 'unbiased_kl': True},
    'verl': {'scale': 'std', 'advantage_eps': 1e-6, 'kl_clamp': 10.0, 'unbiased_kl': False},
    'open_instruct': {
        'scale': 'population_std', 'advantage_eps': 1e-8, 'kl_clamp': 0.0, 'unbiased_kl': False,
    },
}  # fmt: skip


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
    known = Algorithm.__dataclass_fields__.keys() - {'terms'}
    unknown = [
        f'{option!r}{plugins.did_you_mean(option, sorted(known), cutoff=0.5)}'
        for option in changes
        if option not in known
    ]
    if unknown:
        raise ValueError(f'preset {name!r}: Algorithm has no option {"; nor ".join(unknown)}')
    return Algorithm(**(PRESETS[name] | changes))
