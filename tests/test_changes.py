"""Resuming a run with another config, beginning from another run, and earlier checkpoints."""

import json
import pathlib
import shutil

import folders
import jax
import numpy as np
import pytest
import runs
import tiny

from grpo_jax import evaluate, export, models
from grpo_jax.run import arguments, changes, checkpoint, parameters, saved_config, setup, start
from grpo_jax.run import export as exports
from grpo_jax.run.config import defaults

STAGES = {'sft': [3, 5], 'grpo': [6, 8]}


def check(steps=STAGES, *, extend=False, override=False, **different):
    saved, config = runs.get_config(), runs.get_config()
    for path, value in different.items():
        section, _, name = path.rpartition('__')
        target = config
        for part in section.split('__'):
            target = target[part]
        target[name] = value
    folder = pathlib.Path('/runs/a')
    changes.check_changes(config, saved, folder, steps, extend=extend, override=override)


@pytest.mark.parametrize(
    ('different', 'flag'),
    [
        ({'grpo__steps': 12}, 'extend'),
        ({'grpo__steps': 12}, 'override'),
        ({'grpo__iterations': 2}, 'extend'),
        ({'grpo__optimizer__learning_rate': 1e-5}, 'override'),
        ({'eval__every': 2, 'log__completions': 3, 'checkpoint__keep': 5}, 'override'),
        ({'eval__correct': ''}, 'override'),
    ],
)
def test_changes_that_are_allowed(different, flag):
    with pytest.raises(ValueError, match=rf'; --{"extend|--override"} continues it'):
        check(**different)
    check(**different, **{flag: True})


@pytest.mark.parametrize(
    ('different', 'flags', 'message'),
    [
        ({'grpo__group_size': 8}, {'override': True}, r'group_size \(there 4, here 8\).*resume$'),
        ({'grpo__steps': 4}, {'extend': True}, 'steps .*; --override continues it with these'),
        ({'eval__every': 2}, {'extend': True}, '; --override continues it with these values'),
        ({'grpo__steps': 4}, {'override': True}, 'grpo.steps=4, but 8 steps have been done: make'),
        (
            {'sft__steps': 9}, {'extend': True},
            "sft.steps .* the stage 'grpo' has begun from its result: start another run with "
            "start='/runs/a:sft'",
        ),
    ],
)  # fmt: skip
def test_changes_that_are_refused(different, flags, message):
    with pytest.raises(ValueError, match=message):
        check(**different, **flags)


def test_sft_can_be_extended_before_grpo_has_begun():
    check({'sft': [3]}, extend=True, sft__steps=9)
    saved, config, folder = runs.get_config(), runs.get_config(), pathlib.Path('a')
    saved.grpo.iterations = 3
    steps = {'grpo': [8], 'grpo-2': [2]}
    with pytest.raises(ValueError, match='iterations=1, but iteration 2 has begun'):
        changes.check_changes(config, saved, folder, steps, override=True)


def test_an_extended_run_equals_a_longer_one(finished, tmp_path):
    """Five steps and then three more, as eight: everything but times, to the last bit."""
    config = runs.get_config()
    config.grpo.steps = 5
    shutil.copytree(finished / 'checkpoints' / 'sft', tmp_path / 'checkpoints' / 'sft')
    shutil.copy(finished / 'config.json', tmp_path / 'config.json')
    saved = saved_config.read(tmp_path / 'config.json')
    saved.grpo.steps = 5
    (tmp_path / 'config.json').write_text(saved_config.to_json(saved))
    for name in runs.FILES:
        rows = [row for row in (finished / name).read_text().splitlines() if '"sft"' in row]
        (tmp_path / name).write_text(''.join(f'{row}\n' for row in rows))
    runs.train(config, tmp_path)
    with pytest.raises(ValueError, match='--extend continues it for more steps'):
        runs.train(runs.get_config(), tmp_path)
    runs.train(runs.get_config(), tmp_path, extend=True)
    runs.assert_same_run(tmp_path, finished)
    assert runs.lines(tmp_path / 'changes.jsonl') == [
        {'stage': 'grpo', 'step': 5, 'changes': {'grpo.steps': {'from': 5, 'to': 8}}}
    ]
    # The new values are those of the run from now on.
    runs.train(runs.get_config(), tmp_path)
    # Another learning rate for one more step.
    config = runs.get_config()
    config.grpo.steps = 9
    config.grpo.optimizer.learning_rate = 0.5
    config.log.completions = 1
    runs.train(config, tmp_path, override=True)
    last = runs.lines(tmp_path / 'metrics.jsonl')[-1]
    assert (last['step'], last['learning_rate']) == (8, pytest.approx(0.5))
    record = runs.lines(tmp_path / 'changes.jsonl')[-1]
    assert (record['stage'], record['step']) == ('grpo', 8)
    assert record['changes'].keys() == {
        'grpo.steps', 'grpo.optimizer.learning_rate', 'log.completions',
    }  # fmt: skip


