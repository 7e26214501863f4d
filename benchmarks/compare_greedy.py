"""Compares an evaluated run's greedy completions with those of `transformers` from its export.

    python benchmarks/compare_greedy.py --workdir=runs/gsm8k --export=runs/gsm8k-trained

Reads the prompts and completions of `evaluation.jsonl` and generates for the same prompts in
PyTorch, one at a time. Needs `pip install -e '.[parity]'`.
"""

import json
import pathlib
from typing import Any

import torch
import transformers
from absl import app, flags

WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the run', required=True)
EXPORT = flags.DEFINE_string('export', None, 'folder that was exported', required=True)
ROWS = flags.DEFINE_integer('rows', 100, 'how many completions to compare')


def main(arguments: list[str]) -> None:
    """Generates and compares."""
    if arguments[1:]:
        raise app.UsageError(f'unexpected arguments: {arguments[1:]}')
    data = json.loads(pathlib.Path(WORKDIR.value, 'config.json').read_text())['data']
    if data['chat'] or data['stops']:
        raise app.UsageError('a run with data.chat or data.stops cannot be compared from its texts')
    lines = pathlib.Path(WORKDIR.value, 'evaluation.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines[: ROWS.value]]
    tokenizer = transformers.AutoTokenizer.from_pretrained(EXPORT.value)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model: Any = load(EXPORT.value, dtype=torch.float32)
    same = 0
    for row in rows:
        asked = tokenizer(row['prompt'], return_tensors='pt')
        with torch.no_grad():
            tokens = model.generate(
                **asked, do_sample=False, max_new_tokens=data['completion_length']
            )
        new = tokens[0, asked.input_ids.shape[1] :]
        written = tokenizer.decode(new, skip_special_tokens=True)
        same += written == row['completion']
    print(f'{same} of {len(rows)} greedy completions are identical in transformers')


if __name__ == '__main__':
    app.run(main)
