"""What several turns cost the sampler: an environment without replies, long replies, slow ones.

    python -m benchmarks.episodes [--parts=silent,reply,slow]

Prints Markdown. `silent`: seconds of a rollout with an environment that never replies, divided by
those without one. `reply`: seconds to read a reply of 64 tokens at once, divided by those to decode
64 columns. `slow`: what is decoded while a tool takes two seconds. Runs take turns in one process.
"""

import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from benchmarks import parts
from grpo_jax.algorithm.sample import sample
from grpo_jax.engine.calls import Call
from grpo_jax.engine.compaction import NEVER_COMPACT, Slots, first_shape
from grpo_jax.engine.episodes import Replies, Turns, reply_rows
from grpo_jax.engine.sampler_calls import SamplerCalls
from grpo_jax.models import ModelConfig, Transformer, init_params
from grpo_jax.types import Prompts, Rollout, Sampling

PARTS = flags.DEFINE_list('parts', ['silent', 'reply', 'slow'], 'What to measure.')
ROUNDS = flags.DEFINE_integer('rounds', 7, 'Runs of each kind.')

GROUPS, GROUP_SIZE, PROMPT, COLUMNS = 8, 8, 64, 256
VOCAB, ENDS = 2048, 12  # a completion has about 170 tokens, unless it is cut off
REPLY, SECONDS = 64, 2.0
CONFIG = ModelConfig(
    vocab_size=VOCAB, width=256, layers=4, heads=8, kv_heads=4, head_dim=32, mlp_width=768,
)  # fmt: skip


class Tool:
    """Replies to the first turn of the completions that `chosen` selects, after some seconds.

    Attributes:
      events: of each call, the time, tokens of all completions, turns that wait, and replies.
    """

    def __init__(self, chosen: Callable[[int], bool], seconds: float = 0.0, length: int = REPLY):
        self.chosen, self.seconds, self.length = chosen, seconds, length
        self.events: list[tuple[float, int, int, int]] = []
        self._due: dict[tuple[int, int], float] = {}
        self._over: Any = None

    def __call__(self, turns: Turns, idle: bool) -> Replies:
        if self._over is None:
            self._over = np.zeros(turns.ended.shape, bool)
        groups, size = turns.ended.shape
        length: Any = np.zeros((groups, size), np.int32)
        for place in map(tuple, np.argwhere(turns.ended & ~self._over)):
            room = COLUMNS - turns.length[place]
            asked_before = self._due.get(place) == -1
            if asked_before or not self.chosen(place[0] * size + place[1]) or room <= self.length:
                self._over[place] = True
                continue
            due = self._due.setdefault(place, time.perf_counter() + self.seconds)
            if time.perf_counter() >= due:
                length[place], self._due[place] = self.length, -1
        waiting = sum(due != -1 for due in self._due.values())
        if idle and waiting and not length.any():
            time.sleep(0.01)
        self.events.append(
            (time.perf_counter(), int(turns.length.sum()), waiting, int((length > 0).sum()))
        )
        tokens: Any = np.full((groups, size, self.length), 20, np.int32)
        return Replies(tokens, length, self._over | (turns.length == COLUMNS))


