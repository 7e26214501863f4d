"""Compiled programs: kept in the run's folder, counted, and their compiler's memory freed."""

import contextlib
import ctypes
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

_COMPILED = '/jax/core/compile/backend_compile_duration'  # also of those that were read
_READ = '/jax/compilation_cache/cache_hits'
_LONG = 0.3  # seconds of a compilation after which memory is given back, in some 10 ms


@dataclasses.dataclass
class Count:
    """Programs that were asked of the compiler."""

    programs: int = 0
    read: int = 0  # of these from the cache

    def __str__(self) -> str:
        return f'compiled programs: {self.programs} ({self.read} from the cache)'


@contextlib.contextmanager
def counted() -> Iterator[Count]:
    """Counts the programs that are compiled meanwhile, and those of them read from the cache."""
    count = Count()

    def on_duration(event: str, duration_secs: float, **rest: Any) -> None:
        count.programs += event == _COMPILED

    def on_event(event: str, **rest: Any) -> None:
        count.read += event == _READ

    jax.monitoring.register_event_listener(on_event)
    try:
        with _timed(on_duration):
            yield count
    finally:
        jax.monitoring.unregister_event_listener(on_event)


@contextlib.contextmanager
def trimmed() -> Iterator[None]:
    """Gives the memory that the compiler has freed back to the system, meanwhile.

    glibc keeps what LLVM's threads free: for an update hundreds of MiB, which would stand beside
    the program's own memory from then on. Other C libraries are left alone.
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
    """Reads and writes compiled programs, small ones too, in `folder` meanwhile.

    Where JAX already has a cache (JAX_COMPILATION_CACHE_DIR) that one stays, with its settings; and
    JAX_ENABLE_COMPILATION_CACHE=0 leaves all of them out. The machine is part of a program's key.

    Args:
      folder: need not exist; made when the first program is compiled.
    """
    settings = {
        'jax_compilation_cache_dir': os.fspath(folder),
        'jax_persistent_cache_min_compile_time_secs': 0.0,
        'jax_persistent_cache_min_entry_size_bytes': -1,
        # Its path would be part of every program's key, and a folder that was moved of no use.
        'jax_persistent_cache_enable_xla_caches': 'none',
    }
    before = {name: getattr(jax.config, name) for name in settings}
    if before['jax_compilation_cache_dir'] is not None:
        yield
        return
    try:
        _configure(settings)
        yield
    finally:
        _configure(before)


def _configure(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # it has opened its folder, or found that there is none
