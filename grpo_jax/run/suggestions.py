"""Suggests the config key that was meant by a name that does not exist."""

import difflib
import functools
from collections.abc import Iterable

DEFAULTS = 'grpo_jax.run.config.defaults()'

# Names of other trainers -> keys here; docs/migrating.md explains how they correspond.
_ALIASES: dict[str, tuple[str, ...]] = {
    # TRL
    'beta1': ('grpo.optimizer.b1',),
    'beta2': ('grpo.optimizer.b2',),
    'bf16': ('model.dtype',),
    'delta': ('grpo.algorithm.dual_clip',),
    'epsilon': ('grpo.algorithm.clip_low', 'grpo.algorithm.clip_high'),
    'epsilon_high': ('grpo.algorithm.clip_high',),
    'entropy_coef': ('grpo.algorithm.entropy_bonus',),
    'entropy_coef_delta': ('grpo.entropy_control.step',),
    'entropy_coef_max': ('grpo.entropy_control.most',),
    'entropy_coef_min': ('grpo.entropy_control.least',),
    'entropy_target': ('grpo.entropy_control.target',),
    'eval_steps': ('eval.every',),
    'gradient_accumulation_steps': ('grpo.compute.microbatch',),
    'gradient_checkpointing': ('model.remat',),
    'importance_sampling_level': ('grpo.algorithm.ratio',),
    'loss_type': ('grpo.algorithm.aggregation', 'grpo.algorithm.loss'),
    'lr_scheduler_type': ('grpo.optimizer.decay',),
    'mask_truncated_completions': ('grpo.drop',),
    'max_completion_length': ('data.completion_length',),
    'tools': ('environment.name',),
    'environment_factory': ('environment.name',),
    'max_tool_calling_iterations': ('environment.turns',),
    'max_grad_norm': ('grpo.optimizer.clip_norm',),
    'max_prompt_length': ('data.prompt_length',),
    'max_steps': ('grpo.steps',),
    'model_name_or_path': ('pretrained',),
    'multi_objective_aggregation': ('grpo.algorithm.reward_aggregation',),
    'num_completions_to_print': ('log.completions',),
    'num_generations': ('grpo.group_size',),
    'num_iterations': ('grpo.algorithm.inner_updates',),
    'num_train_epochs': ('grpo.steps',),
    'off_policy_mask_threshold': ('grpo.algorithm.off_policy_threshold',),
    'peft_config': ('model.lora.rank',),
    'per_device_train_batch_size': ('grpo.batch_size',),
    'ref_model_mixup_alpha': ('grpo.algorithm.reference_decay',),
    'report_to': ('log.to',),
    'reward_funcs': ('grpo.rewards',),
    'reward_weights': ('grpo.rewards',),
    'router_aux_loss_coef': ('grpo.algorithm.router_balance',),
    'run_name': ('log.name',),
    'sapo_temperature_neg': ('grpo.algorithm.tau_negative',),
    'sapo_temperature_pos': ('grpo.algorithm.tau_positive',),
    'save_steps': ('checkpoint.every',),
    'save_total_limit': ('checkpoint.keep',),
    'scale_rewards': ('grpo.algorithm.scale',),
    'steps_per_generation': ('grpo.algorithm.inner_updates',),
    'sync_ref_model': ('grpo.algorithm.reference_decay',),
    'temperature': ('grpo.sampling.temperature',),
    'top_entropy_quantile': ('grpo.algorithm.top_entropy',),
    'use_adaptive_entropy': ('grpo.entropy_control.target',),
    'use_bias_correction_kl': ('grpo.algorithm.unbiased_kl',),
    'vespo_k_neg': ('grpo.algorithm.vespo_k_negative',),
    'vespo_k_pos': ('grpo.algorithm.vespo_k_positive',),
    'vespo_lambda_neg': ('grpo.algorithm.vespo_lambda_negative',),
    'vespo_lambda_pos': ('grpo.algorithm.vespo_lambda_positive',),
    'vllm_importance_sampling_clip_max': ('grpo.algorithm.importance_cap',),
    'vllm_importance_sampling_correction': ('grpo.algorithm.importance',),
    'vllm_importance_sampling_mode': ('grpo.algorithm.importance',),
    # verl
    'adv_estimator': ('grpo.algorithm.baseline',),
    'clip_cov_lb': ('grpo.algorithm.cov_low',),
    'clip_cov_ratio': ('grpo.algorithm.cov_share',),
    'clip_cov_ub': ('grpo.algorithm.cov_high',),
    'clip_ratio': ('grpo.algorithm.clip_low', 'grpo.algorithm.clip_high'),
    'clip_ratio_c': ('grpo.algorithm.dual_clip',),
    'clip_ratio_high': ('grpo.algorithm.clip_high',),
    'clip_ratio_low': ('grpo.algorithm.clip_low',),
    'entropy_coeff': ('grpo.algorithm.entropy_bonus',),
    'experiment_name': ('log.name',),
    'kl_coef': ('grpo.algorithm.beta',),
    'kl_cov_ratio': ('grpo.algorithm.cov_share',),
    'kl_loss_coef': ('grpo.algorithm.beta',),
    'kl_loss_type': ('grpo.algorithm.kl',),
    'logger': ('log.to',),
    'loss_mode': ('grpo.algorithm.loss',),
    'loss_agg_mode': ('grpo.algorithm.aggregation',),
    'max_num_gen_batches': ('grpo.refill',),
    'max_response_length': ('data.completion_length',),
    'norm_adv_by_std_in_grpo': ('grpo.algorithm.scale',),
    'project_name': ('log.project',),
    'ppo_epochs': ('grpo.algorithm.inner_updates',),
    'ppo_kl_coef': ('grpo.algorithm.cov_kl',),
    'ppo_micro_batch_size_per_gpu': ('grpo.compute.microbatch',),
    'ppo_mini_batch_size': ('grpo.batch_size',),
    'rollout_is': ('grpo.algorithm.importance',),
    'rollout_is_threshold': ('grpo.algorithm.importance_cap',),
    'save_freq': ('checkpoint.every',),
    'test_freq': ('eval.every',),
    'train_batch_size': ('grpo.batch_size',),
    'use_kl_in_reward': ('grpo.algorithm.kl_place',),
    # Tunix, and names in general use
    'eval_every_n_steps': ('eval.every',),
    'gamma_discount': ('grpo.algorithm.gamma',),
    'max_tokens': ('data.completion_length',),
    'max_tokens_to_generate': ('data.completion_length',),
    'max_new_tokens': ('data.completion_length',),
    'mini_batch_size': ('grpo.batch_size',),
    'model_path': ('pretrained',),
    'n': ('grpo.group_size',),
    'num_samples': ('grpo.group_size',),
    'reward': ('grpo.rewards',),
    'reward_fns': ('grpo.rewards',),
    'system_prompt': ('data.system',),
    'train_micro_batch_size': ('grpo.compute.microbatch',),
}  # fmt: skip
_SHORT = {'lr': 'learning_rate', 'max_lr': 'learning_rate', 'wd': 'weight_decay'}