def main(arguments: list[str]) -> None:
    """Measure the parts that are asked for."""
    parts.check(arguments, PARTS.value, ('silent', 'reply', 'slow'))
    model = Transformer(CONFIG)
    params = init_params(model, jax.random.key(0))
    rng, ends = np.random.default_rng(0), jnp.arange(ENDS)
    lengths: Any = rng.integers(PROMPT // 2, PROMPT + 1, GROUPS).astype(np.int32)
    tokens: Any = rng.integers(ENDS, VOCAB, (GROUPS, PROMPT), np.int32)
    prompts = Prompts(tokens, lengths, jnp.arange(GROUPS))

    def rollout(tool: Tool | None, seed: int = 0) -> tuple[float, Rollout]:
        start = time.perf_counter()
        newest = sample(
            model, params, prompts, seed=seed, step=0, sampling=Sampling(), eos_ids=ends,
            group_size=GROUP_SIZE, max_tokens=COLUMNS, exchange=tool,
        )  # fmt: skip
        jax.block_until_ready(newest)
        return time.perf_counter() - start, newest

    if 'silent' in PARTS.value:
        _silent(rollout)
    if 'reply' in PARTS.value:
        _reply(model, params, prompts)
    if 'slow' in PARTS.value:
        _slow(rollout)


def _silent(rollout: Callable[..., tuple[float, Rollout]]) -> None:
    never = functools.partial(Tool, lambda number: False)
    ratios = []
    for seed in range(ROUNDS.value + 1):  # the first compiles
        rollout(None, seed), rollout(never(), seed)
        alone, silent = rollout(None, seed)[0], rollout(never(), seed)[0]
        ratios.append(silent / alone)
    row = {
        'rollouts': float(ROUNDS.value),
        'with a silent environment / without': statistics.median(ratios[1:]),
        'lowest': min(ratios[1:]), 'highest': max(ratios[1:]),
    }  # fmt: skip
    parts.print_row(row, first=True)


def _reply(model: Transformer, params: Any, prompts: Prompts) -> None:
    """Seconds of one pass over replies, and of as many decode steps."""
    calls = SamplerCalls(model, None, GROUP_SIZE, COLUMNS, turns=True)
    never: Any = np.zeros(0, np.int32)
    first = calls.first(params, prompts, np.int32(0), np.int32(0), Sampling(), never, stops=None)
    inputs, _, slots, state = first.run()
    slots = calls.grown(slots, COLUMNS)
    rows = reply_rows(REPLY, first_shape(GROUPS, GROUP_SIZE, None))
    length = (np.arange(GROUPS * GROUP_SIZE) < rows)[None] * np.int32(REPLY)
    replies = np.full((*length.shape, REPLY), 20, np.int32), length
    pause = NEVER_COMPACT, np.int32(REPLY)
    seconds: list[tuple[float, float]] = []
    for _ in range(ROUNDS.value + 1):
        reading = calls.replies(params, inputs, _copied(slots), state, replies, rows)
        decoding = calls.block_to(params, inputs, _copied(slots), state, COLUMNS, pause=pause)
        seconds.append((_seconds(reading), _seconds(decoding)))
    ratio = statistics.median(read / decoded for read, decoded in seconds[1:])
    row = {
        'replies of 64 tokens': float(rows),
        'one pass / 64 decode steps of 64 completions': ratio,
    }
    parts.print_row(row, first=True)


def _copied(slots: Slots) -> Slots:
    """A copy, whose buffers a program may take."""
    return jax.block_until_ready(jax.tree.map(jnp.copy, slots))


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call.run())
    return time.perf_counter() - start


def _slow(rollout: Callable[..., tuple[float, Rollout]]) -> None:
    """Where a quarter of the completions wait for two seconds after their first turn."""

    def quarter(number: int) -> bool:
        return number % 4 == 0

    rollout(Tool(quarter)), rollout(Tool(quarter, SECONDS))
    fast, _ = rollout(Tool(quarter))
    tool = Tool(quarter, SECONDS)
    start = time.perf_counter()
    slow, _ = rollout(tool)
    print(f'\nseconds of a rollout: {fast:.2f} with immediate replies, {slow:.2f} with slow ones\n')
    for i, (at, tokens, waiting, replied) in enumerate(tool.events):
        row = {
            'seconds': at - start, 'tokens so far': float(tokens),
            'wait for a reply': float(waiting), 'replies now': float(replied),
        }  # fmt: skip
        if i == 0 or waiting != tool.events[i - 1][2] or replied:
            parts.print_row(row, first=i == 0)


if __name__ == '__main__':
    app.run(main)
