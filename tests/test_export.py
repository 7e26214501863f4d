"""From a run to a folder: its files, its weights and adapters, and what is refused."""

import functools
import json
import re
import shutil

import folders
import jax
import numpy as np
import oracle
import pytest
import tiny
import tokenizers
from safetensors.numpy import load_file
from test_transformer import group_logits

from grpo_jax import evaluate, export, models
from grpo_jax.data import byte_tokenizer, load_tokenizer
from grpo_jax.models import hf
from grpo_jax.run import heldout, parameters, setup

pytestmark = pytest.mark.usefixtures('compiled_once')

ROLLOUT = tiny.make_rollout(vocab=folders.VOCAB)


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """The folder of a checkpoint whose tokenizer knows a chat template."""
    return folders.write(
        tmp_path_factory.mktemp('source') / 'llama',
        tokenizer=folders.chat_tokenizer(),
        generation={'eos_token_id': folders.EOS, 'temperature': 0.6},
    )


def make_run(workdir, source='', *, config=None, stage='grpo', step=3, **options):
    """A run that has come to random parameters; returns its config, setup and all parameters."""
    config = config or folders.get_config(source, **options)
    prepared = setup.prepare(config, workdir)
    params = tiny.make_params(prepared.model, seed=1)
    folders.pretend(
        config, workdir, models.split_adapters(params)[1] or params, stage=stage, step=step
    )
    return config, prepared, params


@pytest.fixture(scope='module')
def plain(source, tmp_path_factory):
    """(workdir, config, setup, parameters) of a run that trained all of them."""
    workdir = tmp_path_factory.mktemp('plain')
    return workdir, *make_run(workdir, source)


@pytest.fixture(scope='module')
def adapted(source, tmp_path_factory):
    """Of one that trained adapters; the parameters are the checkpoint's with the adapters."""
    workdir = tmp_path_factory.mktemp('adapted')
    config, prepared, params = make_run(workdir, source, rank=2)
    base = parameters.initial_params(prepared)
    return workdir, config, prepared, models.join_adapters(base, models.split_adapters(params)[1])


def again(folder, workdir, **options):
    """An exported folder as `pretrained` of another run: its setup and parameters."""
    prepared = setup.prepare(folders.get_config(folder, **options), workdir)
    return prepared, parameters.initial_params(prepared)


def naive(prepared, params):
    """Logits of parameters without adapters, by NumPy."""
    return oracle.completion_logits(oracle.float64(params), ROLLOUT, prepared.model.config.base)


def read(path):
    return json.loads(path.read_text())


# All weights


def test_everything_comes_back(plain, source, tmp_path, capsys):
    workdir, config, _, params = plain
    out = tmp_path / 'new' / 'out'
    export.export(config, str(workdir), str(out))
    assert capsys.readouterr().out == f'grpo/3: 0.0 MB of float32 weights in {out}\n'
    prepared, imported = again(out, tmp_path / 'next')
    assert tiny.same(imported, params)
    assert prepared.tokenizer.get_vocab() == folders.chat_tokenizer().get_vocab()
    assert prepared.tokenizer.chat_template == folders.CHATML
    assert {path.name for path in out.iterdir()} == {path.name for path in source.iterdir()}
    for name in ('tokenizer.json', 'tokenizer_config.json', 'chat_template.jinja'):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert read(out / 'config.json') == read(source / 'config.json') | {'dtype': 'float32'}
    assert read(out / 'generation_config.json') == {
        'eos_token_id': folders.EOS, 'temperature': 0.6, 'pad_token_id': 256,
    }  # fmt: skip
    assert [path.name for path in out.parent.iterdir()] == ['out']


def test_nothing_but_the_policy_is_needed(plain, tmp_path):
    """Neither the folder of a reward model nor the accelerator that the run was on."""
    workdir, config, _, params = plain
    config = config.copy_and_resolve_references()
    config.reward_model.update(weight=1.0, pretrained=str(tmp_path / 'gone'))
    config.model.attention = 'splash'
    export.export(config, str(workdir), str(tmp_path / 'out'))
    assert tiny.same(again(tmp_path / 'out', tmp_path / 'next')[1], params)


def test_adapters_are_folded_in(adapted, tmp_path):
    workdir, config, prepared, params = adapted
    export.export(config, str(workdir), str(tmp_path / 'out'))
    found, merged = again(tmp_path / 'out', tmp_path / 'next')
    assert not models.split_adapters(merged)[1]
    whole = folders.all_ids(prepared.model)
    logits = tiny.jit(functools.partial(group_logits, whole))
    expected = np.asarray(logits(params, ROLLOUT))
    np.testing.assert_allclose(naive(found, merged), expected, atol=3e-5)
    assert np.abs(naive(found, models.split_adapters(params)[0]) - expected).max() > 0.1


