"""The run's sampler, with the environment's replies where it has one."""

from collections.abc import Iterable, Iterator
from typing import Any

from grpo_jax.algorithm.sample import last_block, sample_blocks
from grpo_jax.run.episodes.exchange import Exchange
from grpo_jax.run.episodes.recorded import RecordedReplies
from grpo_jax.run.problems import Problems
from grpo_jax.run.setup import Setup
from grpo_jax.types import Params, Prompts, Rollout


class EpisodeSampler:
    """Samples episodes of problems; without an environment, what `setup.sampler` samples.

    Args:
      setup: the run.
      problems: the data set that prompts are from.
    """

    def __init__(self, setup: Setup, problems: Problems) -> None:
        self._setup, self._problems = setup, problems

    def book(self, name: str = '') -> RecordedReplies | None:
        """Returns the replies of a batch, kept in the run's folder if it has a name.

        None without an environment.
        """
        if self._setup.environment is None:
            return None
        return RecordedReplies(self._setup.workdir if name else None, name)

    def __call__(
        self,
        params: Params,
        prompts: Prompts,
        *,
        group_size: int,
        draw: Any = None,
        book: RecordedReplies | None = None,
        **options: Any,
    ) -> Any:
        """Samples from the policy.

        Args:
          params: its parameters.
          prompts: a batch.
          group_size: G.
          draw: `sample.sample`, or `sample.sample_blocks` for the rollout after each block; None:
            what the run's sampler draws by, the whole rollout.
          book: the replies that are known, and that get the new ones; None: there is no
            environment.
          **options: of the sampler.
        """
        options |= {'group_size': group_size}
        if book is None:
            if draw is not None:
                options['draw'] = draw
            return self._setup.sampler(params, prompts, **options)
        exchange = Exchange(self._setup, self._problems, prompts, group_size, book)
        blocks = self._setup.sampler(
            params, prompts, draw=sample_blocks, exchange=exchange, **options
        )
        episodes = _closing(exchange, blocks)
        return episodes if draw is sample_blocks else last_block(episodes)


def _closing(exchange: Exchange, blocks: Iterable[Rollout]) -> Iterator[Rollout]:
    """Yields the blocks, and ends the episodes after them or after an error."""
    with exchange:
        yield from blocks
