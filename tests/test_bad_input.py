"""What is wrong with a run's input is one line before anything is compiled, or counted."""

import json
import logging
import re
import threading

import jax
import numpy as np
import pytest
import runs

from configs import gsm8k_tiny
from grpo_jax import models, train
from grpo_jax.data import byte_tokenizer
from grpo_jax.run import errors


@pytest.fixture
def compiled():
    """The names of programs that are compiled during a test.

    Without random initial parameters, which a thread begins to compile while data are read.
    """
    names = []

    def listen(event, duration, *, fun_name='', **others):
        main = threading.current_thread() is threading.main_thread()
        if main and event.endswith('backend_compile_duration'):
            names.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_compilations_are_noticed(compiled):
    jax.jit(lambda x: x * 3 + 1)(np.float32(2))
    assert len(compiled) == 1


def changed(changes, **fixed):
    """The config with values at dotted paths."""
    config = runs.get_config()
    for path, value in (fixed | changes).items():
        *sections, name = path.split('.')
        target = config
        for section in sections:
            target = target[section]
        target[name] = value
    return config


BAD = [
    ({'seed': -1}, r'seed=-1 is out of range: make it at least 0 and below 2\^31$'),
    ({'mesh.fsdp': 16}, 'mesh fsdp=16 x tensor=1 needs 16 devices, but JAX sees 8: make the mesh'),
    (
        {'mesh.fsdp': 3},
        'eval.batch_size of 4 prompts does not divide over mesh fsdp=3: use 3, 6 prompts',
    ),
    (
        {'mesh.fsdp': 4},
        'compute.microbatch=2 does not cut grpo.batch_size of 4 prompts over fsdp=4 .* one of 4$',
    ),
    (
        {'grpo.compute.microbatch': 3},
        'grpo.compute.microbatch=3 does not cut grpo.batch_size of 4 .* use one of 1, 2, 4$',
    ),
    (
        {'sft.microbatch': 5},
        'sft.microbatch=5 does not cut sft.batch_size of 16 .* use one of 1, 2',
    ),
    (
        {'sft.batch_size': 96, 'sft.microbatch': 96},
        "sft.batch_size is 96: make it 1 to 90, the usable rows of the split 'train'$",
    ),
    (
        {'sft.steps': 0, 'grpo.batch_size': 96, 'grpo.compute.microbatch': 96},
        "grpo.batch_size is 96: make it 1 to 90, the usable rows of the split 'train'$",
    ),
    (
        {'grpo.group_size': 1},
        "^grpo.group_size=1 with baseline='mean', scale='std': .* group_size >= 2",
    ),
    (
        {'grpo.group_size': 1, 'grpo.algorithm.baseline': 'leave_one_out'},
        "group_size=1 with baseline='leave_one_out'",
    ),
    ({'grpo.algorithm.loss': 'clip'}, "loss='clip' is unknown: use one of clipped, nll"),
    (
        {'grpo.algorithm.tau_positive': 2.0},
        "tau_positive=2.0 has no effect with loss='clipped': remove it",
    ),
    (
        {'grpo.algorithm.importance_cap': 3.0},
        "importance_cap=3.0 has no effect with importance='none'",
    ),
    ({'grpo.algorithm.kl': 'k1'}, "kl='k1' with kl_place='loss' has an expected on-policy"),
    ({'grpo.algorithm.supervision': 'process'}, "supervision='process' without step rewards: name"),
    ({'grpo.step_rewards': {'right_steps': 1.0}}, "step_rewards has no effect with .*'outcome'"),
    (
        {'grpo.source': 'reference'},
        "grpo.source='reference' with loss='clipped', which needs samples of",
    ),
    ({'grpo.source': 'sft'}, "grpo.source='sft' is unknown: use policy or reference"),
    (
        {'grpo.ahead': True},
        "grpo.ahead=True with grpo.algorithm.importance='none': completions are sampled",
    ),
    (
        {'grpo.ahead': True, 'grpo.algorithm.importance': 'token', 'grpo.refill': 2},
        'grpo.ahead=True with grpo.refill=2: extra batches need the policy that sampled the',
    ),
    ({'grpo.weights': 'int4'}, "grpo.weights='int4' is unknown: use one of model, int8"),
    (
        {'grpo.weights': 'int8'},
        "grpo.weights='int8' with grpo.algorithm.importance='none': completions are",
    ),
    ({'grpo.drop': ('short',)}, "grpo.drop names 'short', which is unknown: use any of wrong,"),
    ({'grpo.algorithm.loss': 'dpo'}, "scale='std' with loss='dpo': preference losses compare"),
    ({'grpo.algorithm.lam': 0.5}, "lam=0.5 has no effect with baseline='mean'"),
    ({'grpo.algorithm.max_kl': 0.5}, "max_kl=0.5 has no effect with step='optimizer'"),
    ({'grpo.algorithm.step': 'trust_region'}, "step='trust_region' with loss='clipped'"),
    (
        {'critic.optimizer.learning_rate': 1.0},
        "critic.optimizer.learning_rate=1.0 has no effect with baseline='mean': remove it",
    ),
    ({'reward_model.steps': 3}, 'reward_model.steps=3 has no effect with reward_model.weight=0'),
    ({'reward_model.weight': 1.0}, 'reward_model.weight=1.0 of a reward model that is neither'),
    (
        {'reward_model.weight': 1.0, 'reward_model.steps': 3, 'reward_model.kind': 'process'},
        "reward_model.loss='bradley_terry' with kind='process': an outcome model is trained by",
    ),
    ({'grpo.steps': 0, 'sft.steps': 0}, 'sft.steps=0 and grpo.steps=0: set one of them'),
    ({'grpo.sampling.temperature': 0.0}, r'^grpo.sampling.temperature=0.0: make it above 0'),
    ({'grpo.sampling.top_k': -1}, '^grpo.sampling.top_k=-1: make it at least 0'),
    ({'grpo.sampling.top_p': 1.5}, '^grpo.sampling.top_p=1.5: make it above 0 and at most 1'),
    ({'grpo.sampling.min_p': 1.0}, '^grpo.sampling.min_p=1.0: make it at least 0 and below 1'),
    (
        {'grpo.optimizer.name': 'adam'},
        "grpo.optimizer: unknown optimizer 'adam', did you mean 'adamw'",
    ),
    (
        {'grpo.optimizer.name': 'optax.contrib:moun'},
        "grpo.optimizer: optimizer 'optax.contrib:moun': .* did you mean 'muon'",
    ),
    (
        {'sft.optimizer.name': 'optax:sgd', 'sft.optimizer.options': {'momentun': 0.9}},
        "sft.optimizer: options={'momentun': 0.9} do not fit optax:sgd: .* it takes momentum, ",
    ),
    (
        {'grpo.optimizer.options': {'b1': 0.5}},
        "grpo.optimizer: options={'b1': 0.5} has no effect with name='adamw': set b1, b2",
    ),
    (
        {'grpo.optimizer.name': 'optax:sgd', 'grpo.optimizer.b2': 0.5},
        "grpo.optimizer: b2=0.5 has no effect with name='optax:sgd': use options instead",
    ),
    ({'grpo.optimizer.decay': 'cosin'}, "decay='cosin' is unknown: use one of constant, linear"),
    (
        {'grpo.rewards': {'chain_format': float('nan')}},
        'grpo.rewards.chain_format=nan: a weight is',
    ),
    (
        {'data.options': {'train_size': 90, 'test_size': 10, 'train_sze': 90}},
        "arithmetic has no option 'train_sze': it has train_size",
    ),
    ({'model.dtype': 'float99'}, "^model.dtype='float99' is unknown: use one of float32"),
    ({'grpo.rewards': {}}, 'grpo.rewards is empty: name at least one reward function'),
    (
        {'grpo.rewards': {'exact_anwser': 1.0}},
        "unknown reward 'exact_anwser', did you mean 'exact_answer'",
    ),
    ({'grpo.rewards': {'runs:bonuss': 1.0}}, "runs has no 'bonuss', did you mean 'bonus'"),
    ({'grpo.rewards': {'no_module:f': 1.0}}, 'importing no_module raised ModuleNotFoundError'),
    ({'eval.correct': 'right'}, "unknown reward 'right'"),
    ({'eval.k': (1, 5)}, 'eval.k=5 needs at least 5 samples: eval.samples=4'),
    ({'data.prompt_length': 3}, 'all 10 prompts are longer than prompt_length=3 tokens: raise it'),
    ({'data.completion_length': 2}, 'all 90 completions are longer than completion_length=2'),
    ({'data.prompt': ''}, "unknown prompt format '': choose deepseekmath, .* or write a template"),
    ({'data.prompt': '{q}'}, "template '{q}' does not fit the data .*the columns are {answer},"),
    ({'data.train_split': 'training'}, "arithmetic has no split 'training': choose train or test"),
    ({'data.name': 'sums'}, "unknown data set 'sums': choose arithmetic, countdown, gsm8k, math,"),
    (
        {'data.options': {'train_size': 90, 'test_size': 10, 'mistakes': 2.0}},
        'arithmetic: mistakes is 2.0: make it between 0 and 1',
    ),
    ({'data.cache_dir': f'{__file__}/x'}, 'cache_dir .*test_bad_input.py/x: Not a directory: name'),
    ({'tokenizer': '/no/folder'}, "tokenizer '/no/folder' cannot be loaded: give 'bytes'"),
    ({'grpo.batch_size': 0}, r'grpo.batch_size=0 is out of range: make it at least 1$'),
    ({'eval.every': 0}, r'eval.every=0 is out of range: make it at least 1$'),
    (
        {'grpo.algorithm.importance_cap': 0.5},
        r'importance_cap=0.5 is out of range: make it at least 1',
    ),
    (
        {'grpo.algorithm.tau_positive': 0.0},
        r'tau_positive=0.0 is out of range: make it above 0',
    ),
    (
        {'grpo.algorithm.top_entropy': 1.5},
        r'top_entropy=1.5 is out of range: make it above 0 and at most 1',
    ),
    (
        {'grpo.algorithm.reference_decay': 1.5},
        r'reference_decay=1.5 is out of range: make it between 0 and 1',
    ),
    (
        {'grpo.algorithm.label_smoothing': 0.5},
        r'label_smoothing=0.5 is out of range: make it at least 0 and below 0.5$',
    ),
    (
        {'grpo.optimizer.clip_norm': -1.0},
        'grpo.optimizer: clip_norm=-1.0 is out of range: make it at least 0',
    ),
    (
        {'sft.steps': 0, 'sft.optimizer.learning_rate': -1.0},
        r'sft.optimizer.learning_rate=-1.0 is out of range: make it at least 0$',
    ),
    ({'sft.optimizer.warmup_steps': 9}, 'sft.optimizer: warmup_steps=9 and hold_steps=0 add up'),
    (
        {'grpo.algorithm.advantage_estimator': 'pass_at_k', 'grpo.algorithm.pass_k': 5},
        '^grpo.algorithm.pass_k=5 with grpo.group_size=4: .* use pass_k <= 4$',
    ),
    ({'grpo.algorithm.advantage_estimator': 'opi'}, "opi' is unknown: .*, or '' for none$"),
    (
        {'grpo.algorithm.loss': 'dapo'},
        r"dapo' is the name of a method: methods.apply\(config, 'dapo'\) sets its options$",
    ),
    ({'data.chat': True}, "tokenizer 'bytes' has no chat template: set data.chat=False, or use"),
    ({'data.system': 'Be brief.'}, 'no place for a system message: set data.chat=True, or write'),
    ({'log.to': 3}, r'^log.to names 3: give values of type str$'),
    ({'eval.k': 'all', 'eval.samples': 8}, r"^eval.k names 'all': give values of type int$"),
    ({'checkpoint.every': 0}, r'checkpoint.every=0 is out of range: make it at least 1$'),
    ({'log.completions': -1}, r'log.completions=-1 is out of range: make it at least 0$'),
    ({'model.kv_heads': 3}, '^model.heads=4 is not a multiple of kv_heads=3'),
]


