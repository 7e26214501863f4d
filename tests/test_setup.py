"""What the commands begin with: a checkpoint's description, its tokens, problems, parameters."""

import json
import logging
import shutil

import folders
import jax
import numpy as np
import pytest
import tiny

from configs import smoke
from grpo_jax import models
from grpo_jax.run import checkpoint, grading, parameters, problems, setup
from grpo_jax.run.config import defaults
from grpo_jax.types import Sampling

pytestmark = pytest.mark.usefixtures('compiled_once')

COMPUTED = {'dtype', 'param_dtype', 'attention', 'remat', 'lora'}


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return folders.write(tmp_path_factory.mktemp('source') / 'llama')


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The model


def other(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 2
    if isinstance(value, str):
        return f'{value}?'
    return (0,) if isinstance(value, tuple) else {'rope_type': 'linear', 'factor': 2.0}


@pytest.mark.parametrize('name', [name for name in defaults().model if name not in COMPUTED])
def test_the_checkpoint_says_what_the_model_is_like(name, source, tmp_path):
    config = folders.get_config(source)
    config.model[name] = other(config.model[name])
    with pytest.raises(
        ValueError, match=f'^model.{name}=.* has no effect with pretrained='
    ) as error:
        setup.prepare(config, tmp_path)
    assert '\n' not in str(error.value)


def test_the_config_says_how_it_is_computed(source, tmp_path):
    config = folders.get_config(source)
    told = {'dtype': 'bfloat16', 'param_dtype': 'float16', 'attention': 'einsum', 'remat': False}
    config.model.update(told)
    config.model.lora.update(rank=3, alpha=5.0, targets=('q_proj',))
    prepared = setup.prepare(config, tmp_path).model.config
    assert {name: getattr(prepared, name) for name in told} == told
    assert prepared.lora == models.Lora(rank=3, alpha=5.0, targets=('q_proj',))
    known = {'token_ranges': ((0, 258),)}  # those of the tokenizer
    assert prepared.base == folders.make_model(**told, **known).config


def test_a_tokenizer_that_the_embedding_is_too_small_for(tmp_path):
    """Refused where a token is used that has no embedding, here at the end of a turn."""
    source = folders.write(tmp_path / 'small', vocab_size=259)
    folders.chat_tokenizer().save_pretrained(tmp_path / 'larger')
    config = folders.get_config(source)
    setup.prepare(config, tmp_path / 'run')
    config.tokenizer = str(tmp_path / 'larger')
    assert setup.prepare(config, tmp_path / 'run').model.config.token_ranges == ()
    config.data.chat = True
    message = "'<.im_end.>' is token 259 of the tokenizer, but the checkpoint embeds 259 tokens"
    with pytest.raises(ValueError, match=message):
        setup.prepare(config, tmp_path / 'run')
    config.pretrained = str(folders.write(tmp_path / 'enough', vocab_size=260))
    assert len(setup.prepare(config, tmp_path / 'run').tokenizer) == 260


def test_parameters_are_those_of_the_checkpoint(source, tmp_path):
    for rank in (0, 2):
        prepared = setup.prepare(folders.get_config(source, rank=rank), tmp_path)
        assert tiny.same(
            parameters.initial_params(prepared), tiny.make_params(folders.make_model())
        )


def test_parameters_lie_on_the_mesh(source, tmp_path):
    config = folders.get_config(source, rank=2)
    config.mesh.update(fsdp=2, tensor=2)
    prepared = setup.prepare(config, tmp_path)
    params, adapters = parameters.initial_params(prepared), parameters.initial_adapters(prepared)
    assert tiny.same(params, tiny.make_params(folders.make_model()))
    for tree, name in ((params, 'query'), (adapters, 'query_lora_a')):
        assert len(tree['blocks'][name].sharding.device_set) == 4
        assert not tree['blocks'][name].sharding.is_fully_replicated
    merged = parameters.merged(prepared, params, jax.tree.map(lambda x: x + 0.5, adapters))
    where = merged['blocks']['query'].sharding
    expected = tiny.make_params(folders.make_model())['blocks']['query']
    a = np.asarray(adapters['blocks']['query_lora_a'], np.float64) + 0.5
    expected = expected + 16 / 2 * 0.5 * a.sum(-1)[..., None, None]
    np.testing.assert_allclose(merged['blocks']['query'], expected, rtol=1e-5)
    data = ('groups', 'completions')
    assert where.spec == jax.sharding.PartitionSpec(None, data, 'tensor', None)


# The checkpoint's description stays with the run


def test_the_description_is_kept(source, tmp_path):
    config = folders.get_config(source)
    prepared = setup.prepare(config, tmp_path / 'run')
    (tmp_path / 'run' / '.pretrained.abc').mkdir(parents=True)  # of a copy that was cut off
    (tmp_path / 'run' / '.pretrained.abc' / 'old.json').touch()
    setup.keep_description(prepared)
    kept = contents(tmp_path / 'run' / 'pretrained')
    expected = contents(source)
    del expected['model.safetensors']
    assert kept == expected
    assert [path.name for path in (tmp_path / 'run').iterdir()] == ['pretrained']
    again = setup.prepare(config, tmp_path / 'run')
    assert again.source == tmp_path / 'run' / 'pretrained'
    setup.keep_description(again)
    assert contents(tmp_path / 'run' / 'pretrained') == expected


def test_a_check_changes_nothing_in_the_folder_of_another_run(source, tmp_path):
    """As that of `plan`; the copy of a run that has no checkpoint is not taken for its own."""
    config, workdir = folders.get_config(source), tmp_path / 'run'
    setup.keep_description(setup.prepare(config, workdir))
    checkpoint.claim_workdir(workdir, config)
    before = contents(workdir / 'pretrained')
    config.seed += 1
    checked, config = checkpoint.check_workdir(str(workdir), config)
    assert setup.prepare(config, checked).source == source
    assert contents(workdir / 'pretrained') == before
    (workdir / 'checkpoints' / 'grpo' / '2').mkdir(parents=True)
    assert setup.prepare(config, checked).source == workdir / 'pretrained'


def test_what_a_run_needs_when_the_checkpoint_is_gone(source, tmp_path):
    shutil.copytree(source, tmp_path / 'gone')
    policies = {}
    for rank in (0, 2):
        config = folders.get_config(tmp_path / 'gone', rank=rank)
        prepared = setup.prepare(config, tmp_path / 'prepared')
        params = tiny.make_params(prepared.model, seed=1)
        trained = models.split_adapters(params)[1] or params
        folders.pretend(config, tmp_path / f'run{rank}', trained)
        policies[rank] = config, params
    shutil.rmtree(tmp_path / 'gone')
    config, params = policies[0]
    policy = parameters.newest_policy(setup.prepare(config, tmp_path / 'run0'))
    assert (policy.name, policy.pretrained) == ('grpo/3', False)
    assert tiny.same(policy.params, params)
    config, params = policies[2]
    prepared = setup.prepare(config, tmp_path / 'run2')
    with pytest.raises(ValueError, match="/gone' is neither a folder nor a checkpoint"):
        parameters.newest_policy(prepared)
    config.pretrained = str(source)  # the folder has only moved
    policy = parameters.newest_policy(setup.prepare(config, tmp_path / 'run2'))
    assert policy.pretrained
    assert tiny.same(policy.base, tiny.make_params(folders.make_model()))
    assert tiny.same(policy.adapters, models.split_adapters(params)[1])


# The newest policy of a run


def test_a_run_without_a_checkpoint(source, tmp_path):
    prepared = setup.prepare(folders.get_config(source), tmp_path)
    with pytest.raises(ValueError, match='holds no checkpoint: train first, or name another --wo'):
        parameters.newest_policy(prepared)


def test_the_second_stage_begins_with_the_first_ones_adapters_folded_in(source, tmp_path):
    config = folders.get_config(source, rank=2, sft=2)
    prepared = setup.prepare(config, tmp_path)
    first, second = (
        models.split_adapters(tiny.make_params(prepared.model, seed))[1] for seed in (1, 2)
    )
    folders.pretend(config, tmp_path, first, stage='sft', step=2)
    base = tiny.make_params(folders.make_model())
    policy = parameters.newest_policy(prepared)
    assert (policy.name, policy.pretrained) == ('sft/2', True)
    assert tiny.same(policy.params, models.join_adapters(base, first))
    folders.pretend(config, tmp_path, second)
    policy = parameters.newest_policy(prepared)
    assert (policy.name, policy.pretrained) == ('grpo/3', False)
    assert tiny.same(policy.adapters, second)
    expected = models.merge_adapters(prepared.model.config, base, first)
    assert tiny.gap(policy.base, expected) < 1e-5
    assert tiny.gap(policy.base, base) > 0.1


def test_adapters_of_a_model_from_scratch(tmp_path):
    """Their base is the random start, made again from the seed; no checkpoint is involved."""
    config = folders.get_config(rank=2)
    config.model.update(width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp_width=16)
    prepared = setup.prepare(config, tmp_path)
    assert prepared.source is None
    setup.keep_description(prepared)
    adapters = models.split_adapters(tiny.make_params(prepared.model))[1]
    folders.pretend(config, tmp_path, adapters)
    policy = parameters.newest_policy(prepared)
    assert not policy.pretrained
    assert tiny.same(policy.base, parameters.initial_params(prepared))
    assert not (tmp_path / 'pretrained').exists()


# What ends a completion


@pytest.mark.parametrize(
    ('generation', 'chat', 'expected'),
    [
        (None, False, {257}),
        ({'eos_token_id': 263}, False, {257, 263}),
        ({'eos_token_id': [263, 257, 1]}, False, {1, 257, 263}),
        (None, True, {257, 259}),
        ({'eos_token_id': [263, 257]}, True, {257, 259, 263}),
    ],
)
def test_end_tokens(generation, chat, expected, tmp_path):
    """The tokenizer's, those of the checkpoint, and with chat the end of the assistant's turn."""
    source = folders.write(
        tmp_path / 'chat', tokenizer=folders.chat_tokenizer(), generation=generation
    )
    prepared = setup.prepare(folders.get_config(source, chat=chat), tmp_path)
    assert sorted(prepared.ends.tolist()) == sorted(expected)
    assert prepared.ends.dtype == np.int32


def test_stop_strings_of_the_format_and_the_config():
    config = folders.get_config(prompt='gsm8k_8shot', stops=('\n\n', '\nQ:'))
    assert setup.stop_strings(config) == ('\nQ:', '\n\n')
    assert setup.stop_strings(folders.get_config()) == ()


QUESTIONS = [f'What is {number}?' for number in range(12)]
ASKED = {
    'chat': (
        {'chat': True, 'system': 'Be brief.', 'prompt': '{question} Say', 'stops': ('abb', 'b\nb')},
        '<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 11? Say<|im_end|>\n'
        '<|im_start|>assistant\n',
    ),
    'few-shot': (
        {'prompt': 'gsm8k_8shot', 'stops': ('aaa',)},
        ''.join(f'Q: {q}\nA: 1\nThe answer is 1.\n\n' for q in QUESTIONS[:8])
        + 'Q: What is 11?\nA:',
    ),
}


PAIR = 'ba'  # a token of two letters: a stop string may end inside of it


def until(tokens, ends, stops):
    """How many tokens a completion has, its text, and what ends it: a token, a string or None."""
    text = ''
    for count, token in enumerate(tokens, 1):
        text += PAIR if token == 260 else chr(token) if token < 256 else ''
        reason = token if token in ends else next((s for s in stops if s in text), None)
        if reason is not None:
            end = text.find(reason) + len(reason) if reason in stops else len(text)
            return count, text[:end], reason
    return len(tokens), text, None


@pytest.mark.parametrize('kind', ASKED)
def test_prompts_and_completions(kind, tmp_path):
    """A model of random letters is asked the whole way; the ends are found by searching."""
    asked, prompt = ASKED[kind]
    more = folders.EOS if asked.get('chat') else 262  # three of them in any case, to compile once
    tokenizer = folders.chat_tokenizer()
    tokenizer.add_tokens([PAIR])
    letters = [*b'ab\nQ:', 260, folders.EOS, folders.IM_END, folders.ANOTHER_END]
    source = folders.write(
        tmp_path / 'model',
        tokenizer=tokenizer,
        generation={'eos_token_id': [folders.ANOTHER_END, more]},
        params=folders.writing(*letters),
        tied_head=False,
    )
    table = folders.rows(tmp_path / 'rows', train=QUESTIONS[:11], test=QUESTIONS[11:])
    config = folders.get_config(source, **table, **asked)
    config.data.update(prompt_length=512, completion_length=12)
    config.eval.update(batch_size=1)
    prepared = setup.prepare(config, tmp_path / 'run')
    heldout = problems.heldout_problems(prepared)
    prompts = heldout.table.select(np.arange(1))
    length = prompts.length[0]
    assert prepared.tokenizer.decode(prompts.tokens[0, :length]) == prompt
    params = parameters.initial_params(prepared)
    rollout = jax.device_get(
        prepared.sampler(params, prompts, step=0, sampling=Sampling(), group_size=1024)
    )
    stops = setup.stop_strings(config)
    ends = {folders.EOS, folders.ANOTHER_END} | ({folders.IM_END} if config.data.chat else set())
    found = [until(tokens, ends, stops) for tokens in rollout.tokens[0].tolist()]
    assert {reason for *_, reason in found} == {None, *ends, *stops}
    assert rollout.ended[0].tolist() == [reason is not None for *_, reason in found]
    counts = np.array([count for count, *_ in found])
    np.testing.assert_array_equal(rollout.mask[0], np.arange(12) < counts[:, None])
    answer = {'right': lambda prompts, completions, **columns: [0.0] * len(completions)}
    texts = grading.grade_texts(rollout, heldout, answer, {'right': 1.0})
    assert texts.completions == [text for _, text, _ in found]


# Held-out questions


def test_no_run_learns_what_it_is_tested_on(source, tmp_path, caplog):
    """Whatever the spelling; what is left out is counted."""
    questions = [f'How many are {number} and {number}?' for number in range(20)]
    leaked = [questions[3].upper(), questions[4].replace(' ', '  '), questions[5] + ' ']
    table = folders.rows(
        tmp_path / 'rows', train=[*questions[6:], *leaked, 'x' * 70], test=questions[:6]
    )
    prepared = setup.prepare(
        folders.get_config(source, **table, prompt_length=64), tmp_path / 'run'
    )
    heldout = problems.heldout_problems(prepared)
    with caplog.at_level(logging.WARNING):
        training = problems.training_problems(prepared, heldout)
    assert [record.message for record in caplog.records if record.name == 'grpo_jax'] == [
        'train: 14 of 18 rows used; dropped 1 that are too long and 3 whose question is held out'
    ]
    asked = [training.rows[row]['question'] for row in training.table.index]
    assert asked == questions[6:]


def test_nothing_is_said_where_nothing_is_dropped(source, tmp_path, caplog):
    table = folders.rows(tmp_path / 'rows', train=QUESTIONS[:11], test=QUESTIONS[11:])
    prepared = setup.prepare(
        folders.get_config(source, **table, prompt_length=64), tmp_path / 'run'
    )
    with caplog.at_level(logging.WARNING):
        training = problems.training_problems(prepared, problems.heldout_problems(prepared))
    assert len(training.table.index) == 11
    assert not [record for record in caplog.records if record.name == 'grpo_jax']


def test_a_config_that_is_not_json(tmp_path):
    source = folders.write(tmp_path / 'broken')
    (source / 'generation_config.json').write_text('{')
    with pytest.raises(ValueError, match=r'/generation_config.json is not valid JSON: '):
        setup.prepare(folders.get_config(source), tmp_path)
    (source / 'generation_config.json').write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=r'/generation_config.json holds list, not a JSON object'):
        setup.prepare(folders.get_config(source), tmp_path)


def test_routers_of_a_model_without_experts(tmp_path):
    config = smoke.get_config()
    config.grpo.algorithm.router_balance = 0.1
    message = r'^grpo.algorithm.router_balance=0.1 has no effect with a model without experts: rem'
    with pytest.raises(ValueError, match=message):
        setup.prepare(config, tmp_path)
    config.model.update(experts=4, experts_per_token=2)
    assert setup.prepare(config, tmp_path).model.config.experts == 4


@pytest.mark.parametrize(('attention', 'needed'), [('splash', 'TPU'), ('cudnn', 'GPU')])
def test_kernels_of_other_platforms(attention, needed, tmp_path):
    config = smoke.get_config()
    config.model.update(attention=attention, dtype='bfloat16')
    message = f"model.attention='{attention}' is for a {needed}, and these devices are CPUs: use"
    with pytest.raises(ValueError, match=message):
        setup.prepare(config, tmp_path)
