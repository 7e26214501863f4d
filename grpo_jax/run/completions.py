"""Grades completions that were produced elsewhere, without a model and without JAX.

python -m grpo_jax.evaluate --completions=FILE.jsonl --dataset=gsm8k [--k=1,4,8] [--output=FILE]

Each line of the file is a JSON object:
  answer       the reference: a final answer or a worked solution as in the data set's files
  completions  a list of texts, at least one
  scores       optional list of numbers, one for each completion, for rm@k
Other fields are ignored. Either all lines have scores or none has.

Prints one JSON object: `accuracy` (the mean over all completions), `pass@k`, `maj@k` and `rm@k`
(see `statistics`), each with the ends of its 95 % interval over rows in `<name>/low` and
`<name>/high`, `rows`, `completions`, `no_answer` (completions without an answer), `timeouts`
(comparisons that did not end in time and count as wrong) and `grades`, the path of a file. That
file has for each line and completion the `extracted` answer, the class of equivalent answers that
it `votes` for, and whether it is `correct`.
"""

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from tqdm import tqdm

from grpo_jax import rewards
from grpo_jax.rewards import DATASETS
from grpo_jax.run.output_file import replaced
from grpo_jax.run.statistics import maj_at_k, pass_at_k, rm_at_k, with_intervals

CHUNK = 256  # rows graded between two updates of the progress bar


class GradedRows(NamedTuple):
    """Grades of the completions of every row."""

    extracted: list[list[str | None]]  # answers, None where a completion has none
    votes: list[list[int | None]]  # equal in a row where the answers are equivalent
    correct: list[list[bool]]
    timeouts: int


class Row(NamedTuple):
    """One line of the file."""

    line: int  # the first is 1
    answer: str
    completions: list[str]
    scores: list[float] | None


def main(arguments: Sequence[str]) -> None:
    """Run the command: print the estimates and write the grades.

    Raises:
      ValueError: arguments or a file that the user has to fix.
      OSError: a file that cannot be read or written.
    """
    options = _parse(arguments)
    source = pathlib.Path(options.completions)
    output = pathlib.Path(options.output or source.with_suffix('.grades.jsonl'))
    if output.exists() and source.exists() and output.samefile(source):
        raise ValueError(f'--output={output} is the file of completions: name another')
    if not source.is_file():
        raise ValueError(f'--completions={source}: no such file: name a file of JSON lines')
    rows = read(source)
    sizes = _sizes(rows, options.k)
    _check_references(source, options.dataset, rows)
    with replaced(output) as file:
        graded = grade(options.dataset, rows)
        for row, *grades in zip(rows, *graded[:3], strict=True):
            record = {'line': row.line, 'answer': row.answer}
            record |= zip(graded._fields, grades, strict=False)
            file.write(json.dumps(record, ensure_ascii=False) + '\n')
    print(json.dumps(estimate(rows, graded, sizes) | {'grades': str(output)}))


def read(path: pathlib.Path) -> list[Row]:
    """Read the rows of a file of completions; blank lines are skipped.

    Raises:
      ValueError: a line that does not have the format above; names file and line.
    """
    rows: list[Row] = []
    with path.open('rb') as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = _row(number, json.loads(line), line)
                    if rows and (row.scores is None) != (rows[0].scores is None):
                        here, first = (
                            ('no scores', 'some') if rows[0].scores else ('scores', 'none')
                        )
                        raise ValueError(f'has {here}, but line {rows[0].line} has {first}')
                except (ValueError, RecursionError, OverflowError) as error:
                    raise ValueError(f'{path}, line {number}: {error}') from error
                rows.append(row)
    if not rows:
        raise ValueError(f'{path} has no rows')
    return rows


def grade(dataset: str, rows: Sequence[Row]) -> GradedRows:
    """Grade all completions, with a progress bar on a terminal."""
    graded = GradedRows([], [], [], 0)
    total = sum(len(row.completions) for row in rows)
    with tqdm(total=total, desc=dataset, disable=None) as bar:
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            grades = rewards.grade_answers(
                dataset, [row.answer for row in chunk], [row.completions for row in chunk]
            )
            votes = [rewards.equivalence_classes(answers) for answers in grades.extracted]
            graded = GradedRows(
                graded.extracted + grades.extracted,
                graded.votes + votes,
                graded.correct + grades.correct,
                graded.timeouts + grades.timeouts,
            )
            bar.update(sum(len(row.completions) for row in chunk))
    return graded


