"""Attention of all groups, by the form that `selection` chooses.

`attention.attend` is the reference and what CPUs run. For several tokens at a time there are
kernels that never hold the scores in memory: `splash` on TPUs, `cudnn` on NVIDIA GPUs. A single
token, as in decoding, uses the reference, except on NVIDIA GPUs, where `decode_token` reads the
caches in place.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from grpo_jax.models.attention import UNLIMITED_WINDOW, DecodeCache, LayerCaches, Piece, attend
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.kernels import cudnn
from grpo_jax.models.kernels.layout import Kernel, KeyValuePair
from grpo_jax.models.kernels.selection import choose_attention
from grpo_jax.sharding import DATA, data_devices

TokenKeyValue = tuple[Float[Array, 'B G K h'], Float[Array, 'B G K h']]


def attend_token(
    config: ModelConfig,
    q: Float[Array, 'B G H h'],
    new: TokenKeyValue,
    cache: DecodeCache,
    layer: Int[Array, ''],
    window: Int[Array, ''] | None = None,
) -> tuple[Float[Array, 'B G H h'], TokenKeyValue]:
    """`decode_token.attend_token` on each device's groups and heads.

    Args:
      config: with the scale and soft cap of attention.
      q: rotated queries of one new token of each row.
      new: the token's own keys and values.
      cache: keys and values of all layers before the token.
      layer: which layer's to use.
      window: how many positions the token sees, including its own; None: all.

    Returns:
      The output in the dtype of q, and `new`.
    """
    from grpo_jax.models.kernels import decode_token  # slow to import

    kernel = functools.partial(
        decode_token.attend_token, scale=_scale(config), softcap=config.attention_softcap
    )
    window = jnp.int32(UNLIMITED_WINDOW) if window is None else window
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, new, cache, layer, window)

    def local(q: Array, new: TokenKeyValue, prompt: Any, own: Any, *scalars: Array) -> Any:
        length, t, layer, window = scalars
        return kernel(q, new, DecodeCache(LayerCaches(prompt, own), length, t), layer, window)

    groups, heads = _mesh_axes(mesh, len(q), new[0].shape[2])
    rows, replicated = PartitionSpec(groups, None, heads), PartitionSpec()
    caches = PartitionSpec(None, groups, heads), PartitionSpec(None, groups, None, heads)
    t = PartitionSpec(groups) if cache.t.ndim else replicated
    specs = rows, rows, *caches, PartitionSpec(groups), t, replicated, replicated
    mapped = jax.shard_map(local, in_specs=specs, out_specs=rows, check_vma=False)
    return mapped(q, new, *cache.layers, cache.length, cache.t, layer, window)


def attend_groups(
    config: ModelConfig,
    q: Float[Array, 'B G S H h'],
    pieces: Sequence[Piece],
    positions: Int[Array, '*batch S'],
    window: Int[Array, ''] | None = None,
) -> Float[Array, 'B G S H h']:
    """`attention.attend` for B groups at once, in the form that `choose_attention` returns.

    Args:
      config: how attention is computed; also its scale and soft cap.
      q: rotated queries.
      pieces: with a leading B axis. With S > 1 they are the prompt's, if any, whose columns are at
        positions 0, 1, ... up to the queries, and last the queries' own; with a third between
        these two, of which columns may be empty, no kernel is used.
      positions: of the queries, which are consecutive.
      window: see `attend`.

    Returns:
      The output in the dtype of q.

    Raises:
      ValueError: pieces with owners (packed completions) for a kernel.
    """
    softcap = config.attention_softcap
    name = choose_attention(config)
    if name in ('einsum', 'recomputed') or q.shape[2] < 2 or len(pieces) > 2:
        form = functools.partial(
            attend,
            scale=_scale(config),
            softcap=softcap,
            window=window,
            recompute=name == 'recomputed',
        )
        return jax.vmap(form)(q, pieces, positions)
    if pieces[-1].owner is not None:
        raise ValueError(
            f'packed completions with attention={name!r}, which reads one completion at a time: '
            "use packed=False, or attention='recomputed'"
        )
    k, v = pieces[-1].k, pieces[-1].v
    prompt = k[:, 0, :, :0], v[:, 0, :, :0]  # a prompt without columns
    if len(pieces) > 1:
        prompt = pieces[0].k, pieces[0].v
    kernel = functools.partial(_kernel(name), scale=_scale(config), softcap=softcap)
    return _attend_on_mesh(kernel, q, (k, v), prompt, positions[:, 0])


def _kernel(name: str) -> Kernel:
    if name == 'cudnn':
        return cudnn.attend
    from grpo_jax.models.kernels import splash  # slow to import

    return splash.attend


def _attend_on_mesh(
    kernel: Kernel,
    q: Float[Array, 'B G S H h'],
    own: KeyValuePair,
    prompt: KeyValuePair,
    start: Int[Array, ' B'],
) -> Float[Array, 'B G S H h']:
    """Runs a kernel on each device's groups and heads: the compiler cannot partition it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, own, prompt, start)
    copies = mesh.shape['tensor'] // own[0].shape[2]
    if copies > 1:  # fewer heads than devices: each gets a copy of the one that its queries read
        own, prompt = jax.tree.map(lambda x: jnp.repeat(x, copies, axis=-3), (own, prompt))
    groups, heads = _mesh_axes(mesh, len(q), own[0].shape[2])
    rows = PartitionSpec(groups, None, None, heads)
    specs = (
        rows,
        PartitionSpec(groups, None, heads),
        PartitionSpec(groups, heads),
        PartitionSpec(groups),
    )
    mapped = jax.shard_map(kernel, in_specs=specs, out_specs=rows, check_vma=False)
    return mapped(q, own, prompt, start)


def _mesh_axes(mesh: Any, groups: int, kv_heads: int) -> tuple[Any, str | None]:
    """The mesh axes that groups and heads are split over; None where they do not divide."""
    return (
        DATA if groups % data_devices(mesh) == 0 else None,
        'tensor' if kv_heads % mesh.shape['tensor'] == 0 else None,
    )


def _scale(config: ModelConfig) -> float:
    """The factor of the attention scores."""
    return config.attention_scale or config.head_dim**-0.5
