"""Cutting a batch so that its work is that of its real tokens.

A microbatch is a number of groups, over all devices, that are computed at a time; arrays cut into
them have shape [microbatches, m, ...]. Its prompts are read once. Its completions may be read a few
rows at a time, the longest first, and none in more columns than its longest row fills: each width
of a short list is compiled, and the one that fits is chosen on the device. Or they are packed into
sequences behind each other, see `packing`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax import models, packing, sharding
from grpo_jax.types import Batch, Params, Prompts

NARROWEST = 32  # columns from which on a halving is not worth its compilation

# States [b, g, w, D] that predict a bundle's tokens, from its microbatch's prompts [L, m, K, P, h].
Hidden = Callable[[models.Transformer, Params, models.KeyValues], jax.Array]
Outputs = dict[str, jax.Array]
# Outputs [b, g, w] from all parameters, hidden states and the part of a batch that they belong to,
# its columns cut to w as well.
Scorer = Callable[[Params, jax.Array, Batch], Outputs]
# Adds the gradient of a loss of hidden states to a total: (trained parameters, states, part, total)
# to the new total, the loss's slope by the states, and outputs.
Learner = Callable[[Params, jax.Array, Batch, Params], tuple[Params, jax.Array, Outputs]]


class Reader(NamedTuple):
    """A decoder that reads completions."""

    model: models.Transformer
    params: Callable[[Params], Params]  # all parameters from the trained ones


@dataclasses.dataclass(frozen=True)
class Microbatches:
    """How a batch is cut."""

    size: int  # groups
    mesh: Mesh | None = None
    rows: int = 0  # completions read at a time; 0: all of the microbatch, group by group
    widths: int = 1  # how many are compiled: T, T / 2, T / 4, ...
    packed: bool = False  # rows are sequences of T columns, see `packing`

    def cut(self, tree: Any) -> Any:
        """[B, ...] -> [microbatches, m, ...], strided so that devices keep the groups they hold."""

        def one(x):
            x = x.reshape(self.size, -1, *x.shape[1:]).swapaxes(0, 1)
            if self.mesh is None:
                return x
            return jax.lax.with_sharding_constraint(
                x, NamedSharding(self.mesh, PartitionSpec(None, 'fsdp'))
            )

        return jax.tree.map(one, tree)

    def sum(self, function: Callable[[Any], Any], tree: Any, *, like: Any) -> tuple[Any, Any]:
        """Adds up (total, terms) = `function(microbatch)`: the sum of totals, the terms stacked."""

        def add(total, microbatch):
            part, terms = function(microbatch)
            return jax.tree.map(jnp.add, total, part), terms

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, like), self.cut(tree))

    def outputs(self, reader: Reader, scorer: Scorer, params: Params, batch: Batch) -> Outputs:
        """The scorer's outputs [B, G, T] for all of a batch, without gradient."""
        params = reader.params(params)

        def microbatch(part: Batch):
            prompts = _prompts(reader.model, params, part)

            def read(total, some: Batch, hidden: Hidden):
                return total, scorer(params, hidden(reader.model, params, prompts), some)

            return self._in_bundles(read, part, total=())[1]

        return jax.lax.stop_gradient(_joined(jax.lax.map(microbatch, self.cut(batch))))

    def gradient(
        self, reader: Reader, learner: Learner, params: Params, batch: Batch
    ) -> tuple[Params, Outputs]:
        """The sum of the losses' gradients by the trained `params`, and the outputs [B, G, T].

        A prompt's forward and backward pass are computed once, however many bundles read it. Sums
        are float32, whatever the parameters are.
        """
        scale = loss_scale(reader.model, batch.rollout.mask)
        batch = batch._replace(weights=batch.weights * scale)

        def add(total, part: Batch):
            prompts, pull = jax.vjp(
                lambda p: _prompts(reader.model, reader.params(p), part), params
            )

            def read(total, some: Batch, hidden: Hidden):
                states, back = jax.vjp(
                    lambda p, prompts: hidden(reader.model, reader.params(p), prompts),
                    params,
                    prompts,
                )
                total, through = total
                total, slope, out = learner(params, states, some, total)
                return plus((total, through), back(slope)), out

            (total, through), out = self._in_bundles(read, part, (total, zeros(prompts)))
            (found,) = pull(jax.tree.map(lambda x, y: x.astype(y.dtype), through, prompts))
            return plus(total, found), out

        total, out = jax.lax.scan(add, zeros(params), self.cut(batch))
        total = jax.tree.map(lambda x, y: (x / scale).astype(y.dtype), total, params)
        return total, _joined(out)

    def _in_bundles(
        self, read: Callable[[Any, Batch, Hidden], tuple[Any, Outputs]], part: Batch, total: Any
    ) -> tuple[Any, Outputs]:
        """Hands a total from bundle to bundle, and puts their outputs [m, G, T] together.

        Args:
          read: (total, bundle, its states) to the new total and outputs [b, g, w].
          part: the microbatch.
          total: what to begin with.
        """
        if not self.rows:
            return self._read(read, total, part, lambda prompts: prompts)
        shards = 1 if self.mesh is None else self.mesh.shape['fsdp']
        if self.packed:
            return self._in_sequences(read, part, total, shards)
        mask = part.rollout.mask
        order = _by_length(mask, shards, self.rows)

        def bundle(total, index):
            groups = index // mask.shape[1]
            some = _take_rows(part, index, groups)
            return self._read(read, total, some, lambda prompts: _take_prompts(prompts, groups))

        total, out = jax.lax.scan(bundle, total, order)
        return total, jax.tree.map(lambda x: _put_back(x, order, mask.shape), out)

    def _read(self, read, total, some: Batch, take: Callable[[models.KeyValues], Any]):
        """What `read` makes of the total for rows whose prompts' keys and values `take` picks."""

        def within(total, cut: Batch):
            rollout = cut.rollout

            def hidden(model, params, prompts):
                length = rollout.prompts.length
                last = models.last_tokens(rollout.prompts.tokens, length)
                return models.continuation_hidden(
                    model, params, take(prompts), last, length, rollout.tokens
                )

            return read(total, cut, hidden)

        return _in_width(within, total, some, self.widths)

    def _in_sequences(self, read, part: Batch, total: Any, shards: int):
        """`_in_bundles` of packed completions: full bundles, and one by one what is left then."""
        mask = part.rollout.mask
        packed, size = packing.pack(mask, shards), self.rows // shards

        def bundle(total, source):
            some = packing.take(part, source)

            def hidden(model, params, prompts):
                return packing.hidden(model, params, prompts, some)

            return read(total, some.part, hidden)

        def add(count, i, carry):
            total, out = carry
            source = jax.lax.dynamic_slice_in_dim(packed.source, i * count, count, axis=1)
            total, new = bundle(total, source)
            return total, jax.tree.map(lambda x, y: packing.put_back(x, y, source), out, new)

        _, shapes = jax.eval_shape(bundle, total, packed.source[:, :size])
        empty = jax.tree.map(lambda x: jnp.zeros(mask.shape, x.dtype), shapes)
        full = packed.used // size
        found = jax.lax.fori_loop(0, full, functools.partial(add, size), (total, empty))
        if size == 1:
            return found
        return jax.lax.fori_loop(full * size, packed.used, functools.partial(add, 1), found)


