"""Compares our step with other trainers on the same workloads, alternating to share the noise.

    python -m benchmarks.compare --workloads=W1,W2 --rounds=3 --output=runs/peers.jsonl \
        --trl=PATH/bin/python --tunix=PATH/bin/python
    python -m benchmarks.compare --rounds=0 --output=runs/peers.jsonl

Each peer runs in its own environment (`benchmarks/peers/`), named by the path of its Python; a peer
without one is left out. Every run is a process that appends a line to the output. The tables are
made from all its lines, so the second command only prints them.
"""

import json
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags

ROOT = pathlib.Path(__file__).resolve().parents[1]
OURS = 'grpo_jax'

Row = dict[str, Any]

WORKLOADS = flags.DEFINE_list('workloads', ['W1'], 'which workloads')
ROUNDS = flags.DEFINE_integer('rounds', 3, 'runs of each; 0 only prints the tables', lower_bound=0)
STEPS = flags.DEFINE_integer('steps', 3, 'measured steps of a run')
WARMUP = flags.DEFINE_integer('warmup', 2, 'steps before them')
OUTPUT = flags.DEFINE_string('output', None, 'file of JSON lines', required=True)
TRL = flags.DEFINE_string('trl', '', "Python of TRL's environment")
TUNIX = flags.DEFINE_string('tunix', '', "Python of Tunix's environment")
OPTIONS = {
    OURS: flags.DEFINE_string('ours_options', '', 'for benchmarks.step'),
    'trl': flags.DEFINE_string('trl_options', '--micro 8', 'for benchmarks.peers.run_trl'),
    'tunix': flags.DEFINE_string(
        'tunix_options', '--micro 1 --rollout-micro 8', 'for benchmarks.peers.run_tunix'
    ),
}


def main(arguments: list[str]) -> None:
    """Runs what the flags ask for and prints the tables."""
    if arguments[1:]:
        raise app.UsageError(f'unexpected arguments: {arguments[1:]}')
    output = pathlib.Path(OUTPUT.value).absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(ROUNDS.value):
        for workload in WORKLOADS.value:
            for framework, command in commands().items():
                run(framework, [*command, '--workload', workload, '--record', str(output)])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    print('\n'.join([*table(rows), '', *ratios(rows)]))


def commands() -> dict[str, list[str]]:
    """The command of each framework that has an environment, without the workload."""
    programs = {
        OURS: (sys.executable, 'benchmarks.step'),
        'trl': (TRL.value, 'benchmarks.peers.run_trl'),
        'tunix': (TUNIX.value, 'benchmarks.peers.run_tunix'),
    }
    steps = ['--steps', str(STEPS.value), '--warmup', str(WARMUP.value)]
    return {
        framework: [python, '-m', module, *OPTIONS[framework].value.split(), *steps]
        for framework, (python, module) in programs.items()
        if python
    }


def run(framework: str, command: list[str]) -> None:
    """Runs one process and prints its summary, or the end of its output if it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() if line.startswith('[')]
    print('\n'.join(said), flush=True)
    if done.returncode:
        last = '\n'.join(done.stderr.splitlines()[-5:])
        print(f'{framework} failed ({done.returncode}): {" ".join(command)}\n{last}', flush=True)


def learning(row: Row) -> float:
    """Seconds of scoring the reference and of the update.

    In our step both are one program; a peer has separate ones.
    """
    seconds = row['seconds']
    both = seconds['update']['median']
    return both if row['framework'] == OURS else both + seconds['score']['median']


QUANTITIES: dict[str, Callable[[Row], float]] = {
    'step s': lambda row: row['seconds']['step']['median'],
    'sample s': lambda row: row['seconds']['sample']['median'],
    'score and update s': learning,
    'first step s': lambda row: row['first_step_s'],
    'peak GiB': lambda row: row['peak_bytes'] / 2**30,
}


def grouped(rows: list[Row]) -> dict[str, dict[str, list[Row]]]:
    """Rows by workload and framework."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(row['workload'], {}).setdefault(row['framework'], []).append(row)
    return found


def table(rows: list[Row]) -> list[str]:
    """Markdown: medians of the runs' medians, and the extremes of all steps for the step itself."""
    more = ('tokens/step', 'tokens/s', 'noise', 'probe GFLOP/s')
    lines = [
        '| ' + ' | '.join(['workload', 'framework', 'steps', *QUANTITIES, *more]) + ' |',
        '|' + '---|' * (3 + len(QUANTITIES) + len(more)),
    ]
    for workload, frameworks in grouped(rows).items():
        for framework, runs in frameworks.items():
            steps = [run['seconds']['step'] for run in runs]
            cells = [workload, framework, str(sum(step['n'] for step in steps))]
            cells += [f'{middle(runs, of):.2f}' for of in QUANTITIES.values()]
            cells[3] += f' ({min(s["min"] for s in steps):.2f}-{max(s["max"] for s in steps):.2f})'
            probes = [probe / 1e9 for run in runs for probe in run['probe_flops_per_s']]
            cells += [
                f'{middle(runs, lambda run: run["tokens_per_step"]["median"]):.0f}',
                f'{middle(runs, lambda run: run["tokens_per_s"]["step"]["median"]):.0f}',
                f'{max(run["noise"]["max"] for run in runs):.2f}',
                f'{min(probes):.0f}-{max(probes):.0f}',
            ]
            lines.append('| ' + ' | '.join(cells) + ' |')
    return lines


def ratios(rows: list[Row]) -> list[str]:
    """Markdown: the best peer's time or memory divided by ours; above 1, ours is better."""
    lines = [
        '| best peer / ours | ' + ' | '.join(name.rsplit(' ', 1)[0] for name in QUANTITIES) + ' |',
        '|' + '---|' * (1 + len(QUANTITIES)),
    ]
    for workload, frameworks in grouped(rows).items():
        peers = {name: runs for name, runs in frameworks.items() if name != OURS}
        if OURS not in frameworks or not peers:
            continue
        cells = []
        for of in QUANTITIES.values():
            best = min(peers, key=lambda name: middle(peers[name], of))
            ratio = middle(peers[best], of) / middle(frameworks[OURS], of)
            cells.append(f'{ratio:.2f} ({best})')
        lines.append(f'| {workload} | ' + ' | '.join(cells) + ' |')
    return lines


def middle(runs: list[Row], of: Callable[[Row], float]) -> float:
    """The median of a quantity over runs."""
    return statistics.median(map(of, runs))


if __name__ == '__main__':
    app.run(main)
