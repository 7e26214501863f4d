"""How the arrays of a batch are split over the mesh, and put there.

A batch of B groups of G completions is split over the data axes by its groups, [B, G, ...] over
`groups`, and then inside of its groups, over `completions`. What computes whole completions uses
slices of groups instead: with c devices along `completions`, an array [B, G, ...] becomes
[B * c, G / c, ...], whose leading axis is split over all data devices. Each slice has a copy of its
group's prompt.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax.sharding.mesh import DATA, choose_completions, data_devices
from grpo_jax.types import Prompts, Rollout


def groups(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose leading axis is split over all data devices."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding that puts a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def anchor(x: jax.Array) -> jax.Array:
    """Constrains activations [B, ...] to be split by B over the data axes and along no other axis.

    Otherwise the compiler may gather the batch and split the width instead, since parameters are
    split over those mesh axes too. Returns x unchanged without a mesh.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(DATA))


def anchor_rows(x: jax.Array) -> jax.Array:
    """`anchor` that leaves the other axes to the compiler, such as heads that are split already."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    others = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(DATA, *others))


def on_each_data_device(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The function (split, shared) -> result, called on each data device's part of the batch.

    For what the compiler cannot split by itself, such as sorting tokens by their experts.

    Args:
      function: `split` are arrays [N, ...] split over the data devices, as is the result; every
        device gets all of `shared`, such as parameters.
    """

    def run(split: Any, shared: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return function(split, shared)
        mapped = jax.shard_map(
            function,
            in_specs=(PartitionSpec(DATA), PartitionSpec()),
            out_specs=PartitionSpec(DATA),
            # Without an axis of size 1 left to the compiler, so that kernels can be called.
            axis_names={name for name in mesh.axis_names if name in DATA or mesh.shape[name] == 1},
            check_vma=False,
        )
        return mapped(split, shared)

    return run


def slices_of(batch: int, group_size: int, mesh: Mesh | None) -> int:
    """How many devices share a group: each has its prompt, and a slice of its completions.

    It is the size of the `completions` axis if that divides G, and otherwise 1, with the groups
    split over all data devices.

    Args:
      batch: B.
      group_size: G.
      mesh: the devices.

    Raises:
      ValueError: neither divides; the message lists the batches that work.
    """
    if mesh is None:
        return 1
    by_group, by_completion = mesh.shape['groups'], mesh.shape['completions']
    if batch % by_group == 0 and group_size % by_completion == 0:
        return by_completion
    check_batch(batch, batch, mesh, group_size=group_size)
    return 1


def split_groups(tree: Any, slices: int, mesh: Mesh | None) -> Any:
    """Slices of groups: [B, G, ...] -> [B * slices, G / slices, ...], without communication.

    Args:
      tree: arrays [B, G, ...]; those of `Prompts` are [B, ...], and are repeated for each slice.
      slices: from `slices_of`; 1: the tree is returned as it is.
      mesh: the devices.
    """

    def split(x: jax.Array) -> jax.Array:
        count = _groups_axis(mesh)
        x = x.reshape(count, -1, slices, x.shape[1] // slices, *x.shape[2:]).swapaxes(1, 2)
        return _constrained(x.reshape(-1, *x.shape[3:]), mesh, DATA)

    def repeat(x: jax.Array) -> jax.Array:
        x = x.reshape(_groups_axis(mesh), 1, -1, *x.shape[1:])
        x = jnp.broadcast_to(x, (len(x), slices, *x.shape[2:]))
        return _constrained(x.reshape(-1, *x.shape[3:]), mesh, DATA)

    return tree if slices == 1 else _map(split, repeat, tree)


def join_groups(tree: Any, slices: int, mesh: Mesh | None) -> Any:
    """[B * slices, G / slices, ...] -> [B, G, ...], undoing `split_groups`."""

    def join(x: jax.Array) -> jax.Array:
        x = x.reshape(_groups_axis(mesh), slices, -1, *x.shape[1:]).swapaxes(1, 2)
        x = x.reshape(x.shape[0] * x.shape[1], -1, *x.shape[4:])
        return _constrained(x, mesh, *DATA)

    def first(x: jax.Array) -> jax.Array:
        x = x.reshape(_groups_axis(mesh), slices, -1, *x.shape[1:])[:, 0]
        return _constrained(x.reshape(-1, *x.shape[2:]), mesh, 'groups')

    return tree if slices == 1 else _map(join, first, tree)


def _map(completions: Any, prompts: Any, tree: Any) -> Any:
    """Applies one function to arrays [B, G, ...], and another to those of `Prompts`."""

    def apply(x: Any) -> Any:
        return jax.tree.map(prompts if isinstance(x, Prompts) else completions, x)

    return jax.tree.map(apply, tree, is_leaf=lambda x: isinstance(x, Prompts))


def _groups_axis(mesh: Mesh | None) -> int:
    return 1 if mesh is None else int(mesh.shape['groups'])


def _constrained(x: jax.Array, mesh: Mesh | None, *axes: Any) -> jax.Array:
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))


