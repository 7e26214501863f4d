"""Attention of all groups, by kernels that keep no scores in memory where there is one.

`attention.attend` is the reference and what CPUs run. On TPUs it is splash attention, on NVIDIA
GPUs that of cuDNN (both after Dao, arXiv 2307.08691), for several tokens at a time. A single one,
as in decoding, is the einsum form's, but for those GPUs' `decoding.attend_token`.

Splash attention takes any mask and skips the blocks that it leaves out: the completions of a group
stand behind each other, behind their one prompt, if that is long. If not, and for cuDNN, which has
a causal mask alone, the prompt is repeated for its completions while a layer runs. Attending to
both apart and merging by log-sum-exp would not repeat it, but has no gradient through the kernels'
public functions: splash attention cannot be differentiated when asked for its log-sum-exp, and
`jax.nn.dot_product_attention` drops the gradient through it (and rounds it to the queries' dtype:
in bfloat16 by up to 3% of a weight).
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from grpo_jax.models.attention import Piece, Stacks, attend
from grpo_jax.models.config import ModelConfig

# (q [B, G, S, H, h], own keys and values [B, G, K, S, h], those of the prompt [B, K, P, h], start
# i32[B], *, scale, softcap) -> [B, G, S, H, h]: row s stands at start + s, the prompt before start.
Kernel = Callable[..., jax.Array]
KeysValues = tuple[jax.Array, jax.Array]

_LANES = 128  # sequences are padded to multiples of it
_BLOCK = 512  # queries, and keys, that splash attention works on at a time; if they divide so


def choose(config: ModelConfig) -> str:
    """The name of the kernel that `config.attention` stands for on this process's devices."""
    if config.attention != 'auto':
        return config.attention
    device = jax.devices()[0]
    name = {'tpu': 'splash', 'gpu': 'cudnn'}.get(device.platform, 'recomputed')
    if name == 'cudnn' and not _has_cudnn(device):
        name = 'recomputed'
    return 'recomputed' if config.obstacle(name) else name


def _has_cudnn(device: Any) -> bool:
    """Not other makers' GPUs, nor those before compute capability 8, for which it has no kernel."""
    capability = str(getattr(device, 'compute_capability', ''))  # '9.0'; of AMD's, 'gfx942'
    return bool(re.fullmatch(r'\d+\.\d+', capability)) and float(capability) >= 8


def from_stacks(config: ModelConfig) -> bool:
    """Whether a token is attended to by `attend_token`, and not by `attend_groups`."""
    width = config.head_dim  # of which the kernel takes powers of two
    return choose(config) == 'cudnn' and width >= 16 and not width & (width - 1)


def attend_token(
    config: ModelConfig,
    q: jax.Array,
    new: KeysValues,
    stacks: Stacks,
    layer: jax.Array,
    length: jax.Array,
    t: jax.Array,
) -> tuple[jax.Array, KeysValues]:
    """`decoding.attend_token` on each device's groups and heads; arguments are the same.

    Args:
      config: its scale.
      q: [B, G, H, h].
      new: [B, G, K, h] each.
      stacks: prompts' and own keys and values of all layers.
      layer: i32[].
      length: i32[B].
      t: i32[].

    Returns:
      [B, G, H, h], and `new`.
    """
    from grpo_jax.models import decoding  # here, as importing Pallas takes part of a second

    scale = config.attention_scale or config.head_dim**-0.5

    def kernel(q, new, stacks, *rest):
        return decoding.attend_token(q, new, Stacks(*stacks), *rest, scale=scale)

    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, new, stacks, layer, length, t)
    groups, heads = _axes(mesh, len(q), new[0].shape[2])
    rows, everywhere = PartitionSpec(groups, None, heads), PartitionSpec()
    of_stacks = PartitionSpec(None, groups, heads), PartitionSpec(None, groups, None, heads)
    specs = rows, rows, of_stacks, everywhere, PartitionSpec(groups), everywhere
    spread = jax.shard_map(kernel, in_specs=specs, out_specs=rows, check_vma=False)
    return spread(q, new, tuple(stacks), layer, length, t)


