"""The parameters that decode steps use: in the computation's dtype, gathered or quantized once."""

import functools
import math
from typing import Any

import jax
from jax.sharding import Mesh

from grpo_jax import sharding
from grpo_jax.models import Quantized, quantize, unstack_layers
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
    options = conversion(params, dtype, weights, unroll, mesh=mesh, gather=gather)
    return params if options is None else convert(params, **options)


def conversion(
    params: Params,
    dtype: str,
    weights: str,
    unroll: bool,
    *,
    mesh: Mesh | None = None,
    gather: bool | None = None,
) -> dict[str, Any] | None:
    """The options of `convert` for `sampling_params`; None: parameters are used as they are.

    Arguments are those of `sampling_params`; `params` may be abstract.
    """
    if gather and data_devices(mesh) == 1:
        raise ValueError('gather=True has no effect on one device: remove it')
    options = {'dtype': dtype, 'weights': weights, 'unroll': unroll}
    shapes = jax.eval_shape(functools.partial(convert, **options), params)
    if gather is None:
        gather = mesh is not None and data_devices(mesh) > 1 and gathers(shapes, mesh)
    if gather:
        return options | {'mesh': mesh}
    before, after = jax.tree.leaves(params), jax.tree.leaves(shapes)
    unchanged = [x.dtype for x in before] == [x.dtype for x in after]
    return None if unchanged and not unroll else options


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
    return jax.lax.with_sharding_constraint(params, sharding.whole_over_data(params, mesh))
