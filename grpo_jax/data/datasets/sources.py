"""The data sets that are read from files: their locations, and the meaning of their columns.

The common text columns are `question`, `answer` (the final answer alone) and `solution` (worked
text). A data set has those that its files provide; the files' other columns keep their names.
"""

import glob
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

from grpo_jax.data.datasets import answers, programs
from grpo_jax.data.datasets.records import SAVED_DATASET, Row
from grpo_jax.data.rows import MissingSplitError


class Source(NamedTuple):
    """One data set in files."""

    folder: str  # relative to $GRPO_JAX_DATA_DIR
    files: tuple[str, ...]  # patterns over {split} in `folder`; the first that matches is used
    columns: Mapping[str, str] = {}  # new column name -> name in the files
    derive: Callable[[Row], Row] | None = None  # returns columns to add to a row or to replace
    required: tuple[str, ...] = ()  # columns that rows must have, those that `derive` uses included


_JSON = ('{split}.jsonl', '{split}.jsonl.gz', '{split}.json')
_PARQUET = (
    '{split}.parquet',
    '{split}-*.parquet',
    'data/{split}-*.parquet',  # as on the Hugging Face hub
    '{split}/*.parquet',
)

SOURCES: Mapping[str, Source] = {
    'gsm8k': Source(
        'gsm8k', _JSON, {'solution': 'answer'}, answers.gsm8k, ('question', 'solution')
    ),
    'math': Source(
        'math',
        (*_JSON, '{split}/*/*.json'),
        {'question': 'problem'},
        answers.math,
        ('question', 'solution'),
    ),
    'cmath': Source('cmath', _JSON, {'answer': 'golden'}, answers.cmath, ('question', 'answer')),
    'svamp': Source(
        'svamp', _JSON, {'answer': 'Answer'}, answers.svamp, ('Body', 'Question', 'answer')
    ),
    'mawps': Source(
        'mawps',
        _JSON,
        {'question': 'input', 'answer': 'target'},
        answers.mawps,
        ('question', 'answer'),
    ),
    'humaneval': Source(
        'humaneval',
        ('HumanEval.jsonl.gz', 'HumanEval.jsonl'),
        {'question': 'prompt', 'solution': 'canonical_solution'},
        programs.humaneval,
        ('question', 'solution', 'entry_point', 'test'),
    ),
    'mbpp': Source('mbpp', (*_JSON, *_PARQUET), {}, programs.mbpp, ('code', 'test_list')),
    'apps': Source('apps', (*_JSON, *_PARQUET), {}, programs.apps, ('question', 'input_output')),
    'livecodebench': Source(
        'livecodebench',
        (*_JSON, *_PARQUET),
        {'question': 'question_content'},
        programs.livecodebench,
        ('question', 'public_test_cases', 'private_test_cases'),
    ),
    'jsonl': Source('', _JSON),
    'parquet': Source('', _PARQUET),
    'hf': Source('', (f'{{split}}/{SAVED_DATASET}', SAVED_DATASET, *_PARQUET)),
}


def find_files(
    source: Source, split: str, *, folder: str | os.PathLike[str] | None = None, file: str = ''
) -> tuple[pathlib.Path, ...]:
    """Find the files of one split, sorted by folder, then by number (2.json before 10.json).

    Args:
      source: data set.
      split: replaces `{split}` in the patterns.
      folder: replaces `source.folder`.
      file: a pattern that replaces `source.files`.

    Raises:
      MissingSplitError: no file matches.
      ValueError: GRPO_JAX_DATA_DIR is needed and not set.
    """
    root = os.environ.get('GRPO_JAX_DATA_DIR', '')
    folder = pathlib.Path(source.folder if folder is None else folder)
    patterns = [p.replace('{split}', split) for p in ([file] if file else source.files)]
    base = pathlib.Path(root, folder)
    if not root and not (base / patterns[0]).is_absolute():
        raise ValueError(
            'GRPO_JAX_DATA_DIR is not set: set it to the folder that contains '
            f'{folder / patterns[0]}'
        )
    for pattern in patterns:
        matches = [base / path for path in glob.glob(pattern, root_dir=base)]
        paths = sorted((path for path in matches if path.is_file()), key=_sort_key)
        if paths:
            return tuple(paths)
    others = f' (or {", ".join(patterns[1:])})' if patterns[1:] else ''
    raise MissingSplitError(
        f'{base / patterns[0]}: no such file: put it there, or set GRPO_JAX_DATA_DIR (now '
        f'{root!r}) to the folder that contains {folder / patterns[0]}{others}'
    )


def _sort_key(path: pathlib.Path) -> tuple[str, int, str]:
    return str(path.parent), int(path.stem) if path.stem.isdecimal() else 0, path.name