def loss_scale(model: models.Transformer, mask: jax.Array) -> float:
    """What the loss is multiplied with while its gradient is computed: for float16, a power of 2.

    Weights are about 1 / tokens, and the slopes of many tokens would be too small for its exponents
    (Micikevicius et al., arXiv 1710.03740, section 3.2). Multiplied they are about 2^-4 however
    many there are, far from both ends.
    """
    if getattr(model.config, 'dtype', '') != 'float16':
        return 1.0
    return max(1.0, 2.0 ** (mask.size.bit_length() - 4))


def zeros(like: Any) -> Any:
    """Where a sum of `like`s begins: f32."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)


def plus(total: Any, found: Any) -> Any:
    """The sum, in the total's dtypes."""
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), total, found)


def check_rows(rows: int, total: int, mesh: Mesh | None = None) -> None:
    """Raises ValueError, with the numbers that work, where rows cannot be bundled as asked.

    Args:
      rows: completions read at a time; 0: all.
      total: completions of a microbatch.
      mesh: each bundle is spread over its fsdp axis.
    """
    shards = 1 if mesh is None else mesh.shape['fsdp']
    works = [n for n in range(shards, total + 1, shards) if total % n == 0]
    if rows and rows not in works:
        raise ValueError(
            f'rows={rows} does not cut the {total} completions of a microbatch over fsdp={shards} '
            f'into equal bundles: use 0 (all at once), or one of {", ".join(map(str, works))}'
        )


