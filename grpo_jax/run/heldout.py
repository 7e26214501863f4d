"""The held-out evaluation that a config describes, of a stage's policy or of a saved checkpoint."""

import contextlib
import dataclasses
import functools
import io
import json
import logging
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from grpo_jax.rewards import TrainerState, name_in
from grpo_jax.run import compiled, evaluation, hosts
from grpo_jax.run.buckets import check_local
from grpo_jax.run.checkpoint import OF_RUN, find_checkpoint
from grpo_jax.run.config_checks import differing_defaults
from grpo_jax.run.config_problems import check_evaluation_options
from grpo_jax.run.episodes.sampling import EpisodeSampler
from grpo_jax.run.errors import ConfigError
from grpo_jax.run.evaluation import Answers, Evaluation, spread
from grpo_jax.run.graders import calls_of, check_functions, make_grader, make_ranker
from grpo_jax.run.methods import algorithm_of
from grpo_jax.run.output_file import replaced
from grpo_jax.run.parameters import newest_policy, newest_reward_params
from grpo_jax.run.problems import (
    Problems,
    added_columns,
    heldout_problems,
    heldout_rows,
    untokenized,
)
from grpo_jax.run.repairs import OF_TOKENS, Finder
from grpo_jax.run.rollout_rewards import RolloutRewards
from grpo_jax.run.setup import Setup, prepare
from grpo_jax.run.stages import StageParams
from grpo_jax.types import Params, Rollout

__all__ = ['answer', 'make_evaluator', 'spread']

log = logging.getLogger('grpo_jax')


def make_evaluator(
    setup: Setup, heldout: Problems | None
) -> Callable[[Params, StageParams], Evaluation] | None:
    """Make the function that evaluates a stage's policy, (policy, initial) -> evaluation.

    Args:
      setup: the run.
      heldout: the problems.

    Returns:
      The function; None without problems, or, with a warning, without anything that grades answers.

    Raises:
      ValueError: options that the user has to fix.
    """
    if heldout is None:
        return None
    options = _options(setup.config)
    reward = None
    if options['correct'] is not None:
        check_functions({'eval.correct': options['correct']}, heldout, alone=True)
    else:
        reward = _make_reward(setup, heldout)
        if reward is None:
            log.warning(
                'eval.correct and grpo.rewards are empty: the policy is not evaluated, although '
                'there are held-out problems (data.heldout_split=%r), and heldout.jsonl stays '
                'empty. Name a reward function in eval.correct', setup.config.data.heldout_split,
            )  # fmt: skip
            return None
        sections = {f'eval.{name}': '' for name in ('samples', 'k', 'temperature')}
        unused = [text for text, _ in differing_defaults(setup.config, sections)]
        if unused and options['samples']:
            log.warning(
                'only greedy answers are evaluated, and %s has no effect: pass@k and maj@k need '
                'eval.correct', ' and '.join(unused),
            )  # fmt: skip

    sampler = EpisodeSampler(setup, heldout)

    def evaluate(policy: Params, initial: StageParams) -> Evaluation:
        graded = reward and functools.partial(reward, reward_params=initial.reward)
        return evaluation.evaluate(
            sampler, policy, heldout, reward=graded, book=sampler.book, **options
        )

    return evaluate


