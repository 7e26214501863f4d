"""How an update is computed: options that change its speed and memory but not its result."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from grpo_jax.models import ModelConfig, Transformer
from grpo_jax.sharding import data_devices, memory_of, slices_of

_MIB = 2**20
_ACTIVATIONS = {'cpu': 512 * _MIB}  # bytes that a microbatch may keep for its backward pass
_LOGITS = {'cpu': 64 * _MIB}  # bytes of a chunk's logits; more would not fit the CPU's caches
_LOGITS_ELSEWHERE = 512 * _MIB
_CHUNK = {'cpu': 128}
_CHUNK_ELSEWHERE = 256
_LEAST_CHUNK = 16
# The compiler of TPUs takes about a minute of a CPU for each width of a model of any depth, and a
# microbatch there has so many completions that the longest is rarely short.
_WIDTHS, _WIDTHS_ELSEWHERE = {'tpu': 1}, 4
_SHARE = 0.25  # of an accelerator's memory is for activations; parameters and moments take the rest
_WITHOUT_LIMIT = 4096 * _MIB  # for activations on an accelerator that does not report its memory


@dataclasses.dataclass(frozen=True)
class Compute:
    """Options of speed and memory; None: chosen from the shapes, the platform and its memory.

    Changing one compiles a new program. `choose` fills in what is None.

    Attributes:
      microbatch: groups whose gradient is computed at a time, over all devices.
      rows: completions of a microbatch that are processed at a time, the longest first; 0: all.
      packed: completions are packed into sequences of T columns, and `rows` counts sequences. On
        CPUs this saves padding where lengths vary a lot; no attention kernel of accelerators
        supports it.
      widths: how many widths (numbers of columns) are compiled: T, T / 2, T / 4, ...; completions
        are processed in the smallest width that holds the longest of them.
      unroll: compile each layer instead of a loop over layers, which is faster on CPUs and GPUs but
        takes many times longer to compile.
      logprob_chunk: completion positions whose logits exist at a time.
      remat: recompute each layer in the backward pass instead of storing it.

    Raises:
      ValueError: an option out of its range. The message begins with the option's name.
    """

    microbatch: int | None = None
    rows: int | None = None
    packed: bool | None = None
    widths: int | None = None
    unroll: bool | None = None
    logprob_chunk: int | None = None
    remat: bool | None = None

    def __post_init__(self) -> None:
        for name, least in (('microbatch', 1), ('rows', 0), ('widths', 1), ('logprob_chunk', 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f'{name}={value} is out of range: make it at least {least}')
        if self.packed and not self.rows:
            raise ValueError(
                f'packed=True with rows={self.rows}: set how many sequences to process at a time'
            )
        if self.packed and self.widths not in (None, 1):
            raise ValueError(f'widths={self.widths} has no effect with packed=True: remove it')


class ComputePlan(NamedTuple):
    """`Compute` with a value for every option."""

    microbatch: int
    rows: int
    packed: bool
    widths: int
    unroll: bool
    logprob_chunk: int
    remat: bool = True

    def configure(self, model: Transformer) -> Transformer:
        """The model that recomputes its layers in the backward pass if the plan says so."""
        if model.config.remat == self.remat:
            return model
        return model.clone(config=dataclasses.replace(model.config, remat=self.remat))

    def __str__(self) -> str:
        return ', '.join(f'{name}={value}' for name, value in self._asdict().items())


def choose(
    compute: Compute,
    config: ModelConfig,
    shape: tuple[int, int, int, int],
    mesh: Mesh | None = None,
    *,
    platform: str = '',
) -> ComputePlan:
    """The options with a value for each that is None.

    The microbatch is the largest whose activations fit a budget: 512 MiB on a CPU, a quarter of an
    accelerator's memory. The chunk is the largest power of 2 whose logits fit 64 MiB on a CPU or
    512 MiB elsewhere; it is at least 16, and at most 128 on a CPU and 256 elsewhere. By default
    completions are not packed and layers not unrolled: in measurements both helped in some cases
    and hurt in others. Layers are recomputed as the decoder's config says.

    Args:
      compute: explicit values stay as they are.
      config: of the decoder.
      shape: (B, G, P, T) of a rollout.
      mesh: the devices.
      platform: 'cpu', 'gpu' or 'tpu'; by default that of the mesh, or of JAX without one.
    """
    groups, group_size, *_ = shape
    platform = platform or _device(mesh).platform
    remat = config.remat if compute.remat is None else compute.remat
    microbatch = compute.microbatch
    if microbatch is None:
        sizes = _microbatches(shape, mesh)
        cost = _activation_bytes(config, shape, mesh, remat=remat)
        budget = _activation_budget(platform, mesh)
        fitting = [n for n in sizes if n * cost <= budget]
        microbatch = max(fitting, default=min(sizes, default=groups))
    chunk = compute.logprob_chunk
    if chunk is None:
        logits = 4 * config.vocab_size * microbatch * group_size / data_devices(mesh)
        most = _LOGITS.get(platform, _LOGITS_ELSEWHERE) / logits
        most_positions = _CHUNK.get(platform, _CHUNK_ELSEWHERE)
        chunk = min(most_positions, 2 ** int(math.log2(max(most, _LEAST_CHUNK))))
    packed = bool(compute.packed)
    return ComputePlan(
        microbatch=microbatch,
        rows=compute.rows or 0,
        packed=packed,
        widths=compute.widths or (1 if packed else _WIDTHS.get(platform, _WIDTHS_ELSEWHERE)),
        unroll=bool(compute.unroll),
        logprob_chunk=chunk,
        remat=remat,
    )


def alternatives(
    compute: Compute,
    config: ModelConfig,
    shape: tuple[int, int, int, int],
    mesh: Mesh | None = None,
) -> list[ComputePlan]:
    """Plans from the fastest to the one that needs the least memory, for an accelerator.

    The first does not recompute layers, if its activations fit their budget. Each of the next ones
    changes one more option, the one that costs the least time first: layers are recomputed, as
    `choose` has it; chunks of logits get smaller, then the microbatch, and then as few completions
    as there are devices are processed at a time.

    Args:
      compute: explicit values stay as they are.
      config: of the decoder.
      shape: (B, G, P, T) of a rollout.
      mesh: the devices.
    """
    plan = choose(compute, config, shape, mesh)
    plans = [plan]
    if compute.remat is None and plan.remat:
        stored = choose(dataclasses.replace(compute, remat=False), config, shape, mesh)
        needed = stored.microbatch * _activation_bytes(config, shape, mesh, remat=False)
        if needed <= _activation_budget(_device(mesh).platform, mesh):
            plans.insert(0, stored)
    smaller = max(_LEAST_CHUNK, plan.logprob_chunk // 4)
    if compute.logprob_chunk is None and smaller < plan.logprob_chunk:
        plans.append(plans[-1]._replace(logprob_chunk=smaller))
    if compute.microbatch is None:
        for size in _fewer(plan.microbatch, _microbatches(shape, mesh)):
            plans.append(plans[-1]._replace(microbatch=size))
    if compute.rows is None and not plan.packed:
        total, devices = plans[-1].microbatch * shape[1], data_devices(mesh)
        rows = [n for n in range(devices, total, devices) if total % n == 0]
        for size in _fewer(total, rows):
            plans.append(plans[-1]._replace(rows=size))
    return plans


def _fewer(size: int, sizes: list[int]) -> list[int]:
    """The largest of some sizes that is at most a quarter of a size, and the smallest below it."""
    medium = [n for n in sizes if n * 4 <= size]
    return list(dict.fromkeys([*medium[-1:], *[n for n in sizes[:1] if n < size]]))


def _device(mesh: Mesh | None) -> Any:
    return jax.devices()[0] if mesh is None else mesh.devices.flat[0]


def _microbatches(shape: tuple[int, int, int, int], mesh: Mesh | None) -> list[int]:
    """The microbatches that divide a batch and that the mesh divides, the smallest first."""
    groups, group_size, *_ = shape
    least = data_devices(mesh) // slices_of(groups, group_size, mesh)
    return [n for n in range(least, groups + 1, least) if groups % n == 0]


def _activation_budget(platform: str, mesh: Mesh | None) -> float:
    """Bytes on all devices that a microbatch may keep for its backward pass."""
    if platform in _ACTIVATIONS:
        return data_devices(mesh) * _ACTIVATIONS[platform]
    limit = memory_of(_device(mesh))
    return data_devices(mesh) * (_SHARE * limit if limit else _WITHOUT_LIMIT)


def _activation_bytes(
    config: ModelConfig, shape: tuple[int, int, int, int], mesh: Mesh | None, *, remat: bool
) -> int:
    """Bytes per group that the backward pass of a microbatch keeps, roughly."""
    groups, group_size, prompt, length = shape
    size = 4 if config.dtype == 'float32' else 2
    heads = (config.heads + 2 * config.kv_heads) * config.head_dim
    wide = config.mlp_width * (config.experts_per_token if config.experts else 1)
    layer = 5 * config.width + 2 * heads + 2 * wide
    kept = config.layers * config.width + layer if remat else config.layers * layer
    return size * kept * (slices_of(groups, group_size, mesh) * prompt + group_size * length)
