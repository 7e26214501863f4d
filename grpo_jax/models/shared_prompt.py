"""Who sees what in a group, as a mask of splash attention.

Apart from `flash`, which imports it when it runs: splash attention takes part of a second to load.
"""

import dataclasses

import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention


@dataclasses.dataclass(frozen=True)
class SharedPromptMask(splash_attention.Mask):
    """Of a group's queries [G * size] for the keys [past + G * size] of its prompt and of them.

    A query sees the prompt, and its own completion up to itself.

    The kernel reads it from memory, where splash attention keeps equal blocks once. If the blocks'
    size divides `size` and `past`, one kind is neither empty nor full: a triangle.

    Attributes:
      rows: G, the completions, which stand behind each other.
      size: the columns of each.
      past: the columns of the prompt.
    """

    rows: int
    size: int
    past: int

    @property
    def shape(self) -> tuple[int, int]:
        """The queries and the keys."""
        return self.rows * self.size, self.past + self.rows * self.size

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        """bool[queries, keys] of slices of both."""
        queries, keys = (
            np.arange(*part.indices(n), dtype=np.int32)
            for part, n in zip(index, self.shape, strict=True)
        )
        own = keys - self.past
        first = queries // self.size * self.size  # of the query's completion
        if own[0] >= 0 and (own[-1] < first[0] or own[0] > queries[-1]):
            return np.zeros((len(queries), len(own)), bool)  # most blocks, so without comparing
        return (own < 0) | ((own >= first[:, None]) & (own <= queries[:, None]))
