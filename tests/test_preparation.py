"""All that is wrong with a run is told at once, before anything is compiled."""

import importlib.util
import json

import pytest
import runs

from grpo_jax import evaluate, export, train
from grpo_jax.run import saved_config
from grpo_jax.run.config import defaults
from grpo_jax.run.errors import ConfigError

HEAD = ('from grpo_jax.run.config import defaults', 'def get_config():', '  c = defaults()')


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """50 rows to train on and 8 held out, in files."""
    monkeypatch.setenv('GRPO_JAX_DATA_DIR', str(tmp_path))
    (tmp_path / 'sums').mkdir()
    for split, start, stop in (('train', 0, 50), ('test', 100, 108)):
        lines = [{'question': f'{n}+1=', 'answer': str(n + 1)} for n in range(start, stop)]
        text = ''.join(json.dumps(line) + '\n' for line in lines)
        (tmp_path / 'sums' / f'{split}.jsonl').write_text(text)
    return tmp_path


def config_of_rows():
    config = defaults()
    config.model.update(width=32, layers=2, head_dim=8, mlp_width=64)
    config.data.update(name='jsonl', options={'folder': 'sums'}, prompt_length=8)
    config.data.demonstration = '{answer}'
    config.grpo.update(rewards={'math_answer': 1.0}, batch_size=4)
    config.eval.update(correct='math_answer', samples=0)
    return config


def problems_of(config, workdir):
    with pytest.raises(ConfigError) as error:
        train.train(config, str(workdir))
    return list(error.value.problems)


def assert_begin(problems, *beginnings):
    assert [text[: len(b)] for text, b in zip(problems, beginnings, strict=False)] == [*beginnings]
    assert len(problems) == len(beginnings)


def printed_by(command, monkeypatch, capsys, *arguments):
    monkeypatch.setattr('sys.argv', ['command', *arguments])
    with pytest.raises(SystemExit) as stopped:
        command.run()
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    return [line.removeprefix('error: ') for line in lines if line.startswith('error: ')]


def test_one_run_of_the_command_lists_everything(rows, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, 'find_spec', lambda name, *a: None if name == 'wandb' else find(name, *a)
    )
    path = rows / 'mine.py'
    lines = (
        'c.grpo.stepz = 3',
        'c.gpro.group_size = 4',
        "c.seed = 'zero'",
        'c.eval.every = 0',
        "c.log.to = ('wandb', 'no_module:log')",
        'c.model.update(heads=3, kv_heads=2)',
        "c.data.update(name='jsonl', prompt='{problem}')",
        "c.data.options = {'folder': 'sums', 'shuffle': True, 'shards': 2}",
        'c.grpo.batch_size = 5000',
        'c.sft.update(steps=2, batch_size=6000)',
        'c.grpo.algorithm.update(tau_positive=2.0, lam=0.5)',
        "c.grpo.rewards = {'exact_anwser': 1.0, 'chain_formt': 1.0, 'math_answer': 1.0}",
        "c.eval.update(correct='rigth', extract='extract_maths', k=(1, 99))",
    )
    path.write_text('\n'.join((*HEAD, *(f'  {line}' for line in lines), '  return c')))
    given = (f'--config={path}', f'--workdir={rows}/run', '--config.lr=3', '--config.sft.steps=x')
    assert_begin(
        printed_by(train, monkeypatch, capsys, *given),
        f"--config={path}: unknown config key 'grpo.stepz': did you mean 'grpo.steps'?",
        f"--config={path}: unknown config key 'gpro': did you mean 'grpo'?",
        f"--config={path}: config key 'seed' is 'zero': give a value of type int",
        "unknown config key 'lr': did you mean ",
        '--config.sft.steps=x: invalid literal',
        'eval.every=0 is out of range: make it at least 1',
        'eval.k=99 needs at least 99 samples: eval.samples=8',
        "unknown extractor 'extract_maths', did you mean 'extract_math'?",
        "unknown reward 'rigth', did you mean ",
        "log.to names 'wandb', which is not installed: pip install wandb",
        "log.to: 'no_module:log': importing no_module raised",
        "grpo.algorithm.tau_positive=2.0 has no effect with loss='clipped': remove it",
        "grpo.algorithm.lam=0.5 has no effect with baseline='mean': remove it",
        "unknown reward 'chain_formt', did you mean 'chain_format'?",
        "unknown reward 'exact_anwser', did you mean 'exact_answer'?",
        'model.heads=3 is not a multiple of kv_heads=2: make it one',
        "data.options.shards=2: jsonl has no option 'shards': it has folder, file, ",
        "data.options.shuffle=True: jsonl has no option 'shuffle': it has folder, file, ",
        "data.prompt: template '{problem}' does not fit the data ",
        "sft.batch_size is 6000: make it 1 to 50, the usable rows of the split 'train'",
        "grpo.batch_size is 5000: make it 1 to 50, the usable rows of the split 'train'",
        "data.demonstration: template '{demonstration}' does not fit the data ",
    )
    assert not (rows / 'run').exists()


