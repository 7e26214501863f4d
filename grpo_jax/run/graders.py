"""The grader and the ranker that a config describes."""

import functools
import logging
from collections.abc import Mapping

import jax
from ml_collections import ConfigDict

from grpo_jax import data, rewards
from grpo_jax.algorithm import reward_model
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.engine.calls import Call
from grpo_jax.run.evaluation import Ranker
from grpo_jax.run.grading import Grader
from grpo_jax.run.methods import algorithm_of
from grpo_jax.run.parameters import newest_reward_params
from grpo_jax.run.problems import Problems
from grpo_jax.run.setup import Setup
from grpo_jax.types import Params, Rollout

log = logging.getLogger('grpo_jax')


def make_grader(setup: Setup, problems: Problems, algorithm: Algorithm) -> Grader:
    """Make the grader of the config's reward functions, step function and reward model.

    Args:
      setup: the run.
      problems: the data set that prompts are from.
      algorithm: the algorithm of the `grpo` section.

    Raises:
      ValueError: rewards that do not match the algorithm or each other.
    """
    functions, weights, steps = reward_functions(setup.config, problems, algorithm)
    config = setup.config
    return Grader(
        problems, functions, weights, steps, _make_scorer(setup), config.reward_model.weight,
        calls=calls_of(config, functions, steps), max_failed=config.grpo.reward_calls.max_failed,
    )  # fmt: skip


def _make_scorer(setup: Setup) -> reward_model.Scorer | None:
    """Make the function that scores a rollout by the reward model, if there is one."""
    if setup.reward_model is None:
        return None
    kind = setup.config.reward_model.kind
    program = reward_model.make_scorer(setup.reward_model, setup.mesh, kind=kind)

    def score(params: Params, rollout: Rollout) -> jax.Array:
        scores: jax.Array = Call(program, (params, rollout), name='reward model').run()
        return scores

    return score


def reward_functions(
    config: ConfigDict, problems: Problems, algorithm: Algorithm
) -> tuple[
    dict[str, rewards.RewardFunction],
    dict[str, float],
    tuple[str, rewards.RewardFunction, float] | None,
]:
    """Return the reward functions of a config, their weights, and the step function if any.

    Raises:
      ValueError: they do not match the algorithm, each other or the data set.
    """
    has_model, process = bool(config.reward_model.weight), algorithm.supervision == 'process'
    check_kinds(config, algorithm, has_reward_model=has_model)
    if config.grpo.rewards or not (process or has_model):
        functions, weights = rewards.build(config.grpo.rewards)
    else:
        functions, weights = correctness(config)
    steps = rewards.build_steps(config.grpo.step_rewards) if process else None
    alone = sum(map(bool, weights.values())) == 1 and not has_model and steps is None
    check_functions(functions, problems, alone=alone)
    if steps is not None:
        name, function, _ = steps
        arguments = ('prompts', 'completions')
        rewards.check_arguments(
            {name: function}, problems.columns, arguments=arguments, kind='step rewards'
        )
    return functions, weights, steps


def calls_of(
    config: ConfigDict,
    functions: Mapping[str, rewards.RewardFunction],
    steps: tuple[str, rewards.RewardFunction, float] | None = None,
) -> dict[str, rewards.CallOptions]:
    """Return how reward functions, and a step function, are called.

    Args:
      config: its `grpo.reward_calls` are defaults.
      functions: by their names in `grpo.rewards`; of others, all options are defaults.
      steps: name, function and weight of the step function, whose failures are errors.

    Raises:
      ValueError: unknown options, or wrong values.
    """
    options = dict(config.grpo.reward_calls)
    if not 0 <= (share := options.pop('max_failed')) <= 1:
        raise ValueError(f'grpo.reward_calls.max_failed={share}: give a share, from 0 to 1')
    spec = {name: config.grpo.rewards.get(name, 1.0) for name in functions}
    calls = rewards.call_options(spec, functions, options)
    if steps is not None:
        name, function, _ = steps
        spec = {name: config.grpo.step_rewards.get(name, 1.0)}
        called = rewards.call_options(spec, {name: function}, options | {'on_error': 'stop'})
        if called[name].on_error != 'stop':
            raise ValueError(
                f"grpo.step_rewards.{name}.call.on_error='none': a step function that fails stops "
                "the run, so leave it at 'stop'"
            )
        calls |= called
    return calls


def check_functions(
    functions: Mapping[str, rewards.RewardFunction], problems: Problems, *, alone: bool
) -> None:
    """Check that reward functions can be called for every row, before anything is compiled.

    Args:
      functions: reward functions by name.
      problems: the data set.
      alone: whether one function gives the whole reward, so that each row needs a reference that it
        can read. Otherwise such rows are only reported.

    Raises:
      rewards.RewardError: a column is missing, or a row has no readable reference.
    """
    rows = problems.table.index
    rewards.check_arguments(functions, problems.columns)
    unreadable = rewards.check_references(
        functions, data.columns(problems.rows, rows, 1), rows.tolist()
    )
    for name, numbers in unreadable.items():
        first = problems.rows[numbers[0]]
        message = (
            f'reward {name!r} cannot read the reference of {len(numbers)} rows, first row '
            f'{numbers[0]} (from 0), answer {first.get("answer", first)!r:.80}'
        )
        if alone:
            raise rewards.RewardError(f'{message}: fix these rows, or remove them')
        log.warning('%s: it does not apply to them', message)


def correctness(
    config: ConfigDict,
) -> tuple[dict[str, rewards.RewardFunction], dict[str, float]]:
    """Return `eval.correct` with weight 0, for the accuracy of a run; nothing if it is empty."""
    name = config.eval.correct
    return (rewards.build({name: 1.0})[0], {name: 0.0}) if name else ({}, {})


def check_kinds(config: ConfigDict, algorithm: Algorithm, *, has_reward_model: bool) -> None:
    """Check that rewards are of completions or of steps, as the algorithm needs them.

    Raises:
      ValueError: they are not, or step rewards have no effect.
    """
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
