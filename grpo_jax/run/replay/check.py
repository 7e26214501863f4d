"""Whether a replayed step is the step of the run: completions, rewards, metrics and parameters."""

import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax.run import checkpoint, hosts
from grpo_jax.run.environment import environment
from grpo_jax.run.layout import checkpoints
from grpo_jax.run.replay.origin import as_json, recorded
from grpo_jax.run.replay.rerun import Replayed
from grpo_jax.types import TrainState

_TIMES = re.compile('timing/|step_time$|perf/')


class Check(NamedTuple):
    """The result of a comparison."""

    same: tuple[str, ...]  # what was compared and is equal
    different: tuple[str, ...]
    missing: tuple[str, ...]  # what the run has not kept


def check(replayed: Replayed, workdir: pathlib.Path) -> Check:
    """Compares a replayed step with the records of the run, and with the checkpoint after it.

    All processes call it.

    Args:
      replayed: the step.
      workdir: the run's folder.
    """
    stage, step = replayed.stage, replayed.step
    completions = recorded(workdir, 'completions', stage, step)
    metrics = recorded(workdir, 'metrics', stage, step)
    same: list[str] = []
    different: list[str] = []
    missing: list[str] = []
    if completions:
        texts = list(_different_completions(as_json(replayed.completions), completions))
        different += texts
        same += [] if texts else [f'{len(completions)} completions and their rewards']
    else:
        missing.append('completions')
    if metrics:
        numbers = list(_different_metrics(as_json(replayed.metrics), metrics[0]))
        different += numbers
        compared = [name for name in metrics[0] if not _TIMES.match(name)]
        same += [] if numbers else [f'{len(compared)} metrics']
    else:
        missing.append('metrics')
    folder = replayed.origin.config.checkpoint.folder
    if step + 1 in checkpoint.steps_of_stages(workdir, folder).get(stage, []):
        with checkpoint.open_to_read(checkpoints(workdir, folder) / stage) as manager:
            mesh = replayed.setup.mesh
            saved = checkpoint.restore(manager, replayed.state, mesh, step + 1)
        arrays = list(_different_arrays(replayed.state, saved))
        different += [f'{text} in the checkpoint {stage}/{step + 1}' for text in arrays]
        same += [] if arrays else [f'parameters and moments of the checkpoint {stage}/{step + 1}']
    else:
        missing.append(f'the checkpoint {stage}/{step + 1}')
    return Check(tuple(same), tuple(different), tuple(missing))


def likely_cause(replayed: Replayed, different: Sequence[str]) -> str:
    """What may explain the differences, in one sentence."""
    if any(text.startswith('the reward') for text in different) and not any(
        text.startswith('completion') for text in different
    ):
        return (
            'The texts are equal and their rewards are not: a reward function is not '
            'deterministic, or was changed since'
        )
    before, now = replayed.origin.environment, environment(replayed.setup.mesh)
    causes = [
        f'{name} was {before[name]} and is {value} here'
        for name, value in now.items()
        if before.get(name, value) != value
    ]
    causes += [*replayed.changed, *(f'the run changed {name}' for name in replayed.origin.inputs)]
    if replayed.setup.environment is not None and not replayed.origin.start:
        causes.append(
            'the environment replied otherwise: its replies to steps before the oldest checkpoint '
            'are not kept'
        )
    if causes:
        return f'Likely because {"; ".join(causes)}'
    here = ', '.join(f'{name} {value}' for name, value in now.items())
    return f'No cause is known: versions, devices and data seem to be those of the run ({here})'


def _different_completions(
    ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    if len(theirs) > len(ours):
        yield f'completions: {len(ours)} here, {len(theirs)} in completions.jsonl'
    for i, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        for name in ('prompt', 'completion'):
            if mine[name] != other[name]:
                at = _first_difference(mine[name], other[name])
                yield (
                    f'{name} {i} from character {at} on: {mine[name][at : at + 20]!r} here, '
                    f'{other[name][at : at + 20]!r} in completions.jsonl'
                )
                break
        else:
            for label, a, b in _different_values(mine, other):
                yield f'{label} of completion {i}: {a} here, {b} in completions.jsonl'


def _different_values(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], kind: str = ''
) -> Iterator[tuple[str, Any, Any]]:
    """Yields the name and the values of each reward, part of one or other column that differs."""
    for name in dict.fromkeys((*ours, *theirs)):
        if _TIMES.match(name):
            continue
        a, b = ours.get(name), theirs.get(name)
        if name == 'rewards' and isinstance(a, dict) and isinstance(b, dict):
            yield from _different_values(a, b, 'the reward')
        elif a != b:
            yield 'the reward' if name == 'reward' else f'{kind or "the column"} {name!r}', a, b


def _different_metrics(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys((*theirs, *ours)):
        if _TIMES.match(name):
            continue
        if name not in ours or name not in theirs:
            where = 'here' if name in ours else 'in metrics.jsonl'
            yield f'the metric {name!r} is there {where} only'
        elif ours[name] != theirs[name]:
            yield f'the metric {name!r}: {ours[name]} here, {theirs[name]} in metrics.jsonl'


def _different_arrays(ours: TrainState, theirs: TrainState) -> Iterator[str]:
    """Names the first array that differs, and how many do."""
    equal = hosts.fetch(_equal(ours, theirs))
    leaves = jax.tree_util.tree_leaves_with_path(equal)
    names = [jax.tree_util.keystr(path) for path, same in leaves if not same]
    if names:
        yield f'{len(names)} of {len(leaves)} arrays differ from those, such as state{names[0]},'


@jax.jit
def _equal(ours: TrainState, theirs: TrainState) -> Any:
    """Whether the arrays of two states have the same bits."""

    def same(a: jax.Array, b: jax.Array) -> jax.Array:
        if jnp.issubdtype(a.dtype, jnp.floating):
            kind = jnp.dtype(f'uint{8 * a.dtype.itemsize}')
            a, b = (jax.lax.bitcast_convert_type(x, kind) for x in (a, b))
        return (a == b).all()

    return jax.tree.map(same, ours, theirs)


def _first_difference(a: str, b: str) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
