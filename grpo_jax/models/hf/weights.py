"""Reading and writing the weights of Hugging Face folders, one tensor at a time.

Importing reads each tensor from its safetensors file and writes it into its slice of the stacked
parameter on the devices; exporting does the reverse. Neither holds more than a few tensors (or one
shard of the export) in host memory.
"""

import functools
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped
from safetensors.numpy import save_file

from grpo_jax import sharding
from grpo_jax.models import quantization
from grpo_jax.models.config import PROJECTIONS, ModelConfig
from grpo_jax.models.hf.families import family_of, layer_names, text_part
from grpo_jax.models.hf.folder import (
    INDEX,
    StoredTensor,
    list_tensors,
    read_json,
    read_rows,
    text_tensors,
)
from grpo_jax.models.hf.layout import EMBEDDING, TIED_HEAD, Part, check_tensors, parameter_layout
from grpo_jax.models.quantization import Quantized
from grpo_jax.types import Params

_SHARD_BYTES = 4 * 2**30  # largest file that is written
_READ_BYTES = 2**27  # largest part of a tensor that is read at a time


def load(
    folder: pathlib.Path,
    config: ModelConfig,
    shapes: Params,
    mesh: Mesh | None,
    *,
    base: str = 'model',
) -> Params:
    """Reads the parameters of a checkpoint onto the mesh.

    Args:
      folder: from `find_folder`.
      config: from `model_config` of its `config.json`.
      shapes: ShapeDtypeStructs of the parameters without adapters, whose dtypes the result has.
      mesh: the devices that the parameters are sharded over; None: the default device.
      base: quantize each matrix as it is read, see `quantization.quantize_base`.

    Raises:
      ValueError: tensors are missing, unknown or of another shape; lists all of them, before
        anything is read.
    """
    raw = read_json(folder / 'config.json')
    layout = parameter_layout(config, family_of(text_part(raw)), shapes)
    tensors = list_tensors(folder)
    if text_part(raw) is not raw:
        tensors = text_tensors(tensors)
    if config.tied_head and EMBEDDING not in tensors and TIED_HEAD in tensors:
        tensors[EMBEDDING] = tensors[TIED_HEAD]  # the one tensor may have either name
    check_tensors(folder, tensors, layout)
    if config.tied_head and TIED_HEAD in tensors:
        _check_tied_head(folder, tensors[EMBEDDING], tensors[TIED_HEAD])
    shapes = jax.eval_shape(lambda shapes: quantization.quantize_base(shapes, base), shapes)
    shardings = None if mesh is None else sharding.shardings(shapes, mesh)
    params = _zeros(shapes, shardings)
    for name, parts in layout.items():
        offset = 0
        for part in parts:
            for first, count in _row_ranges(tensors[name], part):
                rows = read_rows(tensors[name], offset + first, (count, *part.shape[1:]))
                _write_rows(params, part, first, _put_rows(rows, mesh), shardings)
            offset += part.shape[0]
    return params


def _check_tied_head(folder: pathlib.Path, embedding: StoredTensor, head: StoredTensor) -> None:
    """Refuses a head that differs from the embedding that it is tied to: both cannot be right."""
    equal = embedding.shape == head.shape
    part = Part((), (), embedding.shape)
    for first, count in _row_ranges(embedding, part) if equal else ():
        shape = (count, *embedding.shape[1:])
        ours, theirs = (read_rows(x, first, shape).astype(np.float32) for x in (embedding, head))
        equal = equal and np.array_equal(ours, theirs, equal_nan=True)
    if not equal:
        raise ValueError(
            f'{folder}: {TIED_HEAD} differs from {EMBEDDING}, but config.json has '
            'tie_word_embeddings=true: set it to false to use both tensors, or remove '
            f'{TIED_HEAD}'
        )


def _row_ranges(stored: StoredTensor, part: Part) -> Iterator[tuple[int, int]]:
    """Yields (first row, rows) to read at a time: embedding and head are split, layers are not."""
    total = part.shape[0]
    count = total
    if not part.location and total > 1:
        count = max(1, _READ_BYTES * total // stored.bytes)
    for first in range(0, total, count):
        yield first, min(count, total - first)


def _zeros(shapes: Params, shardings: Any) -> Params:
    make = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.jit(make, out_shardings=shardings)()


def _put_rows(rows: Shaped[np.ndarray, 'N ...'], mesh: Mesh | None) -> Shaped[Array, 'N ...']:
    """Puts rows on the devices, split among them where they divide."""
    if mesh is None:
        return jnp.asarray(rows)
    even = len(rows) % sharding.data_devices(mesh) == 0
    where = NamedSharding(mesh, PartitionSpec(sharding.DATA if even else None))
    return sharding.put(rows, where)


def _write_rows(
    params: Params, part: Part, first: int, rows: Shaped[Array, 'N ...'], shardings: Any
) -> None:
    """Writes a tensor's rows from `first` on into a parameter, whose buffer is donated."""
    for key in part.path[:-1]:
        params, shardings = params[key], shardings and shardings[key]
    name = part.path[-1]
    out = shardings and shardings[name]
    write = _writer(name, len(part.location), out)
    params[name] = write(params[name], rows, np.array([*part.location, first], np.int32))
    jax.block_until_ready(params[name])  # otherwise many tensors would wait in host memory


@functools.lru_cache(maxsize=64)
def _writer(
    name: str, depth: int, out: Any
) -> Callable[[Array | Quantized, Array, np.ndarray], Array | Quantized]:
    """A program that writes rows into the parameter `name`, at an index of `depth` axes."""

    def write(
        param: Array | Quantized, rows: Array, index: Shaped[Array, ' depth']
    ) -> Array | Quantized:
        shape, transpose = quantization.matrix_shape(param, name), name != 'embedding'
        rows = rows.T if transpose else rows
        if depth:
            rows = rows.reshape((1,) * depth + shape[depth:])
        start = [*index[:depth], *[0] * (len(shape) - depth)]
        if not depth:
            start[-1 if transpose else 0] = index[0]
        part = quantization.stored_like(param, rows, name)
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice(x, y, start), param, part)

    return jax.jit(write, donate_argnums=0, out_shardings=out)