def estimate(rows: Sequence[Row], graded: GradedRows, sizes: Sequence[int]) -> dict[str, float]:
    """Return the metrics that the command prints, with k from `sizes`."""
    correct, counts = graded.correct, [len(row.completions) for row in rows]
    values = {'accuracy': [sum(group) / len(group) for group in correct]}
    for k in sizes:
        values[f'pass@{k}'] = [pass_at_k(len(group), sum(group), k) for group in correct]
        values[f'maj@{k}'] = [
            maj_at_k(*pair, k) for pair in zip(graded.votes, correct, strict=True)
        ]
        if rows[0].scores is not None:
            values[f'rm@{k}'] = [
                rm_at_k(row.scores or [], group, k)
                for row, group in zip(rows, correct, strict=True)
            ]
    return {
        'rows': len(rows),
        'completions': sum(counts),
        **with_intervals(values, weights={'accuracy': counts}),
        'no_answer': sum(answer is None for group in graded.extracted for answer in group),
        'timeouts': graded.timeouts,
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:  # argparse would print its usage as well
        raise ValueError(f'{message}; --help shows the arguments')


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in ('completions', 'dataset'):
        parser.add_argument(f'--{name}', required=True)
    for name in ('k', 'output'):
        parser.add_argument(f'--{name}', default='')
    options = parser.parse_args(arguments)
    if options.dataset not in DATASETS:
        raise ValueError(
            f'unknown data set --dataset={options.dataset}: known are {", ".join(DATASETS)}'
        )
    return options


def _check_references(path: pathlib.Path, dataset: str, rows: Sequence[Row]) -> None:
    """Raise ValueError for an answer that no completion can be compared with."""
    for row in rows:
        try:
            rewards.grade_answers(dataset, [row.answer], [[]])
        except ValueError as error:
            raise ValueError(f"{path}, line {row.line}: 'answer': {error}") from error


def _sizes(rows: Sequence[Row], text: str) -> list[int]:
    """Return the values of k in `text`, or the powers of two up to the shortest row."""
    shortest = min(rows, key=lambda row: len(row.completions))
    most = len(shortest.completions)
    if not text:
        return [2**i for i in range(most.bit_length())]
    try:
        sizes = sorted({int(part) for part in text.strip('()').split(',') if part.strip()})
    except ValueError:
        sizes = []
    if not sizes or sizes[0] < 1:
        raise ValueError(f'--k={text}: give positive whole numbers, as in --k=1,4,8')
    if sizes[-1] > most:
        raise ValueError(
            f'--k={text}: line {shortest.line} has {most} completions, so k is at most {most}'
        )
    return sizes


def _row(number: int, fields: Any, line: bytes) -> Row:
    if not isinstance(fields, dict):
        raise ValueError('is not a JSON object')
    for name in ('answer', 'completions'):
        if name not in fields:
            raise ValueError(f'has no {name!r}, only {", ".join(map(repr, fields)) or "nothing"}')
    answer, texts, scores = (fields.get(name) for name in ('answer', 'completions', 'scores'))
    if not isinstance(answer, str) and not _finite(answer):
        raise ValueError(f"'answer' is {_short(answer)}: give a text or a number")
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise ValueError(f"'completions' is {_short(texts)}: give a list of texts")
    if scores is not None:
        if not isinstance(scores, list) or len(scores) != len(texts):
            raise ValueError(f"'scores' is {_short(scores)}: give {len(texts)}, one per completion")
        wrong = next((i for i, score in enumerate(scores) if not _is_score(score)), None)
        if wrong is not None:
            raise ValueError(f"'scores'[{wrong}] is {_short(scores[wrong])}: give a finite number")
    if not isinstance(answer, str):  # a number, as the file spells it
        answer = json.loads(line, parse_float=str, parse_int=str)['answer']
    return Row(number, answer, texts, scores)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


def _is_score(value: Any) -> bool:
    return _finite(value) and abs(value) <= sys.float_info.max  # JSON has integers of any size


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f'{text[:57]}...'
