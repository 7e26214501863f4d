"""The table by which parameters, moments and other trees like them are split over the mesh."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax.sharding.mesh import DATA, devices_of

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


def _axes_of(path: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """The table's entry for a leaf, with None for its leading axes."""
    name = next((k.key for k in reversed(path) if isinstance(k, jax.tree_util.DictKey)), None)
    axes = TABLE.get(name, ()) if isinstance(name, str) else ()
    if len(shape) < len(axes):
        axes = ()
    return (None,) * (len(shape) - len(axes)) + axes


def _spec(path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    axes = zip(_axes_of(path, shape), shape, strict=True)
    return PartitionSpec(*(_fitted(axis, size, mesh) for axis, size in axes))


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


def whole_over_data(tree: Any, mesh: Mesh) -> Any:
    """`shardings` that split over `tensor` alone: each device along the data axes holds a copy."""

    def spec(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        split = (part if part == 'tensor' else None for part in _spec(path, leaf.shape, mesh))
        return NamedSharding(mesh, PartitionSpec(*split))

    return jax.tree_util.tree_map_with_path(spec, tree)


def not_split(tree: Any, mesh: Mesh) -> list[str]:
    """Parameters that devices hold more of than their share, since a size does not divide.

    Key/value heads are left out, see `check_heads`.

    Args:
      tree: parameters, arrays or ShapeDtypeStructs.
      mesh: from `make_mesh`.

    Returns:
      A description of each, such as 'embedding: 67 over tensor=2'.
    """
    found: dict[str, None] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        for axis, size in zip(_axes_of(path, leaf.shape), leaf.shape, strict=True):
            asked: str | tuple[str, ...] = DATA if axis == 'fsdp' else axis or ()
            name = str(getattr(path[-1], 'key', path[-1]))
            if axis == 'tensor' and name.split('_')[0] in ('key', 'value'):
                continue
            if size > 1 and _fitted(axis, size, mesh) != (asked or None):
                found[f'{name}: {size} over {axis}={devices_of(mesh, asked)}'] = None
    return list(found)


def _fitted(axis: str | None, size: int, mesh: Mesh) -> str | tuple[str, ...] | None:
    """The mesh axes that split an array's axis of this size: the most devices that divide it."""
    if axis is None:
        return None
    options: tuple[str | tuple[str, ...], ...] = ('tensor',)
    if axis == 'fsdp':
        options = (DATA, *sorted(DATA, key=lambda name: -mesh.shape[name]))
    return next((option for option in options if size % devices_of(mesh, option) == 0), None)