def save(
    params: Params,
    config: ModelConfig,
    fields: Mapping[str, Any],
    folder: pathlib.Path,
    *,
    dtype: str,
    shard_bytes: int = _SHARD_BYTES,
) -> int:
    """Writes safetensors files that `transformers` reads, with an index if there are several.

    Args:
      params: without adapters.
      config: the decoder's.
      fields: the checkpoint's `config.json`.
      folder: an existing folder; with several processes, the first one writes.
      dtype: 'float32', 'bfloat16' or 'float16'.
      shard_bytes: largest file; a larger tensor gets its own file.

    Returns:
      Bytes of all tensors.
    """
    layout = parameter_layout(config, family_of(fields), params)
    size = jnp.dtype(dtype).itemsize
    sizes = {
        name: size * sum(math.prod(part.shape) for part in parts) for name, parts in layout.items()
    }
    shards = _shards(sizes, shard_bytes)
    names = ['model.safetensors']
    if len(shards) > 1:
        names = [f'model-{n:05}-of-{len(shards):05}.safetensors' for n in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        tensors = {}
        for name in shard:
            tensor = _tensor(params, layout[name], dtype)
            if jax.process_index() == 0:
                tensors[name] = tensor
        if tensors:
            _write(tensors, folder / file)
    total = sum(sizes.values())
    if len(shards) > 1:
        files = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {'metadata': {'total_size': total}, 'weight_map': files}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + '\n')
    return total


def _write(tensors: dict[str, np.ndarray], path: pathlib.Path) -> None:
    save_file(tensors, path, metadata={'format': 'pt'})
    path.chmod(0o644)  # the library makes it readable by its owner only


def _shards(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Names of the tensors in each file."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _tensor(params: Params, parts: list[Part], dtype: str) -> np.ndarray:
    """The tensor of a checkpoint that consists of these parts."""
    rows = []
    for part in parts:
        leaf = functools.reduce(lambda tree, key: tree[key], part.path, params)
        value = _on_host(leaf[part.location].astype(dtype))
        if part.path[-1] != 'embedding':
            value = value.reshape(part.shape[::-1]).T
        rows.append(value)
    return np.ascontiguousarray(np.concatenate(rows) if len(rows) > 1 else rows[0])


def _on_host(x: Array) -> np.ndarray:
    """Copies an array to every host; all processes call it for the same arrays."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def save_adapter(
    adapters: Params,
    config: ModelConfig,
    fields: Mapping[str, Any],
    base: str,
    folder: pathlib.Path,
) -> None:
    """Writes adapters as a PEFT folder.

    Args:
      adapters: from `lora.split_adapters`.
      config: the decoder's, with its `lora`.
      fields: the base's `config.json`.
      base: its folder or hub id.
      folder: an existing folder.

    Raises:
      ValueError: the base has several projections in one tensor, which PEFT adapts as a whole.
    """
    family = family_of(fields)
    if family.fused:
        raise ValueError(
            f'{family.architecture} stacks projections ({", ".join(family.fused)}), for which PEFT '
            'has no separate adapters: export the merged weights'
        )
    names = layer_names(config, family)
    tensors = {}
    for name, value in adapters['blocks'].items():
        parameter, _, side = name.rpartition('_lora_')
        tensor = names[parameter].removesuffix('.weight')
        for layer, part in enumerate(_on_host(value)):
            matrix = (
                part.reshape(-1, config.lora.rank)
                if side == 'a'
                else part.reshape(config.lora.rank, -1)
            )
            key = f'base_model.model.model.layers.{layer}.{tensor}.lora_{side.upper()}.weight'
            tensors[key] = np.ascontiguousarray(matrix.T)
    if jax.process_index():
        return
    _write(tensors, folder / 'adapter_model.safetensors')
    covered = [module for ours, module in PROJECTIONS.items() if config.lora.covers(ours)]
    adapter_config = {
        'peft_type': 'LORA',
        'task_type': 'CAUSAL_LM',
        'base_model_name_or_path': base,
        'r': config.lora.rank,
        'lora_alpha': config.lora.alpha,
        'lora_dropout': 0.0,
        'bias': 'none',
        'target_modules': covered,
        'inference_mode': True,
    }
    (folder / 'adapter_config.json').write_text(json.dumps(adapter_config, indent=2) + '\n')
