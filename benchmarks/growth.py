"""How a step grows with the group, the prompt and the vocabulary.

    python -m benchmarks.growth
    python -m benchmarks.growth --parts=prompt --output=runs/growth.json

Uses a decoder with 2 layers of width 128, so that it takes only minutes on two cores. Prints
Markdown:

- group: seconds per completion for G = 4 to 64 of a prompt of 512 tokens, which all of them share.
- prompt: seconds of a step for prompts of 64 to 2048 tokens, next to the same programs where each
  completion has a copy of its prompt.
- vocabulary: temporary memory of the compiled programs for V = 4k to 128k, next to the head's
  weights and the logits of one chunk (update) or one column (sample).
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterator

import numpy as np
from absl import app, flags

from benchmarks import parts, timing
from benchmarks.ours import Ours, parse_options
from benchmarks.workloads import Shape, Workload

SMALL = Shape(width=128, layers=2, heads=4, kv_heads=2, mlp_width=512)
CHUNK = 16  # completion positions whose logits the update has at a time, in `vocabulary`
NAIVE_ROWS = 4  # completions per gradient where each has its own prompt, to bound the memory

Row = dict[str, float]

PARTS = flags.DEFINE_list('parts', ['group', 'prompt', 'vocabulary'], 'which of them')
OUTPUT = flags.DEFINE_string('output', '', 'JSON file')
STEPS = flags.DEFINE_integer('steps', 3, 'measured steps of each size')


def main(arguments: list[str]) -> None:
    """Measures the parts that the flags name."""
    growths = {'group': group, 'prompt': prompt, 'vocabulary': vocabulary}
    parts.check(arguments, PARTS.value, growths)
    rows: dict[str, list[Row]] = {}
    for part in PARTS.value:
        print(f'\n{part}:\n')
        rows[part] = []
        for row in growths[part]():
            parts.print_row(row, first=not rows[part])
            rows[part].append(row)
    if OUTPUT.value:
        pathlib.Path(OUTPUT.value).write_text(json.dumps(rows, indent=2) + '\n')


def group() -> Iterator[Row]:
    """Time per completion against G, one group."""
    for size in (4, 8, 16, 32, 64):
        seconds = time_steps(Workload(1, size, 512, 64, shape=SMALL))
        milliseconds = {f'{name} ms per completion': s / size * 1e3 for name, s in seconds.items()}
        yield {'G': size, **milliseconds}


def prompt() -> Iterator[Row]:
    """Time of a step against P, the prompt shared by its group or copied for each completion."""
    for length in (64, 512, 2048):
        shared = Workload(1, 16, length, 64, shape=SMALL)
        copied = dataclasses.replace(shared, groups=shared.rows, group_size=1)
        ours = time_steps(shared)
        naive = time_steps(copied, 'baseline=none', 'scale=none', f'microbatch={NAIVE_ROWS}')
        row: Row = {'P': length}
        for name in ours:
            row |= {
                f'{name} s': ours[name],
                f'{name} s, copied': naive[name],
                f'{name}, times': naive[name] / ours[name],
            }
        yield row


def vocabulary() -> Iterator[Row]:
    """Temporary memory against V; the last columns say how much of its growth is explained."""
    first: Row = {}
    for size in (4096, 32_768, 131_072):
        shape = dataclasses.replace(SMALL, vocab_size=size)
        workload = Workload(4, 8, 64, 64, shape=shape)
        # No completion ends early.
        options = parse_options(['microbatch=1', f'logprob_chunk={CHUNK}', 'widths=1'])
        temporaries = Ours(workload, options).temporaries()
        head, word = 4 * size * shape.width, 4 * size
        needs = {
            'head MiB': head,
            'logits of a chunk MiB': word * workload.group_size * CHUNK,
            'logits of a column MiB': word * workload.rows,
            'all logits MiB': word * workload.rows * workload.completion,
            'update MiB': temporaries['update'],
            'sample MiB': temporaries['sample'],
        }
        row: Row = {'V': size} | {name: count / 2**20 for name, count in needs.items()}
        first = first or dict(row)
        grown = {name: row[name] - first[name] for name in needs}
        for name, logits in (('update', 'chunk'), ('sample', 'column')):
            explained = grown['head MiB'] + grown[f'logits of a {logits} MiB']
            ratio = grown[f'{name} MiB'] / explained if explained else 0.0
            row[f'growth of {name} / (head + {logits})'] = ratio
        yield row


def time_steps(workload: Workload, *options: str) -> dict[str, float]:
    """Median seconds of sample, update and the whole step over a few steps."""
    ours, clock = Ours(workload, parse_options(options)), timing.Clock()
    for k in range(1 + STEPS.value):
        ours.step(clock, k)
    return {
        phase: float(np.median([step[phase] for step in clock.steps[1:]]))
        for phase in ('sample', 'update', 'step')
    }


if __name__ == '__main__':
    app.run(main)
