"""The grader and the ranker that a config describes."""

import functools

from ml_collections import ConfigDict

from grpo_jax import rewards
from grpo_jax.algorithm import reward_model
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.run.evaluation import Ranker
from grpo_jax.run.grading import Grader
from grpo_jax.run.methods import algorithm_of
from grpo_jax.run.parameters import newest_reward_params
from grpo_jax.run.problems import Problems
from grpo_jax.run.setup import Setup


def make_grader(setup: Setup, problems: Problems, algorithm: Algorithm) -> Grader:
    """Make the grader of the config's reward functions, step function and reward model.

    Args:
      setup: the run.
      problems: the data set that prompts are from.
      algorithm: the algorithm of the `grpo` section.

    Raises:
      ValueError: rewards that do not match the algorithm or each other.
    """
    config, c = setup.config, setup.config.reward_model
    process = algorithm.supervision == 'process'
    _check_kinds(config, algorithm, has_reward_model=setup.reward_model is not None)
    if config.grpo.rewards or not (process or setup.reward_model is not None):
        functions, weights = rewards.build(config.grpo.rewards)
    else:  # called with weight 0, for the accuracy of the run
        functions, _ = rewards.build({config.eval.correct: 1.0})
        weights = {config.eval.correct: 0.0}
    scorer = None
    if setup.reward_model is not None:
        scorer = reward_model.make_scorer(setup.reward_model, setup.mesh, kind=c.kind)
    steps = rewards.build_steps(config.grpo.step_rewards) if process else None
    return Grader(problems, functions, weights, steps, scorer, c.weight)


def _check_kinds(config: ConfigDict, algorithm: Algorithm, *, has_reward_model: bool) -> None:
    c = config.reward_model
    process = algorithm.supervision == 'process'
    if process and not config.grpo.step_rewards:
        raise ValueError(
            "grpo.algorithm.supervision='process' without step rewards: name a step function, "
            "such as grpo.step_rewards={'right_steps': 1.0}"
        )
    if config.grpo.step_rewards and not (process or (c.steps and c.kind == 'process')):
        raise ValueError(
            "grpo.step_rewards has no effect with supervision='outcome': use "
            "supervision='process', or remove it"
        )
    if has_reward_model and (c.kind == 'process') != process:
        raise ValueError(
            f'reward_model.kind={c.kind!r} with supervision={algorithm.supervision!r}: use an '
            "'outcome' model with 'outcome' and a 'process' model with 'process'"
        )


def make_ranker(setup: Setup, problems: Problems) -> Ranker | None:
    """Make the ranker of the run's newest reward model, for rm@k; None if the run has none."""
    params = newest_reward_params(setup)
    if params is None:
        return None
    grader = make_grader(setup, problems, algorithm_of(setup.config))
    return functools.partial(grader.score, reward_params=params)
