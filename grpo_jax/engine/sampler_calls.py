"""The calls of the sampler's programs: one description for the sampler and for plans of runs."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from grpo_jax import models
from grpo_jax.engine import decode, forced_tokens
from grpo_jax.engine.calls import Call
from grpo_jax.engine.compaction import (
    NEVER_COMPACT,
    DecodeInputs,
    DecodeState,
    Slots,
    SlotShape,
    choose_slots,
    compaction_thresholds,
    copy_prompts,
    first_shape,
    keep_slots,
    shape_of,
)
from grpo_jax.engine.sampling_params import conversion
from grpo_jax.types import Array, Params, Prompts, Sampling


@dataclasses.dataclass(frozen=True)
class SamplerCalls:
    """Calls of the programs that sample T columns for a batch of prompts, G completions for each.

    Their arguments may be abstract. Results of one call are arguments of the next.

    Attributes:
      model: the decoder.
      mesh: the devices, or None.
      group_size: G.
      max_tokens: T.
      block: columns per block; 0: chosen by `decode.block_size`.
      record: what the rollout holds for the update.
      unroll: whether each layer has its own copy of its parameters; None: where
        `models.caches_in_place`.
      turns: whether an environment replies, so that each completion has a column of its own.
    """

    model: models.Transformer
    mesh: Mesh | None
    group_size: int
    max_tokens: int
    block: int = 0
    record: tuple[str, ...] = ()
    unroll: bool | None = None
    turns: bool = False

    def __post_init__(self) -> None:
        in_place = models.caches_in_place(self.model.config)
        unroll = in_place if self.unroll is None else self.unroll
        chosen = self.block or decode.block_size(self.max_tokens, in_place=in_place)
        object.__setattr__(self, 'block', chosen)
        object.__setattr__(self, 'unroll', unroll)
        object.__setattr__(self, 'model', self.model.clone(unrolled=unroll))

    @property
    def first_width(self) -> int:
        """Columns of the first block."""
        return min(self.block, self.max_tokens)

    def next_width(self, width: int) -> int:
        """Columns up to the end of the block after the one that ends at `width`."""
        return min(width + self.block, self.max_tokens)

    def weights(self, params: Params, weights: str, gather: bool | None) -> Call | None:
        """The call of `sampling_params.conversion`, whose arguments these are."""
        return conversion(
            params, self.model.config.dtype, weights, bool(self.unroll),
            mesh=self.mesh, gather=gather,
        )  # fmt: skip

    def first(
        self, params: Params, prompts: Prompts, seed: Any, step: Any, sampling: Sampling,
        eos_ids: Array, *, stops: Array | None,
    ) -> Call:  # fmt: skip
        """The call of `decode.first_block`; arguments as in `sample.sample_blocks`."""
        absent: Any = None
        inputs = DecodeInputs(params, prompts, absent, sampling, eos_ids, stops)
        width, length = self.first_width, prompts.tokens.shape[1]
        shape, thresholds = first_shape(len(prompts.index), self.group_size, self.mesh), None
        if width < self.max_tokens:
            thresholds = compaction_thresholds(shape, length, width)
        options = {
            'group_size': self.group_size, 'max_tokens': self.max_tokens, 'width': width,
            'record': self.record, 'mesh': self.mesh, 'turns': self.turns,
        }  # fmt: skip
        arguments = self.model, inputs, seed, step, thresholds or NEVER_COMPACT
        name = f'prompts of {length} tokens, and the first {width} columns of {_text(shape)}'
        return Call(decode.first_block, arguments, options, name)

    def compacted(
        self, inputs: DecodeInputs, slots: Slots, shape: SlotShape, over: Any = None
    ) -> tuple[DecodeInputs, Slots]:
        """Reduces the slots to `shape`; `over` as in `choose_slots`.

        An array of the caches at a time, which is then deleted: no two copies of all exist at once.
        """
        now = shape_of(slots, self.mesh)
        kept, prompts, fewer = self.choice(inputs, slots, shape, over).run()
        cache = jax.tree.map(lambda x: self.compaction(x, kept, now, shape).run(), slots.cache)
        inputs = inputs._replace(prompts=prompts)
        if shape.apart:
            copies = jax.tree.map(lambda x: self.copies(x, kept, now, shape).run(), inputs.cache)
            inputs = inputs._replace(cache=copies)
        return inputs, fewer._replace(cache=cache)

    def grown(self, slots: Slots, width: int) -> Slots:
        """Slots whose caches have `width` columns; an array at a time, as in `compacted`."""
        now = shape_of(slots, self.mesh)
        cache = jax.tree.map(lambda x: self.growth(x, now, width).run(), slots.cache)
        return slots._replace(cache=cache)

    def choice(
        self, inputs: DecodeInputs, slots: Slots, shape: SlotShape, over: Any = None
    ) -> Call:
        """The call of `choose_slots`."""
        absent: Any = None
        now, width = shape_of(slots, self.mesh), slots.cache.k.shape[-2]
        name = describe('choice', (now, width), (shape, width))
        options = {'shape': shape, 'mesh': self.mesh} | ({} if over is None else {'over': over})
        arguments = inputs.prompts, slots._replace(cache=absent)
        return Call(choose_slots, arguments, options, name)

    def compaction(self, cache: Any, kept: Any, now: SlotShape, shape: SlotShape) -> Call:
        """The call of `keep_slots`, which spends the array."""
        width = cache.shape[-2]
        name = describe('compaction', (now, width), (shape, width))
        options = {'rows': shape.rows, 'mesh': self.mesh}
        return Call(keep_slots, (cache, kept), options, name, spent=(cache,))

    def copies(self, cache: Any, kept: Any, now: SlotShape, shape: SlotShape) -> Call:
        """The call of `copy_prompts`, which spends the array."""
        length = cache.shape[-2]
        name = describe('copies', (now, length), (shape, length))
        options = {'size': now.rows, 'mesh': self.mesh}
        return Call(copy_prompts, (cache, kept), options, name, spent=(cache,))

    def growth(self, cache: Any, now: SlotShape, width: int) -> Call:
        """The call of `decode.grow_cache`, which spends the array."""
        name = describe('growth', (now, cache.shape[-2]), (now, width))
        return Call(decode.grow_cache, (cache,), {'width': width}, name, spent=(cache,))

    def block_to(
        self, params: Params, inputs: DecodeInputs, slots: Slots, state: DecodeState, width: int,
        *, pause: tuple[tuple[int, int], Any] | None = None,
    ) -> Call:  # fmt: skip
        """The call of `decode.next_block`, whose caches have `width` columns.

        `pause`: thresholds and number of columns after which an environment is asked.
        """
        now = shape_of(slots, self.mesh)
        options: dict[str, Any] = {'width': width, 'mesh': self.mesh}
        thresholds = self.thresholds(inputs, slots, width)
        if pause is not None:
            thresholds, options['steps'] = pause
        arguments = self.model, params, inputs, slots, state, thresholds
        name = describe('block', (now, width), (now, width))
        return Call(decode.next_block, arguments, options, name)

    def thresholds(self, inputs: DecodeInputs, slots: Slots, width: int) -> tuple[int, int]:
        """The `compaction_thresholds` of a block."""
        now, length = shape_of(slots, self.mesh), inputs.cache.k.shape[-2]
        return compaction_thresholds(now, length, width)

    def replies(
        self, params: Params, inputs: DecodeInputs, slots: Slots, state: DecodeState,
        replies: tuple[Any, Any], rows: int,
    ) -> Call:  # fmt: skip
        """The call of `forced_tokens.force`."""
        now, width = shape_of(slots, self.mesh), slots.cache.k.shape[-2]
        arguments = self.model, params, inputs, slots, state, replies
        name = describe('replies', (now, width), (now, width), replies[0].shape[-1])
        return Call(forced_tokens.force, arguments, {'rows': rows, 'mesh': self.mesh}, name)


def describe(
    kind: str, before: tuple[SlotShape, int], after: tuple[SlotShape, int], tokens: int = 0
) -> str:
    """The name of a call that follows the first block.

    Args:
      kind: 'choice', 'compaction', 'copies', 'growth', 'block' or 'replies'.
      before: completions on a device, and the columns of their caches.
      after: the same of its results.
      tokens: of each reply.
    """
    (now, width), (shape, columns) = before, after
    if kind == 'choice':
        return f'choice of {_text(shape)} from {_text(now)}'
    if kind == 'copies':
        return f'copies of the prompts of {_text(now)} for {_text(shape)}'
    if kind == 'compaction':
        return f'compaction of {_text(now)} to {_text(shape)}, {width} columns'
    if kind == 'growth':
        return f'caches of {_text(now)} from {width} to {columns} columns'
    if kind == 'replies':
        return f'replies of {tokens} tokens to some of {_text(now)}, {width} columns'
    return f'block to column {columns} of {_text(shape)}'


def _text(shape: SlotShape) -> str:
    return f'{shape.groups} x {shape.rows} completions'