def test_adapters_of_both_stages_are_folded_in(source, tmp_path):
    config = folders.get_config(source, rank=2, sft=2)
    prepared = setup.prepare(config, tmp_path / 'run')
    stages = [models.split_adapters(tiny.make_params(prepared.model, seed))[1] for seed in (1, 2)]
    for stage, adapters in zip(('sft', 'grpo'), stages, strict=True):
        folders.pretend(config, tmp_path / 'run', adapters, stage=stage)
    export.export(config, str(tmp_path / 'run'), str(tmp_path / 'out'))
    _, found = again(tmp_path / 'out', tmp_path / 'next')
    expected = parameters.initial_params(prepared)
    for adapters in stages:
        expected = models.merge_adapters(prepared.model.config, expected, adapters)
    assert tiny.gap(found, expected) < 1e-5


def test_dtypes(plain, tmp_path):
    dtype = 'bfloat16'
    workdir, config, _, params = plain
    export.export(config, str(workdir), str(tmp_path / 'out'), dtype=dtype)
    assert read(tmp_path / 'out' / 'config.json')['dtype'] == dtype
    stored = load_file(tmp_path / 'out' / 'model.safetensors')
    assert {tensor.dtype.name for tensor in stored.values()} == {dtype}
    _, imported = again(tmp_path / 'out', tmp_path / 'next')
    assert tiny.same(imported, jax.tree.map(lambda x: x.astype(dtype).astype('float32'), params))


@pytest.mark.parametrize('field', ['dtype', 'torch_dtype'])
def test_the_dtype_is_that_of_the_checkpoint(field, tmp_path):
    """Whatever name its version of transformers has for it; an older one must not be misled."""
    source = folders.write(tmp_path / 'source', fields={field: 'bfloat16'})
    config, *_ = make_run(tmp_path / 'run', source)
    for dtype, written in (('', 'bfloat16'), ('float16', 'float16')):
        out = tmp_path / written
        export.export(config, str(tmp_path / 'run'), str(out), dtype=dtype)
        stored = load_file(out / 'model.safetensors')
        assert {tensor.dtype.name for tensor in stored.values()} == {written}
        found = read(out / 'config.json')
        assert {found[name] for name in ('dtype', field)} == {written}


def test_without_the_source_folder(source, tmp_path, capsys):
    """A run that trained all parameters has all that it needs."""
    shutil.copytree(source, tmp_path / 'gone')
    table = folders.rows(tmp_path / 'rows', train=['1', '2'], test=['3', '4'])
    config, _, params = make_run(tmp_path / 'run', tmp_path / 'gone', **table)
    config.eval.correct = 'runs:lucky'
    shutil.rmtree(tmp_path / 'gone')
    evaluate.main(config, str(tmp_path / 'run'))
    found = json.loads(capsys.readouterr().out)
    assert (found['checkpoint'], found['problems']) == ('grpo/3', 2)
    export.export(config, str(tmp_path / 'run'), str(tmp_path / 'out'))
    assert tiny.same(again(tmp_path / 'out', tmp_path / 'next')[1], params)


# What ends a completion elsewhere


@pytest.mark.parametrize(
    ('generation', 'chat', 'expected'),
    [
        (None, True, [257, 259]),
        ({'eos_token_id': [263, 257]}, False, [263, 257]),
        ({'eos_token_id': 263}, True, [263, 257, 259]),
    ],
)
def test_end_tokens_are_those_of_the_run(generation, chat, expected, tmp_path):
    """Other programs stop generating where a policy has learned to end its turn."""
    source = folders.write(
        tmp_path / 'source', tokenizer=folders.chat_tokenizer(), generation=generation
    )
    config, *_ = make_run(tmp_path / 'run', source, chat=chat)
    export.export(config, str(tmp_path / 'run'), str(tmp_path / 'out'))
    found = read(tmp_path / 'out' / 'generation_config.json')
    assert found == {'eos_token_id': expected, 'pad_token_id': 256}


def test_a_tokenizer_of_the_config(source, tmp_path):
    """Nothing remains of the folder that it replaces."""
    plain = byte_tokenizer()
    plain.save_pretrained(tmp_path / 'plain')
    config = folders.get_config(source)
    config.tokenizer = str(tmp_path / 'plain')
    make_run(tmp_path / 'run', config=config)
    export.export(config, str(tmp_path / 'run'), str(tmp_path / 'out'))
    prepared, _ = again(tmp_path / 'out', tmp_path / 'next')
    assert prepared.tokenizer.get_vocab() == plain.get_vocab()
    assert prepared.tokenizer.chat_template is None
    assert not (tmp_path / 'out' / 'chat_template.jinja').exists()
    assert read(tmp_path / 'out' / 'generation_config.json')['temperature'] == 0.6


