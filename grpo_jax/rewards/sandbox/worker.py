"""One worker: a sandbox for the next program, one for the tests, and the order of events."""

import contextlib
import math
import os
import signal
import socket
import subprocess
import tempfile
import time

from grpo_jax.rewards.sandbox.bubblewrap import Sandbox, SandboxError
from grpo_jax.rewards.sandbox.inside.candidate import ENDED, TIMEOUT
from grpo_jax.rewards.sandbox.inside.channel import Channel, ChannelError
from grpo_jax.rewards.sandbox.jobs import Inputs, Job, Limits, Result, Tests

_START_SECONDS = 60.0  # for Python to start on a busy machine
_MAX_STARTS = 3  # in a row that fail, after which there is no sandbox
_SPARE_OUTPUT = 2**16  # bytes beyond what is expected, for spaces; more is wrong
_GRACE = 2.0  # seconds after a deadline for what keeps it inside of the sandbox


class _Process:
    """A process in a sandbox of its own, and the connection with it."""

    def __init__(self, sandbox: Sandbox, module: str, errors: int = subprocess.DEVNULL):
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = sandbox.start(module, theirs.fileno(), errors=errors)
        self.channel = Channel(ours)
        self._ready = False

    def wait_until_ready(self) -> bool:
        """Wait for the start; return whether the process is there."""
        if not self._ready:
            self.wait_at_most(_START_SECONDS)
            try:
                self._ready = self.channel.receive() == 'ready'
            except (ChannelError, TimeoutError):
                return False
        return self._ready and self._process.poll() is None

    def wait_at_most(self, seconds: float) -> None:
        """Set the time that sending and receiving may take."""
        self.channel.connection.settimeout(max(seconds, 0.001))

    def kill(self) -> None:
        """End the sandbox and all that is in it."""
        self.channel.close()
        if self._process.returncode is None:  # its number is not another's yet
            with contextlib.suppress(ProcessLookupError, PermissionError):  # all have ended
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def stop(self) -> None:
        """End the sandbox, from another thread."""
        self._process.kill()


class _TestsLost(Exception):
    """The process that runs the tests was killed, which no program can do: memory may be short."""


class Worker:
    """Runs one program after the other, always from the same thread."""

    def __init__(self, sandbox: Sandbox):
        self._sandbox = sandbox
        self._running: _Process | None = None
        self._next: _Process | None = None  # for the next program
        self._checker: _Process | None = None

    def run(self, job: Job, limits: Limits) -> Result:
        """Run a program in a new sandbox, and end the sandbox; once more if its tests were lost."""
        try:
            return self._run(job, limits)
        except _TestsLost:
            pass
        try:
            return self._run(job, limits)
        except _TestsLost as lost:
            return Result(0, 1, str(lost))

    def _run(self, job: Job, limits: Limits) -> Result:
        ready, self._next = self._next, None
        process = self._running = self._start('candidate', ready)
        self._next = _Process(self._sandbox, 'candidate')  # starts meanwhile
        try:
            process.wait_at_most(limits.seconds)
            order = {'program': job.program, 'limits': self._resources(limits)}
            if isinstance(job, Tests):
                process.channel.send({**order, 'kind': 'calls'})
                return self._run_tests(process, job, limits)
            process.channel.send({**order, 'kind': 'cases', 'seconds': limits.seconds})
            return _run_inputs(process, job, limits)
        except ChannelError as error:
            return Result(0, _cases(job), str(error))
        except TimeoutError:
            return Result(0, _cases(job), 'it does not read its input', timeout=True)
        finally:
            process.kill()

    def stop(self) -> None:
        """End the program that runs, from another thread."""
        if self._running:
            self._running.stop()

    def close(self) -> None:
        """End the processes that wait."""
        for process in (self._next, self._checker):
            if process:
                process.kill()
        self._next = self._checker = None

    def _resources(self, limits: Limits) -> dict[str, int]:
        resources = limits.resources()
        if self._sandbox.unsafe:  # all processes of this user would count
            del resources['NPROC']
        return resources

    def _run_tests(self, process: _Process, job: Tests, limits: Limits) -> Result:
        ready, self._checker = self._checker, None
        checker = self._start('checker', ready)
        deadline = time.monotonic() + limits.seconds
        order = {
            'test': job.test,
            'prefix': job.prefix,
            'entry_point': job.entry_point,
            'partial': job.partial,
            'seconds': math.ceil(limits.seconds + _GRACE),
            'limits': self._resources(limits),
        }
        timeout = False
        try:
            checker.wait_at_most(limits.seconds)
            connection = process.channel.connection
            connection.settimeout(None)  # a flag of the connection, which the checker gets
            socket.send_fds(checker.channel.connection, [b'.'], [connection.fileno()])
            checker.channel.send(order)
            checker.wait_at_most(deadline - time.monotonic())
            try:
                report = checker.channel.receive()
            except TimeoutError:  # without the program, the tests end at once
                timeout = True
                process.kill()
                checker.wait_at_most(_GRACE)
                report = checker.channel.receive()
        except TimeoutError:
            checker.kill()
            return Result(0, 1, 'the tests do not end', timeout=True)
        except (ChannelError, OSError) as error:
            checker.kill()
            raise _TestsLost(f'the process of the tests was killed: {error}') from error
        self._checker = checker
        return Result(report['passed'], report['cases'], report['error'], timeout)

    def _start(self, module: str, process: _Process | None) -> _Process:
        """Return a process that is ready: the one that was started, if it still is."""
        for _ in range(_MAX_STARTS):
            process = process or _Process(self._sandbox, module)
            if process.wait_until_ready():
                return process
            process.kill()
            process = None
        raise SandboxError(_why_not(self._sandbox))


def _run_inputs(process: _Process, job: Inputs, limits: Limits) -> Result:
    passed, error, printed = 0, '', None
    for number, (text, expected) in enumerate(zip(job.inputs, job.outputs, strict=True)):
        process.wait_at_most(limits.seconds + _GRACE)
        try:
            process.channel.send_bytes(text.encode(errors='replace'))
            answer = process.channel.receive_bytes()
        except (ChannelError, TimeoutError) as ended:
            return Result(passed, len(job.inputs), str(ended), isinstance(ended, TimeoutError))
        status, output = answer[:1], answer[1:]
        if status == TIMEOUT:
            return Result(passed, len(job.inputs), f'case {number} takes too long', timeout=True)
        most = 4 * len(expected) + _SPARE_OUTPUT
        printed = output[:most].decode(errors='replace') if status == ENDED else None
        if printed is not None and len(output) <= most and job.same(printed, expected):
            passed += 1
            continue
        error = error or f'case {number} is wrong'
        if not job.partial:
            break
    return Result(passed, len(job.inputs), error, output=printed)


def _cases(job: Job) -> int:
    return len(job.inputs) if isinstance(job, Inputs) else 1


def _why_not(sandbox: Sandbox) -> str:
    """Return why no process starts."""
    with tempfile.TemporaryFile() as file:
        process = _Process(sandbox, 'candidate', errors=file.fileno())
        if process.wait_until_ready():
            process.kill()
            return f'{_MAX_STARTS} sandboxes ended before they were ready: is memory short?'
        process.kill()
        file.seek(0)
        reason = file.read().decode(errors='replace').strip()[-500:]
    return (
        f'bubblewrap starts no sandbox here: {reason or "it says nothing"}: allow user namespaces '
        '(sysctl kernel.unprivileged_userns_clone=1 or kernel.apparmor_restrict_unprivileged_userns'
        '=0; docker run --security-opt seccomp=unconfined), or set unsafe=True in a container that '
        'may be lost'
    )
