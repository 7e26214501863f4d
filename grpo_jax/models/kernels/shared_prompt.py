"""The mask of splash attention for a group: completions one after another, over a shared prompt.

Only `splash` imports it: splash attention takes part of a second to load.
"""

import dataclasses

import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Bool


@dataclasses.dataclass(frozen=True)
class SharedPromptMask(splash_attention.Mask):
    """A group's queries [G * size] by the keys [prompt + G * size] of its prompt and completions.

    A query sees the prompt, and its own completion up to itself.

    The kernel reads the mask from memory, where splash attention stores equal blocks once. If the
    size of blocks divides `size` and `prompt`, there is one partial kind of block: a triangle.

    Attributes:
      completions: G.
      size: columns of each completion.
      prompt: columns of the prompt.
    """

    completions: int
    size: int
    prompt: int

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of queries and keys."""
        queries = self.completions * self.size
        return queries, self.prompt + queries

    def __getitem__(self, index: tuple[slice, slice]) -> Bool[np.ndarray, 'queries keys']:
        """The mask of a slice of the queries and a slice of the keys."""
        queries, keys = (
            np.arange(*part.indices(n), dtype=np.int32)
            for part, n in zip(index, self.shape, strict=True)
        )
        own = keys - self.prompt
        first = queries // self.size * self.size  # of the query's completion
        if own[0] >= 0 and (own[-1] < first[0] or own[0] > queries[-1]):
            return np.zeros((len(queries), len(own)), bool)  # most blocks, without comparisons
        return (own < 0) | ((own >= first[:, None]) & (own <= queries[:, None]))