@pytest.mark.parametrize(('changes', 'message'), BAD, ids=[', '.join(row[0]) for row in BAD])
def test_bad_input_is_one_line_before_anything_is_compiled(
    changes, message, tmp_path, cache, compiled
):
    config = changed(changes, **{'data.cache_dir': cache})
    with pytest.raises(ValueError, match=message) as error:
        train.train(config, str(tmp_path))
    assert '\n' not in str(error.value)
    assert not compiled
    assert not list(tmp_path.iterdir())  # the corrected command can use the folder


AT_ONCE = {  # none of these hides another one
    'seed': -1, 'tokenizer': '/no/folder',
    'data.name': 'sums', 'data.prompt': '', 'data.chat': True,
    'model.dtype': 'float99', 'model.kv_heads': 3,
    'sft.microbatch': 5, 'sft.optimizer.name': 'optax:sgd',
    'sft.optimizer.options': {'momentun': 0.9}, 'sft.optimizer.warmup_steps': 9,
    'grpo.drop': ('short',), 'grpo.source': 'sft', 'grpo.weights': 'int4', 'grpo.ahead': True,
    'grpo.group_size': 1, 'grpo.compute.microbatch': 3, 'grpo.rewards': {'exact_anwser': 1.0},
    'grpo.sampling.temperature': 0.0, 'grpo.sampling.top_k': -1, 'grpo.sampling.top_p': 1.5,
    'grpo.sampling.min_p': 1.0, 'grpo.optimizer.name': 'adam', 'grpo.optimizer.decay': 'cosin',
    'grpo.optimizer.clip_norm': -1.0,
    'grpo.algorithm.importance_cap': 0.5, 'grpo.algorithm.label_smoothing': 0.5,
    'grpo.algorithm.tau_positive': 0.0, 'grpo.algorithm.reference_decay': 1.5,
    'grpo.algorithm.top_entropy': 1.5, 'grpo.algorithm.lam': 0.5, 'grpo.algorithm.kl': 'k1',
    'grpo.algorithm.advantage_estimator': 'opi', 'grpo.algorithm.supervision': 'process',
    'grpo.algorithm.step': 'trust_region',
    'critic.optimizer.learning_rate': 1.0, 'reward_model.steps': 3,
    'eval.correct': 'right', 'eval.every': 0, 'log.to': 3, 'log.completions': -1,
    'checkpoint.every': 0,
}  # fmt: skip
FOLLOWS = {'data.chat'}  # from the tokenizer, which could have a chat template


