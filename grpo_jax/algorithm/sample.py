"""Sampling a group of completions for each prompt: prefill each prompt once, then decode.

A column is one position of all completions. They are decoded in blocks of columns, and the cache
grows before each block, so that few of the columns that a step attends to are still empty. A block
ends early once the unfinished completions fit a smaller program; the batch is then compacted. The
compiled programs are in `engine.decode`, compaction is in `engine.compaction`.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import ParamSpec

import jax
from jax.sharding import Mesh

from grpo_jax import models
from grpo_jax.engine import decode
from grpo_jax.engine.compaction import shape_of, smallest_shape
from grpo_jax.engine.episodes import Exchange, decode_episodes
from grpo_jax.engine.sampler_calls import SamplerCalls
from grpo_jax.engine.sampling_params import completed
from grpo_jax.types import Array, Params, Prompts, Rollout, Sampling

_P = ParamSpec('_P')


def last_block(blocks: Iterable[Rollout]) -> Rollout:
    """The complete rollout: the last one that `sample_blocks` yields."""
    return collections.deque(blocks, maxlen=1).pop()


def sample_blocks(
    model: models.Transformer,
    params: Params,
    prompts: Prompts,
    *,
    seed: int | Array,
    step: int | Array,
    sampling: Sampling,
    eos_ids: Array,
    group_size: int,
    max_tokens: int,
    stops: Array | None = None,
    mesh: Mesh | None = None,
    block: int = 0,
    weights: str = 'model',
    record: tuple[str, ...] = (),
    unroll: bool | None = None,
    gather: bool | None = None,
    exchange: Exchange | None = None,
) -> Iterator[Rollout]:
    """Samples `group_size` completions per prompt, yielding the rollout so far after each block.

    A token's random key depends only on (seed, step, prompt index, completion index, position), not
    on the batch, mesh or block size. With T <= block this is one program, which `jit` may trace.

    Args:
      model: the decoder.
      params: its parameters.
      prompts: tokens [B, P], their lengths [B] and data-set rows [B].
      seed: i32[], the seed of the run.
      step: i32[], the training step.
      sampling: temperature and filters; all its values are traced.
      eos_ids: i32[E], tokens that end a completion.
      group_size: G.
      max_tokens: T.
      stops: i32[states, V] from `data.stop_table`, for strings that end a completion.
      mesh: the devices; with one, prompts are sharded as `sharding.put_groups` does. The parameters
        may be on another mesh of the same devices, see `sharding.with_tensor`.
      block: columns per block; 0: chosen by `decode.block_size`.
      weights: 'model', or 'int8': matrices are quantized first (`models.quantize`), and tokens and
        log-probs are those of the quantized model. A decode step reads half the bytes of bfloat16.
      record: what the rollout holds for the update: 'support', the tokens that the filters kept
        (V / 8 bytes per token), and 'routing', the experts that were used (see `models.routing`).
      unroll: compile each layer with its own copy of its parameters, which saves copying them out
        of their stack for every token; None: where `models.caches_in_place` (NVIDIA GPUs).
      gather: give each device of the mesh's data axes a copy of the parameters in the model's dtype
        for the rollout, so that no token waits for them; None: where it fits into memory.
      exchange: gives an environment's replies to completions, see `engine.episodes`; None: a
        completion is one turn.

    Yields:
      A Rollout of [B, G, T] arrays after each block is dispatched; the last one is complete. The
      previous block is decoded by then, so reading its completions does not stall the devices.
      Tokens after a completion's end are 0 and outside the mask.

    Raises:
      ValueError: unknown weights, or a size or sampling option (unless an array) out of range.
    """
    decode.check_options(
        model.config, mesh, sampling, weights, record,
        group_size=group_size, max_tokens=max_tokens, block=block,
    )  # fmt: skip
    turns = exchange is not None
    calls = SamplerCalls(model, mesh, group_size, max_tokens, block, record, unroll, turns)
    converted = calls.weights(params, weights, gather)
    params = params if converted is None else completed(params, converted.run())
    width, prompt = calls.first_width, prompts.tokens.shape[1]
    first = calls.first(params, prompts, seed, step, sampling, eos_ids, stops=stops)
    inputs, routing, slots, state = first.run()
    prompts = prompts._replace(routing=routing)
    if exchange is not None:
        yield from decode_episodes(calls, exchange, params, prompts, (inputs, slots, state))
        return
    yield decode.rollout_so_far(prompts, state, group_size, mesh)
    if width == max_tokens:
        return  # under `jit`, the values read below would not exist
    while True:
        t, (most, total) = jax.device_get((state.t, state.live))
        if not most or t == max_tokens:
            return
        if t == width:
            width = calls.next_width(width)
        now = shape_of(slots, mesh)
        smaller = smallest_shape(int(most), int(total), now, prompt, width)
        if smaller != now:
            inputs, slots = calls.compacted(inputs, slots, smaller)
        if slots.cache.k.shape[-2] < width:
            slots = calls.grown(slots, width)
        slots, state = calls.block_to(params, inputs, slots, state, width).run()
        yield decode.rollout_so_far(prompts, state, group_size, mesh)


def _whole(blocks: Callable[_P, Iterator[Rollout]]) -> Callable[_P, Rollout]:
    @functools.wraps(blocks)
    def sample(*args: _P.args, **options: _P.kwargs) -> Rollout:
        return last_block(blocks(*args, **options))

    return sample


sample = _whole(sample_blocks)  # returns the complete rollout; arguments as in `sample_blocks`
