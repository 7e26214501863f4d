"""Finds all problems of a config that need no data, checkpoint or parameters."""

import functools
import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from grpo_jax import data, plugins, rewards, sharding
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.run import loggers
from grpo_jax.run.config import flatten, set_value
from grpo_jax.run.config_checks import check_values
from grpo_jax.run.defaults import defaults
from grpo_jax.run.errors import problems_of
from grpo_jax.run.evaluation import evaluation_options
from grpo_jax.run.graders import check_kinds
from grpo_jax.run.methods import algorithm_of, check_group, compute_of, sampling_of
from grpo_jax.run.reward_stage import check_loss
from grpo_jax.run.stages import check_batch_size, make_optimizer

_NAMED = re.compile(r'[\w.]+')  # the key that a message begins with


def find_problems(config: ConfigDict) -> tuple[list[str], ConfigDict]:
    """Checks a config, and goes on after a problem with the key it names at its default.

    A message that also names a key of an earlier problem is left out: it may be about the default.

    Args:
      config: with every key of `defaults()`, of the right types.

    Returns:
      The problems, and the config with those keys at their defaults.
    """
    plugins.set_folders(config.module_folders)
    finder = _Finder(config)
    finder.run(check_values)
    finder.run(lambda c: data.get_format(c.data.prompt))
    finder.run(lambda c: evaluation_options(c.eval))
    finder.run(loggers.check)
    mesh = finder.run(lambda c: sharding.make_mesh(**c.mesh))
    algorithm = finder.run(algorithm_of) if finder.config.grpo.steps else None
    for check in _checks_of_stages(finder.config, mesh, algorithm):
        finder.run(check)
    return finder.problems, finder.config


def _checks_of_stages(
    config: ConfigDict, mesh: Any, algorithm: Algorithm | None
) -> Iterator[Callable[[ConfigDict], Any]]:
    """Yields the checks of the stages that the config has."""

    def batch(section: str, name: str) -> Callable[[ConfigDict], None]:
        def check(c: ConfigDict) -> None:
            microbatch = functools.reduce(operator.getitem, name.split('.'), c[section])
            check_batch_size(c, mesh, section, name, microbatch)

        return check

    def optimizer(section: str, steps: int) -> Callable[[ConfigDict], Any]:
        return lambda c: make_optimizer(c, section, steps)

    if config.sft.steps:
        yield batch('sft', 'microbatch')
        yield optimizer('sft', config.sft.steps)
    if not config.grpo.steps:
        return
    yield compute_of
    yield sampling_of
    yield batch('grpo', 'compute.microbatch')
    if config.reward_model.steps and config.reward_model.weight:
        c = config.reward_model
        yield lambda _: check_loss(c.loss, c.kind, c.group_size)
        yield batch('reward_model', 'microbatch')
        yield optimizer('reward_model', c.steps)
    if algorithm is None:  # the other checks do not depend on what is wrong with it
        algorithm = Algorithm()
    updates = config.grpo.steps * algorithm.inner_updates
    yield lambda c: check_group(c, algorithm)
    yield optimizer('grpo', updates)
    if algorithm.has_critic:
        yield optimizer('critic', max(updates, 1))
    yield lambda c: _check_rewards(c, algorithm)


def _check_rewards(config: ConfigDict, algorithm: Algorithm) -> None:
    has_model = bool(config.reward_model.weight)
    check_kinds(config, algorithm, has_reward_model=has_model)
    process = algorithm.supervision == 'process'
    if len(config.grpo.rewards) or not (process or has_model):
        rewards.build(config.grpo.rewards)
    if process:
        rewards.build_steps(config.grpo.step_rewards)


class _Finder:
    """Runs checks on a config that it repairs."""

    def __init__(self, config: ConfigDict) -> None:
        self.config, self.problems = config, list[str]()
        self.repaired: set[str] = set()

    def run(self, check: Callable[[ConfigDict], Any]) -> Any:
        """Runs a check until it finds nothing more; returns its result, None if it fails."""
        while True:
            try:
                return check(self.config)
            except ValueError as error:
                messages = problems_of(error)
            self.problems += [text for text in messages if not self._follows(text)]
            keys = {key for text in messages if (key := _named_key(text))} - self.repaired
            if not keys:
                return None
            if not self.repaired:
                self.config = self.config.copy_and_resolve_references()
            for key in keys:
                set_value(self.config, key, flatten(defaults())[key])
            self.repaired |= keys

    def _follows(self, text: str) -> bool:
        """Whether a message may be about a key that was set to its default."""
        names = {name for key in self.repaired for name in (key, key.rpartition('.')[2])}
        return any(re.search(rf'(?<![\w.]){re.escape(name)}=', text) for name in names)


def _named_key(message: str) -> str | None:
    """The path of the key that a message begins with; None if it begins with none."""
    match = _NAMED.match(message)
    return match[0] if match and match[0] in flatten(defaults()) else None