# From scratch


FROM_SCRATCH = {
    'llama': {},
    'qwen3_moe': {'qk_norm': 'head', 'experts': 4, 'experts_per_token': 2},
    'olmo2': {'norms': 'post', 'qk_norm': 'projection'},
}


def scratch(rank=0, **options):
    config = folders.get_config(rank=rank)
    config.model.update(width=16, layers=2, heads=2, kv_heads=1, head_dim=8, mlp_width=16)
    config.model.update(options)
    return config


@pytest.mark.parametrize('kind', FROM_SCRATCH)
def test_a_run_from_scratch_becomes_a_checkpoint(kind, tmp_path, caplog):
    """Also its tokenizer, although transformers chooses the class by the model in the folder."""
    config, prepared, params = make_run(tmp_path / 'run', config=scratch(**FROM_SCRATCH[kind]))
    export.export(config, str(tmp_path / 'run'), str(tmp_path / 'out'))
    assert read(tmp_path / 'out' / 'config.json')['model_type'] == kind
    assert read(tmp_path / 'out' / 'generation_config.json') == {
        'eos_token_id': 257, 'pad_token_id': 256,
    }  # fmt: skip
    found, imported = again(tmp_path / 'out', tmp_path / 'next')
    assert tiny.same(imported, params)
    assert found.model == prepared.model
    text = "Don't, 12345  \n\n <eos>é e\u0301 数"
    assert len(found.tokenizer) == 258
    assert found.tokenizer.encode(text) == list(text.encode())
    assert found.tokenizer.decode(list(text.encode())) == text
    assert not [record for record in caplog.records if record.name == 'grpo_jax']


def test_a_tokenizer_that_transformers_reads_otherwise(tmp_path, caplog):
    """In a Qwen2 folder every tokenizer becomes a Qwen2Tokenizer: other rules, one more token."""
    config, *_ = make_run(tmp_path / 'run', config=scratch(attention_bias=True))
    export.export(config, str(tmp_path / 'run'), str(tmp_path / 'out'))
    assert read(tmp_path / 'out' / 'config.json')['model_type'] == 'qwen2'
    assert [record.message[:65] for record in caplog.records if record.name == 'grpo_jax'] == [
        'transformers loads another tokenizer from the exported folder tha'
    ]
    assert len(load_tokenizer(str(tmp_path / 'out'))) == 259
    faithful = tokenizers.Tokenizer.from_file(str(tmp_path / 'out' / 'tokenizer.json'))
    assert faithful.encode('e\u0301 12').ids == list('e\u0301 12'.encode())


# Adapters


@pytest.mark.parametrize('targets', [('*_proj',), ('q_proj', 'down_proj')], ids=['all', 'some'])
def test_peft_reads_the_adapter(targets, tmp_path, capsys):
    peft = pytest.importorskip('peft', reason='peft is the reference for adapters')
    torch = pytest.importorskip('torch')
    import checkpoints

    source = folders.write(tmp_path / 'source')
    config = folders.get_config(source, rank=3)
    config.model.lora.update(alpha=5.0, targets=targets)
    _, prepared, params = make_run(tmp_path / 'run', config=config)
    out = tmp_path / 'out'
    export.export_adapter(config, str(tmp_path / 'run'), str(out))
    assert capsys.readouterr().out == f'grpo/3: adapters of {source} in {out}\n'
    stored = load_file(out / 'adapter_model.safetensors')
    assert len(stored) == (14 if len(targets) == 1 else 4)
    adapters = models.split_adapters(params)[1]
    merged = models.merge_adapters(
        prepared.model.config, parameters.initial_params(prepared), adapters
    )
    base, complaints = checkpoints.open_torch(source)
    assert not complaints
    plain = checkpoints.completion_logits(base, ROLLOUT)
    model = peft.PeftModel.from_pretrained(base, out).eval()
    loaded = peft.get_peft_model_state_dict(model)
    assert {name: tensor.shape for name, tensor in loaded.items()} == {
        name: torch.Size(tensor.shape) for name, tensor in stored.items()
    }
    theirs = checkpoints.completion_logits(model, ROLLOUT)
    assert checkpoints.error(naive(prepared, merged), theirs) < 1e-5
    assert checkpoints.error(plain, theirs) > 0.01
    assert load_tokenizer(str(out)).encode('1+1=') == list(b'1+1=')


