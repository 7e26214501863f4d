"""The device mesh, and the table by which parameters are sharded over it.

The mesh has two axes. `fsdp` splits the batch's groups and the parameters (as in ZeRO-3, gathered
where they are used); `tensor` splits heads, the MLP and the vocabulary. One device is
a mesh of size 1 x 1.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ('fsdp', 'tensor')

# Parameter name -> how its last axes are split; leading (stacked layer) axes are not. Names that
# are not listed (norm scales, counters) are replicated.
TABLE: dict[str, tuple[str | None, ...]] = {
    'embedding': ('tensor', 'fsdp'),  # [V, D]
    'head': ('fsdp', 'tensor'),  # [D, V]
    'score': ('fsdp', None),  # [D, 1]
    'query': ('fsdp', 'tensor', None),  # [D, H, h]
    'key': ('fsdp', 'tensor', None),  # [D, K, h]
    'value': ('fsdp', 'tensor', None),
    'query_lora_a': ('fsdp', None),  # [D, r]
    'key_lora_a': ('fsdp', None),
    'value_lora_a': ('fsdp', None),
    'gate_lora_a': ('fsdp', None),
    'up_lora_a': ('fsdp', None),
    'out_lora_a': ('tensor', None, None),  # [H, h, r]
    'down_lora_a': ('tensor', None),  # [M, r]
    'query_lora_b': (None, 'tensor', None),  # [r, H, h]
    'key_lora_b': (None, 'tensor', None),
    'value_lora_b': (None, 'tensor', None),
    'gate_lora_b': (None, 'tensor'),  # [r, M]
    'up_lora_b': (None, 'tensor'),
    'out_lora_b': (None, 'fsdp'),  # [r, D]
    'down_lora_b': (None, 'fsdp'),
    'query_bias': ('tensor', None),  # [H, h]
    'key_bias': ('tensor', None),
    'value_bias': ('tensor', None),
    'out_bias': (None,),  # [D]
    'gate_bias': ('tensor',),  # [M]
    'up_bias': ('tensor',),
    'down_bias': (None,),
    'router': ('fsdp', None),  # [D, E]
    'out': ('tensor', None, 'fsdp'),  # [H, h, D]
    'gate': ('fsdp', 'tensor'),  # [D, M], or [E, D, M] of experts
    'up': ('fsdp', 'tensor'),
    'down': ('tensor', 'fsdp'),  # [M, D]
}


def make_mesh(*, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of fsdp x tensor devices; fsdp=-1: use all devices.

    Raises:
      ValueError: the sizes do not fit the devices that exist.
    """
    devices = jax.devices()
    if tensor < 1 or (fsdp < 1 and fsdp != -1):
        raise ValueError(f'mesh fsdp={fsdp}, tensor={tensor}: make each at least 1 (or fsdp=-1)')
    if fsdp == -1:
        fsdp = len(devices) // tensor
    if fsdp < 1 or fsdp * tensor > len(devices):
        raise ValueError(
            f'mesh fsdp={fsdp} x tensor={tensor} needs {max(fsdp, 1) * tensor} devices, but '
            f'JAX sees {len(devices)}: make the mesh smaller, or set fsdp=-1 to use all devices'
        )
    grid = np.asarray(devices[: fsdp * tensor]).reshape(fsdp, tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _spec(path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The table's entry for a leaf. An axis is not split if the mesh size does not divide it."""
    name = next((k.key for k in reversed(path) if isinstance(k, jax.tree_util.DictKey)), None)
    axes = TABLE.get(name, ()) if isinstance(name, str) else ()
    if len(shape) < len(axes):
        return PartitionSpec()
    whole = (None,) * (len(shape) - len(axes))
    fitted = [
        axis if axis and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(axes, shape[len(whole) :], strict=True)
    ]
    return PartitionSpec(*whole, *fitted)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf of parameters, optimizer state or a whole TrainState.

    A leaf is looked up by the last dictionary key on its path, so Adam's moments are sharded like
    the parameters they belong to.

    Args:
      tree: arrays or ShapeDtypeStructs.
      mesh: from `make_mesh`.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _spec(path, leaf.shape, mesh)), tree
    )


def placed(tree: Any, mesh: Mesh) -> Any:
    """ShapeDtypeStructs of arrays or shapes, with their `shardings`."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree,
        shardings(tree, mesh),
    )


def groups(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays with a leading B axis: groups are split over `fsdp`."""
    return NamedSharding(mesh, PartitionSpec('fsdp'))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that puts a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


@contextlib.contextmanager
def use(mesh: Mesh | None) -> Iterator[None]:
    """A context in which functions are traced for the mesh (None: one device); see `anchor`."""
    if mesh is None:
        yield
    else:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            yield


def anchor(x: jax.Array) -> jax.Array:
    """Constrains activations [B, ...] to be split by group over `fsdp` and along no other axis.

    Otherwise the compiler may gather the batch and split the width instead, since parameters are
    split over that mesh axis too. Returns x unchanged without a mesh.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec('fsdp'))


def data_devices(mesh: Mesh | None) -> int:
    """How many devices the groups of a batch are spread over."""
    return 1 if mesh is None else int(mesh.shape['fsdp'])


def put_groups(tree: Any, mesh: Mesh) -> Any:
    """Places host arrays with a leading B axis on the mesh."""
    return jax.device_put(tree, groups(mesh))


def check_batch(
    batch: int,
    microbatch: int,
    mesh: Mesh | None = None,
    *,
    of: str = 'a batch',
    name: str = 'microbatch',
) -> None:
    """Checks that B groups can be split over the mesh and into microbatches.

    Args:
      batch: B.
      microbatch: groups per microbatch, over all devices.
      mesh: each microbatch is spread over its fsdp axis.
      of: the batch's name in error messages.
      name: the microbatch's name in error messages.

    Raises:
      ValueError: they cannot; the message lists the sizes that work.
    """
    devices = data_devices(mesh)
    if batch % devices:
        near = ', '.join(
            str(n) for n in (batch // devices * devices, -(-batch // devices) * devices) if n
        )
        raise ValueError(
            f'{of} of {batch} prompts does not divide over mesh fsdp={devices}: use {near} prompts'
        )
    works = [n for n in range(devices, batch + 1, devices) if batch % n == 0]
    if microbatch not in works:
        raise ValueError(
            f'{name}={microbatch} does not cut {of} of {batch} prompts over '
            f'fsdp={devices} into equal pieces: use one of {", ".join(map(str, works))}'
        )