def suggest(key: str) -> str:
    """Suggests the keys that may have been meant by `key`, a dotted path or a part of one.

    In this order: keys that end in the same names, the names of other trainers, and similar names;
    of each those in the same section, if there are any.

    Returns:
      The end of an error message, `did you mean 'a' or 'b'?`.
    """
    found = candidates(key)
    if not found:
        return f'see {DEFAULTS} for all keys'
    *others, last = map(repr, found)
    return f'did you mean {", ".join(others)}{" or " if others else ""}{last}?'


def candidates(key: str) -> list[str]:
    """The keys and sections that may have been meant, best first; empty if nothing is similar."""
    *parents, name = key.split('.')
    name = _SHORT.get(name, name)
    known = _known()
    if name in _ALIASES and not _near([*parents, name], known):
        return _in_section(key, list(_ALIASES[name]))
    for start in range(len(parents) + 1):  # the longest common ending first
        ending = '.'.join([*parents[start:], name])
        found = [path for path in known if f'.{path}'.endswith(f'.{ending}')]
        if found:
            return _in_section(key, found)
    return _similar(key, name, known)


def _near(parts: list[str], known: Iterable[str]) -> bool:
    """Whether the section that the key is in has a key of this name below it."""
    top, name = parts[0], parts[-1]
    return len(parts) > 1 and any(
        path.startswith(f'{top}.') and path.endswith(f'.{name}') for path in known
    )


def _similar(key: str, name: str, known: list[str]) -> list[str]:
    parent = key.rpartition('.')[0]
    siblings = {path.rpartition('.')[2]: path for path in known if _parent(path) == parent}
    if len(longer := [sibling for sibling in siblings if sibling.startswith(name)]) == 1:
        return [siblings[longer[0]]]
    if near := difflib.get_close_matches(name, siblings, n=1, cutoff=0.6):
        return [siblings[near[0]]]
    by_name: dict[str, list[str]] = {}
    for path in known:
        by_name.setdefault(path.rpartition('.')[2], []).append(path)
    if near := difflib.get_close_matches(name, by_name, n=1, cutoff=0.7):
        found = _in_section(key, by_name[near[0]])
        # Of a name that several sections have, that of `grpo` is the likeliest.
        return [path for path in found if path.startswith('grpo.')] or found
    if near := difflib.get_close_matches(name, _ALIASES, n=1, cutoff=0.8):
        return list(_ALIASES[near[0]])
    return difflib.get_close_matches(key, known, n=1, cutoff=0.7)


def _in_section(key: str, paths: list[str]) -> list[str]:
    """Those of the paths that are in the same section as `key`, or all."""
    top = key.partition('.')[0]
    return [path for path in paths if path.startswith(f'{top}.')] or paths


def _parent(path: str) -> str:
    return path.rpartition('.')[0]


@functools.cache
def _known() -> list[str]:
    """All keys and sections."""
    from grpo_jax.run.defaults import defaults  # whose sections use this module

    def paths(section: object, prefix: str) -> Iterable[str]:
        for name, value in getattr(section, 'items')():  # noqa: B009 for the type checker
            yield prefix + name
            if hasattr(value, 'items'):
                yield from paths(value, f'{prefix}{name}.')

    return list(paths(defaults(), ''))
