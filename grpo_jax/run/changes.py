"""Changes of a config with which a run in a folder may be resumed, and the record of them."""

import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from grpo_jax.run.json_lines import Appender, line
from grpo_jax.run.layout import stage_order
from grpo_jax.run.saved_config import describe, differences

_STEPS = ('sft.steps', 'reward_model.steps', 'grpo.steps', 'grpo.iterations')
# Sections that can be overridden as a whole.
_SECTIONS = ('eval.', 'log.', 'checkpoint.', 'health.', 'grpo.reward_calls.')


def check_changes(
    config: ConfigDict,
    saved: ConfigDict,
    workdir: pathlib.Path,
    steps: Mapping[str, list[int]],
    *,
    extend: bool = False,
    override: bool = False,
) -> None:
    """Checks that a run can be resumed with another config than it was saved with.

    Args:
      config: the config to resume with.
      saved: that of the run.
      workdir: the run's folder.
      steps: the steps of its checkpoints, by stage.
      extend: allow more steps.
      override: allow other steps, learning rates, and keys of eval, log, checkpoint and health.

    Raises:
      ValueError: a key differs that may not, or steps that have been done already.
    """
    different = differences(config, saved)
    refused = {
        key: values
        for key, values in different.items()
        if not (override and _overridable(key, config)) and not (extend and _extends(key, values))
    }
    if refused:
        described = '; '.join(describe(key, values) for key, values in refused.items())
        raise ValueError(
            f'workdir {str(workdir)!r} holds the run of another config: {described}. Use another '
            f'--workdir, or the same config to resume{_remedy(refused, config)}'
        )
    for key in different.keys() & set(_STEPS):
        _check_steps(key, different[key], workdir, steps)


def record_changes(
    config: ConfigDict, saved: ConfigDict, workdir: pathlib.Path, steps: Mapping[str, list[int]]
) -> None:
    """Appends to `changes.jsonl`: the newest checkpoint, and the keys that differ from there on."""
    changed = {key: {'from': a, 'to': b} for key, (a, b) in differences(config, saved).items()}
    if changed:
        append_record(changed, workdir, steps)


def append_record(
    changed: Mapping[str, Mapping[str, Any]], workdir: pathlib.Path, steps: Mapping[str, list[int]]
) -> None:
    """Appends to `changes.jsonl`: the newest checkpoint, and what is another from there on.

    Args:
      changed: {what: {'from': value, 'to': value}}.
      workdir: the run's folder.
      steps: the steps of its checkpoints, by stage.
    """
    done = {stage: found[-1] for stage, found in steps.items() if found}
    stage = max(done, key=stage_order, default=None)
    record = {'stage': stage, 'step': done[stage] if stage else 0, 'changes': changed}
    file = Appender(workdir / 'changes.jsonl')
    file.write(line(record))
    file.close()


def _overridable(key: str, config: ConfigDict) -> bool:
    if key == 'eval.correct' and config.reward_model.steps:
        return False  # it labels what the reward model is trained on
    return key in _STEPS or key.startswith(_SECTIONS) or key.endswith('.optimizer.learning_rate')


def _extends(key: str, values: tuple[Any, Any]) -> bool:
    return key in _STEPS and values[1] > values[0]


def _remedy(refused: dict[str, tuple[Any, Any]], config: ConfigDict) -> str:
    if all(_extends(key, values) for key, values in refused.items()):
        return '; --extend continues it for more steps'
    if all(_overridable(key, config) for key in refused):
        return '; --override continues it with these values'
    return ''


def _check_steps(
    key: str, values: tuple[int, int], workdir: pathlib.Path, steps: Mapping[str, list[int]]
) -> None:
    """Raises ValueError for a number of steps below those done, or of a stage that is over."""
    kind, name = key.split('.')
    kind = 'reward' if kind == 'reward_model' else kind
    done = {stage: found[-1] for stage, found in steps.items() if found}
    if name == 'iterations':
        begun = max((stage_order(stage)[0] for stage in done), default=0)
        if values[1] < begun:
            raise ValueError(f'{key}={values[1]}, but iteration {begun} has begun: make it more')
        return
    if done.get(kind, 0) > values[1]:
        raise ValueError(
            f'{key}={values[1]}, but {done[kind]} steps have been done: make it at least that'
        )
    later = [stage for stage in done if stage_order(stage) > stage_order(kind)]
    if later:
        raise ValueError(
            f'{key} (there {values[0]}, here {values[1]}) cannot be changed, because the stage '
            f'{min(later, key=stage_order)!r} has begun from its result: start another run with '
            f"start='{workdir}:{kind}'"
        )
