"""Games with the interface of Gymnasium whose observations and actions are texts.

Gymnasium itself is not needed: a game is any object with `reset(seed=…)`, which returns an
observation or a pair of it and a dictionary, and `step(action)`, which returns the five values of
Gymnasium, or the four of the older Gym.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from grpo_jax import plugins


class Gym:
    """Plays a game: a turn of the model is an action, and the next observation is the reply.

    Rows of the data set have a `seed`, and a prompt with the first observation; `gym_rows` makes
    them. The reward by `get_reward` is the sum of the rewards of the steps.

    Args:
        game: the path of a class or of a function that returns a game, or it itself.
        options: its keyword arguments.
        last_line: the action is the last line of a turn that is not empty, in the place of all.
    """

    def __init__(
        self,
        game: str | Callable[..., Any],
        options: dict[str, Any] | None = None,
        *,
        last_line: bool = True,
    ) -> None:
        self._game, self._last_line, self._reward = _make(game, options), last_line, 0.0

    @staticmethod
    def check_options(**options: Any) -> None:
        """Check that there is such a game.

        Raises:
            ValueError: there is none, or it cannot be made.
        """
        game = options['game']
        try:
            _close(_make(game, options.get('options')))
        except Exception as error:
            raise ValueError(f'game={game!r}: {type(error).__name__}: {error}') from error

    def reset(self, seed: int | str, **columns: Any) -> str:
        """Begin the game of a row and return its observation, which is in the prompt."""
        return _first(self._game.reset(seed=int(seed)))

    def reply(self, text: str) -> str | None:
        """Take a step; None if the game is over."""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        action = (lines[-1] if lines else '') if self._last_line else text
        observation, reward, *ends, _ = self._game.step(action)
        self._reward += float(reward)
        return None if any(ends) else _text(observation)

    def get_reward(self) -> float:
        """Return the sum of the rewards so far."""
        return self._reward

    def close(self) -> None:
        """Close the game, if it can be."""
        _close(self._game)


def gym_rows(
    game: str | Callable[..., Any],
    seeds: Sequence[int],
    options: dict[str, Any] | None = None,
    *,
    instruction: str = '',
) -> list[dict[str, Any]]:
    """Return the rows of a data set with a game for each seed: `question` and `seed`.

    Args:
        game: as in `Gym`.
        seeds: of the games.
        options: keyword arguments of the game.
        instruction: comes before the first observation, with an empty line between.
    """
    rows = []
    for seed in seeds:
        observation = _first(_make(game, options).reset(seed=seed))
        question = f'{instruction}\n\n{observation}' if instruction else observation
        rows.append({'question': question, 'seed': seed})
    return rows


def _make(game: str | Callable[..., Any], options: dict[str, Any] | None) -> Any:
    make = plugins.load(game) if isinstance(game, str) else game
    made = make(**(options or {}))
    missing = [n for n in ('reset', 'step') if not callable(getattr(made, n, None))]
    if missing or inspect.isclass(made):
        raise ValueError(f'game {game!r} makes {made!r:.60}, which has no reset and step')
    return made


def _close(game: Any) -> None:
    if callable(close := getattr(game, 'close', None)):
        close()


def _first(returned: Any) -> str:
    """Return the observation of `reset`, of Gymnasium or of Gym."""
    pair = isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], dict)
    return _text(returned[0] if pair else returned)


def _text(observation: Any) -> str:
    if not isinstance(observation, str):
        raise TypeError(
            f'an observation is {observation!r:.60}: wrap the game so that it returns texts'
        )
    return observation
