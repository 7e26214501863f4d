"""Samples of earlier iterations, kept on disk and mixed into the batches of a later one."""

import os
import pathlib
from typing import Any

import jax
import numpy as np


class Replay:
    """The samples on which a reward model is trained, one file per step.

    Algorithm 1 of DeepSeekMath (arXiv 2402.03300) keeps training its reward model with a replay
    mechanism that holds 10 % of historical data. What a step replays is a function of the seed, the
    iteration and the step, so a run that was stopped goes on as if it had not been.

    Args:
      folder: where the files lie, in a folder for each iteration.
      iteration: from 1, the one that samples now.
      share: of the groups of a batch, taken from earlier iterations; rounded to whole groups, at
        least one where it is not 0.
      seed: of the choice.

    Raises:
      ValueError: a share that is not within 0 to 1.
    """

    def __init__(self, folder: pathlib.Path, iteration: int, share: float, seed: int) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f'reward_model.replay={share}: it is a share, within 0 to 1')
        self.folder, self.iteration, self.share, self.seed = folder, iteration, share, seed

    def mix(self, step: int, batch: Any) -> Any:
        """Keeps a batch for later, and returns it with some of its groups from earlier ones.

        Args:
          step: of this iteration.
          batch: a tree of host arrays with a leading B axis.
        """
        leaves, structure = jax.tree.flatten(batch)
        here = self.folder / str(self.iteration)
        here.mkdir(parents=True, exist_ok=True)
        partial = here / 'partial.npz'
        np.savez(partial, *leaves)
        os.replace(partial, here / f'{step}.npz')
        size = len(leaves[0])
        count = max(round(self.share * size), 1) if self.share and self.iteration > 1 else 0
        rng = np.random.default_rng((self.seed, self.iteration, step))
        mixed = [leaf.copy() for leaf in leaves]
        earlier = sorted(
            path for i in range(1, self.iteration) for path in (self.folder / str(i)).glob('*.npz')
        )
        for row in size - 1 - np.arange(count):
            with np.load(earlier[rng.integers(len(earlier))]) as old:
                group = rng.integers(len(old['arr_0']))
                for i, leaf in enumerate(mixed):
                    leaf[row] = old[f'arr_{i}'][group]
        return jax.tree.unflatten(structure, mixed)
