"""Which tensor of a Hugging Face checkpoint holds which parameter."""

import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax

from grpo_jax.models.config import PROJECTIONS, ModelConfig
from grpo_jax.models.hf.families import Family, layer_names
from grpo_jax.models.hf.folder import DTYPES, StoredTensor
from grpo_jax.types import Params

_OUTSIDE_LAYERS = {  # parameter outside the layers -> tensor, without '.weight'
    'embedding': 'model.embed_tokens',
    'final_norm': 'model.norm',
    'head': 'lm_head',
    'score': 'score',
}


EMBEDDING = 'model.embed_tokens.weight'
TIED_HEAD = 'lm_head.weight'  # stored beside the embedding by some checkpoints with a tied head
_SHOWN = 20  # most tensors that an error message names


class Part(NamedTuple):
    """A parameter's part of a tensor: all of it, or some of its rows."""

    path: tuple[str, ...]
    location: tuple[int, ...]  # (layer,) or (layer, expert) of the stacked parameter, or ()
    shape: tuple[int, ...]  # of the tensor's rows, [outputs, inputs] for a matrix


def parameter_layout(config: ModelConfig, family: Family, shapes: Params) -> dict[str, list[Part]]:
    """Tensor name -> its parts in order, for every tensor of a checkpoint."""
    names = layer_names(config, family)
    fused = {p: f'{tensor}.weight' for tensor, parts in family.fused.items() for p in parts}
    parts: dict[str, list[Part]] = {}

    def add(
        name: str, path: tuple[str, ...], location: tuple[int, ...], shape: tuple[int, ...]
    ) -> None:
        parts.setdefault(name, []).append(Part(path, location, shape))

    for path, shape in _leaves(shapes):
        if path[0] != 'blocks':
            rows = shape if path[0] == 'embedding' else shape[::-1]
            add(f'{_OUTSIDE_LAYERS[path[0]]}.weight', path, (), rows)
            continue
        parameter = '/'.join(path[1:])
        name = fused.get(parameter, names[parameter])
        experts = range(config.experts) if '{expert}' in name else (None,)
        rows = _matrix(path[-1], shape[1 if experts == (None,) else 2 :])[::-1]
        for layer in range(config.layers):
            for expert in experts:
                location = (layer,) if expert is None else (layer, expert)
                add(f'model.layers.{layer}.{name.format(expert=expert)}', path, location, rows)
    order = {p: i for fused_parts in family.fused.values() for i, p in enumerate(fused_parts)}
    return {
        name: sorted(of_tensor, key=lambda part: order.get(part.path[-1], 0))
        for name, of_tensor in parts.items()
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


def check_tensors(
    folder: pathlib.Path,
    tensors: Mapping[str, StoredTensor],
    layout: Mapping[str, list[Part]],
) -> None:
    """Compares a checkpoint's tensors with the layout of its parameters.

    Raises:
      ValueError: tensors are missing, unknown, of another shape or not floats; lists all of them,
        the first of each kind.
    """
    missing = [f'{name} is missing' for name in layout if name not in tensors]
    ignored = set() if 'score.weight' in layout else {TIED_HEAD}
    unknown = [
        f'{name} is unknown'
        for name in tensors
        if name not in layout and name not in ignored and not name.endswith('rotary_emb.inv_freq')
    ]
    wrong = []
    for name, stored in tensors.items():
        if name not in layout:
            continue
        rows = [part.shape for part in layout[name]]
        shape = (sum(r[0] for r in rows), *rows[0][1:])
        if stored.shape != shape:
            wrong.append(f'{name} has shape {stored.shape}, config.json says {shape}')
        if stored.dtype not in DTYPES:
            wrong.append(f'{name} is stored as {stored.dtype}, not as a float of 16 or more bits')
    count = len(missing) + len(unknown) + len(wrong)
    if count:
        # Unknown names are shown beside missing ones, which may be the same tensors.
        room = max(_SHOWN - min(len(unknown) + len(wrong), _SHOWN // 2), 0)
        shown = (missing[:room] + unknown + wrong)[:_SHOWN]
        more = f'; and {count - len(shown)} more' if count > len(shown) else ''
        raise ValueError(
            f'{folder}: {count} tensors do not fit its config.json: {"; ".join(shown)}{more}'
        )