def test_all_that_is_wrong_is_told_at_once(tmp_path, cache, compiled):
    messages = [message for changes, message in BAD if changes.items() <= AT_ONCE.items()]
    told = [message for message in messages if 'has no chat template' not in message]
    assert len(told) == len(AT_ONCE.keys() - FOLLOWS) - 1  # two keys make up one row
    with pytest.raises(errors.ConfigError) as error:
        train.train(changed(AT_ONCE, **{'data.cache_dir': cache}), str(tmp_path))
    problems = error.value.problems
    assert not [message for message in told if not any(re.search(message, p) for p in problems)]
    assert not [p for p in problems if not any(re.search(message, p) for message in told)]
    assert not compiled


def test_a_folder_of_another_run(finished, compiled):
    before = sorted(finished.rglob('*'))
    message = (
        r"finished' holds the run of another config: grpo.algorithm.beta \(there 0.04, here 0.0\); "
        r'seed \(there 0, here 1\)\. Use another --workdir, or the same config to resume$'
    )
    with pytest.raises(ValueError, match=message):
        train.train(changed({'seed': 1, 'grpo.algorithm.beta': 0.0}), str(finished))
    assert not compiled
    assert sorted(finished.rglob('*')) == before


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch, capsys, compiled):
    (tmp_path / 'file').touch()
    workdir = tmp_path / 'file' / 'run'
    monkeypatch.setattr('sys.argv', ['train', f'--config={runs.__file__}', f'--workdir={workdir}'])
    with pytest.raises(SystemExit) as stopped:
        train.run()
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    expected = f"workdir '{workdir}' cannot be written to (Not a directory): name another folder"
    assert (printed.out, printed.err) == ('', f'error: {expected}\n')
    assert not compiled


