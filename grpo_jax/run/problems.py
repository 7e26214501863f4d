"""The problems of a run's data set, tokenized: those to train on, and those held out."""

import contextlib
import logging
import pathlib
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from grpo_jax import data, sharding
from grpo_jax.data import get_format
from grpo_jax.run.defaults import defaults
from grpo_jax.run.errors import ConfigError, renamed
from grpo_jax.run.setup import Setup, stop_strings

log = logging.getLogger('grpo_jax')


class Problems(NamedTuple):
    """The problems of one split, ready to be sampled from and graded."""

    rows: data.Rows
    table: data.PromptTable
    tokenizer: Any
    stops: tuple[str, ...]  # strings that end a completion
    hidden: frozenset[int] | None = None  # ids that are not part of a text; None: special tokens
    conversations: list[data.Conversation] | None = None  # the prompts as messages, if they are
    split: data.Rows = ()  # all rows of the split, with those that are left out of `rows`
    added: tuple[str, ...] = ()  # columns that reward functions get beside those of the rows

    @property
    def columns(self) -> list[str]:
        """The names of the columns that reward functions get."""
        return [*self.rows[0], *self.added]


def load_rows(config: ConfigDict, workdir: pathlib.Path, split: str) -> data.Rows:
    """Opens one split of the config's data set.

    Raises:
      data.MissingSplitError: there is no such split.
      ConfigError: options are wrong.
      ValueError: the data set cannot be opened.
    """
    cache = config.data.cache_dir or workdir / 'data'
    try:
        return data.load(config.data.name, split, cache_dir=cache, **config.data.options)
    except data.OptionError as error:
        given = config.data.options  # without an option whose default is out of range
        raise ConfigError([
            f'data.options{f".{option}={given[option]!r}" if option in given else ""}: {message}'
            for option, message in error.messages.items()
        ]) from error  # fmt: skip
    except data.MissingSplitError as error:
        for key in ('train_split', 'heldout_split'):
            if split == config.data[key] != defaults().data[key]:
                raise data.MissingSplitError(f'data.{key}={split!r}: {error}') from error
        raise


def prompting(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Keyword arguments of `data.tokenize_prompts` from the config's `data` section."""
    shots = get_format(config.data.prompt).shots
    return {
        'template': config.data.prompt,
        'prompt_length': config.data.prompt_length,
        'chat': config.data.chat,
        'system': config.data.system,
        'assistant_prefix': config.data.assistant_prefix,
        'examples': load_rows(config, workdir, config.data.train_split) if shots else (),
    }


def heldout_problems(setup: Setup) -> Problems | None:
    """The held-out problems; logs how many prompts were dropped because they are too long.

    Returns:
      The problems. None, with a warning, if there are none: `data.heldout_split` is empty, or it is
      the default and the data set has only the split to train on.
    """
    config = setup.config
    check_evaluation_batch(config, setup.mesh)
    rows = heldout_rows(config, setup.workdir)
    if rows is None:
        log.warning(
            'no held-out problems (data.heldout_split=%r): the policy is not evaluated. Name a '
            "split in data.heldout_split, or split train by data.options={'heldout': 0.1}",
            config.data.heldout_split,
        )
        return None
    return _problems(setup, rows, config.data.heldout_split, 0)._replace(split=rows)


def check_evaluation_batch(config: ConfigDict, mesh: Mesh) -> None:
    """Checks that the batch of an evaluation, if there is one, divides over the mesh.

    Raises:
      ValueError: it does not.
    """
    size = config.eval.batch_size
    if config.data.heldout_split:
        sharding.check_batch(size, size, mesh, of='eval.batch_size')


def training_problems(setup: Setup, heldout: Problems | None) -> Problems:
    """The training problems without those that are held out; logs how many were dropped."""
    config = setup.config
    split: data.Rows = list(load_rows(config, setup.workdir, config.data.train_split))  # read once
    rows, leaked = split, 0
    if heldout is not None:
        rows, leaked = data.without_leaks(split, heldout.rows)
    return _problems(setup, rows, config.data.train_split, leaked)._replace(split=split)


def heldout_rows(config: ConfigDict, workdir: pathlib.Path) -> data.Rows | None:
    """Opens the held-out split; None if there is none, as in `heldout_problems`."""
    split = config.data.heldout_split
    if not split:
        return None
    try:
        return list(load_rows(config, workdir, split))
    except data.MissingSplitError as missing:
        if split != defaults().data.heldout_split:
            raise
        try:
            load_rows(config, workdir, config.data.train_split)
        except ValueError:
            raise missing from None
        return None


def added_columns(config: ConfigDict) -> tuple[str, ...]:
    """What reward functions get beside the columns of the data set."""
    return ('turns', 'environment_reward') if config.environment.name else ()


def untokenized(rows: data.Rows, added: tuple[str, ...] = ()) -> Problems:
    """Problems of all rows, without the tokens of their prompts, for checks of the rows alone."""
    count = len(rows)
    tokens = np.zeros((count, 1), np.int32)
    table = data.PromptTable(
        tokens, np.ones(count, np.int32), np.arange(count, dtype=np.int32), dropped=0
    )
    return Problems(rows, table, None, (), added=added)


def naming_template(key: str) -> contextlib.AbstractContextManager[None]:
    """Names the key in the message of an error in the block that is about its template."""
    return renamed({f'template {quote}': f'{key}: template {quote}' for quote in '\'"'})


def check_template(config: ConfigDict, workdir: pathlib.Path, rows: data.Rows) -> None:
    """Fills the template of the prompts with the first row.

    Raises:
      ValueError: it does not fit.
    """
    c, examples = config.data, prompting(config, workdir)['examples']
    with naming_template('data.prompt'):
        data.prompt_messages(c.prompt, list(rows[:1]), examples=examples, system=c.system)


def check_demonstration(config: ConfigDict, rows: data.Rows) -> None:
    """Fills the template of the demonstrations with the first row.

    Raises:
      ValueError: it does not fit.
    """
    with naming_template('data.demonstration'):
        data.render_demonstration(config.data.demonstration, rows[0])


def _problems(setup: Setup, rows: data.Rows, split: str, leaked: int) -> Problems:
    with naming_template('data.prompt'):
        options = prompting(setup.config, setup.workdir)
        table = data.tokenize_prompts(rows, setup.tokenizer, hidden=setup.hidden, **options)
    if table.dropped or leaked:
        log.warning('%s: %s', split, table.summary(leaked))
    if setup.environment is not None:
        setup.environment.check(list(rows[0]))
        for name in rows[0].keys() & set(added_columns(setup.config)):
            raise ValueError(
                f'the data set has a column {name!r}, which with an environment is what reward '
                'functions get from it: rename the column'
            )
    data.check_token_ids(table.used_ids(), setup.tokenizer, setup.model.config.vocab_size)
    stops, messages = stop_strings(setup.config), _messages(setup, rows)
    return Problems(
        rows, table, setup.tokenizer, stops, setup.hidden, messages,
        added=added_columns(setup.config),
    )  # fmt: skip


def _messages(setup: Setup, rows: data.Rows) -> list[data.Conversation] | None:
    """The prompts as messages for the reward functions; None if they get texts."""
    c = setup.config.data
    if c.reward_inputs == 'texts':
        return None
    if c.reward_inputs == 'auto':
        return data.prompt_conversations(c.prompt, rows, c.system)
    examples = prompting(setup.config, setup.workdir)['examples']
    return data.prompt_messages(c.prompt, rows, examples=examples, system=c.system)
