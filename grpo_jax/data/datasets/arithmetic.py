"""Arithmetic problems with worked solutions, and demonstrations with systematic mistakes.

A problem such as `37+58+21=` is solved strictly from left to right (so `2+3*4=` is 20), one
operation per step: `37+58=95;95+21=116`. The running value is never negative.

The mistake is carryless arithmetic (Applegate, LeBrun and Sloane, "Carryless Arithmetic Mod 10",
2011): every decimal place is computed modulo 10 and nothing is carried or borrowed, so 37+58=85,
95+21=16, 52-37=25 and 12*34=308. A carry step is a step for which this differs from the correct
result. A policy that is fine-tuned on the demonstrations learns these mistakes.
"""

import dataclasses
import itertools
import math
import operator
import random
from collections.abc import Callable, Iterator
from typing import ClassVar

import tensorflow_datasets as tfds

from grpo_jax.data.datasets.generated import Generated, GeneratedConfig

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    '+': operator.add,
    '-': operator.sub,
    '*': operator.mul,
}

Problem = tuple[list[int], list[str]]  # n numbers and the n - 1 operations between them


@dataclasses.dataclass(eq=False, kw_only=True)
class ArithmeticConfig(GeneratedConfig):
    """Options of the arithmetic problems.

    Attributes:
      train_size: problems in the train split.
      test_size: problems in the test split.
      seed: seed of the problems and the mistakes.
      min_numbers: smallest count of numbers in a problem.
      max_numbers: largest count of numbers in a problem. All counts are equally frequent until the
        problems with one count are used up.
      min_digits: smallest count of decimal digits of a number (0 has one digit).
      max_digits: largest count of decimal digits of a number.
      operations: the operations that occur, a subset of `+-*`.
      mistakes: probability that a carry step of a demonstration is carryless.

    Raises:
      ValueError: an option is out of range.
    """

    KIND = 'arithmetic'
    LARGEST: ClassVar = {'min_numbers': 1000, 'max_numbers': 1000, 'max_digits': 1000}

    min_numbers: int = 3
    max_numbers: int = 3
    min_digits: int = 1
    max_digits: int = 2
    operations: str = '+'
    mistakes: float = 0.5

    def __post_init__(self) -> None:
        known = isinstance(self.operations, str) and set(self.operations) <= set(OPERATIONS)
        if known:
            self.operations = ''.join(x for x in OPERATIONS if x in self.operations)
        super().__post_init__()

    def _own_checks(self) -> Iterator[tuple[str, bool, str]]:
        yield 'min_numbers', self.min_numbers >= 2, 'at least 2'
        yield 'max_numbers', self.max_numbers >= self.min_numbers, 'at least min_numbers'
        yield 'min_digits', self.min_digits >= 1, 'at least 1'
        yield 'max_digits', self.max_digits >= self.min_digits, 'at least min_digits'
        known = bool(self.operations) and set(self.operations) <= set(OPERATIONS)
        yield 'operations', known, f'one or more of {"".join(OPERATIONS)}'
        yield 'mistakes', 0 <= self.mistakes <= 1, 'between 0 and 1'


class Arithmetic(Generated):
    """Text columns `question`, `answer`, `solution` (correct) and `demonstration` (with mistakes).

    No question occurs twice in the two splits, and the test questions are the same for any
    `train_size` and `mistakes`.
    """

    VERSION = tfds.core.Version('2.0.0')  # increase it if the same options would give other text
    COLUMNS = ('question', 'answer', 'solution', 'demonstration')

    def _problems(self) -> Iterator[Problem]:
        return _problems(self.builder_config)

    def _row(self, problem: Problem) -> dict[str, str]:
        config = self.builder_config
        return make_row(*problem, mistakes=config.mistakes, seed=config.seed)


