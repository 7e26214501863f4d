"""Weights in and out of Hugging Face folders, a tensor at a time.

Importing reads each tensor from its safetensors file and writes it into its place of the stacked
parameter on the devices; exporting does the reverse. Neither holds more than a few tensors (or one
shard of the export) in host memory.
"""

import functools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from grpo_jax import sharding
from grpo_jax.models.config import PROJECTIONS, ModelConfig
from grpo_jax.models.families import Family, family_of, layer_names
from grpo_jax.models.folders import DTYPES, INDEX, Stored, contents, read, read_json
from grpo_jax.types import Params

_SHARD_BYTES = 4 * 2**30  # of a file that is written
_PIECE_BYTES = 2**27  # of what is read at a time


_ENDS = {  # parameter outside the layers -> tensor, without '.weight'
    'embedding': 'model.embed_tokens',
    'final_norm': 'model.norm',
    'head': 'lm_head',
    'score': 'score',
}


class _Part(NamedTuple):
    """A parameter's place in a tensor: the whole of it, or some of its rows."""

    path: tuple[str, ...]
    place: tuple[int, ...]  # (layer,) or (layer, expert) of the stacked parameter, or ()
    shape: tuple[int, ...]  # of the tensor's rows, as Hugging Face has them


# What lies where


def _layout(config: ModelConfig, family: Family, shapes: Params) -> dict[str, list[_Part]]:
    """Tensor name -> the parts of it, in their order, for every tensor of a checkpoint."""
    names = layer_names(config, family)
    fused = {p: f'{tensor}.weight' for tensor, parts in family.fused.items() for p in parts}
    parts: dict[str, list[_Part]] = {}

    def add(name: str, path: tuple[str, ...], place: tuple[int, ...], shape: tuple[int, ...]):
        parts.setdefault(name, []).append(_Part(path, place, shape))

    for path, shape in _leaves(shapes):
        if path[0] != 'blocks':
            rows = shape if path[0] == 'embedding' else shape[::-1]
            add(f'{_ENDS[path[0]]}.weight', path, (), rows)
            continue
        parameter = '/'.join(path[1:])
        name = fused.get(parameter, names[parameter])
        experts = range(config.experts) if '{expert}' in name else (None,)
        rows = _matrix(path[-1], shape[1 if experts == (None,) else 2 :])[::-1]
        for layer in range(config.layers):
            for expert in experts:
                place = (layer,) if expert is None else (layer, expert)
                add(f'model.layers.{layer}.{name.format(expert=expert)}', path, place, rows)
    order = {p: i for fused_parts in family.fused.values() for i, p in enumerate(fused_parts)}
    return {
        name: sorted(several, key=lambda part: order.get(part.path[-1], 0))
        for name, several in parts.items()
    }


def _matrix(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """[inputs, outputs] of a parameter [*in, *out], or its length where it is a vector."""
    if name not in PROJECTIONS:  # a scale, a bias or the router
        return shape if name == 'router' else (math.prod(shape),)
    inputs = 2 if name == 'out' else 1
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])


def _leaves(shapes: Params) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        yield tuple(key.key for key in path), leaf.shape


def _check(folder: pathlib.Path, tensors: Mapping[str, Stored], layout: Mapping[str, list[_Part]]):
    """Raises ValueError that lists every tensor which is missing, unknown or of another shape."""
    tied = not {'lm_head.weight', 'score.weight'} & {*layout}
    spare = {'lm_head.weight'} if tied else set()
    wrong = [f'{name} is missing' for name in layout if name not in tensors]
    for name, stored in tensors.items():
        if name not in layout:
            if name not in spare and not name.endswith('rotary_emb.inv_freq'):
                wrong.append(f'{name} is unknown')
            continue
        rows = [part.shape for part in layout[name]]
        shape = (sum(r[0] for r in rows), *rows[0][1:])
        if stored.shape != shape:
            wrong.append(f'{name} has shape {stored.shape}, config.json says {shape}')
        if stored.dtype not in DTYPES:
            wrong.append(f'{name} is stored as {stored.dtype}, not as a float of 16 or more bits')
    if wrong:
        shown = '; '.join(wrong[:20]) + (f'; and {len(wrong) - 20} more' if wrong[20:] else '')
        raise ValueError(f'{folder}: {len(wrong)} tensors do not fit its config.json: {shown}')


# Import


def load(folder: pathlib.Path, config: ModelConfig, shapes: Params, mesh: Mesh | None) -> Params:
    """The parameters of a checkpoint, on the mesh.

    Args:
      folder: from `find_folder`.
      config: from `families.model_config` of its `config.json`.
      shapes: ShapeDtypeStructs of the parameters without adapters; also their dtypes.
      mesh: where they shall lie; the default device without one.

    Raises:
      ValueError: tensors that are missing, unknown or of another shape, all of them named; nothing
        is read before.
    """
    layout = _layout(config, family_of(read_json(folder / 'config.json')), shapes)
    tensors = contents(folder)
    _check(folder, tensors, layout)
    where = None if mesh is None else sharding.shardings(shapes, mesh)
    params = _zeros(shapes, where)
    for name, parts in layout.items():
        skipped = 0
        for part in parts:
            for first, count in _pieces(tensors[name], part):
                rows = read(tensors[name], skipped + first, (count, *part.shape[1:]))
                _put(params, part, first, _place(rows, mesh), where)
            skipped += part.shape[0]
    return params