def answer(
    config: ConfigDict, workdir: pathlib.Path, checkpoint: str = '', output: str = ''
) -> tuple[str, Answers]:
    """Evaluate a checkpoint of a run, and write a line for each problem.

    Args:
      config: the config of the run, or a changed one.
      workdir: the run's folder.
      checkpoint: 'STAGE/STEP', STAGE or STEP; empty: the newest.
      output: the file to write; empty: `evaluation.jsonl` in the run's folder.

    Returns:
      The name of the checkpoint, and the answers.

    Raises:
      ConfigError: all that the user has to fix: options, no checkpoint, or no held-out problems.
      OSError: the file cannot be written.
    """
    path = pathlib.Path(output or workdir / 'evaluation.jsonl').absolute()
    finder = Finder(config)
    with hosts.together('checking the config'):
        if path.name in OF_RUN and path.parent.samefile(workdir):
            finder.add([f'--output={output} is a file of the run: name another'])
        finder.run(lambda _: check_local('--output', output))
        folder = config.checkpoint.folder
        finder.run(lambda _: find_checkpoint(workdir, ('sft', 'grpo'), checkpoint, folder))
        prepared = _prepare(finder, workdir)
        if prepared is None or finder.problems:
            raise ConfigError(finder.problems)
    setup, problems, options = prepared
    writing = replaced(path) if hosts.is_first() else contextlib.nullcontext(io.StringIO())
    with writing as file, compiled.kept_in(workdir / 'cache'), compiled.trimmed():
        policy = newest_policy(setup, checkpoint)
        if options['correct'] is not None:
            options['rank'] = make_ranker(setup, problems)
        elif (reward := _make_reward(setup, problems)) is not None:
            params = newest_reward_params(setup)
            options['reward'] = functools.partial(reward, reward_params=params)
        else:
            raise ValueError(
                'eval.correct and grpo.rewards are empty, so nothing grades the answers: name a '
                'reward function by --config.eval.correct'
            )
        sampler = EpisodeSampler(setup, problems)
        options['book'] = sampler.book
        answers = evaluation.answer_problems(sampler, policy.params, problems, **options)
        for record in evaluation.answer_records(answers):
            line = {'checkpoint': policy.name, **record}
            file.write(json.dumps(line, ensure_ascii=False) + '\n')
    return policy.name, answers


def problems_of_evaluation(
    config: ConfigDict, workdir: str, known: Sequence[str] = ()
) -> list[str]:
    """Return what is wrong with a config for an evaluation, beside problems that are known.

    Args:
      config: the config of the run, or a changed one.
      workdir: the run's folder.
      known: what is known to be wrong with the command line.
    """
    finder = Finder(config, known)
    _prepare(finder, pathlib.Path(workdir).absolute())
    return finder.problems


def _prepare(
    finder: Finder, workdir: pathlib.Path
) -> tuple[Setup, Problems, dict[str, Any]] | None:
    """Return the setup, the problems and the options of an evaluation; None if one is wrong."""
    check_evaluation_options(finder)
    setup, problems = finder.run(lambda c: prepare(c, workdir)), None
    if setup is not None:
        finder.config = setup.config
        problems = finder.run(lambda c: _held_out(setup, c), unless=OF_TOKENS)
    options = finder.run(_options)
    rows = finder.run(lambda c: heldout_rows(c, workdir)) if problems is None else None
    checked = untokenized(rows, added_columns(finder.config)) if rows else problems
    if options is not None and options['correct'] is not None and checked is not None:
        functions = {'eval.correct': options['correct']}
        finder.run(lambda _: check_functions(functions, checked, alone=True))
    if setup is None or problems is None or options is None:
        return None
    return setup, problems, options


def _options(config: ConfigDict) -> dict[str, Any]:
    """Return keyword arguments of `answer_problems` from a config."""
    options = evaluation.evaluation_options(config.eval)
    name = name_in(config.grpo.rewards, config.eval.correct)
    correct = {} if options['correct'] is None else {name: options['correct']}
    return options | {'call': calls_of(config, correct).get(name)}


def _held_out(setup: Setup, config: ConfigDict) -> Problems:
    problems = heldout_problems(dataclasses.replace(setup, config=config))
    if problems is None:
        raise ValueError(
            'there are no problems to evaluate on: name a split by --config.data.heldout_split'
        )
    return problems


def _make_reward(setup: Setup, problems: Problems) -> Callable[..., RolloutRewards] | None:
    """Make the function that rewards a rollout as in training; None if there are no rewards."""
    c, algorithm = setup.config.grpo, algorithm_of(setup.config)
    if not len(c.rewards) and algorithm.supervision == 'outcome' and setup.reward_model is None:
        return None
    # As at the end of training, so that the reward means the same in all evaluations.
    state = TrainerState(c.steps, c.steps)
    grader = dataclasses.replace(make_grader(setup, problems, algorithm), trainer_state=state)

    def reward(
        rollout: Rollout, groups: int, books: Any = (), *, reward_params: Params | None
    ) -> RolloutRewards:
        informed = dataclasses.replace(grader, books=books)
        graded = informed.grade(rollout, reward_params, groups=groups)
        if graded.skipped is not None:
            log.warning(
                '%d held-out completions have no reward, because all reward functions returned '
                'None or one failed; they count as the mean of their group, or 0',
                graded.skipped.sum(),
            )  # fmt: skip
        return graded

    return reward