def phi3(folder):
    """A checkpoint whose projections are stacked."""
    import transformers

    usual = transformers.CONFIG_MAPPING['phi3'](
        vocab_size=folders.VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=folders.EOS, pad_token_id=256,
    )  # fmt: skip
    fields = usual.to_dict() | {'architectures': ['Phi3ForCausalLM']}
    fields = {k: v for k, v in fields.items() if v is not None}
    model = models.Transformer(hf.model_config(fields))
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(fields))
    byte_tokenizer().save_pretrained(folder)
    hf.save(tiny.make_params(model), model.config, fields, folder, dtype='float32')
    return folder


WITHOUT_ADAPTER = 'the run has no adapters of a pretrained checkpoint: it trained all weights, or'
REFUSED = {
    'all weights': (lambda path, source: folders.get_config(source), WITHOUT_ADAPTER),
    'after SFT': (lambda path, source: folders.get_config(source, rank=2, sft=2), WITHOUT_ADAPTER),
    'from scratch': (lambda path, source: scratch(rank=2), WITHOUT_ADAPTER),
    'stacked': (
        lambda path, source: folders.get_config(phi3(path / 'phi3'), rank=2),
        r'Phi3ForCausalLM stacks projections \(self_attn.qkv_proj, mlp.gate_up_proj\), for which P',
    ),
}


@pytest.mark.parametrize('kind', REFUSED)
def test_adapters_that_cannot_be_exported(kind, source, tmp_path):
    make, message = REFUSED[kind]
    config = make(tmp_path, source)
    if kind == 'after SFT':
        make_run(tmp_path / 'run', config=config, stage='sft')
    make_run(tmp_path / 'run', config=config)
    (tmp_path / 'outside').mkdir()
    with pytest.raises(ValueError, match=message) as error:
        export.export_adapter(config, str(tmp_path / 'run'), str(tmp_path / 'outside' / 'out'))
    assert '\n' not in str(error.value)
    assert not list((tmp_path / 'outside').iterdir())
    export.export(config, str(tmp_path / 'run'), str(tmp_path / 'outside' / 'out'))


def test_adapters_of_an_unfinished_sft_can_be_exported(source, tmp_path):
    config = folders.get_config(source, rank=2, sft=2)
    make_run(tmp_path / 'run', config=config, stage='sft', step=1)
    export.export_adapter(config, str(tmp_path / 'run'), str(tmp_path / 'out'))
    assert read(tmp_path / 'out' / 'adapter_config.json')['base_model_name_or_path'] == str(source)


# The folder


def test_the_output_folder(plain, tmp_path):
    workdir, config, *_ = plain
    for name in ('file', 'full', 'empty'):
        (tmp_path / name).mkdir()
    (tmp_path / 'full' / 'precious.txt').write_text('mine')
    (tmp_path / 'file' / 'out').write_text('mine')
    for out in (tmp_path / 'full', tmp_path / 'file' / 'out'):
        message = f'--output={out} is not empty: name a new folder'
        with pytest.raises(ValueError, match=re.escape(message)):
            export.export(config, str(workdir), str(out))
    kept = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob('*'))
    assert kept == ['empty', 'file', 'file/out', 'full', 'full/precious.txt']
    assert (tmp_path / 'full' / 'precious.txt').read_text() == 'mine'
    (tmp_path / 'empty.partial').mkdir()  # somebody's
    (tmp_path / 'empty.partial' / 'old.json').touch()
    (tmp_path / 'link').symlink_to('empty')
    export.export(config, str(workdir), str(tmp_path / 'link'))
    assert (tmp_path / 'empty' / 'model.safetensors').is_file()
    assert not (tmp_path / 'empty' / 'old.json').exists()
    assert (tmp_path / 'empty.partial' / 'old.json').is_file()
    names = ['empty', 'empty.partial', 'file', 'full', 'link']
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / 'empty').stat().st_mode == (tmp_path / 'full').stat().st_mode


def test_numbers_that_are_not_finite_are_not_exported(tmp_path):
    config, _, params = make_run(tmp_path / 'run', config=scratch())
    spoiled = jax.tree.map(np.array, params)
    spoiled['final_norm']['scale'][:2] = np.nan, -np.inf
    folders.pretend(config, tmp_path / 'run', spoiled, step=7)
    message = r'checkpoint grpo/7: 2 numbers are NaN or infinite \(2 in final_norm/scale\)'
    with pytest.raises(ValueError, match=message):
        export.export(config, str(tmp_path / 'run'), str(tmp_path / 'out'))
    with pytest.raises(ValueError, match=message):
        heldout.answer(config, tmp_path / 'run')
    assert not (tmp_path / 'out').exists()


