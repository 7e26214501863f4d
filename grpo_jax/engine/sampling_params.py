"""The parameters that decode steps use: in the computation's dtype, gathered or quantized once."""

import functools
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from grpo_jax import sharding
from grpo_jax.engine.calls import Call
from grpo_jax.models import Quantized, quantize, unstack_layers
from grpo_jax.models.quantization import is_quantized
from grpo_jax.sharding import data_devices
from grpo_jax.types import Params

COPY_SHARE = 0.3  # of a device's memory, for a copy of the parameters; caches need the rest
_STATIC = ('dtype', 'weights', 'unroll', 'mesh')


def sampling_params(
    params: Params,
    dtype: str,
    weights: str,
    unroll: bool,
    *,
    mesh: Mesh | None = None,
    gather: bool | None = None,
) -> Params:
    """The parameters as decode steps use them, converted once rather than in every step.

    Args:
      params: of the model.
      dtype: of the model's computation.
      weights: 'model', or 'int8' for quantized matrices.
      unroll: take each layer's parameters out of their stack.
      mesh: the devices.
      gather: give each device along the data axes a copy, so that decode steps gather nothing;
        None: if a copy fits, see `gathers`.

    Raises:
      ValueError: gather=True where there is one such device, or gather=False with parameters of
        another mesh, which are always copied.
    """
    call = conversion(params, dtype, weights, unroll, mesh=mesh, gather=gather)
    return params if call is None else completed(params, call.run())


def conversion(
    params: Params,
    dtype: str,
    weights: str,
    unroll: bool,
    *,
    mesh: Mesh | None = None,
    gather: bool | None = None,
) -> Call | None:
    """The call that `sampling_params` makes; None: parameters are used as they are.

    Arguments are those of `sampling_params`; `params` may be abstract. What is not converted is no
    argument, so that no copy of it is made, such as of the base of adapters in another dtype.
    Parameters on another mesh are always copied, see `sharding.with_tensor`.
    """
    moved = mesh is not None and _mesh_of(params) not in (None, mesh)
    if gather and data_devices(mesh) == 1 and not moved:
        raise ValueError('gather=True has no effect on one device: remove it')
    if gather is False and moved:
        raise ValueError('gather=False has no effect on parameters of another mesh: remove it')
    options = {'dtype': dtype, 'weights': weights, 'unroll': unroll}
    shapes = convert.eval_shape(params, **options)  # traced once
    if moved:
        gather = True
    elif gather is None:
        gather = mesh is not None and data_devices(mesh) > 1 and gathers(shapes, mesh)
    name = f'weights to sample with, {dtype if weights == "model" else weights}'
    if gather and mesh is not None:
        leaves, tree = jax.tree.flatten(sharding.whole_over_data(shapes, mesh))
        program = _convert_onto(tree, tuple(leaves))
        return Call(program, (params,), options | {'mesh': mesh}, f'{name}, a copy on each device')
    if not unroll:
        params = jax.tree.map(_if_changed, params, shapes, is_leaf=is_quantized)
    return Call(convert, (params,), options, name) if jax.tree.leaves(params) else None


def _mesh_of(params: Params) -> Mesh | None:
    """The mesh of the parameters, which all have the same; None if it is not known."""
    where = getattr(jax.tree.leaves(params)[0], 'sharding', None)
    mesh = where.mesh if isinstance(where, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) else None


def _if_changed(before: Any, after: Any) -> Any:
    """A parameter or a quantized matrix, unless its conversion is the same."""
    is_same = is_quantized(before) or (not is_quantized(after) and before.dtype == after.dtype)
    return None if is_same else before


def completed(params: Params, converted: Params) -> Params:
    """The results of a call of `conversion`, with the parameters that it did not change."""
    if all(leaf is not None for leaf in jax.tree.leaves(converted, is_leaf=_is_whole)):
        return converted
    return jax.tree.map(
        lambda new, old: old if new is None else new, converted, params, is_leaf=_is_whole
    )


def _is_whole(x: Any) -> bool:
    return x is None or is_quantized(x)


def gathers(params: Params, mesh: Mesh) -> bool:
    """Whether each device along the data axes gets a copy of the parameters to sample with.

    It does if a copy takes at most 30 % of a device's memory. CPUs do not report theirs, and get
    copies.

    Args:
      params: as decode steps use them, arrays or ShapeDtypeStructs.
      mesh: the devices.
    """
    memory = sharding.memory_of(mesh.devices.flat[0])
    return memory is None or bytes_of_copy(params, mesh) <= COPY_SHARE * memory


def bytes_of_copy(params: Params, mesh: Mesh) -> int:
    """Bytes on a device of a copy of the parameters; arguments as in `gathers`."""
    where = sharding.whole_over_data(params, mesh)
    sizes = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, params, where
    )
    return sum(jax.tree.leaves(sizes))


@functools.cache
def _convert_onto(tree: Any, where: tuple[NamedSharding, ...]) -> Any:
    """`convert` with the shardings of its results.

    Constraints in it are not enough: the results of a program over two meshes came out whole.
    """
    shardings = jax.tree.unflatten(tree, where)
    return jax.jit(_convert, static_argnames=_STATIC, out_shardings=shardings)


def _convert(
    params: Params, dtype: str, weights: str, unroll: bool, mesh: Mesh | None = None
) -> Params:
    """The parameters in other dtypes, from their layout on a mesh towards copies on its devices."""

    def cast(path: tuple[Any, ...], x: jax.Array | Quantized) -> jax.Array | Quantized:
        # Norms use their scales in float32.
        return x if isinstance(x, Quantized) or path[-1].key == 'scale' else x.astype(dtype)

    params = quantize(params) if weights == 'int8' else params
    params = jax.tree_util.tree_map_with_path(
        cast, params, is_leaf=lambda x: isinstance(x, Quantized)
    )
    params = unstack_layers(params) if unroll else params
    if mesh is None:
        return params
    # From another mesh: without this step each device would get all of a parameter for a moment.
    params = jax.lax.with_sharding_constraint(params, sharding.shardings(params, mesh))
    with sharding.use(mesh, splits_params=True):
        return sharding.by_axes(params)


convert = jax.jit(_convert, static_argnames=_STATIC)
