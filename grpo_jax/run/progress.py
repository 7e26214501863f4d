"""The metrics of a stage's steps: fetched one step late, so that no dispatch waits for them."""

import collections
import logging
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from grpo_jax.algorithm.advantages import OF_GROUP
from grpo_jax.rewards import RewardError
from grpo_jax.run.health import Health
from grpo_jax.run.report import Records
from grpo_jax.run.rollouts import CollectedBatch
from grpo_jax.run.stages import Stage

log = logging.getLogger('grpo_jax')

_SHOWN = {
    'reward': 'reward', 'accuracy': 'accuracy', 'kl': 'KL', 'loss': 'loss',
    'perf/tokens_per_second': 'tok/s',
}  # fmt: skip


class EqualGroups:
    """Warns once when all groups of `STEPS` steps in a row had equal rewards.

    Args:
      stage: name of the stage.
    """

    STEPS = 10

    def __init__(self, stage: str) -> None:
        self.stage, self.rows, self.warned = stage, list[dict[str, float]](), False

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Adds the metrics of a step."""
        if self.warned:
            return
        self.rows = [*self.rows, metrics] if metrics.get('frac_reward_zero_std') == 1 else []
        if len(self.rows) < self.STEPS:
            return
        self.warned = True
        log.warning(
            '%s step %d: in %d steps in a row all completions of each prompt had the same reward, '
            'so nothing is learned. %s Look at completions.jsonl: do completions hold an answer, '
            'and in the form that the reward function expects?',
            self.stage, step, self.STEPS, ' '.join(self._observations()),
        )  # fmt: skip

    def _observations(self) -> Iterator[str]:
        values = {row['reward'] for row in self.rows}
        if len(values) == 1 and all(row.get('reward_std') == 0 for row in self.rows):
            yield f'Every reward was {values.pop():g}.'
        else:
            yield 'Rewards differ between prompts only.'
        cut = np.mean([row.get('completions/clipped_ratio', 0.0) for row in self.rows])
        if cut >= 0.5:
            yield f'{cut:.0%} of the completions were cut off at data.completion_length.'


class Progress:
    """Writes the metrics of the steps that were dispatched, in their order.

    `step_time` is the time from the end of one step to the end of the next, without evaluations and
    saves; a step ends when its metrics arrive on the host. `timing/update` is the rest of it, after
    subtracting sampling and rewards.

    Args:
      stage: the stage.
      records: the files to write to.
      bar: the progress bar, which shows some of the metrics.
      skipped: optimizer updates that were skipped before the first step.
      health: checks the metrics of each step after they are written; None: nothing does.
    """

    def __init__(
        self,
        stage: Stage,
        records: Records,
        bar: tqdm,
        skipped: int,
        health: Health | None = None,
    ) -> None:
        self.stage, self.records, self.bar, self.skipped = stage, records, bar, skipped
        self.health = health
        self.rates: Any = None
        if stage.schedule:  # in one program, before the devices are busy
            counts = np.arange(stage.steps * stage.updates, dtype=np.int32)
            self.rates = jax.device_get(jax.jit(jax.vmap(stage.schedule))(counts))
        self.newest: dict[str, float] | None = None  # the last fetched metrics of the update
        self.last: dict[str, float] | None = None  # the last that were written, of the host too
        self.waiting: collections.deque[Any] = collections.deque()
        self.partly_written = False  # whether the first waiting step is
        # With another baseline than the group's, equal rewards have a gradient.
        in_group = stage.algorithm is None or stage.algorithm.baseline in OF_GROUP
        self.equal_groups = EqualGroups(stage.name) if in_group else None
        self.restart()

    def restart(self) -> None:
        """Starts the time of the next step now."""
        self.ended = time.perf_counter()

    def add(self, step: int, metrics: dict[str, jax.Array], batch: CollectedBatch) -> None:
        """Adds a step that was dispatched, to be written later."""
        # Do not keep all of the rollout: the devices need its memory.
        self.waiting.append((step, metrics, batch.metrics, batch.completions))
        if self.health is not None:
            self.health.keep(step, batch)

    def write(self, *, keep: int = 0) -> None:
        """Waits for all steps but the last `keep` and writes their metrics and completions.

        After an error or an interrupt it can be called again: rows that were written in part are
        replaced.

        Raises:
          UnhealthyError: the numbers of a step have gone wrong, see `health`.
        """
        while len(self.waiting) > keep:
            step, device_metrics, host_metrics, completions = self.waiting[0]
            fetched = jax.device_get(device_metrics)
            if self.partly_written:
                self.records.remove_from(step)
            self.partly_written = True
            values = {name: float(value) for name, value in fetched.items()}
            self.newest = dict(values)
            metrics = self._complete(step, values, host_metrics)
            self.records.metrics(step, metrics)
            self.last = metrics
            self.records.completions(step, completions)
            self.waiting.popleft()
            self.partly_written = False
            if self.equal_groups is not None:
                self.equal_groups.add(step, metrics)
            self._show(metrics)
            if self.health is not None:
                self.health.check(step, metrics)

    def _complete(
        self, step: int, metrics: dict[str, float], host_metrics: dict[str, float]
    ) -> dict[str, float]:
        """Adds the metrics of the host, the times and the learning rate."""
        seconds = time.perf_counter() - self.ended
        self.restart()
        before, self.skipped = self.skipped, int(metrics['skipped_updates'])
        if self.rates is not None:
            updates = (step + 1) * self.stage.updates - self.skipped
            metrics['learning_rate'] = float(self.rates[max(updates - 1, 0)])
        if self.skipped > before:
            log.warning(
                '%s step %d: the gradient was not finite, so its update was skipped (%d so far)',
                self.stage.name, step, self.skipped,
            )  # fmt: skip
        if taken := sorted(metrics.keys() & host_metrics.keys()):
            raise RewardError(f'log_metric({taken[0]!r}, …): a metric has this name: use another')
        others = sum(host_metrics.get(f'timing/{name}', 0.0) for name in ('sample', 'reward'))
        return metrics | host_metrics | {
            'timing/update': max(seconds - others, 0.0),
            'step_time': seconds,
            'perf/tokens_per_second': metrics['step_tokens'] / seconds,
        }  # fmt: skip

    def _show(self, metrics: dict[str, float]) -> None:
        shown = {short: metrics[name] for name, short in _SHOWN.items() if name in metrics}
        if 'reward' in shown:
            shown.pop('loss', None)
        postfix = {name: f'{value:.3g}' for name, value in shown.items()}
        self.bar.set_postfix(postfix, refresh=False)
        self.bar.update()