def attend_groups(
    config: ModelConfig,
    q: jax.Array,
    pieces: Sequence[Piece],
    positions: jax.Array,
    window: jax.Array | None = None,
) -> jax.Array:
    """`attention.attend` for B groups at once, in the form that config and platform call for.

    Args:
      config: how attention is computed; also its scale and soft cap.
      q: [B, G, S, H, h] rotated queries.
      pieces: with a leading B axis. With S > 1 they are the prompt's, if any, whose columns stand
        at 0, 1, ... up to the queries, and last the queries' own.
      positions: i32[B, S], where the queries stand; one after another.
      window: i32[], see `attend`.

    Returns:
      [B, G, S, H, h] in the dtype of q.

    Raises:
      ValueError: pieces with owners for a kernel.
    """
    scale = config.attention_scale or config.head_dim**-0.5
    softcap = config.attention_softcap
    name = choose(config)
    if name in ('einsum', 'recomputed') or q.shape[2] < 2:
        form = functools.partial(
            attend, scale=scale, softcap=softcap, window=window, recompute=name == 'recomputed'
        )
        return jax.vmap(form)(q, pieces, positions)
    if pieces[-1].owner is not None:
        raise ValueError(
            f'packed completions with attention={name!r}, which reads one at a time: use '
            "algorithm.packed=False, or attention='recomputed'"
        )
    k, v = pieces[-1].k, pieces[-1].v
    prompt = k[:, 0, :, :0], v[:, 0, :, :0]  # one without columns
    if len(pieces) > 1:
        prompt = pieces[0].k, pieces[0].v
    kernel = functools.partial(KERNELS[name], scale=scale, softcap=softcap)
    return _spread(kernel, q, (k, v), prompt, positions[:, 0])


def _spread(
    kernel: Kernel, q: jax.Array, own: KeysValues, prompt: KeysValues, start: jax.Array
) -> jax.Array:
    """Runs a kernel on each device's groups and heads: the compiler cannot cut it itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, own, prompt, start)
    groups, heads = _axes(mesh, len(q), own[0].shape[2])
    rows = PartitionSpec(groups, None, None, heads)
    of_own, of_prompt = PartitionSpec(groups, None, heads), PartitionSpec(groups, heads)
    specs = rows, of_own, of_prompt, PartitionSpec(groups)
    spread = jax.shard_map(kernel, in_specs=specs, out_specs=rows, check_vma=False)
    return spread(q, own, prompt, start)


def _axes(mesh: Any, groups: int, kv_heads: int) -> tuple[str | None, str | None]:
    """The mesh's axes that groups and heads are spread over, None where they do not divide."""
    return (
        'fsdp' if groups % mesh.shape['fsdp'] == 0 else None,
        'tensor' if kv_heads % mesh.shape['tensor'] == 0 else None,
    )