def _prompts(model: models.Transformer, params: Params, part: Batch) -> models.KeyValues:
    """Keys and values [L, m, K, P, h]."""
    prompts = part.rollout.prompts
    return models.apply(model, params, prompts.tokens, prompts.length, method='prefill')[0]


def widths_of(longest: int, count: int) -> tuple[int, ...]:
    """Up to `count` numbers of columns, the smallest first: T, T / 2, T / 4, ... (rounded up)."""
    widths = [longest]
    while len(widths) < count and widths[-1] > NARROWEST:
        widths.append(-(-widths[-1] // 2))
    return tuple(reversed(widths))


def _in_width(function: Callable[[Any, Batch], Any], total: Any, part: Batch, count: int):
    """`function(total, part)`, computed in the fewest columns that hold all of the part's tokens.

    Outputs [b, g, w] are filled up with zeros again.
    """
    mask = part.rollout.mask
    longest = mask.shape[-1]

    def within(width: int):
        def run(total, part: Batch):
            rows, prompts = _apart(part)
            rows = jax.tree.map(lambda x: x[:, :, :width] if x.ndim > 2 else x, rows)
            total, out = function(total, _together(rows, prompts))
            behind = ((0, 0), (0, 0), (0, longest - width))
            return total, jax.tree.map(lambda x: jnp.pad(x, behind), out)

        return run

    widths = widths_of(longest, count)
    if len(widths) == 1:
        return within(longest)(total, part)
    needed = jnp.where(mask, jnp.arange(1, longest + 1), 0).max()
    choice = jnp.searchsorted(jnp.asarray(widths), needed)
    return jax.lax.switch(choice, [within(width) for width in widths], total, part)


# Rows of a microbatch, numbered on each device's share of the groups


def _by_length(mask: jax.Array, shards: int, rows: int) -> jax.Array:
    """i32[bundles, shards, rows / shards], the longest completions first.

    Each shard sorts its own, so none has to move.
    """
    lengths = mask.sum(-1).reshape(shards, -1)
    order = jnp.argsort(-lengths, axis=1, stable=True)
    return order.reshape(shards, -1, rows // shards).swapaxes(0, 1)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    """Entries [shards * k, ...] of x [shards * n, ...], `index` i32[shards, k] of each share."""
    shares = x.reshape(len(index), -1, *x.shape[1:])
    taken = jax.vmap(lambda share, i: share[i])(shares, index)
    return sharding.anchor(taken.reshape(-1, *x.shape[1:]))


def _take_rows(part: Batch, index: jax.Array, groups: jax.Array) -> Batch:
    """A batch of groups of one."""
    rows, prompts = _apart(part)
    rows = jax.tree.map(lambda x: _take(x.reshape(-1, *x.shape[2:]), index)[:, None], rows)
    return _together(rows, jax.tree.map(lambda x: _take(x, groups), prompts))


def _apart(part: Batch) -> tuple[Batch, Prompts]:
    """What a batch holds for each row, and its prompts."""
    nothing: Any = None
    return part._replace(rollout=part.rollout._replace(prompts=nothing)), part.rollout.prompts


def _together(rows: Batch, prompts: Prompts) -> Batch:
    return rows._replace(rollout=rows.rollout._replace(prompts=prompts))


def _take_prompts(prompts: models.KeyValues, groups: jax.Array) -> models.KeyValues:
    return jax.tree.map(lambda x: _take(x.swapaxes(0, 1), groups).swapaxes(0, 1), prompts)


def _put_back(x: jax.Array, order: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[bundles, rows, 1, T] in the places that `order` took them from: [m, G, T]."""
    shards = order.shape[1]
    x = x.reshape(*order.shape, -1).swapaxes(0, 1).reshape(shards, -1, shape[-1])
    place = jnp.argsort(order.swapaxes(0, 1).reshape(shards, -1), axis=1)
    return sharding.anchor(jax.vmap(lambda x, i: x[i])(x, place).reshape(shape))


def _joined(out: Any) -> Any:
    """[microbatches, m, ...] -> [B, ...], undoing `Microbatches.cut`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), out)
