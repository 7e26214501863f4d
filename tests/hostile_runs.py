"""Trains by the command with each hostile reward function, and says how the command ended.

    python tests/hostile_runs.py --folder=FOLDER [--names=sleeps,segfault]

Each function of `hostile_rewards` is called in the process of the run and in isolated workers, on
all completions, and with `on_error='none'` on each completion alone, where those with a '=' set it
off. A run that has not done all of its steps has to end with another status than 0, in one line;
the steps that it has done have to be in a checkpoint, unless the function has crashed the run's own
process. With 'none' the run has to go on.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import signal
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
if __name__ == '__main__':
    sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
    os.environ |= {'HOSTILE_TEXT': '', 'HOSTILE_STEP': '1', 'JAX_PLATFORMS': 'cpu'}
    os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'

import hostile_rewards  # noqa: E402
import kill_runs  # noqa: E402

from grpo_jax import train  # noqa: E402
from grpo_jax.run import checkpoint, report  # noqa: E402

STEPS = 3
SECONDS = 120  # for a run


def get_config():
    config = kill_runs.get_config()
    config.grpo.steps = STEPS
    config.eval.update(every=STEPS, correct='')
    config.data.heldout_split = ''
    config.checkpoint.every = 1
    return config


MODES = {
    'inside': {'timeout': 2.0},
    'isolated': {'timeout': 5.0, 'isolated': True, 'memory': 4.0},
    'none': {
        'timeout': 5.0, 'isolated': True, 'memory': 4.0, 'on_error': 'none', 'per': 'completion',
    },
}  # fmt: skip


def functions():
    """The names of all of them."""
    groups = ('FAILING', 'ASYNC', 'DEADLY', 'HARMFUL')
    return [f.__name__ for group in groups for f in getattr(hostile_rewards, group)]


def command(name, mode, workdir, cache):
    """Runs the command in this process."""
    if mode == 'none':
        os.environ['HOSTILE_TEXT'] = hostile_rewards.TEXT = '='
    entry = {'weight': 1.0, 'call': MODES[mode]}
    sys.argv = [
        'train', f'--config={__file__}', f'--workdir={workdir}',
        f'--config.grpo.rewards={ {f"hostile_rewards:{name}": entry, "kill_runs:lucky": 1.0} }',
        '--config.grpo.reward_calls.max_failed=1.0', f'--config.data.cache_dir={cache}',
    ]  # fmt: skip
    train.run()


def attempt(name, mode, folder):
    """One run: its status, the lines it ends with, the steps that are done and those saved."""
    workdir = folder / f'{name}-{mode}'
    output = workdir.with_suffix('.txt')
    process = kill_runs.fork(lambda: command(name, mode, workdir, folder / 'data'), output)
    deadline = time.monotonic() + SECONDS
    while (found := os.waitpid(process, os.WNOHANG)) == (0, 0):
        time.sleep(0.05)
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(found[1])
    if status < 0:  # the line is written after the end of the process
        time.sleep(2)
    text = output.read_text(errors='replace')
    lines = [line for line in re.split('[\r\n]+', text) if line.startswith('error: ')]
    path = workdir / 'metrics.jsonl'
    done = len(report.read(path, 'grpo')) if path.exists() else 0
    saved = max(checkpoint.steps_of_stages(workdir).get('grpo', [0]), default=0)
    return status, lines, done, saved, 'Traceback (most' in text


def problem(mode, status, lines, done, saved, traced):
    """What is wrong with the end of a run; empty if nothing is."""
    if status == 0:
        return '' if done == saved == STEPS and not traced else 'status 0 of an unfinished run'
    if mode == 'none':
        return 'the run has not gone on'
    if status < 0 and mode != 'inside':
        return 'a worker has ended the run'
    if saved != done and status > 0:  # a killed process has not finished what it was saving
        return 'steps are not saved'
    as_it_ends = status == 2 or status < 0  # the function crashed, or the watchdog killed it
    return '' if as_it_ends and len(lines) == 1 and not traced else 'not one line'


def main(folder, names):
    """Runs all; returns {name and mode: (problem, what was found)}."""
    kill_runs.prepare(folder)
    results = {}
    for name in names:
        for mode in MODES:
            found = attempt(name, mode, folder)
            wrong = problem(mode, *found)
            kill_runs.say(f'{name} {mode}: {wrong or "as it should be"}: {found}')
            results[f'{name} {mode}'] = wrong, found
    return results


if __name__ == '__main__':
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument('--folder', type=pathlib.Path, required=True)
    parser.add_argument('--names', default='')
    options = parser.parse_args()
    names = options.names.split(',') if options.names else functions()
    results = main(options.folder.resolve(), names)
    print(json.dumps({name: wrong for name, (wrong, _) in results.items() if wrong}))
    sys.exit(any(wrong for wrong, _ in results.values()))
