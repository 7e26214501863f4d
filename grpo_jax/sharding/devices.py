"""What accelerators can do: memory, FLOPs, bandwidths.

TPUs: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm, a page for each version; the
memory that programs may use is what the compiler reports when a program needs more. GPUs: the data
sheets of NVIDIA, dense bfloat16, NVLink in one direction.
"""

from typing import Any, NamedTuple

import jax

_GIB, _GB, _TERA = 2**30, 10**9, 10**12


class Chip(NamedTuple):
    """An accelerator.

    Attributes:
      memory: bytes that programs may use.
      flops: in bfloat16, in a second.
      bandwidth: of the memory, in bytes per second.
      links: to other chips of a slice or node, in bytes per second in one direction.
    """

    memory: float
    flops: float
    bandwidth: float
    links: float


CHIPS = {  # name -> chip; a TPU's `device_kind` is in KINDS
    'v4': Chip(30.75 * _GIB, 275 * _TERA, 1228 * _GB, 150 * _GB),
    'v5e': Chip(15.75 * _GIB, 197 * _TERA, 819 * _GB, 200 * _GB),
    'v5p': Chip(95.74 * _GIB, 459 * _TERA, 2765 * _GB, 600 * _GB),
    'v6e': Chip(31.25 * _GIB, 918 * _TERA, 1640 * _GB, 400 * _GB),
    'a100': Chip(79 * _GIB, 312 * _TERA, 2039 * _GB, 300 * _GB),
    'h100': Chip(79 * _GIB, 989 * _TERA, 3350 * _GB, 450 * _GB),
    'h200': Chip(139 * _GIB, 989 * _TERA, 4800 * _GB, 450 * _GB),
    'b200': Chip(178 * _GIB, 2250 * _TERA, 8000 * _GB, 900 * _GB),
    'l4': Chip(22 * _GIB, 121 * _TERA, 300 * _GB, 16 * _GB),
    'rtx4090': Chip(23.5 * _GIB, 165 * _TERA, 1008 * _GB, 16 * _GB),
}
KINDS = {
    'TPU v4': 'v4', 'TPU v5 lite': 'v5e', 'TPU v5e': 'v5e', 'TPU v5': 'v5p', 'TPU v5p': 'v5p',
    'TPU v6 lite': 'v6e', 'TPU v6e': 'v6e',
}  # fmt: skip


def chip_of(device: Any) -> Chip | None:
    """What a device can do; None if its kind is unknown, as that of CPUs."""
    kind = device.device_kind
    if kind in KINDS:
        return CHIPS[KINDS[kind]]
    name = kind.lower().replace(' ', '')
    return next((chip for key, chip in CHIPS.items() if key in name), None)


def memory_of(device: Any) -> int | None:
    """Bytes that programs may use on a device; None if that is unknown, as on CPUs.

    It is what a device of the same kind of this process reports. A kind that this process has none
    of, because its devices are only described, has the memory of `CHIPS`.
    """
    own = next((d for d in jax.local_devices() if d.device_kind == device.device_kind), None)
    if own is not None:
        limit = (own.memory_stats() or {}).get('bytes_limit')
        return None if limit is None else int(limit)
    chip = chip_of(device)
    return None if chip is None else int(chip.memory)
