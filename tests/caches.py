"""Watches a sampler's caches: how many bytes of them exist when each of its programs starts."""

import contextlib
import itertools
from typing import NamedTuple

import jax

from grpo_jax.engine import calls, decode, forced_tokens


class Moment(NamedTuple):
    """When a program starts.

    Attributes:
      name: of its call.
      used: bytes of each array of caches that it decodes tokens with; None: it decodes none.
      live: bytes of all caches.
      made: bytes of the caches among its results; 0 if they take the place of others.
    """

    name: str
    used: list[int] | None
    live: int
    made: int


def caches(tree):
    """The arrays of keys and values, which have more axes than all others of a sampler."""
    return [x for x in jax.tree.leaves(tree) if getattr(x, 'ndim', 0) >= 5]


def sizes(tree):
    """Bytes of each array of keys and values."""
    return [x.size * x.dtype.itemsize for x in caches(tree)]


@contextlib.contextmanager
def watched():
    """Yields the list of moments at which programs start in the block."""
    before = caches(jax.live_arrays())  # held, so that no other array gets their numbers
    known = {id(x) for x in before}
    moments = []

    def observe(call):
        live = sum(sizes([x for x in jax.live_arrays() if id(x) not in known]))
        used, made = None, []
        if call.program in (decode.next_block, forced_tokens.force):
            used = sizes(call.arguments)
        else:
            made = sizes(call.program.eval_shape(*call.arguments, **call.options))
        if call.program is decode.first_block:
            used = made
        moments.append(Moment(call.name, used, live, sum(made)))

    with calls.observed(observe):
        yield moments


def assert_one_copy(moments):
    """Between two blocks there is one copy of all caches, and another one of one array.

    Returns:
      How often an array of caches was changed.
    """
    changes = 0
    of_tokens = [i for i, moment in enumerate(moments) if moment.used is not None]
    for start, end in itertools.pairwise(of_tokens):
        before, after = moments[start].used, moments[end].used
        assert moments[end].live == sum(after), moments[end]
        for moment in moments[start + 1 : end]:
            assert moment.live <= max(sum(before), sum(after)), moment
            assert moment.made <= max(before + after), moment
            changes += moment.made > 0
    return changes
