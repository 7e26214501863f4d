"""Starting several processes, and ending them together."""

import atexit
import contextlib
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from grpo_jax.run.errors import problems_of
from grpo_jax.run.hosts.agreement import Stopped, is_in_all_processes
from grpo_jax.run.hosts.state import ProcessesError, index

MEETING = 300  # seconds in which all processes have to start
_HEARTBEAT = 40  # seconds after which JAX ends the others if a process hangs

OPTIONS = ('coordinator', 'num_processes', 'process_id')  # of the command line, see `start_from`

_roll_call: Any = None


class Start(NamedTuple):
    """How this process finds the others."""

    coordinator: str  # host:port of process 0
    num_processes: int
    process_id: int
    local_device_ids: Any = None


def start_from(coordinator: str, num_processes: str, process_id: str) -> Start | None:
    """How to start, from options of the command line; None: one process, or as the environment has.

    Args:
      coordinator: host:port of process 0.
      num_processes: their number.
      process_id: of this one, from 0.

    Raises:
      ProcessesError: some of them are missing, or a number is wrong.
    """
    options = {
        '--coordinator': coordinator, '--num_processes': num_processes, '--process_id': process_id,
    }  # fmt: skip
    if not any(options.values()):
        return None
    if missing := [name for name, text in options.items() if not text]:
        raise ProcessesError(
            f'{", ".join(missing)} is missing: several processes need --coordinator=HOST:PORT of '
            'process 0, --num_processes=N and --process_id=K, from 0 to N - 1'
        )
    if not re.fullmatch(r'.+:\d+', coordinator):
        raise ProcessesError(f'--coordinator={coordinator}: give host and port, such as host:8476')
    count, index = (int(t) if t.isdecimal() else -1 for t in (num_processes, process_id))
    if not 0 <= index < count:
        raise ProcessesError(
            f'--num_processes={num_processes} --process_id={process_id}: give a number of '
            'processes, and for each process its own number from 0 to that less one'
        )
    return Start(coordinator, count, index)


def detected() -> Start | None:
    """How to start where the environment says that there are several processes; else None.

    JAX finds the processes of Cloud TPU slices, Slurm, Open MPI, and indexed jobs of Kubernetes.
    """
    from jax._src import clusters

    for environment in clusters.ClusterEnv._cluster_types:
        # Any container of a Kubernetes cluster looks like one of its jobs.
        other = environment.__name__ == 'K8sCluster' and 'JOB_COMPLETION_INDEX' not in os.environ
        if environment.opt_in_only_method or other or not environment.is_env_present():
            continue
        if environment.get_process_count() == 1:
            return None
        found: Any = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, MEETING
        )
        return Start(*found)
    return None


def start(options: Start | None = None, *, timeout: float = MEETING) -> None:
    """Starts JAX's distributed runtime if there are several processes.

    Call it before anything uses a device.

    Args:
      options: from `start_from`; None: those that the environment has, see `detected`.
      timeout: seconds to wait for the others.

    Raises:
      ProcessesError: processes are missing; names them.
    """
    global _roll_call
    options = options or detected()
    if options is None or options.num_processes == 1 or jax.distributed.is_initialized():
        return
    from grpo_jax.run.hosts import roll_call

    try:
        _roll_call = roll_call.meet(
            options.coordinator, options.num_processes, options.process_id, timeout=timeout
        )
    except roll_call.RollCallError as error:
        raise ProcessesError(str(error)) from error
    # Its handler of SIGTERM would compete with that of `signals.handled`.
    jax.config.update('jax_enable_preemption_service', False)
    jax.distributed.initialize(
        options.coordinator,
        options.num_processes,
        options.process_id,
        local_device_ids=options.local_device_ids,
        initialization_timeout=int(timeout),
        heartbeat_timeout_seconds=_HEARTBEAT,
    )
    atexit.register(_roll_call.leave)
    if options.process_id:
        # The first process warns of what all of them see.
        logging.getLogger('grpo_jax').setLevel(logging.ERROR)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends the other processes if this one fails in the block; to be used around a whole command.

    An error that is raised in all processes is none of this kind.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized() or is_in_all_processes(error):
            raise
        from grpo_jax.rewards import output, watchdog  # slow, and needed here alone

        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(
                5
            )  # if the reason is that another process ended, the roll call ends this one
        if isinstance(error, ValueError | OSError):
            for problem in problems_of(error):
                print('error:', output.printable(' '.join(problem.split())), file=sys.stderr)
        else:
            traceback.print_exception(error)
        if _roll_call is not None:
            _roll_call.announce(f'process {index()} failed: {type(error).__name__}: {error}')
        sys.stdout.flush()
        sys.stderr.flush()
        watchdog.exit_now(2 if isinstance(error, ValueError | OSError) else 1)


@contextlib.contextmanager
def stopped_by_signal() -> Iterator[None]:
    """Ends the program with a line and the status of a signal, such as 143, if one stops it."""
    try:
        yield
    except Stopped as stopped:
        print(stopped, file=sys.stderr, flush=True)
        sys.exit(128 + stopped.number)
