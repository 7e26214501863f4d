"""The sampler's programs: all that a rollout can dispatch, by the sizes that completions leave."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from grpo_jax import sharding
from grpo_jax.engine import episodes
from grpo_jax.engine.calls import Call
from grpo_jax.engine.compaction import (
    NEVER_COMPACT,
    DecodeInputs,
    Slots,
    SlotShape,
    first_shape,
    smallest_shape,
)
from grpo_jax.engine.sampler_calls import SamplerCalls
from grpo_jax.engine.token_sampling import without_inactive
from grpo_jax.run import abstract
from grpo_jax.run.setup import Setup, stopping
from grpo_jax.types import Params, Sampling


class Move(NamedTuple):
    """A program that follows the first one.

    Attributes:
      kind: 'choice' of the completions that go on, 'compaction' of an array of their caches,
        'copies' of an array of their prompts' caches, 'growth' of an array of the caches, a 'block'
        of columns, or an environment's 'replies'.
      before: the shape of the slots, and the columns of their caches.
      after: the same of its results.
      tokens: of the replies.
    """

    kind: str
    before: tuple[SlotShape, int]
    after: tuple[SlotShape, int]
    tokens: int = 0

    @property
    def size(self) -> int:
        """Cache columns of completions, before and after."""
        return sum(shape.groups * shape.rows * width for shape, width in (self.before, self.after))


@dataclasses.dataclass(frozen=True)
class Sample:
    """Sampling of a batch of prompts.

    Attributes:
      setup: the run.
      shape: B, G, P, T.
      sampling: of the tokens.
      weights: 'model' or 'int8'.
      record: what the rollout holds, see `types.Rollout`.
    """

    setup: Setup
    shape: abstract.Shape
    sampling: Sampling
    weights: str = 'model'
    record: tuple[str, ...] = ()

    @functools.cached_property
    def calls(self) -> SamplerCalls:
        """The calls, for the platform of the run's mesh."""
        setup, (_, group_size, _, columns) = self.setup, self.shape
        with sharding.use(setup.sampling_mesh):
            return SamplerCalls(
                setup.model, setup.sampling_mesh, group_size, columns, record=self.record,
                turns=setup.environment is not None,
            )  # fmt: skip

    def conversion(self, params: Params) -> Call | None:
        """The call that makes the weights to sample with; None: they are used as they are."""
        return self.calls.weights(params, self.weights, self.setup.config.mesh.gather)

    def first(self, params: Params) -> Call:
        """The call that reads the prompts and decodes the first columns."""
        setup, groups = self.setup, self.shape[0]
        where = sharding.whole_groups(groups, setup.sampling_mesh)
        ends: Any
        ends, table = stopping(setup.config, setup.model, setup.tokenizer, setup.ends, setup.hidden)
        stops: Any = None
        if table is not None:
            everywhere = sharding.replicated(setup.sampling_mesh)
            stops = jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=everywhere)
        prompts = abstract.prompts(self.shape, where)
        sampling = without_inactive(self.sampling)
        return self.calls.first(params, prompts, 0, 0, sampling, ends, stops=stops)

    @property
    def blocks(self) -> int:
        """How many blocks follow the first one, if completions are as long as they may be."""
        return -(-self.shape[3] // self.calls.block) - 1

    @functools.cached_property
    def moves(self) -> list[Move]:
        """The programs that can follow the first one.

        Blocks end at the last of their columns, or once so few completions go on that they can be
        compacted. With an environment, a long reply may need more than the next columns.
        """
        groups, group_size, prompt, _ = self.shape
        calls = self.calls
        found: dict[Move, None] = {}
        if calls.first_width == calls.max_tokens and not calls.turns:
            return []
        reached = [(first_shape(groups, group_size, self.setup.sampling_mesh), calls.first_width)]
        for now, width in reached:  # which grows
            for columns in [width, *self._widths_after(width)]:
                for shape in sorted(set(_shapes_after(now, prompt, columns))):
                    if (shape, columns) == (now, width) and not calls.turns:
                        continue
                    plain = shape._replace(apart=False)
                    if shape != now:
                        for kind in ('choice', 'compaction', 'copies')[: 2 + shape.apart]:
                            found[Move(kind, (now, width), (shape, width))] = None
                    if columns > width:
                        found[Move('growth', (plain, width), (plain, columns))] = None
                    block = (plain, columns)
                    found[Move('block', block, block)] = None
                    for tokens in self._reply_widths:
                        found[Move('replies', block, block, tokens)] = None
                    if block not in reached:
                        reached.append(block)
        return list(found)

    def _widths_after(self, width: int) -> list[int]:
        """To how many columns the caches may grow."""
        calls, widths = self.calls, list[int]()
        while width < calls.max_tokens and (calls.turns or not widths):
            width = calls.next_width(width)
            widths.append(width)
        return widths

    @property
    def _reply_widths(self) -> list[int]:
        if not self.calls.turns:
            return []
        longest = min(self.setup.config.environment.reply_tokens, self.calls.max_tokens - 2)
        widths = []
        for width in episodes.reply_widths():
            widths.append(width)
            if width >= longest:
                return widths
        raise AssertionError('widths grow without end')

    def call(self, move: Move, params: Params, results: Any) -> Call:
        """The call of a move.

        Args:
          move: one of `moves`.
          params: the weights.
          results: of the first block's call, abstract arrays.
        """
        inputs, _, slots, state = results
        inputs, slots = self._at(inputs, slots, *move.before)
        over, pause, calls = None, None, self.calls
        if calls.turns:
            over = self._of_completions(jnp.bool)
            pause = NEVER_COMPACT, jax.ShapeDtypeStruct((), jnp.int32)
        (now, _), (shape, columns) = move.before, move.after
        if move.kind == 'choice':
            return calls.choice(inputs, slots, shape, over)
        if move.kind in ('compaction', 'copies'):
            kept = self._of_devices(jnp.int32, shape.groups * shape.rows)
            if move.kind == 'compaction':
                return calls.compaction(slots.cache.k, kept, now, shape)
            return calls.copies(inputs.cache.k, kept, now, shape)
        if move.kind == 'growth':
            return calls.growth(slots.cache.k, now, columns)
        if move.kind == 'replies':
            rows = episodes.reply_rows(move.tokens, move.before[0])
            replies = self._of_completions(jnp.int32, move.tokens), self._of_completions(jnp.int32)
            return calls.replies(params, inputs, slots, state, replies, rows)
        return calls.block_to(params, inputs, slots, state, columns, pause=pause)

    def beside(self, move: Move, results: Any) -> dict[str, Any]:
        """Abstract arrays that are on the devices beside those of a move's call, by what they are.

        Of caches, one array at a time is changed: beside the first one the others are as before,
        beside the last one they are as after. It is the larger of both.

        Args:
          move: one of `moves`.
          results: of the first block's call, abstract arrays.
        """
        if move.kind not in ('compaction', 'copies', 'growth'):
            return {}
        inputs, _, slots, state = results
        sizes = move.before, move.after
        before, after = ([x.cache for x in self._at(inputs, slots, *size)] for size in sizes)
        if move.kind == 'copies':
            changed, others = (before[0], after[0]), after[1]
        else:
            changed, others = (before[1], after[1]), before[0]
        rest = max((jax.tree.leaves(cache)[1:] for cache in changed), key=_elements)
        return {'other caches': (rest, others), 'tokens so far': state}

    def _of_completions(self, dtype: Any, *axes: int) -> Any:
        """An abstract array [devices, n, ...] of each device's completions."""
        total = self.shape[0] * self.shape[1]
        return self._of_devices(
            dtype, total // sharding.data_devices(self.setup.sampling_mesh), *axes
        )

    def _of_devices(self, dtype: Any, *axes: int) -> Any:
        """An abstract array [devices, ...] that is split over them."""
        shape = sharding.data_devices(self.setup.sampling_mesh), *axes
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=sharding.groups(self.setup.sampling_mesh)
        )

    def _at(
        self, inputs: DecodeInputs, slots: Slots, shape: SlotShape, width: int
    ) -> tuple[DecodeInputs, Slots]:
        """Inputs and slots of other sizes."""
        groups = shape.groups * sharding.data_devices(self.setup.sampling_mesh)
        cache = jax.tree.map(lambda x: _resized(x, {1: groups}), inputs.cache)
        prompts = jax.tree.map(lambda x: _resized(x, {0: groups}), inputs.prompts)
        sizes = {1: groups, 2: shape.rows, 4: width}
        grown = jax.tree.map(lambda x: _resized(x, sizes), slots.cache)
        absent: Any = None
        slots = jax.tree.map(
            lambda x: _resized(x, {0: groups, 1: shape.rows}), slots._replace(cache=absent)
        )
        return inputs._replace(cache=cache, prompts=prompts), slots._replace(cache=grown)


def _shapes_after(now: SlotShape, prompt: int, columns: int) -> Iterator[SlotShape]:
    """Yields the shapes to which `smallest_shape` may compact, for any number of live slots."""
    for most in _halvings(now.rows):
        for total in _halvings(now.groups * now.rows):
            live = min(total, now.groups * most)
            if 2 * live > most:
                yield smallest_shape(most, live, now, prompt, columns)


def _halvings(size: int) -> list[int]:
    """The sizes size, size / 2, size / 4, ..., 1, rounded up."""
    sizes = [size]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def _elements(arrays: list[Any]) -> int:
    return sum(x.size for x in arrays)


def _resized(x: Any, sizes: dict[int, int]) -> Any:
    """An abstract array with other sizes of some axes."""
    shape = tuple(sizes.get(axis, size) for axis, size in enumerate(x.shape))
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=getattr(x, 'sharding', None))
