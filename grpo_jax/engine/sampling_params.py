"""The parameters that decode steps use: in the computation's dtype, gathered or quantized once."""

import functools
import math
from typing import Any

import jax
from jax.sharding import Mesh

from grpo_jax import sharding
from grpo_jax.engine.calls import Call
from grpo_jax.models import Quantized, quantize, unstack_layers
from grpo_jax.models.quantization import is_quantized
from grpo_jax.sharding import data_devices
from grpo_jax.types import Params

_COPY_SHARE = 0.3  # of a device's memory, for a copy of the parameters; caches need the rest


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
      ValueError: gather=True where there is one such device.
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
    """
    if gather and data_devices(mesh) == 1:
        raise ValueError('gather=True has no effect on one device: remove it')
    options = {'dtype': dtype, 'weights': weights, 'unroll': unroll}
    shapes = convert.eval_shape(params, **options)  # traced once
    if gather is None:
        gather = mesh is not None and data_devices(mesh) > 1 and gathers(shapes, mesh)
    name = f'weights to sample with, {dtype if weights == "model" else weights}'
    if gather:
        return Call(convert, (params,), options | {'mesh': mesh}, f'{name}, a copy on each device')
    if not unroll:
        params = jax.tree.map(_if_changed, params, shapes, is_leaf=is_quantized)
    return Call(convert, (params,), options, name) if jax.tree.leaves(params) else None


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


def gathers(params: Params, mesh: Mesh, *, memory: int | None = None) -> bool:
    """Whether each device along the data axes gets a copy of the parameters to sample with.

    It does if a copy takes at most 30 % of a device's memory.

    Args:
      params: as decode steps use them, arrays or ShapeDtypeStructs.
      mesh: the devices.
      memory: bytes of a device; None: what it reports. CPUs report nothing, and get copies.
    """
    memory = sharding.memory_of(mesh.devices.flat[0]) if memory is None else memory
    if memory is None:
        return True
    where = sharding.whole_over_data(params, mesh)
    sizes = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize, params, where
    )
    return sum(jax.tree.leaves(sizes)) <= _COPY_SHARE * memory


@functools.partial(jax.jit, static_argnames=('dtype', 'weights', 'unroll', 'mesh'))
def convert(
    params: Params, dtype: str, weights: str, unroll: bool, mesh: Mesh | None = None
) -> Params:
    """The parameters in other dtypes, on each device along the data axes if there is a mesh."""

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
    with sharding.use(mesh, splits_params=True):
        params = sharding.by_axes(params)
    return jax.lax.with_sharding_constraint(params, sharding.whole_over_data(params, mesh))
