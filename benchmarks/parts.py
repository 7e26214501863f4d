"""The parts of a benchmark that its flag `--parts` names, and their tables."""

from collections.abc import Collection, Mapping, Sequence

from absl import app


def check(arguments: Sequence[str], parts: Sequence[str], known: Collection[str]) -> None:
    """Raises UsageError for arguments that are no flags, and for unknown parts."""
    if arguments[1:]:
        raise app.UsageError(f'unexpected arguments: {arguments[1:]}')
    if [part for part in parts if part not in known]:
        raise app.UsageError(f'--parts={",".join(parts)} is unknown: use {", ".join(known)}')


def print_row(row: Mapping[str, float | str], *, first: bool, digits: int = 4) -> None:
    """Prints a row of a Markdown table, after the names of the columns if it is the first."""
    if first:
        print('| ' + ' | '.join(row) + ' |\n|' + '---|' * len(row))
    cells = (x if isinstance(x, str) else f'{x:.{digits}g}' for x in row.values())
    print('| ' + ' | '.join(cells) + ' |', flush=True)