# Starting from another run


def test_the_start_of_another_run(finished, tmp_path):
    config = runs.get_config()
    config.sft.steps, config.grpo.steps = 0, 1
    config.start = f'{finished}:sft'
    resolved = start.with_start(config, str(tmp_path / 'run'))
    assert resolved.start == f'{finished}:sft/5'
    assert config.start == f'{finished}:sft'
    printed = runs.train(config, tmp_path / 'run')
    assert printed.splitlines()[0] == f'begins from {finished}:sft/5'
    saved = saved_config.read(tmp_path / 'run' / 'config.json')
    assert saved.start == f'{finished}:sft/5'
    first = runs.lines(tmp_path / 'run' / 'heldout.jsonl')[0]
    theirs = runs.lines(finished / 'heldout.jsonl')[0]  # of the same parameters, before GRPO
    assert first['completions'] == theirs['completions']
    prepared = setup.prepare(resolved, tmp_path / 'run')
    with checkpoint.open_manager(finished / 'checkpoints' / 'sft', keep=1) as manager:
        shapes = models.init_params
        shapes = jax.eval_shape(lambda: shapes(prepared.model, jax.random.key(0)))
        expected = checkpoint.restore_params(manager, shapes, prepared.mesh, 5)
    assert tiny.same(parameters.initial_params(prepared), expected)
    # The step is fixed with the run: it does not move when the other run goes on.
    assert start.with_start(config, str(tmp_path / 'run')).start == f'{finished}:sft/5'
    assert 'begins from' not in runs.train(config, tmp_path / 'run')  # resumed


def test_a_try_without_a_checkpoint_does_not_fix_the_step(finished, tmp_path):
    config = runs.get_config()
    config.start = f'{finished}:sft/4'  # which has been removed since
    checkpoint.claim_workdir(tmp_path, config)
    config.start = f'{finished}:sft'
    assert start.with_start(config, str(tmp_path)).start == f'{finished}:sft/5'


def test_the_model_is_that_of_the_other_run(finished):
    config = runs.get_config()
    other = config.copy_and_resolve_references()
    config.model = defaults().model
    config.start = f'{finished}:sft/3'
    resolved = start.with_start(config, '/nowhere')
    assert resolved.model == other.model


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'start': '{run}:sft/4'}, r'holds no checkpoint \'sft/4\': it has sft/3, sft/5, grpo/6'),
        ({'start': '{run}'}, "name a run and a stage of it, as in 'runs/a:sft'"),
        ({'start': '{run}/none:sft'}, 'none/config.json does not exist: name the folder of a run'),
        ({'model.width': 48}, r'start=.* has another model than this run: .* is \(.*\) there and'),
        ({'tokenizer': '{tokenizer}'}, 'has another tokenizer than this run: use tokenizer='),
    ],
)
def test_starts_that_do_not_fit(finished, tmp_path, change, message):
    folders.chat_tokenizer().save_pretrained(tmp_path / 'tokenizer')
    config = runs.get_config()
    config.start = f'{finished}:sft'
    for path, value in change.items():
        *sections, name = path.split('.')
        section = config
        for part in sections:
            section = section[part]
        if isinstance(value, str):
            value = value.format(run=finished, tokenizer=tmp_path / 'tokenizer')
        section[name] = value
    with pytest.raises(ValueError, match=message):
        runs.train(config, tmp_path / 'run')


