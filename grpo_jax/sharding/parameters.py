"""The table by which parameters, moments and other trees like them are split over the mesh."""

from collections.abc import Collection
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from grpo_jax.sharding.mesh import DATA, devices_of, splits_params

HOST = 'pinned_host'  # JAX's name of the host's memory that devices can read

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


def shardings(tree: Any, mesh: Mesh, *, host: Collection[str] = ()) -> Any:
    """A NamedSharding for each leaf of parameters, optimizer state or a whole TrainState.

    A leaf is looked up by the last dictionary key on its path, so Adam's moments are sharded like
    the parameters they belong to.

    Args:
      tree: arrays or ShapeDtypeStructs. What lies in the host's memory stays there.
      mesh: from `make_mesh`.
      host: fields of the tree whose arrays are kept in the host's memory, but for scalars.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        named = any(getattr(key, 'name', None) in host for key in path)
        stays = getattr(getattr(leaf, 'sharding', None), 'memory_kind', None) == HOST
        kind = HOST if leaf.ndim and (named or stays) else None
        return NamedSharding(mesh, _spec(path, leaf.shape, mesh), memory_kind=kind)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def placed(tree: Any, mesh: Mesh, *, host: Collection[str] = ()) -> Any:
    """ShapeDtypeStructs of arrays or shapes, with their `shardings`."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        tree,
        shardings(tree, mesh, host=host),
    )


def check_host_memory(mesh: Mesh | None, name: str) -> None:
    """Checks that arrays can be kept in the host's memory.

    Args:
      mesh: the devices; None: JAX's default device.
      name: of the option that asks for it, for the error message.

    Raises:
      ValueError: the devices cannot read it, or there is no mesh.
    """
    if mesh is None:
        raise ValueError(f'{name}=True needs a mesh: pass one, such as that of make_mesh()')
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise ValueError(
            f'{name}=True, and {device.device_kind} devices have no memory of kind {HOST!r} '
            f'(they have {", ".join(kinds)}): store moments in fewer bytes, by '
            "optimizer.moments='bfloat16' or 'float8'"
        )


def on_device(tree: Any) -> Any:
    """The arrays of a program, those in the host's memory copied to the devices."""
    return _moved(tree, tree, jax.memory.Space.Device)


def back_on_host(tree: Any, before: Any) -> Any:
    """The arrays of a program, copied to the host's memory where those of `before` lie there."""
    return _moved(tree, before, jax.memory.Space.Host)


def _moved(tree: Any, before: Any, space: Any) -> Any:
    def move(x: Any, old: Any) -> Any:
        return jax.device_put(x, space) if _lies_on_host(old) else x

    return jax.tree.map(move, tree, before)


def _lies_on_host(x: Any) -> bool:
    return bool(jax.typeof(x).memory_space == jax.memory.Space.Host)


def whole_over_data(tree: Any, mesh: Mesh) -> Any:
    """`shardings` that split over `tensor` alone: each device along the data axes holds a copy."""

    def spec(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        split = (part if part == 'tensor' else None for part in _spec(path, leaf.shape, mesh))
        return NamedSharding(mesh, PartitionSpec(*split))

    return jax.tree_util.tree_map_with_path(spec, tree)


def by_axes(x: Any, name: str = '') -> Any:
    """Parameters that are gathered, and whose gradients are summed, over one data axis at a time.

    They are constrained to be split over `groups` alone of the data axes. Over both at once, the
    compiler of TPUs makes an all-reduce of the whole array out of a gather, and out of the sum of
    a gradient that is then split: more bytes to send, and several times the compilation.

    Args:
      x: a tree of parameters, or one layer's parameter of this name, a cast of it, or its gradient.
        Returned unchanged unless parameters are split over both data axes of the mesh in use.
      name: in the table.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not splits_params() or any(mesh.shape[axis] == 1 for axis in DATA):
        return x

    def constrained(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        axes = _axes_of((jax.tree_util.DictKey(name), *path), leaf.shape)
        split = [_fitted(axis, size, mesh) for axis, size in zip(axes, leaf.shape, strict=True)]
        if DATA not in split:
            return leaf
        where = PartitionSpec(*(DATA[0] if part == DATA else part for part in split))
        return jax.lax.with_sharding_constraint(leaf, where)

    return jax.tree_util.tree_map_with_path(constrained, x)


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


def _fitted(axis: str | None, size: int, mesh: Mesh | AbstractMesh) -> str | tuple[str, ...] | None:
    """The mesh axes that split an array's axis of this size: the most devices that divide it."""
    if axis is None:
        return None
    options: tuple[str | tuple[str, ...], ...] = ('tensor',)
    if axis == 'fsdp':
        options = (DATA, *sorted(DATA, key=lambda name: -mesh.shape[name]))
    return next((option for option in options if size % devices_of(mesh, option) == 0), None)
