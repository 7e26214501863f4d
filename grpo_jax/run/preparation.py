"""Prepares a run: checks its config, opens its data set, and makes its stages.

Everything that the user has to fix is told at once: each step is run by a `repairs.Finder`, which
goes on after a problem with a repaired config.
"""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from ml_collections import ConfigDict

from grpo_jax import data
from grpo_jax.run import checkpoint
from grpo_jax.run.config_problems import check_options
from grpo_jax.run.errors import ConfigError, problems_of
from grpo_jax.run.evaluation import evaluation_options
from grpo_jax.run.graders import check_functions, reward_functions
from grpo_jax.run.inputs import digest_inputs
from grpo_jax.run.methods import algorithm_of
from grpo_jax.run.parameters import check_start
from grpo_jax.run.policy_stages import grpo_stage, sft_stage
from grpo_jax.run.problems import (
    Problems,
    added_columns,
    check_demonstration,
    check_template,
    heldout_problems,
    heldout_rows,
    load_rows,
    training_problems,
    untokenized,
)
from grpo_jax.run.repairs import OF_TOKENS, Finder
from grpo_jax.run.reward_stage import reward_stage
from grpo_jax.run.setup import Setup, prepare
from grpo_jax.run.stages import Stage
from grpo_jax.run.start import with_start

T = TypeVar('T')


class Prepared(NamedTuple):
    """A run that can be started; nothing is compiled, and no weights are read."""

    setup: Setup
    stages: list[Stage]


def prepare_run(
    config: ConfigDict,
    workdir: str,
    *,
    extend: bool = False,
    override: bool = False,
    meanwhile: Callable[[Setup], object] | None = None,
) -> Prepared:
    """Checks a config, and makes the stages of its run with the problems of the data set tokenized.

    Args:
      config: with every key of `defaults()`.
      workdir: the run's folder; it is made.
      extend: see `changes.check_changes`.
      override: see `changes.check_changes`.
      meanwhile: called before the data are read, to begin what does not need them.

    Raises:
      ConfigError: all that the user has to fix in the config, the data and the folder.
    """
    finder = _started(Finder(config), workdir)
    try:
        path, finder.config = checkpoint.check_workdir(
            workdir, finder.config, extend=extend, override=override
        )
    except ValueError as error:
        finder.add(problems_of(error))
        raise ConfigError(_all_problems(finder)) from error
    check_options(finder)
    prepared = _prepare(finder, path, meanwhile)
    if prepared is None or finder.problems:
        raise ConfigError(finder.problems)
    return prepared


def problems_of_run(config: ConfigDict, workdir: str, known: Sequence[str] = ()) -> list[str]:
    """Returns what is wrong with the config of a run, beside problems that are known.

    Args:
      config: with every key of `defaults()`; keys that the known problems are about have defaults.
      workdir: the run's folder, to which nothing is written.
      known: what is known to be wrong with the command line and the config file.
    """
    return _all_problems(_started(Finder(config, known), workdir))


def _started(finder: Finder, workdir: str) -> Finder:
    """The finder, with the model of the run that its config starts from."""
    started = finder.run(lambda c: with_start(c, workdir))
    if started is not None:
        finder.config = started
    return finder


def _all_problems(finder: Finder) -> list[str]:
    """The problems of a config whose folder cannot be used."""
    check_options(finder)
    with tempfile.TemporaryDirectory() as folder:
        _prepare(finder, pathlib.Path(folder))
    return finder.problems


def _prepare(
    finder: Finder,
    workdir: pathlib.Path,
    meanwhile: Callable[[Setup], object] | None = None,
) -> Prepared | None:
    """Makes the setup and the stages; None if one of them cannot be made."""
    heldout = training = None
    stages: list[Stage | None] = []
    setup = finder.run(lambda c: prepare(c, workdir))
    if setup is not None:
        finder.config = setup.config
        if meanwhile is not None and not finder.problems:
            meanwhile(setup)
        _run(finder, setup, check_start)
        heldout = _run(finder, setup, heldout_problems)
        training = _run(finder, setup, lambda s: training_problems(s, heldout))
    if setup is not None and training is not None:
        makers = _makers_of_stages(finder.config, training, heldout)
        stages = [_run(finder, setup, make) for make in makers]
    made = [stage for stage in stages if stage is not None]
    if setup is not None and training is not None and len(made) == len(stages):
        others = None if heldout is None else heldout.split
        inputs = digest_inputs(finder.config, setup.tokenizer, training.split, others)
        return Prepared(dataclasses.replace(setup, inputs=inputs), made)
    _check_rows(finder, workdir, training, heldout)
    return None


def _run(finder: Finder, setup: Setup, make: Callable[[Setup], T]) -> T | None:
    """Runs a step that depends on the tokens of the run."""

    def with_config(config: ConfigDict) -> T:
        return make(dataclasses.replace(setup, config=config))

    return finder.run(with_config, unless=OF_TOKENS)


def _makers_of_stages(
    config: ConfigDict, training: Problems, heldout: Problems | None
) -> Iterator[Callable[[Setup], Stage]]:
    """Yields the stages that have steps: SFT, then reward model and policy for each iteration."""
    if config.sft.steps:
        evaluated = None if config.grpo.steps else heldout
        yield functools.partial(sft_stage, training=training, heldout=evaluated)
    for number in range(1, config.grpo.iterations + 1) if config.grpo.steps else ():
        if config.reward_model.steps:
            yield functools.partial(reward_stage, training=training, iteration=number)
        yield functools.partial(grpo_stage, training=training, heldout=heldout, iteration=number)


def _check_rows(
    finder: Finder, workdir: pathlib.Path, training: Problems | None, heldout: Problems | None
) -> None:
    """Finds the problems of a data set of which a stage, or its prompts, could not be made."""
    added = added_columns(finder.config)
    if training is None:
        rows = finder.run(lambda c: list(load_rows(c, workdir, c.data.train_split)))
        if rows:
            finder.run(functools.partial(check_template, workdir=workdir, rows=rows))
            training = untokenized(rows, added)
    if heldout is None:
        others = finder.run(lambda c: heldout_rows(c, workdir))
        heldout = untokenized(others, added) if others else None
    for check in () if training is None else _checks_of_rows(finder.config, training):
        finder.run(check)
    if heldout is not None and finder.config.eval.correct:
        correct = finder.run(lambda c: evaluation_options(c.eval)['correct'])
        if correct is not None:
            functions = {'eval.correct': correct}
            finder.run(lambda _: check_functions(functions, heldout, alone=True))


def _checks_of_rows(
    config: ConfigDict, training: Problems
) -> Iterator[Callable[[ConfigDict], Any]]:
    """Yields checks that do not depend on each other, nor on the model and the tokenizer."""

    def check_size(config: ConfigDict, section: str) -> None:
        size, name = config[section].batch_size, f'{section}.batch_size'
        split = config.data.train_split
        data.check_batch_size(size, len(training.table), name=name, split=split)

    trains_reward = bool(config.reward_model.weight) and config.reward_model.steps
    for section, steps in (
        ('sft', config.sft.steps),
        ('reward_model', config.grpo.steps and trains_reward),
        ('grpo', config.grpo.steps),
    ):
        if steps:
            yield functools.partial(check_size, section=section)
    if config.sft.steps:
        yield lambda c: check_demonstration(c, training.rows)
    if config.grpo.steps:
        yield lambda c: reward_functions(c, training, algorithm_of(c))
