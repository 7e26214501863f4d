"""The device mesh and its sizes."""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

AXES = ('groups', 'completions', 'tensor')
DATA = ('groups', 'completions')  # `fsdp` in the table of parameters

_splits_params = contextvars.ContextVar('splits_params', default=False)


def make_mesh(
    *,
    fsdp: int = 1,
    completions: int = 1,
    tensor: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh of fsdp x tensor devices, whose axes are `AXES`.

    Args:
      fsdp: devices over which a batch and the parameters are split; -1: all that tensor leaves.
      completions: devices over which each group is split, a factor of fsdp.
      tensor: devices over which heads, the MLP and the vocabulary are split; -1: all that fsdp
        leaves.
      devices: to use, the first ones of them; None: all that JAX sees.

    Raises:
      ValueError: the sizes do not fit the devices that exist, or each other.
    """
    found = jax.devices() if devices is None else list(devices)
    fsdp, tensor = mesh_sizes(fsdp, tensor, len(found))
    if completions < 1 or fsdp % completions:
        works = ', '.join(str(n) for n in range(1, fsdp + 1) if fsdp % n == 0)
        raise ValueError(
            f'mesh completions={completions} does not divide fsdp={fsdp}: use one of {works}'
        )
    shape = (fsdp // completions, completions, tensor)
    used = found[: math.prod(shape)]
    if len(used) == len(found):  # neighbors in the mesh are neighbors on a TPU slice
        grid = mesh_utils.create_device_mesh(shape, used, allow_split_physical_axes=True)
    else:
        grid = np.asarray(used).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def with_tensor(mesh: Mesh, tensor: int) -> Mesh:
    """The same devices with more of them along `tensor`, and so fewer along the data axes.

    Those that split a group are taken first. The order of the devices stays, so that a program can
    take arrays of both meshes.

    Args:
      mesh: from `make_mesh`.
      tensor: one of `tensor_sizes`.
    """
    groups, completions, before = mesh.devices.shape
    factor = tensor // before
    of_group = math.gcd(completions, factor)
    shape = groups * of_group // factor, completions // of_group, tensor
    return Mesh(mesh.devices.reshape(shape), AXES, axis_types=mesh.axis_types)


def tensor_sizes(mesh: Mesh, heads: int, kv_heads: int) -> list[int]:
    """The sizes of `tensor` that `with_tensor` can make and whose devices hold whole heads.

    Args:
      mesh: from `make_mesh`.
      heads: of queries.
      kv_heads: of keys and values.
    """
    groups, completions, tensor = mesh.devices.shape
    factors = {completions * n for n in range(1, groups + 1) if groups % n == 0}
    factors |= {n for n in range(1, completions + 1) if completions % n == 0}
    sizes = sorted(tensor * n for n in factors)
    return [size for size in sizes if _heads_fit(size, heads, kv_heads)]


def mesh_sizes(fsdp: int, tensor: int, devices: int) -> tuple[int, int]:
    """The sizes with a number for -1, which one of them may be.

    Raises:
      ValueError: they do not fit the number of devices.
    """
    sizes = f'mesh fsdp={fsdp}, tensor={tensor}'
    if fsdp == tensor == -1:
        raise ValueError(f'{sizes}: only one of them can be -1')
    if any(size < 1 and size != -1 for size in (fsdp, tensor)):
        raise ValueError(f'{sizes}: make each at least 1 (or one of them -1)')
    if fsdp == -1:
        fsdp = devices // tensor
    if tensor == -1:
        tensor = devices // fsdp
    if min(fsdp, tensor) < 1 or fsdp * tensor > devices:
        needed = max(fsdp, 1) * max(tensor, 1)
        raise ValueError(
            f'mesh fsdp={fsdp} x tensor={tensor} needs {needed} devices, but '
            f'JAX sees {devices}: make the mesh smaller, or set fsdp=-1 to use all devices'
        )
    return fsdp, tensor


def choose_completions(fsdp: int, batch: int, group_size: int) -> int:
    """The fewest devices to split a group over so that B groups of G completions use all of fsdp.

    1 if there is no such number; `check_batch` then lists the batches that work.

    Args:
      fsdp: devices over which a batch is split.
      batch: B.
      group_size: G.
    """
    works = (
        n
        for n in range(1, fsdp + 1)
        if fsdp % n == 0 and batch % (fsdp // n) == 0 and group_size % n == 0
    )
    return next(works, 1)


def check_heads(heads: int, kv_heads: int, mesh: Mesh | None) -> None:
    """Checks that each device of the `tensor` axis can hold whole heads and the keys they read.

    Query heads are split evenly. Key/value heads are split too if there are at least as many as
    devices; if there are fewer, each is replicated on the devices whose query heads read it.

    Raises:
      ValueError: they cannot; the message lists the sizes that work.
    """
    tensor = 1 if mesh is None else mesh.shape['tensor']
    if not _heads_fit(tensor, heads, kv_heads):
        sizes = range(1, heads + 1)
        works = ', '.join(str(size) for size in sizes if _heads_fit(size, heads, kv_heads))
        raise ValueError(
            f'mesh tensor={tensor} does not divide {heads} query heads with {kv_heads} key/value '
            f'heads: use one of {works}'
        )


def _heads_fit(size: int, heads: int, kv_heads: int) -> bool:
    return heads % size == 0 and (kv_heads % size == 0 or size % kv_heads == 0)


@contextlib.contextmanager
def use(mesh: Mesh | None, *, splits_params: bool = False) -> Iterator[None]:
    """A context in which functions are traced for the mesh (None: one device); see `anchor`.

    Args:
      mesh: the devices.
      splits_params: parameters are split over the data axes, as by `shardings`, and `by_axes` has
        an effect.
    """
    if mesh is None:
        yield
        return
    token = _splits_params.set(splits_params)
    try:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield
    finally:
        _splits_params.reset(token)


def splits_params() -> bool:
    """Whether functions are traced in `use(mesh, splits_params=True)`."""
    return _splits_params.get()


def data_devices(mesh: Mesh | AbstractMesh | None) -> int:
    """How many devices the completions of a batch are spread over."""
    return 1 if mesh is None else devices_of(mesh, DATA)


def devices_of(mesh: Mesh | AbstractMesh, axes: str | tuple[str, ...]) -> int:
    """How many devices one or several axes of the mesh have."""
    names = (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[name] for name in names)
