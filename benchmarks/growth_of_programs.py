"""How the work and the memory of compiled programs grow with G, P, T and V.

    export JAX_DISABLE_MOST_OPTIMIZATIONS=1  # of machine code that nobody runs
    python -m benchmarks.growth_of_programs --output=runs/growth.json --picture=runs/growth.png
    python -m benchmarks.growth_of_programs --topology=v5e:1x1 --parts=completion

Nothing is run: `grpo_jax.run.plan` compiles the update and the sampler of a decoder with 2 layers
of width 128 for one device, and multiplies what a loop's body costs by its trips. Prints Markdown:

- group: G = 4 to 64 with a short and a long prompt. Their difference is what reading the prompt
  costs, and completions' attention to it, which is proportional to G.
- prompt: P = 128 to 4,096.
- completion: T = 128 to 32,768.
- vocabulary: V = 4k to 128k, with the logits of 16 positions at a time.
"""

import json
import pathlib
import tempfile
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict

from benchmarks import parts
from grpo_jax.run import config as grpo_config
from grpo_jax.run.plan import planning, topology

GROUPS, CHUNK = 2, 16  # prompts, of which one is a microbatch; positions with logits at a time
WIDTH, LAYERS = 128, 2
BASE = {'G': 16, 'P': 128, 'T': 128, 'V': 4096}
LONG = 4096
PARTS = {
    'group': [{'G': g, 'P': p} for g in (4, 16, 64) for p in (BASE['P'], LONG)],
    'prompt': [{'P': p} for p in (128, 1024, LONG)],
    'completion': [{'G': 4, 'T': t} for t in (128, 2048, 8192, 32_768)],
    'vocabulary': [{'V': v} for v in (4096, 32_768, 131_072)],
}
PROGRAMS = {
    'update': 'grpo: update',
    'prompts, first block': 'grpo: sampler, prompts and first block',
    'last block': 'grpo: sampler, block',
}

Row = dict[str, float]

_PARTS = flags.DEFINE_list('parts', list(PARTS), 'which of them')
_TOPOLOGY = flags.DEFINE_string('topology', 'local', 'of one device, as for grpo_jax.plan')
_OUTPUT = flags.DEFINE_string('output', '', 'JSON file')
_PICTURE = flags.DEFINE_string('picture', '', 'PNG file of all parts')


def main(arguments: list[str]) -> None:
    """Compiles the programs of the parts that the flags name."""
    parts.check(arguments, _PARTS.value, PARTS)
    devices = topology.find_topology(_TOPOLOGY.value)
    devices = devices._replace(devices=devices.devices[:1])
    known: dict[tuple[int, ...], Row] = {}
    rows: dict[str, list[Row]] = {}
    for part in _PARTS.value:
        print(f'\n{part}:\n')
        rows[part] = []
        for changes in PARTS[part]:
            sizes = BASE | changes
            key = tuple(sizes.values())
            if key not in known:
                known[key] = measure(sizes, devices)
            row: Row = {**sizes, **known[key]}
            parts.print_row(row, first=not rows[part], digits=5)
            rows[part].append(row)
    if _OUTPUT.value:
        pathlib.Path(_OUTPUT.value).write_text(json.dumps(rows, indent=2) + '\n')
    if _PICTURE.value:
        draw(rows, _PICTURE.value)


