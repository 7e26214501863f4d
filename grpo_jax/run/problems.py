"""The problems of a run's data set, tokenized: those to train on, and those held out."""

import logging
import pathlib
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from grpo_jax import data, sharding
from grpo_jax.data import get_format
from grpo_jax.run.setup import Setup, stop_strings

log = logging.getLogger('grpo_jax')


class Problems(NamedTuple):
    """The problems of one split, ready to be sampled from and graded."""

    rows: data.Rows
    table: data.PromptTable
    tokenizer: Any
    stops: tuple[str, ...]  # strings that end a completion


def load_rows(config: ConfigDict, workdir: pathlib.Path, split: str) -> data.Rows:
    """Opens one split of the config's data set."""
    cache = config.data.cache_dir or workdir / 'data'
    return data.load(config.data.name, split, cache_dir=cache, **config.data.options)


def prompting(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Keyword arguments of `data.tokenize_prompts` from the config's `data` section."""
    shots = get_format(config.data.prompt).shots
    return {
        'template': config.data.prompt,
        'prompt_length': config.data.prompt_length,
        'chat': config.data.chat,
        'system': config.data.system,
        'examples': load_rows(config, workdir, config.data.train_split) if shots else (),
    }


def heldout_problems(setup: Setup) -> Problems:
    """The held-out problems; logs how many prompts were dropped because they are too long."""
    config = setup.config
    size = config.eval.batch_size
    sharding.check_batch(size, size, setup.mesh, of='eval.batch_size')
    rows = list(load_rows(config, setup.workdir, config.data.heldout_split))
    return _problems(setup, rows, config.data.heldout_split, 0)


def training_problems(setup: Setup, heldout: Problems) -> Problems:
    """The training problems without those that are held out; logs how many were dropped."""
    config = setup.config
    all_rows = list(load_rows(config, setup.workdir, config.data.train_split))  # read once
    rows, leaked = data.without_leaks(all_rows, heldout.rows)
    return _problems(setup, rows, config.data.train_split, leaked)


def _problems(setup: Setup, rows: data.Rows, split: str, leaked: int) -> Problems:
    table = data.tokenize_prompts(rows, setup.tokenizer, **prompting(setup.config, setup.workdir))
    if table.dropped or leaked:
        log.warning('%s: %s', split, table.summary(leaked))
    return Problems(rows, table, setup.tokenizer, stop_strings(setup.config))
