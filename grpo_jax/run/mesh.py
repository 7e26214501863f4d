"""The mesh that a config describes, and what of a model it cannot split."""

import contextlib
import contextvars
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax import models, sharding
from grpo_jax.engine import sampling_params
from grpo_jax.types import Params

log = logging.getLogger('grpo_jax')


class _Described(NamedTuple):
    devices: Sequence[Any]
    memory: float | None


_described: contextvars.ContextVar[_Described | None]
_described = contextvars.ContextVar('described', default=None)


@contextlib.contextmanager
def described(devices: Sequence[Any], memory: float | None = None) -> Iterator[None]:
    """A context in which runs are prepared for these devices but not started, as by `plan`.

    Nothing is put on the devices, which may only be described, and no weights have to exist.

    Args:
      devices: of JAX, or descriptions of some.
      memory: bytes of a device; None: what its kind has, if that is known.
    """
    token = _described.set(_Described(devices, memory))
    try:
        yield
    finally:
        _described.reset(token)


def memory_of(mesh: Mesh) -> float | None:
    """Bytes of a device of a run's mesh; None if they are not known."""
    found = _described.get()
    if found is not None and found.memory is not None:
        return found.memory
    return sharding.memory_of(mesh.devices.flat[0])


def is_described() -> bool:
    """Whether runs are prepared in the context of `described`."""
    return _described.get() is not None


def make_mesh(config: ConfigDict) -> Mesh:
    """The mesh of a config's `mesh` section.

    Raises:
      ValueError: its sizes do not fit the devices that exist.
    """
    c, found = config.mesh, _described.get()
    devices = None if found is None else found.devices
    count = jax.device_count() if devices is None else len(devices)
    fsdp, tensor = sharding.mesh_sizes(c.fsdp, c.tensor, count)
    if c.gather and fsdp == 1:
        raise ValueError('mesh.gather=True has no effect with mesh.fsdp=1: remove it')
    completions = c.completions
    if completions is None:
        batch, group_size = config.grpo.batch_size, splittable_group(config)
        completions = sharding.choose_completions(fsdp, batch, group_size)
    processes = jax.process_count()
    if processes > 1 and fsdp * tensor < count:
        raise ValueError(
            f'mesh.fsdp={c.fsdp} x mesh.tensor={c.tensor} uses {fsdp * tensor} of the {count} '
            f'devices of {processes} processes: set mesh.fsdp=-1 to use all'
        )
    mesh = sharding.make_mesh(fsdp=fsdp, completions=completions, tensor=tensor, devices=devices)
    if c.offload_moments:
        sharding.check_host_memory(mesh, 'mesh.offload_moments')
    return mesh


def make_sampling_mesh(config: ConfigDict, model: models.Transformer, mesh: Mesh) -> Mesh:
    """The mesh that completions are sampled on: that of the run, or one with a longer tensor axis.

    Where a copy of the parameters takes more than 30 % of a device's memory, so many devices share
    one that it takes at most 15 %, but no more than there are key/value heads: beyond, each cache
    would be on several devices. A decode step reads less on each device then, and sends little.

    Raises:
      ValueError: `mesh.sampling_tensor` does not fit the mesh, the heads or `mesh.gather`.
    """
    c, tensor = config.mesh, mesh.shape['tensor']
    sizes = sharding.tensor_sizes(mesh, model.config.heads, model.config.kv_heads)
    if (wanted := c.sampling_tensor) is not None:
        if wanted not in sizes:
            raise ValueError(
                f'mesh.sampling_tensor={wanted} does not fit a mesh of {dict(mesh.shape)} and '
                f'{model.config.heads} query heads with {model.config.kv_heads} key/value heads: '
                f'use one of {", ".join(map(str, sizes))}'
            )
        if c.gather is False and wanted > tensor:
            raise ValueError(
                f'mesh.gather=False has no effect with mesh.sampling_tensor={wanted}, with which '
                'the parameters are copied once per rollout: remove one of them'
            )
        return sharding.with_tensor(mesh, wanted)
    memory = memory_of(mesh)
    if c.gather is not None or memory is None or sharding.data_devices(mesh) == 1:
        return mesh
    shapes = sampling_params.convert.eval_shape(
        parameter_shapes(model, model.config.lora.base), dtype=model.config.dtype,
        weights=config.grpo.weights, unroll=False,
    )  # fmt: skip
    if sampling_params.bytes_of_copy(shapes, mesh) <= sampling_params.COPY_SHARE * memory:
        return mesh
    chosen = mesh
    for size in [size for size in sizes if size <= model.config.kv_heads]:
        found = sharding.with_tensor(mesh, size)
        share = sampling_params.bytes_of_copy(shapes, found) / memory
        if share <= sampling_params.COPY_SHARE:
            chosen = found
        if share <= sampling_params.COPY_SHARE / 2:
            break
    return chosen


def parameter_shapes(model: models.Transformer, base: str = 'model') -> Params:
    """Abstract parameters of a model, those of a frozen base as `model.lora.base` says."""
    shapes = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
    quantized: Params = jax.eval_shape(lambda params: models.quantize_base(params, base), shapes)
    return quantized


def splittable_group(config: ConfigDict) -> int:
    """Completions of a group of the `grpo` section that the mesh may split.

    1 with baseline='greedy': each prompt has one greedy completion, which cannot be split.
    """
    return 1 if config.grpo.algorithm.baseline == 'greedy' else int(config.grpo.group_size)


def check_model(model: models.Transformer, mesh: Mesh) -> None:
    """Checks that the mesh divides the model's heads; warns of other sizes that it does not divide.

    Raises:
      ValueError: it does not.
    """
    sharding.check_heads(model.config.heads, model.config.kv_heads, mesh)
    if mesh.size == 1:
        return
    copied = sharding.not_split(parameter_shapes(model), mesh)
    if copied:
        log.warning(
            'each device holds copies of parameters with sizes that the mesh does not divide: %s',
            '; '.join(copied),
        )
