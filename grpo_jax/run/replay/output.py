"""What the command `replay` prints and writes."""

import json
import pathlib
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from grpo_jax.run import hosts, saved_config
from grpo_jax.run.buckets import check_local
from grpo_jax.run.errors import naming_file
from grpo_jax.run.health import batch_arrays
from grpo_jax.run.replay.check import Check, check, likely_cause
from grpo_jax.run.replay.origin import find_origin
from grpo_jax.run.replay.page import page
from grpo_jax.run.replay.rerun import Replayed, replayed
from grpo_jax.run.replay.table import default_completion, heading, table
from grpo_jax.run.replay.tokens import completions_of, prompt_text, visible


def replay(
    config: ConfigDict,
    workdir: pathlib.Path,
    *,
    step: str,
    stage: str = '',
    prompt: str = '',
    completion: str = '',
    update: str = '',
    output: str = '',
) -> bool:
    """Replays a step, prints what it did with the tokens of a completion, and checks it.

    Args:
      config: of the run.
      workdir: the run's folder.
      step: number of the step, from 0 as in `metrics.jsonl`.
      stage: see `origin.find_origin`.
      prompt: number of a prompt in the batch; empty: that of the completion.
      completion: number of a completion of it; empty: the one that is changed most.
      update: number of the inner update that is shown; empty: the first one, 0.
      output: folder of the page and the arrays; empty: they are not written.

    Returns:
      Whether the step is that of the run.

    Raises:
      ValueError: an option that the user has to fix, or a step that cannot be replayed.
    """
    saved = saved_config.read(workdir / 'config.json', quiet=True)
    for key in saved_config.differences(config, saved):
        raise ValueError(f'--config.{key} has no effect: a step is replayed with its own config')
    numbers = {'step': step, 'prompt': prompt, 'completion': completion, 'update': update or '0'}
    at = {name: _number(name, text) for name, text in numbers.items()}
    if at['step'] is None:
        raise ValueError('--step=NUMBER is missing: name a step, from 0 as in metrics.jsonl')
    folder = _output_folder(workdir, output)
    origin = find_origin(config, workdir, stage, at['step'])
    hosts.say(f'{origin.stage}: replays the steps {origin.start} to {at["step"]}')
    shown = {name: at[name] or 0 for name in ('update', 'prompt', 'completion')}
    with replayed(origin, workdir, at['step'], **shown) as result:
        checked = check(result, workdir)
        if hosts.is_first():
            chosen = _chosen(result, at['prompt'], at['completion'])
            _print(result, chosen, at['update'] or 0)
            lines = _verdict(result, checked)
            print('\n'.join(lines))
            if folder is not None:
                with naming_file(folder):
                    _write(folder, result, at['prompt'], checked, lines)
    # The others have no texts to compare.
    return hosts.from_first(lambda: not checked.different, 'the comparison with the run')


def _number(name: str, text: str) -> int | None:
    if not text:
        return None
    if not text.isdecimal():
        raise ValueError(f'--{name}={text}: give a number, from 0')
    return int(text)


def _output_folder(workdir: pathlib.Path, output: str) -> pathlib.Path | None:
    """The folder to write, which is none of the run's."""
    if not output:
        return None
    check_local('--output', output)
    folder = pathlib.Path(output).absolute()
    if folder.resolve().is_relative_to(workdir.resolve()):
        raise ValueError(f'--output={output} is in the run, which a replay leaves as it is')
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _chosen(result: Replayed, prompt: int | None, completion: int | None) -> tuple[int, int] | None:
    """The completion to show; None where the stage trains no policy."""
    if result.terms is None:
        return None
    group, number = default_completion(result.terms, prompt)
    return group, number if completion is None else completion


def _print(result: Replayed, chosen: tuple[int, int] | None, update: int) -> None:
    if chosen is None or result.terms is None:
        print(
            f'{result.stage} trains no policy: it has no log-probs, ratios and advantages to show'
        )
        return
    group, number = chosen
    shown = completions_of(result, group)[number]
    which = f', inner update {update}' if update else ''
    print(f'{result.stage} step {result.step}{which}, prompt {group}, completion {number}')
    print(f'prompt: {visible(prompt_text(result, group))}')
    print(heading(result.terms, shown))
    print(table(result.terms, shown))


def _verdict(result: Replayed, checked: Check) -> list[str]:
    lines = []
    if checked.same:
        lines.append(f'equal to the run, bit for bit: {", ".join(checked.same)}')
    if checked.missing:
        lines.append(
            f'not compared, because the run has not kept them: {", ".join(checked.missing)}'
        )
    if checked.different:
        shown = '; '.join(checked.different[:5])
        more = len(checked.different) - 5
        rest = f'; and {more} more' if more > 0 else ''
        cause = likely_cause(result, checked.different)
        lines.append(f'DIFFERENT from the run: {shown}{rest}. {cause}')
    return lines


def _write(
    folder: pathlib.Path, result: Replayed, prompt: int | None, checked: Check, lines: list[str]
) -> None:
    """Writes `replay.json`, `arrays.npz` and, of a policy's stage, `page.html`."""
    arrays: dict[str, Any] = batch_arrays(result.rollout, result.rewards)
    if result.terms is not None:
        fields = result.terms._asdict().items()
        arrays |= {name: np.asarray(value) for name, value in fields if value is not None}
        (folder / 'page.html').write_text(page(result, prompt, lines), encoding='utf-8')
    np.savez(folder / 'arrays.npz', **arrays)
    summary = {
        'stage': result.stage, 'step': result.step, 'checkpoint': result.origin.start,
        'metrics': result.metrics, 'completions': result.completions, **checked._asdict(),
    }  # fmt: skip
    text = json.dumps(summary, indent=1, ensure_ascii=False)
    (folder / 'replay.json').write_text(text + '\n', encoding='utf-8', errors='backslashreplace')
    page_name = [] if result.terms is None else ['page.html']
    print(f'{folder}: {", ".join([*page_name, "arrays.npz", "replay.json"])}')