def test_links_out_of_the_checkpoint_are_not_followed(tmp_path, caplog):
    secret, hub = tmp_path / 'secret.json', tmp_path / 'models--a--b'
    secret.write_text('{}')
    snapshot = hub / 'snapshots' / 'abc'
    for folder in (snapshot, hub / 'blobs', tmp_path / 'copy'):
        folder.mkdir(parents=True)
    (hub / 'blobs' / '123').write_text('{"a": 1}')
    (snapshot / 'config.json').symlink_to('../../blobs/123')
    (snapshot / 'stolen.json').symlink_to(secret)
    (snapshot / 'folder.json').mkdir()
    (snapshot / 'private.txt').write_text('mine')
    (snapshot / 'private.txt').chmod(0o600)
    hf.copy_description(snapshot, tmp_path / 'copy')
    assert sorted(path.name for path in (tmp_path / 'copy').iterdir()) == [
        'config.json', 'private.txt',
    ]  # fmt: skip
    assert (tmp_path / 'copy' / 'private.txt').stat().st_mode & 0o777 == 0o600
    assert 'stolen.json is a link to a file outside of its folder' in caplog.text


def test_an_export_that_fails_leaves_nothing(plain, tmp_path, monkeypatch):
    workdir, config, *_ = plain

    def fail(*arguments, **options):
        raise OSError('the disk is full')

    monkeypatch.setattr(hf.weights, 'save_file', fail)
    with pytest.raises(OSError, match='the disk is full'):
        export.export(config, str(workdir), str(tmp_path / 'out'))
    assert not list(tmp_path.iterdir())


def test_a_model_that_no_architecture_is_like(tmp_path):
    config, *_ = make_run(tmp_path / 'run', config=scratch(norms='both'))
    with pytest.raises(ValueError, match='no Hugging Face architecture is like ModelConfig'):
        export.export(config, str(tmp_path / 'run'), str(tmp_path / 'out'))
    assert [path.name for path in tmp_path.iterdir()] == ['run']


# The command


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--workdir={run}'], '--output=FOLDER is missing: name the folder to write'),
        (['--output={out}'], '--workdir=FOLDER is missing: name the folder of the run'),
        (['--workdir={out}', '--output={out}'], '{out}/config.json: no such file: --workdir has '),
        (
            ['--workdir={run}', '--output={out}', '--dtype=int8'],
            '--dtype=int8: use one of float32, bfloat16, float16',
        ),
        (
            ['--workdir={run}', '--output={out}', '--dtype=float32', '--adapter'],
            '--dtype has no effect with --adapter, which is float32: remove it',
        ),
        (['--workdir={run}', '--output={out}', '--adaptor'], "unexpected argument '--adaptor'"),
        (['--workdir={run}', '--output={out}', '--adapter'], WITHOUT_ADAPTER),
        (
            ['--workdir={run}', '--output={out}', '--config.model.width=64'],
            'model.width=64 has no effect with pretrained=',
        ),
        (
            ['--workdir={run}', '--output={out}', '--config.mesh.fsdp=16'],
            'mesh fsdp=16 x tensor=1 needs 16 devices',
        ),
    ],
)
def test_mistakes_are_one_line(arguments, message, plain, tmp_path, monkeypatch, capsys):
    names = {'run': plain[0], 'out': tmp_path / 'out'}
    given = [argument.format(**names) for argument in arguments]
    monkeypatch.setattr('sys.argv', ['export', *given])
    with pytest.raises(SystemExit) as stopped:
        export.run()
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ''
    assert printed.err.startswith(f'error: {message.format(**names)}')
    assert printed.err.count('\n') == 1
    assert not list(tmp_path.iterdir())


def test_the_command(adapted, tmp_path, monkeypatch):
    workdir, *_ = adapted
    for name, options in (('merged', ['--dtype=bfloat16']), ('adapter', ['--adapter'])):
        out = f'--output={tmp_path / name}'
        monkeypatch.setattr('sys.argv', ['export', f'--workdir={workdir}', out, *options])
        export.run()
    stored = load_file(tmp_path / 'merged' / 'model.safetensors')
    assert {tensor.dtype.name for tensor in stored.values()} == {'bfloat16'}
    assert len(load_file(tmp_path / 'adapter' / 'adapter_model.safetensors')) == 14
    assert read(tmp_path / 'adapter' / 'adapter_config.json')['r'] == 2
