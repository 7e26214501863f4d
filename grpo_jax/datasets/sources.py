r"""The data sets that are read from files, as a table: where each lies and what its columns mean.

Every data set serves the text columns `question`, `answer` (the final answer alone) and `solution`
(worked text) as far as its files have them, and the other columns of the files under their names.
"""

import glob
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from grpo_jax.datasets.read import SAVED_DATASET, Row

_BRACE = re.compile(r'\\.|[{}]', re.DOTALL)
_BOX = re.compile(r'\\(?:boxed|fbox)(?![a-zA-Z])[ ]*')
_WHOLE = re.compile(r'(-?[0-9]+)\.0+')


class Source(NamedTuple):
    """One data set in files."""

    folder: str  # relative to $GRPO_JAX_DATA_DIR
    files: tuple[str, ...]  # patterns over {split}, relative to the folder; the first that fits
    columns: Mapping[str, str] = {}  # new name -> name in the files
    finish: Callable[[Row], Row] | None = None  # columns that replace or join those of a row
    required: tuple[str, ...] = ()  # columns that `finish` reads and those that rows must have


def gsm8k(row: Row) -> Row:
    """The number after the last `####` of the solution, without thousands separators."""
    _, marker, answer = row['solution'].rpartition('####')
    answer = answer.strip().replace(',', '')
    if not marker or not answer:
        raise ValueError("the solution has no '#### ' and a number at its end")
    return {'answer': answer}


def math(row: Row) -> Row:
    """What the solution boxes last, where the file has no column `answer`."""
    return {'answer': row['answer'] if 'answer' in row else boxed(row['solution'])}


def cmath(row: Row) -> Row:
    """The answer without white space around it."""
    return {'answer': row['answer'].strip()}


def svamp(row: Row) -> Row:
    """The story and what it asks, as one text, and the answer without `.0`.

    The story of some rows ends where a comma stood: `If he has 34 books` / `How many shelves...?`
    """
    story, ending = row['Body'].strip(), row['Question'].strip()
    if story.endswith(('.', '!', '?')):
        question = f'{story} {ending}'
    elif re.search(r'(^|[.!?]\s+)If\b[^.!?]*$', story):
        question = f'{story}, {ending[:1].lower()}{ending[1:]}'
    else:
        question = f'{story}. {ending}'
    return {'question': question, 'answer': number(row['answer'])}


def mawps(row: Row) -> Row:
    """The answer without `.0`."""
    return {'answer': number(row['answer'])}


def number(text: str) -> str:
    """A JSON number without the zeros of an integer: `145.0` becomes `145`."""
    try:
        float(text)
    except ValueError:
        raise ValueError(f'the answer {text!r} is not a number') from None
    whole = _WHOLE.fullmatch(text.strip())
    return whole[1] if whole else text.strip()


def boxed(text: str) -> str:
    r"""What the last `\boxed{...}` or `\fbox{...}` holds, its braces balanced.

    Without braces (`\boxed 5$`) that is the text up to the next dollar sign or end of line.
    Escaped braces, as in `\{1, 2\}`, are not counted.

    Raises:
        ValueError: there is none, it is empty, or its brace is never closed.
    """
    found = list(_BOX.finditer(text))
    if not found:
        raise ValueError(r'the solution has no \boxed{...}')
    rest = text[found[-1].end() :]
    content = _braced(rest) if rest.startswith('{') else re.split(r'[$\n]', rest)[0]
    if not content.strip():
        raise ValueError(r'the last \boxed{...} of the solution is empty')
    return content.strip()


def _braced(text: str) -> str:
    depth = 0
    for token in _BRACE.finditer(text):
        depth += {'{': 1, '}': -1}.get(token.group(), 0)
        if not depth:
            return text[1 : token.start()]
    raise ValueError(r'the brace of the last \boxed{...} of the solution is never closed')


_JSON = ('{split}.jsonl', '{split}.jsonl.gz', '{split}.json')
_PARQUET = (
    '{split}.parquet',
    '{split}-*.parquet',
    'data/{split}-*.parquet',  # as the Hugging Face hub stores them
    '{split}/*.parquet',
)

SOURCES = {
    'gsm8k': Source('gsm8k', _JSON, {'solution': 'answer'}, gsm8k, ('question', 'solution')),
    'math': Source(
        'math',
        (*_JSON, '{split}/*/*.json'),
        {'question': 'problem'},
        math,
        ('question', 'solution'),
    ),
    'cmath': Source('cmath', _JSON, {'answer': 'golden'}, cmath, ('question', 'answer')),
    'svamp': Source('svamp', _JSON, {'answer': 'Answer'}, svamp, ('Body', 'Question', 'answer')),
    'mawps': Source(
        'mawps', _JSON, {'question': 'input', 'answer': 'target'}, mawps, ('question', 'answer')
    ),
    'humaneval': Source(
        'humaneval',
        ('HumanEval.jsonl.gz', 'HumanEval.jsonl'),
        {'question': 'prompt', 'solution': 'canonical_solution'},
        None,
        ('question', 'solution', 'entry_point', 'test'),
    ),
    'jsonl': Source('', _JSON),
    'parquet': Source('', _PARQUET),
    'hf': Source('', (f'{{split}}/{SAVED_DATASET}', SAVED_DATASET, *_PARQUET)),
}


def find(
    source: Source, split: str, *, folder: str | os.PathLike[str] | None = None, file: str = ''
) -> tuple[pathlib.Path, ...]:
    """The files of one split, in their order.

    Args:
        source: the data set.
        split: fills `{split}` in the patterns.
        folder: in the place of the source's.
        file: a pattern in the place of the source's.

    Raises:
        ValueError: there are none.
    """
    root = os.environ.get('GRPO_JAX_DATA_DIR', '')
    inside = pathlib.Path(source.folder if folder is None else folder)
    patterns = [p.replace('{split}', split) for p in ([file] if file else source.files)]
    base = pathlib.Path(root, inside)
    if not root and not (base / patterns[0]).is_absolute():
        raise ValueError(
            'GRPO_JAX_DATA_DIR is not set: let it name the folder that holds '
            f'{inside / patterns[0]}'
        )
    for pattern in patterns:
        found = [base / path for path in glob.glob(pattern, root_dir=base)]
        paths = sorted((path for path in found if path.is_file()), key=_in_order)
        if paths:
            return tuple(paths)
    others = f' (nor {", ".join(patterns[1:])})' if patterns[1:] else ''
    raise ValueError(
        f'{base / patterns[0]}: no such file: put it there, or let GRPO_JAX_DATA_DIR (now '
        f'{root!r}) name the folder that holds {inside / patterns[0]}{others}'
    )


def _in_order(path: pathlib.Path) -> tuple[str, int, str]:
    """Folders by name; in a folder 2.json before 10.json."""
    return str(path.parent), int(path.stem) if path.stem.isdecimal() else 0, path.name
