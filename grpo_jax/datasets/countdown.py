"""Countdown: reach a target number from a few numbers, each used once.

The task of the television game show, in the form that made it a test of reinforcement learning
from rules alone (TinyZero, 2025): three or four numbers below 100 and a target of at most 100.
"""

import dataclasses
import json
import random
from collections.abc import Iterator
from typing import NamedTuple

import tensorflow_datasets as tfds

from grpo_jax.datasets.generated import Generated, GeneratedConfig

OPERATIONS = '+-*/'
_TRIES = 10_000  # draws without a new problem after which there are taken to be no more


class Problem(NamedTuple):
    """Numbers, the target, and one expression of the numbers that has the target's value."""

    numbers: list[int]
    target: int
    expression: str


@dataclasses.dataclass(eq=False, kw_only=True)
class CountdownConfig(GeneratedConfig):
    """Which problems to generate.

    Attributes:
        train_size: problems in the train split.
        test_size: problems in the test split.
        seed: decides the problems.
        min_numbers: fewest numbers in a problem.
        max_numbers: most numbers in a problem. Every count comes equally often while it lasts.
        max_number: largest number; the smallest is 1.
        max_target: largest target; the smallest is 1.

    Raises:
        ValueError: an option is out of its range.
    """

    KIND = 'countdown'

    min_numbers: int = 3
    max_numbers: int = 4
    max_number: int = 99
    max_target: int = 100

    def __post_init__(self) -> None:
        self._require('min_numbers', self.min_numbers >= 2, 'at least 2')
        self._require('max_numbers', self.max_numbers >= self.min_numbers, 'at least min_numbers')
        self._require('max_number', self.max_number >= 1, 'at least 1')
        self._require('max_target', self.max_target >= 1, 'at least 1')
        super().__post_init__()


class Countdown(Generated):
    """Text columns `question`, `numbers` (a JSON list), `target`, and `answer`, an expression.

    Every problem can be solved: `answer` does. No two problems of either split have the same target
    and the same numbers, in whatever order, and the test problems are the same for any
    `train_size`.
    """

    VERSION = tfds.core.Version('1.0.0')  # raise it whenever the same options give other text
    COLUMNS = ('question', 'answer', 'numbers', 'target')

    def _problems(self) -> Iterator[Problem]:
        config = self.builder_config
        rng = random.Random(config.seed)
        counts = list(range(config.min_numbers, config.max_numbers + 1))
        seen: set[tuple[int, ...]] = set()
        while counts:
            count = rng.choice(counts)
            problem = _new(count, config.max_number, config.max_target, rng, seen)
            if problem is None:
                counts.remove(count)
            else:
                yield problem

    def _row(self, problem: Problem) -> dict[str, str]:
        return row(problem)


def row(problem: Problem) -> dict[str, str]:
    """The columns of one problem."""
    *most, last = map(str, problem.numbers)
    return {
        'question': (
            f'Use each of the numbers {", ".join(most)} and {last} exactly once, together with '
            f'+, -, *, / and brackets, to make {problem.target}. Give your equation in '
            '<answer> </answer> tags, for example <answer>(7 - 2) * 3</answer>.'
        ),
        'answer': problem.expression,
        'numbers': json.dumps(problem.numbers),
        'target': str(problem.target),
    }


def _new(
    count: int, max_number: int, max_target: int, rng: random.Random, seen: set[tuple[int, ...]]
) -> Problem | None:
    """A problem that is not in `seen`, to which it is added; None if none is found."""
    for _ in range(_TRIES):
        numbers = [rng.randint(1, max_number) for _ in range(count)]
        value, expression = combine(numbers, rng)
        if 1 <= value <= max_target and (value, *sorted(numbers)) not in seen:
            seen.add((value, *sorted(numbers)))
            return Problem(numbers, value, expression)
    return None


def combine(numbers: list[int], rng: random.Random) -> tuple[int, str]:
    """A random expression that uses every number once: its value and its text.

    Joins two random parts by a random operation until one part is left. Divisions leave no
    remainder, and no value on the way is below 0.
    """
    parts = [(number, str(number)) for number in numbers]
    while len(parts) > 1:
        rng.shuffle(parts)
        (a, left), (b, right) = sorted((parts.pop(), parts.pop()), key=lambda part: -part[0])
        symbols = OPERATIONS if b and a % b == 0 else OPERATIONS.replace('/', '')
        symbol = rng.choice(symbols)
        value = {'+': a + b, '-': a - b, '*': a * b, '/': a // max(b, 1)}[symbol]
        outer = '{} {} {}' if not parts else '({} {} {})'
        parts.append((value, outer.format(left, symbol, right)))
    return parts[0]
