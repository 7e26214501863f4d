"""Calls of compiled programs: dispatched by runs, compiled ahead of time and listed by plans."""

import contextlib
import hashlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

_ADDRESS = re.compile(r' at 0x[0-9a-f]+')


class Call(NamedTuple):
    """A call of a compiled program.

    Attributes:
      program: made by `jax.jit`.
      arguments: arrays; for a call that is only compiled or listed, ShapeDtypeStructs.
      options: keyword arguments.
      name: what the program does, and at which sizes.
      closed_over: what the program was made with, beside its arguments: anything with a `repr`.
      spent: arrays that are deleted once the program is dispatched. Their memory is free when it
        has run, as that of donated arguments, also where no result has their size.
    """

    program: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any] = {}  # noqa: RUF012
    name: str = ''
    closed_over: tuple[Any, ...] = ()
    spent: tuple[jax.Array, ...] = ()

    def run(self) -> Any:
        """Dispatches the program, and returns its results."""
        for observe in _observers:
            observe(self)
        results = self.program(*self.arguments, **self.options)
        for array in self.spent:
            array.delete()
        return results

    @property
    def is_traced(self) -> bool:
        """Whether it is made while another program is traced, of which it becomes a part."""
        return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(self.arguments))

    @property
    def digest(self) -> str:
        """What tells the program from others of a run: equal in every process that runs it.

        It depends on the shapes and dtypes of the arguments, on static options, on the sizes of the
        mesh and on `closed_over`, not on values.
        """
        leaves, tree = jax.tree.flatten(self.arguments)
        parts = [
            getattr(self.program, '__qualname__', ''), str(tree), str(list(map(_kind, leaves))),
            *(f'{key}={_static(value)}' for key, value in sorted(self.options.items())),
            *map(_static, self.closed_over),
        ]  # fmt: skip
        text = _ADDRESS.sub('', '\n'.join(parts))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


_observers: list[Callable[[Call], None]] = []


@contextlib.contextmanager
def observed(observe: Callable[[Call], None]) -> Iterator[None]:
    """Calls `observe` before each call that is dispatched in the block, in any thread."""
    _observers.append(observe)
    try:
        yield
    finally:
        _observers.remove(observe)


def _kind(leaf: Any) -> str:
    """The type of an argument; of one that is no array and no number all of it."""
    if isinstance(leaf, bool | int | float):
        return type(leaf).__name__
    if not hasattr(leaf, 'dtype'):
        return _static(leaf)
    dtype = leaf.dtype if jnp.issubdtype(leaf.dtype, jax.dtypes.extended) else None
    return f'{dtype or np.dtype(leaf.dtype).name}{list(leaf.shape)}'


def _static(value: Any) -> str:
    if hasattr(value, 'dtype') and hasattr(value, 'shape'):  # a keyword argument that is traced
        return _kind(value)
    return str(dict(value.shape)) if isinstance(value, Mesh) else repr(value)
