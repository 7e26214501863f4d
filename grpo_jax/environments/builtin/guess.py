"""A number game of several turns, for tests and first experiments."""

import re
from typing import Any

_NUMBER = re.compile(r'-?[0-9]{1,9}')


class Guess:
    """Answers guesses of the row's `number` by 'higher' or 'lower' until one is right.

    A guess is the last whole number in a turn. The reward by `get_reward` is 1 divided by the
    number of guesses, or 0 as long as the number is not found.
    """

    def reset(self, number: int | str, **columns: Any) -> None:
        """Begin a game."""
        self._number, self._turns, self._found = int(number), 0, False

    def reply(self, text: str) -> str | None:
        """Answer a guess; None if it is right."""
        self._turns += 1
        numbers = _NUMBER.findall(text)
        if not numbers:
            return 'guess a number'
        self._found = int(numbers[-1]) == self._number
        if self._found:
            return None
        return 'higher' if int(numbers[-1]) < self._number else 'lower'

    def get_reward(self) -> float:
        """Return what the game is worth so far."""
        return 1 / self._turns if self._found else 0.0