# Earlier checkpoints


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('', ('grpo', 8)), ('grpo', ('grpo', 8)), ('sft', ('sft', 5)), ('sft/3', ('sft', 3)),
        ('6', ('grpo', 6)), ('3', ('sft', 3)),
    ],
)  # fmt: skip
def test_checkpoints_by_name(finished, name, expected):
    assert checkpoint.find_checkpoint(finished, ('sft', 'grpo'), name) == expected
    with pytest.raises(ValueError, match="no checkpoint 'grpo/3': it has sft/3, sft/5, grpo/6, gr"):
        checkpoint.find_checkpoint(finished, ('sft', 'grpo'), 'grpo/3')


def test_an_earlier_checkpoint_is_evaluated_and_exported(finished, tmp_path, monkeypatch, capsys):
    def command(module, *options):
        monkeypatch.setattr('sys.argv', ['command', f'-workdir={finished}', *options])
        with runs.compiled_once():
            module.run()
        return capsys.readouterr().out

    greedy = '--config.eval.samples=0'
    found = json.loads(command(evaluate, '--checkpoint=sft/5', greedy))
    first = runs.lines(finished / 'heldout.jsonl')[0]['metrics']
    assert (found['checkpoint'], found['eval/accuracy']) == ('sft/5', first['eval/accuracy'])
    newest = json.loads(command(evaluate, greedy))
    assert newest['checkpoint'] == 'grpo/8'
    fewer = json.loads(command(evaluate, '-config.eval.samples=2'))
    assert {name for name in fewer if '@' in name and '/' not in name[5:]} == {
        'eval/avg@2', 'eval/pass@1', 'eval/maj@1',
    }  # fmt: skip
    printed = command(export, '-checkpoint=sft', f'-output={tmp_path}/sft')
    assert printed.startswith('sft/5: ')


def test_another_data_set_has_options_of_its_own(finished, tmp_path, monkeypatch, capsys):
    rows = [{'question': f'{i}+1=', 'answer': str(i + 1)} for i in range(4)]
    (tmp_path / 'test.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    monkeypatch.chdir(tmp_path)
    options = ('--data=jsonl', "--config.data.options={'folder': '.'}", '--config.eval.samples=0')
    monkeypatch.setattr('sys.argv', ['evaluate', f'--workdir={finished}', *options])
    with runs.compiled_once():
        evaluate.run()
    assert json.loads(capsys.readouterr().out)['problems'] == 4
    config, _ = arguments.parse([f'--workdir={finished}', '--config.data.name=svamp'], saved=True)
    assert config.data.options.to_dict() == {}
    assert (config.data.train_split, config.data.heldout_split) == ('train', 'test')


# Adapters


@pytest.mark.slow
def test_merged_and_adapter_exports_of_a_trained_run_agree(tmp_path, monkeypatch):
    """W + alpha / r * B A of the adapter export is the merged export, in NumPy."""
    from safetensors.numpy import load_file

    monkeypatch.chdir(tmp_path)
    folders.write(tmp_path / 'source')
    config = folders.get_config('source', rank=2)  # by a relative path, as earlier versions saved
    config.model.lora.alpha = 6.0
    config.grpo.steps = 2
    config.grpo.optimizer.update(learning_rate=0.05, warmup_steps=0)
    config.eval.every = 2
    runs.train(config, tmp_path / 'run')
    monkeypatch.chdir('/')
    config.pretrained = str(tmp_path / 'source')
    run = str(tmp_path / 'run')
    exports.export(config, run, str(tmp_path / 'merged'), dtype='float32')
    exports.export_adapter(config, run, str(tmp_path / 'adapter'))
    described = json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())
    assert described['base_model_name_or_path'] == str(tmp_path / 'source')
    base, merged = (
        load_file(tmp_path / name / 'model.safetensors') for name in ('source', 'merged')
    )
    adapter = load_file(tmp_path / 'adapter' / 'adapter_model.safetensors')
    moved = 0
    for name, before in base.items():
        module = f'base_model.model.{name.removesuffix(".weight")}'
        expected = before.astype(np.float64)
        if f'{module}.lora_A.weight' in adapter:
            a, b = (adapter[f'{module}.lora_{side}.weight'].astype(np.float64) for side in 'AB')
            expected = expected + 6.0 / 2 * b @ a
            moved += np.abs(merged[name] - before).max() > 1e-3
        np.testing.assert_allclose(merged[name], expected, rtol=1e-6, atol=1e-6)
    assert moved == 7  # all projections of the layer have been trained