def test_each_stage_has_its_own_batch(rows):
    config = config_of_rows()
    config.sft.update(steps=1, batch_size=77)
    config.grpo.batch_size = 99
    config.reward_model.update(weight=1.0, steps=2, batch_size=88)
    found = problems_of(config, rows / 'run')
    assert sorted(text.split()[0] for text in found) == [
        'grpo.batch_size', 'reward_model.batch_size', 'sft.batch_size',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ('key', 'value', 'beginning'),
    [
        ('tokenizer', '/no/folder', "tokenizer '/no/folder' cannot be loaded"),
        ('pretrained', '/no/folder', "pretrained='/no/folder' is neither a folder nor"),
        ('start', '/no/folder:sft', "start='/no/folder:sft': /no/folder/config.json does not"),
    ],
)
def test_without_tokens_the_rows_are_checked(key, value, beginning, rows):
    """The lengths of prompts are not told of, since they would be those of another tokenizer."""
    config = config_of_rows()
    config[key] = value
    config.model.heads = 3
    config.data.update(prompt='{problem}', prompt_length=1)
    config.grpo.update(batch_size=51, rewards={'countdown_answer': 1.0})
    assert_begin(
        problems_of(config, rows / 'run'),
        beginning,
        'model.heads=3 is not a multiple of kv_heads=2',
        "data.prompt: template '{problem}' does not fit the data",
        'grpo.batch_size is 51: make it 1 to 50',
        "reward 'countdown_answer' needs 'numbers', which is not a column",
    )


def test_lengths_and_columns(rows):
    config = config_of_rows()
    config.sft.update(steps=1, batch_size=4)
    config.data.update(prompt_length=1, completion_length=1)
    config.grpo.rewards = {'countdown_answer': 1.0, 'math_answer': 1.0}
    config.eval.correct = 'countdown_answer'
    found = problems_of(config, rows / 'run')
    assert_begin(
        found,
        'all 8 prompts are longer than prompt_length=1 tokens: raise it',
        'all 50 completions are longer than completion_length=1 tokens: raise it',
        "reward 'countdown_answer' needs 'numbers'",
        "reward 'eval.correct' needs 'numbers'",
    )


def test_options_of_generated_data(tmp_path):
    """Without its train_size more problems are asked for than there are, which is not told of."""
    config = runs.get_config()
    config.data.options.update(train_size=0, mistakes=9.0, sizes=3)
    config.data.cache_dir = str(tmp_path / 'cache')
    config.grpo.drop = ('short', 'wrong', 'long')
    assert_begin(
        problems_of(config, tmp_path / 'run'),
        "grpo.drop names 'short'",
        "grpo.drop names 'long'",
        "data.options.sizes=3: arithmetic has no option 'sizes': it has train_size, ",
        'data.options.train_size=0: arithmetic: train_size is 0: make it at least 1',
        'data.options.mistakes=9.0: arithmetic: mistakes is 9.0: make it between 0 and 1',
    )


def test_both_splits(cache, tmp_path):
    config = runs.get_config()
    config.data.update(train_split='trian', heldout_split='tset', cache_dir=cache)
    config.grpo.batch_size = 92
    assert_begin(
        problems_of(config, tmp_path / 'run'),
        "data.heldout_split='tset': arithmetic has no split 'tset': choose train or test",
        "data.train_split='trian': arithmetic has no split 'trian': choose train or test",
        "grpo.batch_size is 92: make it 1 to 90, the usable rows of the split 'train'",
    )


def test_a_folder_of_another_run_beside_other_problems(tmp_path):
    folder = tmp_path / 'checkpoints' / 'grpo' / '3'
    folder.mkdir(parents=True)
    (tmp_path / 'config.json').write_text(saved_config.to_json(runs.get_config()))
    config = runs.get_config()
    config.seed = 1
    config.data.prompt = '{q}'
    config.eval.every = 0
    assert_begin(
        problems_of(config, tmp_path),
        f"workdir '{tmp_path}' holds the run of another config",
        'eval.every=0 is out of range',
        "data.prompt: template '{q}' does not fit the data",
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoints', 'config.json']


def test_evaluate_and_export_list_everything(rows, monkeypatch, capsys):
    workdir = rows / 'run'
    workdir.mkdir()
    (workdir / 'config.json').write_text(saved_config.to_json(config_of_rows()))
    (rows / 'full').mkdir()
    (rows / 'full' / 'file').touch()
    options = '--config.data.options={"folder": "sums", "shuffle": 1}'
    wrong = ('--config.data.prompt={q}', '--config.eval.correct=countdown_answer', options)
    expected = (
        'data.options.shuffle=1: jsonl has no option',
        "data.prompt: template '{q}' does not fit the data",
        "reward 'eval.correct' needs 'numbers'",
    )
    run = f'--workdir={workdir}'
    found = printed_by(
        evaluate, monkeypatch, capsys, run, *wrong, '--config.eval.batch_size=0', '--checkpoint=x'
    )
    assert_begin(
        found, f'{workdir} holds no checkpoint', 'eval.batch_size=0 is out of range', *expected
    )
    found = printed_by(evaluate, monkeypatch, capsys, run, *wrong, '--config.eval.evry=3')
    assert_begin(found, "unknown config key 'eval.evry'", *expected)
    found = printed_by(
        export, monkeypatch, capsys, run, f'--output={rows}/full', '--dtype=int3',
        '--config.model.dtype=float99',
    )  # fmt: skip
    assert_begin(
        found,
        "model.dtype='float99' is unknown",
        f'{workdir} holds no checkpoint',
        f'--output={rows}/full is not empty',
        '--dtype=int3: use one of',
    )
