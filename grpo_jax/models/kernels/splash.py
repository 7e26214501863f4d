"""Attention on TPUs, by splash attention (after Dao, arXiv 2307.08691).

Splash attention takes any mask and skips the blocks that it leaves out. So if the prompt is long,
the completions of a group are concatenated after it. If not, the prompt is repeated for each of its
completions while a layer runs. Attending to both separately and merging by
log-sum-exp would not repeat it, but splash attention cannot be differentiated when it returns its
log-sum-exp.

Only `dispatch` imports this module, when it is needed: Pallas takes part of a second to load.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as tpu
from jaxtyping import Array, Float, Int

from grpo_jax.models.kernels.layout import KeyValuePair, pad_positions, repeat_prompt
from grpo_jax.models.kernels.shared_prompt import SharedPromptMask

_LANES = 128  # completions are padded to multiples of it
_BLOCK = 512  # queries, and keys, that the kernel processes at a time, if they divide the sizes


def attend(
    q: Float[Array, 'B G S H h'],
    own: KeyValuePair,
    prompt: KeyValuePair,
    start: Int[Array, ' B'],
    *,
    scale: float,
    softcap: float,
    interpret: bool = False,
) -> Float[Array, 'B G S H h']:
    """Attention of completions to their prompt and to themselves; see `layout.Kernel`.

    If the prompt is at least as long as its completions together, a group is one call with a
    `SharedPromptMask`. Otherwise there is one call for each completion, with a copy of the prompt:
    the gradient of keys steps through all pairs of a call's blocks, also those that it skips, which
    for long prompts are at most twice as many as in separate calls.

    Prompt and completions are padded to whole blocks. A completion is thus at the same columns in
    every group, as the mask has to be static; segments mask the padding of the prompts.

    Args:
      q: rotated queries.
      own: keys and values [B, G, K, S, h] of the completions.
      prompt: those of the prompts, [B, K, P, h].
      start: real tokens of the prompts.
      scale: of the scores.
      softcap: see `attention.attend`.
      interpret: runs on any platform, slowly.
    """
    rows, length, heads = q.shape[1:4]
    size = _round_up(length, _LANES)
    block = math.gcd(_BLOCK, size)
    past = _round_up(prompt[0].shape[2], block)
    calls = 1 if rows * size <= past else rows
    columns = rows // calls * size
    line_up = functools.partial(_concatenate_completions, size=size, calls=calls)
    queries = line_up((q * jnp.asarray(scale, q.dtype)).swapaxes(2, 3))
    k, v = (
        jnp.concatenate([repeat_prompt(pad_positions(p, past), calls), line_up(o)], axis=3)
        for p, o in zip(prompt, own, strict=True)
    )
    real = (jnp.arange(past) < start[:, None]).astype(jnp.int32)
    segments = jnp.pad(real, ((0, 0), (0, columns)), constant_values=1)
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

    def call(q: Array, k: Array, v: Array, segments: Array) -> Array:
        # A query reads the keys whose segment is its own, 1.
        return attention(q, k, v, tpu.SegmentIds(jnp.ones(columns, jnp.int32), segments))

    out = jax.vmap(jax.vmap(call, in_axes=(0, 0, 0, None)))(queries, k, v, segments)
    out = out.reshape(-1, calls, heads, rows // calls, size, q.shape[-1])[..., :length, :]
    return out.transpose(0, 1, 3, 4, 2, 5).reshape(q.shape)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _concatenate_completions(
    x: Float[Array, 'B G N S h'], *, size: int, calls: int
) -> Float[Array, 'B calls N columns h']:
    """Pads completions to `size` and concatenates the G / calls of them that share a call."""
    x = pad_positions(x, size).reshape(x.shape[0], calls, -1, x.shape[2], size, x.shape[-1])
    return x.swapaxes(2, 3).reshape(*x.shape[:2], x.shape[3], -1, x.shape[-1])
