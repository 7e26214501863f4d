"""Where a replay begins: the config of that time, and the newest checkpoint before the step."""

import json
import logging
import pathlib
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from grpo_jax.run import checkpoint, checksums, json_lines, report
from grpo_jax.run.config import flatten, set_value
from grpo_jax.run.defaults import defaults
from grpo_jax.run.environment import read_environment
from grpo_jax.run.intact import folder_of
from grpo_jax.run.layout import stage_order

log = logging.getLogger('grpo_jax')


class Origin(NamedTuple):
    """Where the replay of a step begins."""

    config: ConfigDict  # that the step was run with
    stage: str
    start: int  # step of the checkpoint; 0: the start of the stage
    environment: dict[str, str]  # of the run at that time, see `environment.environment`
    inputs: tuple[str, ...]  # names of data, tokenizer and code that the run changed later


def find_origin(config: ConfigDict, workdir: pathlib.Path, stage: str, step: int) -> Origin:
    """Finds the config and the checkpoint from which a step can be replayed.

    Changes after the step, by `--extend`, `--override` or another machine, are undone.

    Args:
      config: of the run, as it is now.
      workdir: the run's folder.
      stage: name of the stage; empty: 'grpo', or the last one of a run without it.
      step: number of the step, from 0 as in `metrics.jsonl`.

    Raises:
      ValueError: the run has no such stage or step, or no checkpoint from which it can be replayed.
    """
    stage = _existing_stage(workdir, stage, step)
    config, environment = config.copy_and_resolve_references(), read_environment(workdir)
    inputs, since = [], 0
    known = flatten(defaults())
    for row in reversed(_changes(workdir)):
        if (stage_order(row['stage']), row['step']) > (stage_order(stage), step):
            for name, values in row['changes'].items():
                if name in known:
                    set_value(config, name, values['from'])
                elif name in environment:
                    environment[name] = values['from']
                else:
                    inputs.append(name)
        elif row['stage'] == stage and row['changes'].keys() & known.keys():
            since = max(since, row['step'])
    start = _start(workdir, stage, step, since, config.checkpoint.folder)
    return Origin(config, stage, start, environment, tuple(dict.fromkeys(inputs)))


def _changes(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The records of `changes.jsonl` that are of a stage, oldest first; not of where files are."""
    path = workdir / 'changes.jsonl'
    rows = [line.row for line in json_lines.read(path)] if path.exists() else []
    for row in rows:
        row['changes'].pop('checkpoint.folder', None)
    return [row for row in rows if row['stage'] is not None]


def _start(workdir: pathlib.Path, stage: str, step: int, since: int, folder: str) -> int:
    """The newest intact checkpoint up to a step, and since the last change of the config."""
    kept = checkpoint.steps_of_stages(workdir, folder).get(stage, [])
    for start in [start for start in reversed(kept) if since <= start <= step]:
        problem = checksums.damage(folder_of(workdir, stage, start, folder))
        if not problem:
            return start
        log.warning('checkpoint %s/%d is damaged (%s): it is not used', stage, start, problem)
    if not since:
        return 0
    raise ValueError(
        f'{stage} step {step} cannot be replayed: the config was changed at step {since}, see '
        'changes.jsonl, and no intact checkpoint between it and the step is kept. The run has '
        f'those of step {", ".join(map(str, kept))}; checkpoint.keep says how many are kept'
    )


def recorded(workdir: pathlib.Path, name: str, stage: str, step: int) -> list[dict[str, Any]]:
    """The rows of a step in `<name>.jsonl`, without stage and step."""
    path = workdir / f'{name}.jsonl'
    rows = report.read(path, stage) if path.exists() else []
    return [
        {k: v for k, v in row.items() if k not in ('stage', 'step')}
        for row in rows
        if row['step'] == step
    ]


def _existing_stage(workdir: pathlib.Path, stage: str, step: int) -> str:
    """The stage to replay.

    Raises:
      ValueError: the run has not come to this step of it.
    """
    path = workdir / 'metrics.jsonl'
    done: dict[str, int] = {}
    for line in json_lines.read(path) if path.exists() else ():
        done[line.row['stage']] = line.row['step']
    stage = stage or ('grpo' if 'grpo' in done or not done else list(done)[-1])
    if step > done.get(stage, -1) + 1:  # the step after the last one may be the one that failed
        found = ', '.join(f'0 to {last} of {name}' for name, last in done.items()) or 'none'
        raise ValueError(
            f'--step={step}: the run has not done this step of {stage}; its steps in '
            f'metrics.jsonl: {found}'
        )
    return stage


def as_json(values: Any) -> Any:
    """Values as they are read from a JSON line."""
    return json.loads(json.dumps(values))
