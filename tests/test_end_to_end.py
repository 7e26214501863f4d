"""The README's way, command by command: from a folder to a folder that transformers agrees with."""

import json
import os
import pathlib

import folders
import pytest
import runs
import tiny
from absl import flags

from configs import arithmetic
from grpo_jax import evaluate, export, train
from grpo_jax.run import setup

torch = pytest.importorskip('torch', reason='PyTorch is the reference for checkpoints')

from benchmarks import compare_greedy, make_checkpoint  # noqa: E402  they import PyTorch


@pytest.fixture
def command(monkeypatch, capfd):
    """Runs a command with its arguments; returns what it printed."""

    def run(function, **options):
        arguments = [f'--{name.replace("__", ".")}={value}' for name, value in options.items()]
        monkeypatch.setattr('sys.argv', ['command', *arguments])
        with runs.compiled_once():
            function()
        return capfd.readouterr().out

    torch.set_num_threads(1)
    return run


def benchmark(module, **options):
    """A benchmark in this process, where the flags of all of them are known."""
    required = {'output': '-', 'workdir': '-', 'export': '-'} | options
    flags.FLAGS(['benchmark', *(f'--{name}={value}' for name, value in required.items())])
    try:
        module.main(['benchmark'])
    finally:
        flags.FLAGS.unparse_flags()


@pytest.mark.slow
def test_gsm8k_from_folder_to_folder(tmp_path, command, capfd):
    folder = pathlib.Path(os.environ.get('GRPO_JAX_DATA_DIR', ''))
    if not (folder / 'gsm8k' / 'train.jsonl').is_file():
        pytest.skip('GRPO_JAX_DATA_DIR names no folder with gsm8k/train.jsonl')
    source, workdir, out = tmp_path / 'source', tmp_path / 'run', tmp_path / 'trained'
    benchmark(make_checkpoint, output=source, vocabulary=1000, width=32, layers=1)
    printed = command(
        train.run,
        config=pathlib.Path(runs.__file__).parents[1] / 'configs' / 'gsm8k_checkpoint.py',
        workdir=workdir,
        config__pretrained=source,
        config__data__train_split='train[:300]',
        config__data__heldout_split='test[:16]',
        config__data__demonstration=' #### {answer}',
        config__data__prompt_length=128,
        config__data__completion_length=16,
        config__sft__steps=60,
        config__sft__optimizer__learning_rate=1e-2,
        config__sft__optimizer__warmup_steps=5,
        config__grpo__steps=2,
        config__eval__batch_size=16,
    )
    assert 'held-out accuracy: ' in printed
    steps = [(row['stage'], row['step']) for row in runs.lines(workdir / 'metrics.jsonl')]
    assert steps == [('sft', k) for k in range(60)] + [('grpo', 0), ('grpo', 1)]
    found = json.loads(command(evaluate.run, workdir=workdir))
    assert found['checkpoint'] == 'grpo/2'
    assert found['problems'] > 8
    heldout = runs.lines(workdir / 'heldout.jsonl')[-1]
    assert found['eval/accuracy'] == heldout['metrics']['eval/accuracy']
    rows = runs.lines(workdir / 'evaluation.jsonl')
    assert [row['completion'] for row in rows] == heldout['completions']
    assert sum(' #### ' in row['completion'] for row in rows) > len(rows) / 2  # it has learned that
    assert command(export.run, workdir=workdir, output=out).startswith('grpo/2: ')
    assert same_completions(workdir, out, capfd) == len(rows)
    with pytest.raises(AssertionError):  # before training they are others
        same_completions(workdir, source, capfd)


def same_completions(workdir, out, capfd):
    """How many there are, all of them identical in transformers."""
    benchmark(compare_greedy, workdir=workdir, export=out)
    same, _, count, *rest = capfd.readouterr().out.split()
    assert ' '.join(rest) == 'greedy completions are identical in transformers'
    assert same == count
    return int(count)


def test_a_run_from_scratch_in_transformers(tmp_path, command, capfd):
    """The byte tokenizer too: the same ids, and the same end."""
    import transformers

    config = arithmetic.get_config()
    config.data.options.update(train_size=40, test_size=12)
    config.data.cache_dir = str(tmp_path / 'cache')
    config.eval.update(samples=0)
    prepared = setup.prepare(config, tmp_path / 'run')
    params = tiny.make_params(prepared.model)
    folders.pretend(config, tmp_path / 'run', params)
    found = json.loads(command(evaluate.run, workdir=tmp_path / 'run'))
    assert found['problems'] == 12
    command(export.run, workdir=tmp_path / 'run', output=tmp_path / 'out')
    assert same_completions(tmp_path / 'run', tmp_path / 'out', capfd) == 12
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
    rows = runs.lines(tmp_path / 'run' / 'evaluation.jsonl')
    assert len({row['completion'] for row in rows}) > 3
    for row in rows:
        assert tokenizer(row['prompt']).input_ids == list(row['prompt'].encode())
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == (257, 256, 258)
