"""The sampled completions of a step as text for a terminal."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from grpo_jax.algorithm.advantages import OF_BATCH, group_advantages
from grpo_jax.run import json_lines
from grpo_jax.run.errors import ConfigError
from grpo_jax.run.methods import algorithm_of

_MARKS = {' ': '·', '\n': '↵\n', '\t': '→\t', '\r': '\\r'}
_FIELDS = ('stage', 'step', 'prompt', 'completion', 'reward', 'rewards', 'turns')


def shown(
    config: ConfigDict, workdir: str, *, step: str = '', stage: str = '', prompt: str = ''
) -> Iterator[str]:
    """Yields the texts of the prompts of a step, each with its completions by reward.

    Args:
      config: of the run.
      workdir: the run's folder.
      step: number of the step; '': the newest.
      stage: its stage; '': the newest.
      prompt: number of the only prompt, from 0 in the order of the records; '': all.

    Raises:
      ValueError: the run has no such records.
    """
    numbers = _numbers(step=step, prompt=prompt)
    records, stage, number = _records(pathlib.Path(workdir), stage, numbers.get('step'))
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record['prompt'], []).append(record)
    if numbers.get('prompt', 0) >= len(groups):
        raise ValueError(
            f'--prompt={prompt}: step {number} of {stage} has completions of {len(groups)} prompts '
            'in completions.jsonl, numbered from 0; log.completions says how many are written'
        )
    for index, (text, group) in enumerate(groups.items()):
        if numbers.get('prompt', index) == index:
            advantages = _advantages(config, group)
            yield f'{stage}, step {number}, prompt {index}\n{_indented(visible(text))}\n'
            order = sorted(range(len(group)), key=lambda i: (-_key(group[i]['reward']), i))
            yield from (_completion(i, group[i], advantages) for i in order)


def visible(text: str) -> str:
    """The text with marks for white space, and escapes for characters that a terminal obeys."""
    return ''.join(_MARKS.get(c) or (c if c.isprintable() else repr(c)[1:-1]) for c in text)


def _numbers(**options: str) -> dict[str, int]:
    """Returns the options that are given, as numbers; raises ConfigError if they are none."""
    wrong = [
        f'--{name}={text}: give a whole number, at least 0'
        for name, text in options.items()
        if text and not (text.isascii() and text.isdigit())
    ]
    if wrong:
        raise ConfigError(wrong)
    return {name: int(text) for name, text in options.items() if text}


def _records(
    workdir: pathlib.Path, stage: str, step: int | None
) -> tuple[list[dict[str, Any]], str, int]:
    """Returns the records of a step, its stage and its number."""
    path = workdir / 'completions.jsonl'
    if not path.is_file():
        raise ValueError(f'{path}: no such file: the run has sampled nothing yet')
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for line in json_lines.read(path):
        try:
            steps = found.setdefault(line.row['stage'], {})
            steps.setdefault(line.row['step'], []).append(line.row)
            _ = line.row['prompt'], line.row['completion'], line.row['reward']
        except KeyError as error:
            raise json_lines.unreadable(path, line.number, f'has no {error}') from error
    if not found:
        raise ValueError(f'{path} is empty: set log.completions to write completions into it')
    name = stage or list(found)[-1]
    if name not in found:
        raise ValueError(f'--stage={name}: completions.jsonl has those of {", ".join(found)}')
    number = max(found[name]) if step is None else step
    if number not in found[name]:
        raise ValueError(
            f'--step={number}: completions.jsonl has the steps {min(found[name])} to '
            f'{max(found[name])} of {name}'
        )
    return found[name][number], name, number


def _advantages(config: ConfigDict, group: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """Returns the advantages of a whole group whose rewards alone determine them, or None."""
    algorithm = algorithm_of(config)
    computed = (
        len(group) == config.grpo.group_size
        and algorithm.supervision == 'outcome'
        and algorithm.estimator_function is None
        and algorithm.baseline in ('mean', 'leave_one_out', 'none')
        and algorithm.scale not in OF_BATCH
        and not algorithm.uses_function_rewards
    )
    if not computed:
        return None
    rewards: Any = np.array(
        [0.0 if r['reward'] is None else r['reward'] for r in group], np.float32
    )
    scored: Any = np.array([record['reward'] is not None for record in group])
    values = group_advantages(
        rewards,
        scored,
        baseline=algorithm.baseline,
        scale=algorithm.scale,
        eps=algorithm.advantage_eps,
    )
    return [float(value) for value in np.asarray(values)]


def _completion(number: int, record: Mapping[str, Any], advantages: Sequence[float] | None) -> str:
    """The text of a completion below its reward and what else is recorded."""
    reward = record['reward']
    parts = ', '.join(f'{name} {_value(x)}' for name, x in record.get('rewards', {}).items())
    heading = [f'reward {_value(reward)}' + (f' ({parts})' if parts else '')]
    if advantages is not None and reward is not None:
        heading.append(f'advantage {advantages[number]:+.4g}')
    heading += [f'{k} {_value(value)}' for k, value in record.items() if k not in _FIELDS]
    turns = record.get('turns')
    body = _turns(turns) if turns else _indented(visible(record['completion']))
    return f'--- completion {number}: {", ".join(heading)}\n{body}\n'


def _turns(turns: Sequence[Mapping[str, Any]]) -> str:
    """The text of each turn, its tool calls and the reply to it."""
    lines = []
    for number, turn in enumerate(turns, 1):
        lines.append(f'  turn {number}:')
        lines.append(_indented(visible(str(turn.get('text', '')))))
        for call in turn.get('calls') or ():
            lines.append(f'  call: {_call(call)}')
        if turn.get('reply') is not None:
            lines.append(f'  reply{_notes(turn)}:')
            lines.append(_indented(visible(str(turn['reply'])), '  < '))
        elif turn.get('outcome'):
            lines.append(f'  no reply{_notes(turn)} {turn.get("detail") or ""}'.rstrip())
    return '\n'.join(lines)


def _notes(turn: Mapping[str, Any]) -> str:
    """What is worth saying of a reply: a failure, a cut, and the seconds that it took."""
    outcome, seconds = turn.get('outcome'), turn.get('seconds')
    notes = [] if outcome in (None, 'reply') else [str(outcome)]
    notes += ['cut'] if turn.get('cut') else []
    notes += [f'{seconds:.3g} s'] if isinstance(seconds, int | float) else []
    return f' ({", ".join(notes)})' if notes else ''


def _call(call: Any) -> str:
    """A tool call, from its name, its arguments and its error, by names or in this order."""
    if isinstance(call, Mapping):
        call = [call.get('name'), call.get('arguments'), call.get('error')]
    name, arguments, error = [*call, '', '', ''][:3]
    named = arguments.items() if isinstance(arguments, Mapping) else ()
    inside = ', '.join(f'{key}={visible(repr(value))}' for key, value in named)
    return f'{name or "?"}({inside})' + (f' error: {error}' if error else '')


def _indented(text: str, margin: str = '  | ') -> str:
    return '\n'.join(margin + line for line in text.split('\n'))


def _value(value: Any) -> str:
    if value is None:
        return 'none'
    return format(value, '.6g') if isinstance(value, float) else visible(str(value))


def _key(reward: float | None) -> float:
    return -np.inf if reward is None else reward
