"""Compiled programs: cached in the run's folder, and counted; the compiler's memory is freed."""

import contextlib
import ctypes
import dataclasses
import os
import pathlib
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from grpo_jax.engine.calls import Call
from grpo_jax.models.kernels.selection import target_platform
from grpo_jax.run import hosts
from grpo_jax.run.errors import is_disk_full

_COMPILED = '/jax/core/compile/backend_compile_duration'  # also for programs from the cache
_TRACED = '/jax/core/compile/jaxpr_trace_duration'
_LOWERED = '/jax/core/compile/jaxpr_to_mlir_module_duration'
_CACHE_HIT = '/jax/compilation_cache/cache_hits'
_LONG = 0.3  # seconds; not worth trimming (about 10 ms) after shorter compilations


@dataclasses.dataclass
class Count:
    """The number of compiled programs."""

    programs: int = 0
    cached: int = 0  # of these, read from the cache

    def __str__(self) -> str:
        return f'compiled programs: {self.programs} ({self.cached} from the cache)'


@contextlib.contextmanager
def counted() -> Iterator[Count]:
    """Counts the programs that are compiled in the block, and those of them read from the cache."""
    count = Count()

    def on_duration(event: str, duration_secs: float, **rest: Any) -> None:
        count.programs += event == _COMPILED

    def on_event(event: str, **rest: Any) -> None:
        count.cached += event == _CACHE_HIT

    jax.monitoring.register_event_listener(on_event)
    try:
        with _timed(on_duration):
            yield count
    finally:
        jax.monitoring.unregister_event_listener(on_event)


class Compilations:
    """The time that compilations take, for a progress bar that leaves it out of its estimate.

    Args:
      bar: a tqdm progress bar.
    """

    def __init__(self, bar: Any) -> None:
        self.seconds, self._bar = 0.0, bar
        self._spans: list[tuple[float, float]] = []

    def add(self, event: str, duration_secs: float, **rest: Any) -> None:
        """Listens to JAX's events."""
        if event not in (_TRACED, _LOWERED, _COMPILED):
            return
        if threading.current_thread() is not threading.main_thread():
            return  # of `CompiledAhead`
        now = time.time()
        begun = now - duration_secs
        # A function that is traced contains others, whose events came before.
        inner = sum(end - start for start, end in self._spans if start >= begun)
        self._spans = [span for span in self._spans if span[0] < begun] + [(begun, now)]
        self._leave_out(max(duration_secs - inner, 0.0), now)

    def wait_for(self, ahead: 'CompiledAhead') -> None:
        """Waits for a program that a thread compiles; this is time of compilations too."""
        started = time.time()
        ahead.wait()
        now = time.time()
        self._leave_out(now - started, now)

    def _leave_out(self, added: float, now: float) -> None:
        self.seconds += added
        if not self._bar.disable:
            # As if the bar had started that much later; `last_print_t` is for its latest rate.
            self._bar.start_t = min(self._bar.start_t + added, now)
            self._bar.last_print_t = min(self._bar.last_print_t + added, now)

    @contextlib.contextmanager
    def announced(self, what: str) -> Iterator[None]:
        """Says on standard error what is compiled in the block, and how long that took."""
        before = self.seconds
        if not hosts.is_first():
            yield
            return
        self._bar.write(f'{what} ...', file=sys.stderr)
        yield
        self._bar.write(f'{what} ... {self.seconds - before:.0f} s', file=sys.stderr)


class CompiledAhead:
    """Compiles a program in a thread, while others are compiled and run that are needed before it.

    XLA compiles without Python's lock, so on a machine of several cores a run's samplers and its
    update are compiled at the same time. The dispatch finds the executable: JAX keeps it by the
    shapes, dtypes and shardings of the arguments. An error is left to the dispatch, which compiles
    the program again and meets it too.

    Nothing is compiled ahead by several processes, which compile their programs in the same order,
    and for GPUs, whose compiler measures kernels on a device that is sampling.

    Args:
      call: returns the abstract call of the program, or None for none; called in the thread.
    """

    def __init__(self, call: Callable[[], Call | None]) -> None:
        self._call, self._thread = call, threading.Thread(target=self._compile, daemon=True)
        if hosts.count() == 1 and target_platform() != 'gpu':
            self._thread.start()

    def _compile(self) -> None:
        with contextlib.suppress(Exception):
            if (call := self._call()) is not None:
                call.program.lower(*call.arguments, **call.options).compile()

    def wait(self) -> None:
        """Waits until it is compiled."""
        if self._thread.ident is not None:
            self._thread.join()


@contextlib.contextmanager
def left_out(bar: Any) -> Iterator[Compilations]:
    """Leaves the time of compilations in the block out of a progress bar's estimate."""
    compilations = Compilations(bar)
    with _timed(compilations.add):
        yield compilations


@contextlib.contextmanager
def trimmed() -> Iterator[None]:
    """Returns memory that the compiler has freed to the system, after compilations in the block.

    glibc keeps the memory that LLVM's threads free, which would add to the peak memory of training:
    about 450 MiB on workload W1 (benchmarks/RESULTS.md). No effect with other C libraries.
    """
    libc = ctypes.CDLL(None) if sys.platform == 'linux' else None
    trim: Callable[[int], int] | None = getattr(libc, 'malloc_trim', None)

    def on_duration(event: str, duration_secs: float, **rest: Any) -> None:
        if trim is not None and event == _COMPILED and duration_secs > _LONG:
            trim(0)

    with _timed(on_duration):
        yield


@contextlib.contextmanager
def _timed(listener: Callable[..., None]) -> Iterator[None]:
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


@contextlib.contextmanager
def kept_in(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Uses `folder` as the cache of compiled programs, small ones too, in the block.

    Where JAX already has a cache (JAX_COMPILATION_CACHE_DIR) that one is used with its settings,
    and with JAX_ENABLE_COMPILATION_CACHE=0 there is none. The machine is part of a program's key.

    Args:
      folder: created when the first program is compiled. If the block ends because the disk is
        full, the programs of the block are removed.
    """
    settings = {
        'jax_compilation_cache_dir': os.fspath(folder),
        'jax_persistent_cache_min_compile_time_secs': 0.0,
        'jax_persistent_cache_min_entry_size_bytes': -1,
        # XLA's own caches put their path into every program's key, which fails in a moved folder.
        'jax_persistent_cache_enable_xla_caches': 'none',
    }
    before = {name: getattr(jax.config, name) for name in settings}
    if before['jax_compilation_cache_dir'] is not None:
        yield
        return
    started = time.time()
    try:
        _configure(settings)
        with warnings.catch_warnings():
            # The run finds no room for its records either, and ends with an error that says so.
            warnings.filterwarnings('ignore', 'Error writing persistent .* No space left on device')
            yield
    except Exception as error:
        if is_disk_full(error):
            _remove_since(started, pathlib.Path(folder))
        raise
    finally:
        _configure(before)


def _remove_since(started: float, folder: pathlib.Path) -> None:
    """Removes the programs that were written since: JAX never replaces one that was cut off."""
    for path in folder.glob('*-cache'):
        if path.stat().st_mtime >= started:
            path.unlink()


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # the open cache still uses the previous folder