def measure(sizes: dict[str, int], devices: topology.Topology) -> Row:
    """GFLOPs, and MiB that are moved and of temporaries, of the programs of a run."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(sizes, pathlib.Path(folder))
        plan = planning.make_plan(config, devices, only=[*PROGRAMS.values()])
    found = {measured.program.kind: measured for measured in plan.measured}
    row: Row = {}
    for short, name in PROGRAMS.items():
        measured = found[name]
        row[f'{short}, GFLOPs'] = measured.costs.flops / 1e9
        row[f'{short}, MiB moved'] = measured.costs.bytes / 2**20
        row[f'{short}, MiB temporary'] = measured.memory['temporaries'] / 2**20
    return row


def config_of(sizes: dict[str, int], folder: pathlib.Path) -> ConfigDict:
    """A run with these sizes, of a described checkpoint with V tokens."""
    description = {
        'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'hidden_size': WIDTH,
        'intermediate_size': 4 * WIDTH, 'num_hidden_layers': LAYERS, 'num_attention_heads': 4,
        'num_key_value_heads': 2, 'vocab_size': sizes['V'], 'hidden_act': 'silu',
        'rms_norm_eps': 1e-6, 'rope_theta': 1e4, 'tie_word_embeddings': False,
        'max_position_embeddings': 2**17, 'bos_token_id': 0, 'eos_token_id': 1,
    }  # fmt: skip
    (folder / 'config.json').write_text(json.dumps(description))
    config = grpo_config.defaults()
    config.pretrained, config.tokenizer = str(folder), 'bytes'
    config.mesh.fsdp = 1
    config.sft.steps = 0
    config.data.update(
        name='arithmetic', heldout_split='', prompt_length=sizes['P'],
        completion_length=sizes['T'],
    )  # fmt: skip
    config.grpo.update(steps=1, batch_size=GROUPS, group_size=sizes['G'])
    config.grpo.algorithm.update(beta=0.04)
    config.grpo.compute.update(microbatch=1, widths=1, logprob_chunk=CHUNK)
    config.grpo.rewards = {'exact_answer': 1.0}
    return config


def draw(rows: dict[str, list[Row]], path: str) -> None:
    """A panel for each part."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 6.5), layout='constrained')
    for part, axis in zip(PARTS, axes.flat, strict=True):
        if part in rows:
            _DRAW[part](axis, rows[part])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc='upper left')
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_group(axis: Any, rows: list[Row]) -> None:
    for length in (BASE['P'], LONG):
        chosen = [row for row in rows if row['P'] == length]
        sizes, flops = ([row[name] for row in chosen] for name in ('G', 'update, GFLOPs'))
        axis.plot(sizes, flops, 'o-', label=f'update, P = {length:,}')
        if length == LONG:
            slope = (flops[-1] - flops[0]) / (sizes[-1] - sizes[0])
            start = flops[0] - sizes[0] * slope
            axis.axhline(start, linestyle=':', color='gray', label='its part without G')
    axis.set(xlabel='completions of a prompt, G', ylabel='GFLOPs', title='prompts are read once')
    axis.set_ylim(0)


def _draw_prompt(axis: Any, rows: list[Row]) -> None:
    for program in ('update', 'prompts, first block'):
        lengths, sizes = _columns(rows, 'P', f'{program}, MiB temporary')
        axis.loglog(lengths, sizes, 'o-', label=program)
    axis.loglog(lengths, [sizes[-1] * p / lengths[-1] for p in lengths], ':', label='linear in P')
    axis.minorticks_off()
    axis.set_xticks(lengths, [f'{p:,.0f}' for p in lengths])
    axis.set(xlabel='prompt tokens, P', ylabel='MiB temporary', title='prompt length')


def _draw_completion(axis: Any, rows: list[Row]) -> None:
    for program in ('update', 'last block'):
        axis.loglog(*_columns(rows, 'T', f'{program}, MiB temporary'), 'o-', label=program)
    lengths, last = _columns(rows, 'T', 'update, MiB temporary')
    axis.loglog(lengths, [last[-1] * t / lengths[-1] for t in lengths], ':', label='linear in T')
    axis.set(xlabel='completion tokens, T', ylabel='MiB temporary', title='completion length')


def _draw_vocabulary(axis: Any, rows: list[Row]) -> None:
    sizes, update = _columns(rows, 'V', 'update, MiB temporary')
    axis.loglog(sizes, update, 'o-', label='update')
    word = 4 / 2**20
    kept = [word * v * (WIDTH + BASE['G'] * CHUNK) for v in sizes]
    axis.loglog(sizes, kept, '--', label='output matrix, logits of a chunk')
    logits = [word * v * GROUPS * BASE['G'] * BASE['T'] for v in sizes]
    axis.loglog(sizes, logits, ':', label='all logits')
    axis.set(xlabel='tokens of the vocabulary, V', ylabel='MiB temporary', title='vocabulary')


def _columns(rows: list[Row], *names: str) -> list[list[float]]:
    return [[row[name] for row in rows] for name in names]


_DRAW = {
    'group': _draw_group,
    'prompt': _draw_prompt,
    'completion': _draw_completion,
    'vocabulary': _draw_vocabulary,
}

if __name__ == '__main__':
    app.run(main)
