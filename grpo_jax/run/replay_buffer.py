"""Samples of earlier iterations, kept on disk and mixed into the batches of a later one."""

import os
import pathlib
import zipfile
from typing import TypeVar

import jax
import numpy as np

from grpo_jax.run import hosts
from grpo_jax.run.errors import naming_file

TreeT = TypeVar('TreeT')


class ReplayBuffer:
    """The samples that a reward model is trained on, one file per step.

    Algorithm 1 of DeepSeekMath (arXiv 2402.03300) keeps training its reward model with a replay
    mechanism that holds 10 % of historical data. What a step replays is a function of the seed, the
    iteration and the step, so a resumed run replays the same as an unbroken one.

    Args:
      folder: folder of the files, with one subfolder for each iteration.
      iteration: the current iteration, counted from 1.
      share: share of the groups of a batch that come from earlier iterations, from 0 to 1; rounded
        to whole groups, and to at least one group unless it is 0.
      seed: seed of the choice.

    Raises:
      ValueError: `share` is out of range.
    """

    def __init__(self, folder: pathlib.Path, iteration: int, share: float, seed: int) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f'reward_model.replay={share} is out of range: make it 0 to 1')
        self.folder, self.iteration, self.share, self.seed = folder, iteration, share, seed

    def mix(self, step: int, batch: TreeT) -> TreeT:
        """Keep a batch for later, and return it with some groups replaced by earlier ones.

        Args:
          step: of this iteration.
          batch: a tree of host arrays with a leading B axis.

        Returns:
          A tree of the same shapes, whose last groups are replaced.
        """
        leaves, structure = jax.tree.flatten(batch)
        if hosts.is_first():
            self._write(step, leaves)
        size = len(leaves[0])
        count = max(round(self.share * size), 1) if self.share and self.iteration > 1 else 0
        rng = np.random.default_rng((self.seed, self.iteration, step))
        mixed = [leaf.copy() for leaf in leaves]
        earlier = sorted(
            path
            for i in range(1, self.iteration)
            for path in (self.folder / str(i)).glob('*.npz')
            if path.stem.isdigit()  # not a file of another's
        )
        for group in size - 1 - np.arange(count):
            arrays = _read(earlier[rng.integers(len(earlier))])
            replayed = rng.integers(len(arrays[0]))
            for leaf, array in zip(mixed, arrays, strict=True):
                leaf[group] = array[replayed]
        return jax.tree.unflatten(structure, mixed)

    def _write(self, step: int, leaves: list[np.ndarray]) -> None:
        folder = self.folder / str(self.iteration)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f'{step}.partial'
        try:
            with naming_file(partial), partial.open('wb') as file:
                np.savez(file, *leaves)
            os.replace(partial, folder / f'{step}.npz')
        finally:
            partial.unlink(missing_ok=True)


def _read(path: pathlib.Path) -> list[np.ndarray]:
    """The arrays of a file, whose checksums are checked.

    Raises:
      ValueError: it is damaged; names it.
    """
    try:
        with np.load(path) as arrays:
            return [arrays[f'arr_{i}'] for i in range(len(arrays))]
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f'{path} is damaged ({error}): restore it, or begin the run in another --workdir'
        ) from error
