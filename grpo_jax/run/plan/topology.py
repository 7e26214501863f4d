"""The devices that a plan is made for: those of this machine, or described ones."""

import dataclasses
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from grpo_jax.sharding import CHIPS, Chip, chip_of, memory_of

_SIZES = re.compile(r'\d+(x\d+)*')
_MEMORY = re.compile(r'([\d.]+)\s*(GiB|GB|MiB|MB)', re.IGNORECASE)
_UNITS = {'gib': 2**30, 'gb': 10**9, 'mib': 2**20, 'mb': 10**6}
_TPUS = ('v4', 'v5e', 'v5p', 'v6e')


@dataclasses.dataclass(frozen=True)
class DescribedGpu:
    """A GPU as a mesh needs it, to trace programs for it."""

    id: int
    device_kind: str
    platform: str = 'gpu'
    process_index: int = 0


class Topology(NamedTuple):
    """Devices, real or described.

    Attributes:
      name: as it was asked for.
      devices: of JAX, or `DescribedGpu`s, for which nothing can be compiled.
      chip: what a device can do; None if that is unknown.
      memory: bytes that programs may use on a device; None if that is unknown.
      estimated: the devices have no compiler here, so that memory is estimated.
      limited: `memory` is what was asked for, and not what the devices have.
    """

    name: str
    devices: Sequence[Any]
    chip: Chip | None
    memory: float | None
    estimated: bool = False
    limited: bool = False


def find_topology(name: str, memory: str = '') -> Topology:
    """The devices that a name such as 'v5e:4x4', 'h100:8' or 'local' describes.

    Args:
      name: 'local', or a kind of accelerator and the shape of the slice.
      memory: of a device, such as '16GiB', instead of what its kind has.

    Raises:
      ValueError: an unknown name, or the compiler of TPUs is not installed.
    """
    kind, _, sizes = name.partition(':')
    if name == 'local':
        found = Topology(name, jax.devices(), chip_of(jax.devices()[0]), _local_memory())
    elif kind in CHIPS and _SIZES.fullmatch(sizes):
        chip, shape = CHIPS[kind], tuple(map(int, sizes.split('x')))
        if kind in _TPUS:
            found = Topology(name, _tpus(name, kind, shape), chip, chip.memory)
        else:
            gpus = [DescribedGpu(i, f'NVIDIA {kind.upper()}') for i in range(math.prod(shape))]
            found = Topology(name, gpus, chip, chip.memory, estimated=True)
    else:
        raise ValueError(
            f"--topology={name} is unknown: use 'local', or one of {', '.join(CHIPS)} and a shape, "
            "as in 'v5e:4x4' or 'h100:8'"
        )
    return found._replace(memory=parse_memory(memory), limited=True) if memory else found


def parse_memory(text: str) -> float:
    """Bytes of a text such as '16GiB'.

    Raises:
      ValueError: it has another form.
    """
    match = _MEMORY.fullmatch(text.strip())
    if match is None or not float(match[1]):
        raise ValueError(f"--memory={text}: give bytes of a device, as in '16GiB' or '80GB'")
    return float(match[1]) * _UNITS[match[2].lower()]


def _tpus(name: str, kind: str, shape: tuple[int, ...]) -> Sequence[Any]:
    """Described TPUs, as the compiler of TPUs knows them."""
    from jax.experimental import topologies

    axes = 2 if kind in ('v5e', 'v6e') else 3
    if len(shape) != axes:
        example = 'x'.join('4' * axes)
        raise ValueError(
            f'--topology={name}: {kind} slices have {axes} axes, as in {kind}:{example}'
        )
    # Nothing is run, so another process may use the library, and no metadata server is needed.
    os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
    os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
    options: dict[str, Any] = {}
    host = (2, 2, 1)
    shape3 = (*shape, 1)[:3]
    if any(size % least for size, least in zip(shape3, host, strict=True)):
        options['chips_per_host_bounds'] = shape3  # a part of a host
    try:
        described = topologies.get_topology_desc(platform='tpu', topology_name=name, **options)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        reason, *_ = str(error).split('\n')
        raise ValueError(
            f'--topology={name}: the compiler of TPUs does not know it, or is not installed '
            f"(pip install 'jax[tpu]'): {reason}"
        ) from error
    devices: Sequence[Any] = described.devices
    return devices


def gib(size: float) -> str:
    """Bytes as text."""
    return f'{size / 2**30:,.2f} GiB' if size >= 2**28 else f'{size / 2**20:,.2f} MiB'


def _local_memory() -> float | None:
    """Bytes of a device of this machine; of CPUs a share of the machine's memory."""
    device = jax.devices()[0]
    if device.platform == 'cpu':
        total = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
        return total / len(jax.local_devices())
    return memory_of(device)