def test_a_tokenizer_without_an_end(tmp_path, compiled):
    without = byte_tokenizer()
    without.eos_token = None
    without.save_pretrained(tmp_path / 'tokenizer')
    config = changed({'tokenizer': str(tmp_path / 'tokenizer')})
    with pytest.raises(ValueError, match=r'has no end-of-sequence token, .*: set eos_token in its'):
        train.train(config, str(tmp_path / 'run'))
    assert not compiled


class Reached(Exception):
    """The checks are over and the parameters would be made."""


@pytest.fixture
def jsonl(tmp_path, monkeypatch):
    """A config that reads its rows from files; returns it and a function that writes them."""
    monkeypatch.setenv('GRPO_JAX_DATA_DIR', str(tmp_path / 'data'))
    folder = tmp_path / 'data' / 'sums'
    folder.mkdir(parents=True)

    def write(name, *questions):
        rows = [{'question': q, 'demonstration': '1', 'answer': '1'} for q in questions]
        text = ''.join(json.dumps(row) + '\n' for row in rows)
        (folder / f'{name}.jsonl').write_text(text)
        return folder / f'{name}.jsonl'

    def reach(*arguments):
        raise Reached

    monkeypatch.setattr(models, 'init_params', reach)
    return changed({'data.name': 'jsonl', 'data.options': {'folder': 'sums'}}), write


