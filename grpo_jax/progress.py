"""The metrics of a stage's steps: fetched one step late, so that no dispatch waits for them."""

import collections
import logging
import time
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from grpo_jax.collect import Collected
from grpo_jax.report import Records
from grpo_jax.stages import Stage

log = logging.getLogger('grpo_jax')

_SHOWN = {
    'reward': 'reward', 'accuracy': 'accuracy', 'kl': 'KL', 'loss': 'loss',
    'perf/tokens_per_second': 'tok/s',
}  # fmt: skip


class Progress:
    """Writes the rows of steps that were dispatched, in their order.

    `step_time` is the time from the end of one step to that of the next, where evaluations and
    saves do not count; an end is when the metrics arrive on the host. `timing/update` is what
    remains of it beside sampling and rewards.

    Args:
      stage: whose steps.
      records: where rows are written.
      bar: where some numbers are shown.
      skipped: optimizer updates that were left out before the first step.
    """

    def __init__(self, stage: Stage, records: Records, bar: tqdm, skipped: int) -> None:
        self.stage, self.records, self.bar, self.skipped = stage, records, bar, skipped
        self.rates: Any = None
        if stage.schedule:  # in one program, before the devices are busy
            counts = np.arange(stage.steps * stage.updates, dtype=np.int32)
            self.rates = jax.device_get(jax.jit(jax.vmap(stage.schedule))(counts))
        self.waiting: collections.deque[Any] = collections.deque()
        self.torn = False  # rows of a step were not written to their end
        self.restart()

    def restart(self) -> None:
        """Lets the next step begin now."""
        self.ended = time.perf_counter()

    def add(self, step: int, metrics: dict[str, jax.Array], collected: Collected) -> None:
        """Takes a step that was dispatched, and writes those before it."""
        # Not the rollout, whose memory is needed.
        self.waiting.append((step, metrics, collected.metrics, collected.completions))
        self.write(but=1)

    def write(self, *, but: int = 0) -> None:
        """Waits for all steps `but` the last ones and writes their rows."""
        while len(self.waiting) > but:
            host = jax.device_get(self.waiting[0][1])
            self.torn = True
            step, _, known, completions = self.waiting.popleft()
            metrics = self._complete(step, {k: float(v) for k, v in host.items()}, known)
            self.records.metrics(step, metrics)
            self.records.completions(step, completions)
            self.torn = False
            self._show(metrics)

    close = write

    def _complete(
        self, step: int, metrics: dict[str, float], known: dict[str, float]
    ) -> dict[str, float]:
        """With what the host has `known`, the times and the learning rate."""
        seconds = time.perf_counter() - self.ended
        self.restart()
        before, self.skipped = self.skipped, int(metrics['skipped_updates'])
        if self.rates is not None:
            updates = (step + 1) * self.stage.updates - self.skipped
            metrics['learning_rate'] = float(self.rates[max(updates - 1, 0)])
        if self.skipped > before:
            log.warning(
                '%s step %d: the gradient was not finite, so its update was left out (%d so far)',
                self.stage.name, step, self.skipped,
            )  # fmt: skip
        others = sum(known.get(f'timing/{name}', 0.0) for name in ('sample', 'reward'))
        return metrics | known | {
            'timing/update': max(seconds - others, 0.0),
            'step_time': seconds,
            'perf/tokens_per_second': metrics['num_tokens'] / seconds,
        }  # fmt: skip

    def _show(self, metrics: dict[str, float]) -> None:
        shown = {short: metrics[name] for name, short in _SHOWN.items() if name in metrics}
        if 'reward' in shown:
            shown.pop('loss', None)
        postfix = {name: f'{value:.3g}' for name, value in shown.items()}
        self.bar.set_postfix(postfix, refresh=False)
        self.bar.update()
