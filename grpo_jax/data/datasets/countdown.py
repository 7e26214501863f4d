"""Countdown: reach a target number from a few numbers, each used once.

The task of the television game show, in the form in which TinyZero (2025) used it to test
reinforcement learning with rule-based rewards: three or four numbers below 100 and a target of at
most 100.
"""

import dataclasses
import json
import random
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import tensorflow_datasets as tfds

from grpo_jax.data.datasets.generated import Generated, GeneratedConfig

OPERATIONS = '+-*/'
_MAX_DRAWS = 10_000  # draws without a new problem after which the problems count as used up


class Problem(NamedTuple):
    """Numbers, the target, and an expression of the numbers whose value is the target."""

    numbers: list[int]
    target: int
    expression: str


@dataclasses.dataclass(eq=False, kw_only=True)
class CountdownConfig(GeneratedConfig):
    """Options of the countdown problems.

    Attributes:
      train_size: problems in the train split.
      test_size: problems in the test split.
      seed: seed of the problems.
      min_numbers: smallest count of numbers in a problem.
      max_numbers: largest count of numbers in a problem. All counts are equally frequent until the
        problems with one count are used up.
      max_number: largest number; the smallest is 1.
      max_target: largest target; the smallest is 1.

    Raises:
      ValueError: an option is out of range.
    """

    KIND = 'countdown'
    LARGEST: ClassVar = {
        'min_numbers': 100, 'max_numbers': 100, 'max_number': 10**9, 'max_target': 10**9,
    }  # fmt: skip

    min_numbers: int = 3
    max_numbers: int = 4
    max_number: int = 99
    max_target: int = 100

    def _own_checks(self) -> Iterator[tuple[str, bool, str]]:
        yield 'min_numbers', self.min_numbers >= 2, 'at least 2'
        yield 'max_numbers', self.max_numbers >= self.min_numbers, 'at least min_numbers'
        yield 'max_number', self.max_number >= 1, 'at least 1'
        yield 'max_target', self.max_target >= 1, 'at least 1'


class Countdown(Generated):
    """Text columns `question`, `numbers` (a JSON list), `target`, and `answer`, an expression.

    Every problem has a solution, `answer`. No two problems of the two splits have the same target
    and the same numbers in any order, and the test problems are the same for any `train_size`.
    """

    VERSION = tfds.core.Version('2.0.0')  # increase it if the same options would give other text
    COLUMNS = ('question', 'answer', 'numbers', 'target')

    def _problems(self) -> Iterator[Problem]:
        config = self.builder_config
        rng = random.Random(config.seed)
        counts = list(range(config.min_numbers, config.max_numbers + 1))
        seen: set[tuple[int, ...]] = set()
        while counts:
            count = rng.choice(counts)
            problem = _new_problem(count, config, rng, seen)
            if problem is None:
                counts.remove(count)
            else:
                yield problem

    def _row(self, problem: Problem) -> dict[str, str]:
        return make_row(problem)


def make_row(problem: Problem) -> dict[str, str]:
    """Return the columns of one problem."""
    *first, last = map(str, problem.numbers)
    return {
        'question': (
            f'Use each of the numbers {", ".join(first)} and {last} exactly once, together with '
            f'+, -, *, / and brackets, to make {problem.target}. Give your equation in '
            '<answer> </answer> tags, for example <answer>(7 - 2) * 3</answer>.'
        ),
        'answer': problem.expression,
        'numbers': json.dumps(problem.numbers),
        'target': str(problem.target),
    }


def random_expression(numbers: list[int], rng: random.Random) -> tuple[int, str]:
    """Make a random expression that uses every number once.

    It joins two random parts by a random operation until one part is left. Divisions leave no
    remainder, and no intermediate value is negative.

    Returns:
      The value of the expression and its text.
    """
    parts = [(number, str(number)) for number in numbers]
    while len(parts) > 1:
        rng.shuffle(parts)
        (a, left), (b, right) = sorted((parts.pop(), parts.pop()), key=lambda part: -part[0])
        symbols = OPERATIONS if b and a % b == 0 else OPERATIONS.replace('/', '')
        symbol = rng.choice(symbols)
        value = {'+': a + b, '-': a - b, '*': a * b, '/': a // max(b, 1)}[symbol]
        template = '({} {} {})' if parts else '{} {} {}'
        parts.append((value, template.format(left, symbol, right)))
    return parts[0]


def _new_problem(
    count: int, config: CountdownConfig, rng: random.Random, seen: set[tuple[int, ...]]
) -> Problem | None:
    """Draw a problem that is not in `seen` and add it there; None if there are none left."""
    for _ in range(_MAX_DRAWS):
        numbers = [rng.randint(1, config.max_number) for _ in range(count)]
        value, expression = random_expression(numbers, rng)
        if 1 <= value <= config.max_target and (value, *sorted(numbers)) not in seen:
            seen.add((value, *sorted(numbers)))
            return Problem(numbers, value, expression)
    return None
