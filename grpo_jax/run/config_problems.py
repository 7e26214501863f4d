"""Finds all problems of a config that need no data, checkpoint or parameters."""

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax import data, plugins, rewards
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.run import loggers
from grpo_jax.run.config_checks import check_steps, check_values
from grpo_jax.run.errors import naming, problems_of
from grpo_jax.run.evaluation import evaluation_options
from grpo_jax.run.graders import calls_of, check_kinds
from grpo_jax.run.interaction import make_environment
from grpo_jax.run.mesh import make_mesh
from grpo_jax.run.methods import algorithm_of, check_group, compute_of, sampling_of
from grpo_jax.run.problems import check_evaluation_batch
from grpo_jax.run.repairs import Finder
from grpo_jax.run.reward_stage import check_loss
from grpo_jax.run.stages import check_batch_size, make_optimizer


def find_problems(config: ConfigDict) -> tuple[list[str], ConfigDict]:
    """Checks a config without its data and its model, see `check_options`.

    Args:
      config: with every key of `defaults()`, of the right types.

    Returns:
      The problems, and the config with repairs of them.
    """
    finder = Finder(config)
    check_options(finder)
    return finder.problems, finder.config


def problems_of_options(config: ConfigDict, workdir: str, known: Sequence[str] = ()) -> list[str]:
    """Returns the problems of a config beside known ones, see `check_options`."""
    finder = Finder(config, known)
    check_options(finder)
    return finder.problems


def check_options(finder: Finder) -> None:
    """Finds all problems of a config that need no data, checkpoint or parameters."""
    finder.run(check_steps)
    mesh = check_evaluation_options(finder)
    finder.run(loggers.check)
    algorithm = finder.run(algorithm_of) if finder.config.grpo.steps else None
    for check in _checks_of_stages(finder.config, mesh, algorithm):
        finder.run(check)
    if finder.config.grpo.steps:
        _check_rewards(finder)


def check_evaluation_options(finder: Finder) -> Mesh | None:
    """Finds the problems of the options of an evaluation; returns the mesh if it is right."""
    plugins.set_folders(finder.config.module_folders)
    finder.run(check_values)
    finder.run(lambda c: data.get_format(c.data.prompt))
    finder.run(lambda c: evaluation_options(c.eval))
    finder.run(make_environment)
    mesh = finder.run(make_mesh)
    if mesh is not None:
        finder.run(lambda c: check_evaluation_batch(c, mesh))
    return mesh


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
    yield lambda c: calls_of(c, {})
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
    yield lambda c: check_kinds(c, algorithm, has_reward_model=bool(c.reward_model.weight))
    process = algorithm.supervision == 'process'
    if not config.grpo.rewards and not process and not config.reward_model.weight:
        yield lambda c: rewards.build(c.grpo.rewards)  # which are empty
    if process and config.grpo.step_rewards:
        yield lambda c: rewards.build_steps(c.grpo.step_rewards)


def _check_rewards(finder: Finder) -> None:
    """Checks each reward function by itself, and goes on without those that are wrong."""
    for name, value in dict(finder.config.grpo.rewards).items():
        try:
            with naming('grpo.rewards'):
                functions, _ = rewards.build({name: value})
                calls_of(finder.config, functions)
        except ValueError as error:
            finder.add(problems_of(error))
            finder.remove('grpo.rewards', [name])