def splash(
    q: jax.Array,
    own: KeysValues,
    prompt: KeysValues,
    start: jax.Array,
    *,
    scale: float,
    softcap: float,
    interpret: bool = False,
) -> jax.Array:
    """The TPU's `Kernel`: one call for a group, if its prompt is long; see `shared_prompt`.

    Else there is one for each completion, with a copy of the prompt: the gradient of keys steps
    through all pairs of a call's blocks, also those that it skips. Behind a prompt that is at least
    as long as its completions together these are at most twice as many as in calls for each.

    Prompt and completions are padded to whole blocks. A completion thus stands at the same columns
    in every group, as the mask has to be static; segments mask the padding of the prompts.

    `interpret` runs it on any platform, slowly; the rest is that of any `Kernel`.
    """
    # Here, as importing them takes part of a second.
    from jax.experimental.pallas.ops.tpu import splash_attention as tpu

    from grpo_jax.models.shared_prompt import SharedPromptMask

    rows, length, heads = q.shape[1:4]
    size = _whole(length, _LANES)
    block = math.gcd(_BLOCK, size)
    past = _whole(prompt[0].shape[2], block)
    calls = 1 if rows * size <= past else rows
    columns = rows // calls * size
    line_up = functools.partial(_line_up, size=size, calls=calls)
    queries = line_up((q * jnp.asarray(scale, q.dtype)).swapaxes(2, 3))
    k, v = (
        jnp.concatenate([_repeat(_pad(p, past), calls), line_up(o)], axis=3)
        for p, o in zip(prompt, own, strict=True)
    )
    seen = (jnp.arange(past) < start[:, None]).astype(jnp.int32)
    seen = jnp.pad(seen, ((0, 0), (0, columns)), constant_values=1)
    attention = tpu.make_splash_mha_single_device(
        tpu.MultiHeadMask([SharedPromptMask(rows // calls, size, past)] * heads),
        block_sizes=tpu.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=softcap or None,
        interpret=interpret,
    )

    def one(q, k, v, seen):  # a query reads the keys whose segment is its own, 1
        return attention(q, k, v, tpu.SegmentIds(jnp.ones(columns, jnp.int32), seen))

    out = jax.vmap(jax.vmap(one, in_axes=(0, 0, 0, None)))(queries, k, v, seen)
    out = out.reshape(-1, calls, heads, rows // calls, size, q.shape[-1])[..., :length, :]
    return out.transpose(0, 1, 3, 4, 2, 5).reshape(q.shape)


def _whole(n: int, part: int) -> int:
    """The least multiple of part from n on."""
    return -(-n // part) * part


def _pad(x: jax.Array, size: int) -> jax.Array:
    """[..., N, h] to [..., size, h]."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, size - x.shape[-2]), (0, 0)])


def _line_up(x: jax.Array, *, size: int, calls: int) -> jax.Array:
    """[B, G, N, S, h] to [B, calls, N, G / calls * size, h], completions behind each other."""
    x = _pad(x, size).reshape(x.shape[0], calls, -1, x.shape[2], size, x.shape[-1])
    return x.swapaxes(2, 3).reshape(*x.shape[:2], x.shape[3], -1, x.shape[-1])


def _repeat(x: jax.Array, rows: int) -> jax.Array:
    """[B, ...] to [B, G, ...]."""
    return jnp.broadcast_to(x[:, None], (x.shape[0], rows, *x.shape[1:]))


def cudnn(
    q: jax.Array,
    own: KeysValues,
    prompt: KeysValues,
    start: jax.Array,
    *,
    scale: float,
    softcap: float = 0.0,
    implementation: Literal['xla', 'cudnn'] = 'cudnn',
) -> jax.Array:
    """The NVIDIA GPU's `Kernel`, without soft caps.

    `implementation` is that of `jax.nn.dot_product_attention`; 'xla' runs on any platform.

    It knows one causal mask, that of queries and keys which both begin at position 0. So everything
    is laid where it stands: a completion over its prompt's padding, its queries behind others that
    nobody reads. These cost P^2 / 2 products of a query and a key on top of P T + T^2 / 2. A mask
    for the padding would cost more: it is a bias [B, 1, T, P + T], and with it nothing is skipped.

    Raises:
      ValueError: a soft cap.
    """
    if softcap:
        raise ValueError(f"cudnn attention has no softcap={softcap}: use attention='einsum'")
    rows, length = q.shape[1:3]
    columns = prompt[0].shape[2] + length
    q = _laid(q, start, columns)
    stands = jnp.arange(columns)[:, None, None] < start[:, None, None, None, None]
    k, v = (
        jnp.where(
            stands,
            _repeat(_pad(p, columns), rows).swapaxes(2, 3),
            _laid(o.swapaxes(2, 3), start, columns),
        )
        for p, o in zip(prompt, own, strict=True)
    )
    of_rows = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    out = jax.nn.dot_product_attention(
        of_rows[0],
        of_rows[1],
        of_rows[2],
        scale=scale,
        is_causal=True,
        implementation=implementation,
    )
    return _laid(out.reshape(*q.shape[:2], *out.shape[1:]), -start, length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _laid(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """[B, G, size, ...]: column p is that of x [B, G, S, ...] at p - start i32[B], else 0.

    Both it and its gradient are gathered: a scatter would first make and then copy the zeros.
    """
    taken = jnp.arange(size) - start[:, None]
    column = jnp.clip(taken, 0, x.shape[2] - 1)
    found = jax.vmap(lambda x, i: x.at[:, i].get(mode='promise_in_bounds'))(x, column)
    real = (taken == column).reshape(len(x), 1, size, *(1,) * (x.ndim - 3))
    return jnp.where(real, found, jnp.zeros((), x.dtype))


def _laid_forward(x, start, size):
    return _laid(x, start, size), (start, x.shape[2])


def _laid_backward(size, kept, slope):
    start, columns = kept
    return _laid(slope, -start, columns), None


_laid.defvjp(_laid_forward, _laid_backward)


KERNELS: dict[str, Kernel] = {'splash': splash, 'cudnn': cudnn}