def test_prompts_that_are_too_long_are_counted(tmp_path, jsonl, caplog):
    config, write = jsonl
    config.sft.update(batch_size=8)
    write('test', '9999', '12345')
    write('train', *(str(number) for number in range(9_990, 10_010)))
    with caplog.at_level(logging.WARNING), pytest.raises(Reached):
        train.train(config, str(tmp_path / 'run'))
    told = [record.message for record in caplog.records if record.name == 'grpo_jax']
    assert told == [
        'test: 1 of 2 rows used; dropped 1 that are too long',
        'train: 9 of 20 rows used; dropped 10 that are too long and 1 whose question is held out',
        'demonstrations: 9 of 19 rows used; dropped 10 that are too long',
    ]


def test_a_line_that_is_no_json(tmp_path, jsonl, compiled):
    config, write = jsonl
    path = write('train', *(str(number) for number in range(16)))
    write('test', '99')
    good = path.read_text()
    path.write_text(good + '{"question": \n')
    with pytest.raises(ValueError, match=f'^{path}:17: not valid JSON: .* at column') as error:
        train.train(config, str(tmp_path / 'run'))
    assert '\n' not in str(error.value)
    assert not compiled
    path.write_text(good)
    with pytest.raises(Reached):
        train.train(config, str(tmp_path / 'run'))


def test_an_empty_prompt(tmp_path, jsonl, compiled):
    config, write = jsonl
    write('test', '99')
    write('train', *(str(number) for number in range(16)), '')
    with pytest.raises(ValueError, match='the prompt of row 16 has no tokens: fill the row or the'):
        train.train(config, str(tmp_path / 'run'))
    assert not compiled


def test_sft_can_be_left_out(tmp_path, jsonl):
    config, write = jsonl
    config.data.demonstration = '{there_is_none}'
    write('test', '1')
    write('train', *(str(number) for number in range(16)))
    with pytest.raises(ValueError, match='there_is_none'):
        train.train(config, str(tmp_path / 'run'))
    config.sft.steps = 0
    with pytest.raises(Reached):
        train.train(config, str(tmp_path / 'run'))


def test_data_that_are_not_there(tmp_path, monkeypatch, compiled):
    config = gsm8k_tiny.get_config()
    monkeypatch.delenv('GRPO_JAX_DATA_DIR', raising=False)
    message = 'GRPO_JAX_DATA_DIR is not set: set it to the folder that contains gsm8k/test.jsonl'
    with pytest.raises(ValueError, match=message):
        train.train(config, str(tmp_path / 'run'))
    monkeypatch.setenv('GRPO_JAX_DATA_DIR', str(tmp_path / 'data'))
    message = (
        f'{tmp_path}/data/gsm8k/test.jsonl: no such file: put it there, or set GRPO_JAX_DATA_DIR '
        f"(now '{tmp_path}/data') to the folder that contains gsm8k/test.jsonl"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        train.train(config, str(tmp_path / 'run'))
    assert not compiled