def _pieces(stored: Stored, part: _Part) -> Iterator[tuple[int, int]]:
    """(first row, rows) of what is read at a time: embedding and head are cut, layers are not."""
    total = part.shape[0]
    count = total
    if not part.place and total > 1:
        count = max(1, _PIECE_BYTES * total // stored.bytes)
    for first in range(0, total, count):
        yield first, min(count, total - first)


def _zeros(shapes: Params, where: Any) -> Params:
    make = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.jit(make, out_shardings=where)()


def _place(rows: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """On the devices, cut by rows where they divide."""
    if mesh is None:
        return jnp.asarray(rows)
    even = len(rows) % mesh.shape['fsdp'] == 0
    return jax.device_put(rows, NamedSharding(mesh, PartitionSpec('fsdp' if even else None)))


def _put(params: Params, part: _Part, first: int, rows: jax.Array, where: Any) -> None:
    """Writes `rows`, the tensor's from `first` on, into a parameter whose memory is taken over."""
    for key in part.path[:-1]:
        params, where = params[key], where and where[key]
    name = part.path[-1]
    out = where and where[name]
    write = _writer(params[name].shape, len(part.place), name != 'embedding', out)
    params[name] = write(params[name], rows, np.array([*part.place, first], np.int32))
    params[name].block_until_ready()  # else many tensors would wait in memory


@functools.lru_cache(maxsize=64)
def _writer(shape: tuple[int, ...], depth: int, matrix: bool, out: NamedSharding | None):
    def write(param, rows, place):
        rows = rows.astype(param.dtype)
        rows = rows.T if matrix else rows
        if depth:
            rows = rows.reshape((1,) * depth + shape[depth:])
        start = [*place[:depth], *[0] * (len(shape) - depth)]
        if not depth:
            start[-1 if matrix else 0] = place[0]
        return jax.lax.dynamic_update_slice(param, rows, start)

    return jax.jit(write, donate_argnums=0, out_shardings=out)


# Export


def save(
    params: Params,
    config: ModelConfig,
    fields: Mapping[str, Any],
    folder: pathlib.Path,
    *,
    dtype: str,
    shard_bytes: int = _SHARD_BYTES,
) -> int:
    """Writes safetensors files that `transformers` reads, with an index where there are several.

    Args:
      params: without adapters.
      config: the decoder's.
      fields: the `config.json` that goes with them.
      folder: an existing folder.
      dtype: 'float32', 'bfloat16' or 'float16'.
      shard_bytes: most bytes in one file (a larger tensor gets a file of its own).

    Returns:
      Bytes of all tensors.
    """
    layout = _layout(config, family_of(fields), params)
    size = jnp.dtype(dtype).itemsize
    sizes = {
        name: size * sum(math.prod(part.shape) for part in parts) for name, parts in layout.items()
    }
    shards = _shards(sizes, shard_bytes)
    names = ['model.safetensors']
    if len(shards) > 1:
        names = [f'model-{n:05}-of-{len(shards):05}.safetensors' for n in range(1, len(shards) + 1)]
    for file, shard in zip(names, shards, strict=True):
        tensors = {name: _tensor(params, layout[name], dtype) for name in shard}
        _write(tensors, folder / file)
    total = sum(sizes.values())
    if len(shards) > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {'metadata': {'total_size': total}, 'weight_map': where}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + '\n')
    return total


def _write(tensors: dict[str, np.ndarray], path: pathlib.Path) -> None:
    save_file(tensors, path, metadata={'format': 'pt'})
    path.chmod(0o644)  # the library leaves it to its owner alone


def _shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _tensor(params: Params, parts: list[_Part], dtype: str) -> np.ndarray:
    rows = []
    for part in parts:
        leaf = functools.reduce(lambda tree, key: tree[key], part.path, params)
        value = np.asarray(leaf[part.place].astype(dtype))
        if part.path[-1] != 'embedding':
            value = value.reshape(part.shape[::-1]).T
        rows.append(value)
    return np.ascontiguousarray(np.concatenate(rows) if len(rows) > 1 else rows[0])


def save_adapter(
    adapters: Params,
    config: ModelConfig,
    fields: Mapping[str, Any],
    base: str,
    folder: pathlib.Path,
) -> None:
    """Writes adapters as a PEFT folder.

    Args:
      adapters: from `lora.split`.
      config: the decoder's, with its `lora`.
      fields: the base's `config.json`.
      base: its folder or hub id.
      folder: an existing folder.

    Raises:
      ValueError: the base stacks projections in one tensor, which PEFT adapts as a whole.
    """
    family = family_of(fields)
    if family.fused:
        raise ValueError(
            f'{family.architecture} stacks projections ({", ".join(family.fused)}), for which PEFT '
            'has no adapters of the single ones: export the merged weights'
        )
    names = layer_names(config, family)
    tensors = {}
    for name, value in adapters['blocks'].items():
        parameter, _, side = name.rpartition('_lora_')
        tensor = names[parameter].removesuffix('.weight')
        for layer, part in enumerate(np.asarray(value)):
            matrix = (
                part.reshape(-1, config.lora.rank)
                if side == 'a'
                else part.reshape(config.lora.rank, -1)
            )
            key = f'base_model.model.model.layers.{layer}.{tensor}.lora_{side.upper()}.weight'
            tensors[key] = np.ascontiguousarray(matrix.T)
    _write(tensors, folder / 'adapter_model.safetensors')
    covered = [module for ours, module in PROJECTIONS.items() if config.lora.covers(ours)]
    described = {
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
    (folder / 'adapter_config.json').write_text(json.dumps(described, indent=2) + '\n')
