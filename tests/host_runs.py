"""Runs of several processes on one machine, their config and their reward functions.

This file can be given as --config. `train(folder, processes, …)` runs a command in each process,
with four virtual devices in all.
"""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
import zlib

import jax
import numpy as np

from configs import smoke

TIMES = re.compile('timing/|step_time$|perf/')
ROOT = pathlib.Path(__file__).parent.parent
DEVICES = 4


def get_config():
    """Three steps of GRPO, with rewards that vary without any learning."""
    config = smoke.get_config()
    config.model.layers = 1
    config.mesh.fsdp = -1
    config.sft.steps = 0
    config.grpo.update(steps=3, batch_size=8, group_size=4)
    # Adam divides a rounding error by itself where a gradient is 0, unless eps is larger.
    config.grpo.optimizer.eps = 1e-2
    config.grpo.algorithm.inner_updates = 1
    config.grpo.compute.microbatch = 4
    config.grpo.rewards = {
        'host_runs:lucky': 1.0, 'host_runs:third': 0.5, 'host_runs:unreliable': 1.0,
    }  # fmt: skip
    config.data.heldout_split = ''
    config.eval.update(every=3, batch_size=4, correct='host_runs:lucky', samples=0, k=())
    config.checkpoint.update(every=2)
    config.log.completions = 32  # all of them
    return config


def lucky(prompts, completions, **columns):
    pairs = zip(prompts, completions, strict=True)
    return [float(zlib.crc32((prompt + text).encode()) % 2) for prompt, text in pairs]


def third(completions, **columns):
    """A number that most of the completions of a group differ in."""
    return [zlib.crc32(text.encode()) % 100 / 100 for text in completions]


def unreliable(completions, trainer_state, **columns):
    """Fails in the third step as HOST_RUNS_FAILURE says, in the process HOST_RUNS_VICTIM alone.

    If it says 'slow', every step takes a second, and each process writes a file into the folder
    HOST_RUNS_GRADING once it grades. If it says 'huge', rewards of the third step are large.
    """
    failure = os.environ.get('HOST_RUNS_FAILURE')
    if failure == 'huge' and trainer_state.global_step == 2:
        return [1e4 * reward for reward in third(completions)]
    if failure == 'slow':
        (pathlib.Path(os.environ['HOST_RUNS_GRADING']) / str(jax.process_index())).touch()
        time.sleep(1)
    if trainer_state.global_step == 2 and str(jax.process_index()) == os.environ.get(
        'HOST_RUNS_VICTIM'
    ):
        if failure == 'raise':
            raise LookupError('no such answer')
        if failure == 'time-out':
            raise TimeoutError('the judge did not answer')
        if failure == 'nonsense':
            return ['good'] * len(completions)
        if failure == 'kill':
            os.kill(os.getpid(), 9)
    return [0.0] * len(completions)


class Processes:
    """A command in several processes.

    Args:
      module: of the command.
      processes: their number; 1: without any of their options.
      arguments: of the command; '{process}' in them is the number of the process.
      environment: variables to set.
    """

    def __init__(self, module, processes, arguments, environment=None):
        with socket.create_server(('127.0.0.1', 0)) as server:
            port = server.getsockname()[1]
        paths = [str(ROOT), str(ROOT / 'tests'), *filter(None, [os.environ.get('PYTHONPATH')])]
        variables = os.environ | {
            'JAX_PLATFORMS': 'cpu',
            'JAX_NUM_CPU_DEVICES': str(DEVICES // processes),
            'JAX_DISABLE_MOST_OPTIMIZATIONS': '1',
            'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
            'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
            'PYTHONPATH': os.pathsep.join(paths),
        }
        if programs := os.environ.get('GRPO_JAX_TEST_PROGRAMS'):
            variables.setdefault('JAX_COMPILATION_CACHE_DIR', programs)
        variables |= environment or {}
        self.started = []
        for number in range(processes):
            options = [
                f'--coordinator=127.0.0.1:{port}', f'--num_processes={processes}',
                f'--process_id={number}',
            ] if processes > 1 else []  # fmt: skip
            own = [argument.replace('{process}', str(number)) for argument in arguments]
            command = [sys.executable, '-m', f'grpo_jax.{module}', *own, *options]
            self.started.append(subprocess.Popen(
                command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ))  # fmt: skip

    def wait(self, timeout=300):
        """The exit status, standard output and standard error of each; all have ended then."""
        deadline = time.monotonic() + timeout
        try:
            results = []
            for process in self.started:
                out, err = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
                results.append((process.returncode, out, err))
            return results
        finally:
            for process in self.started:
                process.kill()
                process.wait()


def run(module, processes, *arguments, timeout=300, **environment):
    """The standard output of the first process of a command that succeeds in all."""
    results = Processes(module, processes, arguments, environment).wait(timeout)
    for status, out, err in results:
        assert status == 0, f'{status}\n{out}\n{err}'
    return results[0][1]


def train(workdir, processes, *changes, **environment):
    arguments = [f'--config={__file__}', f'--workdir={workdir}', *changes]
    return run('train', processes, *arguments, **environment)


def rows(path):
    """The objects of a JSON lines file, without times."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not TIMES.match(k)} for row in found]


def largest_difference(workdir, other, stage='grpo'):
    """Between the parameters of the newest checkpoints of two runs."""
    ours, theirs = (_params(folder / 'checkpoints' / stage) for folder in (workdir, other))
    assert ours.keys() == theirs.keys()
    return max(float(np.abs(ours[name] - theirs[name]).max()) for name in ours)


def _params(folder):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(folder) as manager:
        step = manager.latest_step()
        path = folder / str(step) / 'params'
        handler = ocp.PyTreeCheckpointHandler()
        shapes = handler.metadata(path).tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        tree = handler.restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p): np.asarray(x, np.float64) for p, x in leaves}