def put(tree: Any, where: Any) -> Any:
    """Places arrays on a mesh; those of the host have to be the same in all processes.

    Args:
      tree: arrays of the host, or already on the devices of the mesh.
      where: a sharding for all of them, or a tree of shardings.
    """

    def place(x: Any, sharding: NamedSharding) -> jax.Array:
        if sharding.is_fully_addressable or isinstance(x, jax.Array):
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    if isinstance(where, NamedSharding):
        return jax.tree.map(lambda x: place(x, where), tree)
    return jax.tree.map(place, tree, where)


def put_groups(tree: Any, mesh: Mesh) -> Any:
    """Places arrays with a leading B axis on the mesh.

    B is split over all data devices if they divide it, and otherwise over the `groups` axis.
    """
    return put(tree, whole_groups(len(jax.tree.leaves(tree)[0]), mesh))


def whole_groups(batch: int, mesh: Mesh) -> NamedSharding:
    """The sharding of `put_groups` for B groups."""
    axes = DATA if batch % data_devices(mesh) == 0 else 'groups'
    return NamedSharding(mesh, PartitionSpec(axes))


def put_rollout(rollout: Rollout, rewards: Any, mesh: Mesh) -> tuple[Rollout, Any]:
    """Places a rollout and its rewards on the mesh, see `rollout_shardings`."""
    placed: tuple[Rollout, Any] = put((rollout, rewards), rollout_shardings(rollout, rewards, mesh))
    return placed


def rollout_shardings(rollout: Rollout, rewards: Any, mesh: Mesh) -> Any:
    """A sharding for each array of a rollout and its rewards.

    Where the mesh splits groups, arrays [B, G, ...] are split over both data axes, and those of
    prompts over `groups`. Otherwise B is split over all data devices.

    Args:
      rollout: arrays or ShapeDtypeStructs.
      rewards: the same.
      mesh: from `make_mesh`.
    """
    groups, group_size = rollout.ended.shape
    split = slices_of(groups, group_size, mesh) > 1

    def of_completions(x: Any) -> NamedSharding:
        if not split:
            return whole_groups(groups, mesh)
        axes = DATA if x.shape[1:2] == (group_size,) else DATA[:1]
        return NamedSharding(mesh, PartitionSpec(*axes))

    def of_prompts(x: Any) -> NamedSharding:
        axes = PartitionSpec('groups')
        return NamedSharding(mesh, axes) if split else whole_groups(groups, mesh)

    return _map(of_completions, of_prompts, (rollout, rewards))


def check_batch(
    batch: int,
    microbatch: int,
    mesh: Mesh | None = None,
    *,
    group_size: int = 1,
    of: str = 'a batch',
    name: str = 'microbatch',
) -> None:
    """Checks that B groups can be split over the mesh and into microbatches.

    Args:
      batch: B.
      microbatch: groups per microbatch, over all devices.
      mesh: each microbatch is spread over its data axes.
      group_size: G, if groups may be split over the `completions` axis.
      of: the batch's name in error messages.
      name: the microbatch's name in error messages.

    Raises:
      ValueError: they cannot; the message lists the sizes that work.
    """
    devices = unit = data_devices(mesh)
    if mesh is not None and group_size % mesh.shape['completions'] == 0:
        unit = mesh.shape['groups']
    over = f'fsdp={devices}'
    if unit < devices:
        over += f' (groups of {group_size} over completions={devices // unit})'
    if batch % unit:
        near = ', '.join(str(n) for n in (batch // unit * unit, -(-batch // unit) * unit) if n)
        split = choose_completions(devices, batch, group_size)
        remedy = f', or mesh completions={split}' if split > 1 else ''
        raise ValueError(
            f'{of} of {batch} prompts does not divide over mesh {over}: use {near} prompts{remedy}'
        )
    works = [n for n in range(unit, batch + 1, unit) if batch % n == 0]
    if microbatch not in works:
        raise ValueError(
            f'{name}={microbatch} does not cut {of} of {batch} prompts over '
            f'{over} into equal pieces: use one of {", ".join(map(str, works))}'
        )