def make_row(
    numbers: list[int], symbols: list[str], *, mistakes: float, seed: int
) -> dict[str, str]:
    """Return the columns of one problem.

    Args:
      numbers: n numbers.
      symbols: n - 1 operations between them.
      mistakes: probability that a carry step of the demonstration is carryless.
      seed: seed of the mistakes, which depend on it and the question only.
    """
    solution = solve(numbers, symbols, lambda: False)
    terms = (f'{symbol}{number}' for symbol, number in zip(symbols, numbers[1:], strict=True))
    question = f'{numbers[0]}{"".join(terms)}='
    rng = random.Random(f'{seed}:{question}')
    return {
        'question': question,
        'answer': solution[-1].rpartition('=')[2],
        'solution': ';'.join(solution),
        'demonstration': ';'.join(solve(numbers, symbols, lambda: rng.random() < mistakes)),
    }


def solve(numbers: list[int], symbols: list[str], makes_mistake: Callable[[], bool]) -> list[str]:
    """Solve `numbers[0] symbols[0] numbers[1] ...` from left to right.

    After an earlier mistake the running value can be smaller than the number to subtract. Such a
    step is always carryless, so that no step is negative.

    Args:
      numbers: n numbers.
      symbols: n - 1 operations between them.
      makes_mistake: called at every other carry step; true if the step is to be carryless.

    Returns:
      n - 1 steps such as `37+58=95`.
    """
    steps = []
    value = numbers[0]
    for symbol, number in zip(symbols, numbers[1:], strict=True):
        result, mistake = OPERATIONS[symbol](value, number), carryless(value, symbol, number)
        if mistake != result and (result < 0 or makes_mistake()):
            result = mistake
        steps.append(f'{value}{symbol}{number}={result}')
        value = result
    return steps


def carryless(left: int, symbol: str, right: int) -> int:
    """Compute `left symbol right` of non-negative numbers, each decimal place modulo 10."""
    a, b = ([int(digit) for digit in reversed(str(number))] for number in (left, right))
    if symbol == '*':
        sums = [0] * (len(a) + len(b) - 1)
        for (i, x), (j, y) in itertools.product(enumerate(a), enumerate(b)):
            sums[i + j] += x * y
    else:
        pairs = itertools.zip_longest(a, b, fillvalue=0)
        sums = [OPERATIONS[symbol](x, y) for x, y in pairs]
    return sum(total % 10 * 10**place for place, total in enumerate(sums))


def _problems(config: ArithmeticConfig) -> Iterator[Problem]:
    """Yield every problem once, in random order."""
    rng = random.Random(config.seed)
    counts = range(config.min_numbers, config.max_numbers + 1)
    pools = [_problems_of(count, config, rng) for count in counts]
    while pools:
        pool = rng.choice(pools)
        problem = next(pool, None)
        if problem is None:
            pools.remove(pool)
        else:
            yield problem


def _problems_of(count: int, config: ArithmeticConfig, rng: random.Random) -> Iterator[Problem]:
    """Yield every problem of `count` numbers whose running value is never negative."""
    low = 0 if config.min_digits == 1 else 10 ** (config.min_digits - 1)
    choices = [10**config.max_digits - low] * count + [len(config.operations)] * (count - 1)
    for code in _shuffled(math.prod(choices), rng):  # each code is one combination of choices
        digits = []
        for size in choices:
            code, digit = divmod(code, size)
            digits.append(digit)
        numbers = [low + digit for digit in digits[:count]]
        symbols = [config.operations[digit] for digit in digits[count:]]
        steps = zip(symbols, numbers[1:], strict=True)
        if min(itertools.accumulate(steps, _apply, initial=numbers[0])) >= 0:
            yield numbers, symbols


def _apply(value: int, step: tuple[str, int]) -> int:
    symbol, number = step
    return OPERATIONS[symbol](value, number)


def _shuffled(size: int, rng: random.Random) -> Iterator[int]:
    """Yield a permutation of `range(size)`: a Fisher-Yates shuffle that stores swaps only."""
    moved: dict[int, int] = {}
    for last in range(size - 1, -1, -1):
        chosen = rng.randint(0, last)
        yield moved.get(chosen, chosen)
        moved[chosen] = moved.pop(last, last)
