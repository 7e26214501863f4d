"""Weights in and out of Hugging Face folders: bit for bit, with errors that name the tensors."""

import functools
import json
import shutil

import checkpoints
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import tiny
from checkpoints import torch, transformers
from test_families import torch_scorer

from grpo_jax import models, sharding
from grpo_jax.models import hf
from grpo_jax.models.hf import hugging_face_fields, model_config
from grpo_jax.models.hf.families import FAMILIES

TOKENS = torch.tensor([[3, 14, 15, 9, 2, 6, 5, 35, 8]])


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A function from a family and a dtype to a folder with such a checkpoint."""

    @functools.cache
    def make(kind, dtype=torch.float32, **options):
        model = checkpoints.make_torch(checkpoints.make_config(kind)).to(dtype)
        return checkpoints.save(model, tmp_path_factory.mktemp(kind), **options)

    return make


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of a checkpoint, for tests that damage it."""
    return shutil.copytree(checkpoint('llama'), tmp_path / 'copy')


def tensors_of(folder):
    """All tensors, as the library of the format reads them."""
    tensors = {}
    for path in sorted(folder.glob('*.safetensors')):
        tensors |= safetensors.torch.load_file(path)
    return tensors


def same_tensors(a, b):
    a, b = tensors_of(a), tensors_of(b)
    equal = {name: a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a}
    return a.keys() == b.keys() and all(equal.values())


def rewrite(folder, change):
    """Changes the tensors of a folder with a single file."""
    tensors = tensors_of(folder)
    change(tensors)
    safetensors.torch.save_file(tensors, folder / 'model.safetensors', metadata={'format': 'pt'})


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# Import


def test_parameters_by_hand(checkpoint):
    """Where a few tensors of each kind go."""
    folder = checkpoint('llama')
    tensors = {name: tensor.numpy() for name, tensor in tensors_of(folder).items()}
    model, params, _ = checkpoints.read(folder)
    block = params['blocks']
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, tiny.shapes(model))
    np.testing.assert_array_equal(params['embedding'], tensors['model.embed_tokens.weight'])
    np.testing.assert_array_equal(params['head'], tensors['lm_head.weight'].T)
    layer = {name: tensors[f'model.layers.1.{name}.weight'] for name in (
        'self_attn.k_proj', 'self_attn.o_proj', 'mlp.down_proj', 'post_attention_layernorm',
    )}  # fmt: skip
    key = layer['self_attn.k_proj'].T.reshape(32, 2, 8)
    np.testing.assert_array_equal(block['key'][1], key)
    np.testing.assert_array_equal(block['out'][1], layer['self_attn.o_proj'].T.reshape(4, 8, 32))
    np.testing.assert_array_equal(block['down'][1], layer['mlp.down_proj'].T)
    np.testing.assert_array_equal(block['mlp_norm']['scale'][1], layer['post_attention_layernorm'])


def test_sharded_files_are_read(checkpoint):
    one, several = checkpoint('qwen3_moe'), checkpoint('qwen3_moe', max_shard_size='20KB')
    assert len(list(one.glob('*.safetensors'))) == 1
    assert len(list(several.glob('*.safetensors'))) > 3
    assert tiny.same(checkpoints.read(several)[1], checkpoints.read(one)[1])


@pytest.mark.parametrize(
    ('stored', 'held'),  # exports show the other three
    [(torch.bfloat16, 'float32'), (torch.float32, 'bfloat16'), (torch.float16, 'bfloat16')],
)
def test_dtypes(checkpoint, stored, held):
    """Values are rounded once, to the nearest, where the parameters are narrower."""
    tensors = tensors_of(checkpoint('llama', stored))
    params = checkpoints.read(checkpoint('llama', stored), param_dtype=held)[1]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {held}
    for ours, name in (
        (params['embedding'], 'model.embed_tokens.weight'),
        (params['blocks']['up'][2].T, 'model.layers.2.mlp.up_proj.weight'),
        (params['final_norm']['scale'], 'model.norm.weight'),
    ):
        assert tensors[name].dtype == stored
        expected = tensors[name].to(getattr(torch, held)).float().numpy()
        np.testing.assert_array_equal(np.asarray(ours, np.float32), expected)


@pytest.mark.parametrize('base', ['int8', 'nf4'])
@pytest.mark.parametrize('kind', ['qwen2', 'phi3', 'mixtral'])
def test_matrices_are_quantized_as_they_are_read(checkpoint, kind, base):
    """Bit for bit what quantizing all parameters gives, also of stacked tensors and experts."""
    folder = checkpoint(kind)
    model, params, _ = checkpoints.read(folder)
    mesh = sharding.make_mesh(fsdp=2, tensor=2)
    made = hf.load(folder, model.config, tiny.shapes(model), mesh, base=base)
    expected = jax.jit(models.quantize_base, static_argnums=1)(params, base)
    assert jax.tree.structure(made) == jax.tree.structure(expected)
    assert tiny.same(made, expected)
    where = sharding.shardings(made, mesh)
    for leaf, place in zip(jax.tree.leaves(made), jax.tree.leaves(where), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


@pytest.mark.skipif(jax.device_count() < 8, reason='needs eight devices')
@pytest.mark.parametrize('kind', ['qwen2', 'phi3', 'qwen3_moe'])
def test_onto_a_mesh(checkpoint, kind):
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    model, params, _ = checkpoints.read(checkpoint(kind), mesh)
    wanted = sharding.shardings(tiny.shapes(model), mesh)
    lies = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), params, wanted)
    assert all(jax.tree.leaves(lies))
    assert not params['blocks']['gate'].sharding.is_fully_replicated
    assert tiny.same(params, checkpoints.read(checkpoint(kind))[1])


def old_fields(fields):
    """A config.json as transformers 4 would have written it."""
    rope = fields.pop('rope_parameters')
    if 'full_attention' in rope:
        fields['rope_local_base_freq'] = rope['sliding_attention']['rope_theta']
        rope = rope['full_attention']
        fields['sliding_window_pattern'] = 3
        del fields['layer_types']
    fields['rope_theta'] = rope.pop('rope_theta')
    fields['partial_rotary_factor'] = rope.pop('partial_rotary_factor', 1.0)
    kind = rope.pop('rope_type')
    name = 'rope_type' if fields['model_type'] == 'gemma3_text' else 'type'
    fields['rope_scaling'] = None if kind == 'default' else {name: kind, **rope}
    fields['torch_dtype'] = fields.pop('dtype')
    fields['transformers_version'] = '4.40.0'
    if fields['model_type'] == 'qwen3_moe':
        fields['num_experts'] = fields.pop('num_local_experts')


@pytest.mark.parametrize('kind', ['llama', 'gemma3_text', 'qwen3_moe', 'phi3'])
def test_an_old_config_means_the_same(checkpoint, kind):
    fields = hf.read_json(checkpoint(kind) / 'config.json')
    if kind == 'llama':
        fields['rope_parameters'] = {'rope_type': 'linear', 'rope_theta': 70.0, 'factor': 2.0}
    if kind == 'gemma3_text':
        fields['rope_parameters']['full_attention'] |= {'rope_type': 'linear', 'factor': 8.0}
    old = json.loads(json.dumps(fields))
    old_fields(old)
    assert old.keys() ^ fields.keys() >= {'torch_dtype', 'rope_theta', 'rope_parameters'}
    assert model_config(old) == model_config(fields)
    assert model_config(fields).rope_theta != 0


def test_tensors_without_use_are_let_be(broken):
    """What older checkpoints stored besides: rotary frequencies, and a tied head."""
    edit_json(broken / 'config.json', lambda fields: fields.update(tie_word_embeddings=True))

    def add(tensors):
        tensors['model.rotary_emb.inv_freq'] = torch.ones(4)
        tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].clone()

    rewrite(broken, add)
    _, params, _ = checkpoints.read(broken)
    assert 'head' not in params


def test_a_tied_head_that_differs_is_refused(broken):
    """transformers does not tie it: the config and what is stored cannot both be right."""
    edit_json(broken / 'config.json', lambda fields: fields.update(tie_word_embeddings=True))
    message = refusal(broken)
    assert 'lm_head.weight differs from model.embed_tokens.weight, but config.json has ' in message
    assert 'tie_word_embeddings=true: set it to false' in message
    edit_json(broken / 'config.json', lambda fields: fields.update(tie_word_embeddings=False))
    assert 'head' in checkpoints.read(broken)[1]


def test_a_tied_embedding_may_be_stored_as_the_head(broken):
    edit_json(broken / 'config.json', lambda fields: fields.update(tie_word_embeddings=True))
    expected = tensors_of(broken)['lm_head.weight'].numpy()
    rewrite(broken, lambda tensors: tensors.pop('model.embed_tokens.weight'))
    params = checkpoints.read(broken)[1]
    np.testing.assert_array_equal(params['embedding'], expected)
    reference, complaints = checkpoints.open_torch(broken)
    np.testing.assert_array_equal(reference.get_input_embeddings().weight.detach(), expected)
    assert not complaints


def test_a_single_file_comes_before_shards(checkpoint, tmp_path):
    """As in transformers; also where the other files are no part of the checkpoint."""
    folder = shutil.copytree(checkpoint('llama', max_shard_size='20KB'), tmp_path / 'copy')
    single = checkpoint('qwen3')
    shutil.copyfile(single / 'model.safetensors', folder / 'model.safetensors')
    shutil.copyfile(single / 'config.json', folder / 'config.json')
    assert tiny.same(checkpoints.read(folder)[1], checkpoints.read(single)[1])
    assert not checkpoints.open_torch(folder)[1]
    shutil.copyfile(single / 'model.safetensors', folder / 'consolidated.safetensors')
    assert tiny.same(checkpoints.read(folder)[1], checkpoints.read(single)[1])


# Refusals


def refusal(folder):
    """The message with which the folder is refused."""
    with pytest.raises(ValueError, match=r'.') as caught:
        checkpoints.read(hf.find_folder(str(folder)))
    return str(caught.value)


def test_all_tensors_that_do_not_fit_are_named(broken):
    def damage(tensors):
        del tensors['model.norm.weight'], tensors['model.layers.2.mlp.up_proj.weight']
        tensors['model.layers.0.self_attn.q_proj.bias'] = torch.zeros(32)
        tensors['model.layers.1.self_attn.k_proj.weight'] = torch.zeros(32, 16)
        tensors['model.layers.1.self_attn.o_proj.weight'] = torch.zeros(32, 32, dtype=torch.int8)

    rewrite(broken, damage)
    message = refusal(broken)
    assert f'{broken}: 5 tensors do not fit its config.json: ' in message
    for part in (
        'model.norm.weight is missing',
        'model.layers.2.mlp.up_proj.weight is missing',
        'model.layers.0.self_attn.q_proj.bias is unknown',
        'model.layers.1.self_attn.k_proj.weight has shape (32, 16), config.json says (16, 32)',
        'model.layers.1.self_attn.o_proj.weight is stored as I8, not as a float',
    ):
        assert part in message


def test_a_long_list_of_tensors_is_cut(broken):
    edit_json(broken / 'config.json', lambda fields: fields.update(num_hidden_layers=9))
    message = refusal(broken)
    assert '54 tensors do not fit' in message
    assert message.count('is missing') == 20
    assert message.endswith('; and 34 more')


def test_stored_names_are_shown_beside_missing_ones(broken):
    def rename(tensors):
        for name in [*tensors]:
            tensors[f'transformer.{name}'] = tensors.pop(name)

    rewrite(broken, rename)
    message = refusal(broken)
    assert '60 tensors do not fit' in message
    assert message.count('is missing') == message.count('is unknown') == 10
    assert 'transformer.model.embed_tokens.weight is unknown' in message
    assert message.endswith('; and 40 more')


def test_a_folder_of_an_adapter_names_its_base(broken, tmp_path):
    (tmp_path / 'adapter_config.json').write_text('{"base_model_name_or_path": "some/base"}')
    (tmp_path / 'adapter_model.safetensors').write_bytes(b'')
    assert f'{tmp_path} holds an adapter of some/base, not a model. Merge' in refusal(tmp_path)
    (broken / 'adapter_config.json').write_text('{}')  # transformers would load another base
    assert f'{broken} holds an adapter of an unnamed base' in refusal(broken)


def test_fused_and_expert_tensors_are_checked(checkpoint, tmp_path):
    phi3 = shutil.copytree(checkpoint('phi3'), tmp_path / 'phi3')
    fused = 'model.layers.0.self_attn.qkv_proj.weight'
    rewrite(phi3, lambda t: t.update({fused: torch.zeros(96, 32)}))
    assert f'{fused} has shape (96, 32), config.json says (64, 32)' in refusal(phi3)
    mixtral = shutil.copytree(checkpoint('mixtral'), tmp_path / 'mixtral')
    expert = 'model.layers.1.block_sparse_moe.experts.4.w2.weight'
    rewrite(mixtral, lambda t: t.pop(expert))
    assert f'1 tensors do not fit its config.json: {expert} is missing' in refusal(mixtral)


def test_pickled_weights_are_refused_with_the_command_that_converts_them(broken, capsys):
    tensors = tensors_of(broken)
    (broken / 'model.safetensors').unlink()
    torch.save(tensors, broken / 'pytorch_model.bin')
    message = refusal(broken)
    assert f'{broken} holds pickled weights (pytorch_model.bin), which can run code' in message
    assert 'import AutoModelForCausalLM as M' in message
    command = message.split('python -c "')[1].removesuffix('"')
    exec(command, {})  # in place of a Python of its own, which would take ten times as long
    converted = hf.find_folder(f'{broken}-safe')
    read = tensors_of(converted)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    scorer = {'architectures': ['LlamaForSequenceClassification']}
    edit_json(broken / 'config.json', lambda fields: fields.update(scorer))
    assert 'import AutoModelForSequenceClassification as M' in refusal(broken)


@pytest.mark.parametrize('size', [0, 5, 200, -64])
def test_a_truncated_file(broken, size):
    path = broken / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:size])
    message = refusal(broken)
    assert str(path) in message
    assert ('was cut off' if size == -64 else 'is not a safetensors file') in message


@pytest.mark.parametrize(
    'content',
    [b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', b'\2' + 7 * b'\0' + b'[]'],
    ids=['pointer of git-lfs', 'other JSON'],
)
def test_another_file_in_place_of_the_weights(broken, content):
    (broken / 'model.safetensors').write_bytes(content)
    assert 'model.safetensors is not a safetensors file' in refusal(broken)


def test_a_header_that_lies_about_its_tensors(broken):
    """Shorter data than the shape says: another tensor's bytes must not be read as the rest."""
    path = broken / 'model.safetensors'
    content = path.read_bytes()
    size = int.from_bytes(content[:8], 'little')
    header = json.loads(content[8 : 8 + size])
    header['model.embed_tokens.weight']['data_offsets'][1] -= 4
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, 'little') + text + content[8 + size :])
    assert 'model.embed_tokens.weight' in refusal(broken)


def reheaded(broken, change):
    """Changes the header of the weights, and returns the message with which they are refused."""
    path = broken / 'model.safetensors'
    content = path.read_bytes()
    size = int.from_bytes(content[:8], 'little')
    header = json.loads(content[8 : 8 + size])
    text = change(header)
    text = json.dumps(header).encode() if text is None else text
    path.write_bytes(len(text).to_bytes(8, 'little') + text + content[8 + size :])
    return refusal(broken)


def shift(header, by):
    """Moves the data of a norm, whose shape stays."""
    offsets = header['model.norm.weight']['data_offsets']
    offsets[:] = [offset + by for offset in offsets]


NORM, EMBEDDING = 'model.norm.weight', 'model.embed_tokens.weight'
DAMAGED = {
    'negative offsets': lambda h: h[NORM].update(data_offsets=[-128, 0]),
    'reversed offsets': lambda h: h[NORM]['data_offsets'].reverse(),
    'a hole or an overlap': lambda h: shift(h, -4),
    'the same data twice': lambda h: h[NORM].update(
        data_offsets=h['model.layers.0.input_layernorm.weight']['data_offsets']
    ),
    'one offset': lambda h: h[NORM].update(data_offsets=[0]),
    'no offsets': lambda h: h[NORM].pop('data_offsets') and None,
    'offsets that are no numbers': lambda h: h[NORM].update(data_offsets=['0', '128']),
    'fractions': lambda h: h[NORM].update(data_offsets=[0.0, 128.0]),
    'huge offsets': lambda h: h[NORM].update(data_offsets=[10**30, 10**30 + 128]),
    'truth values': lambda h: h[NORM].update(shape=[True]),
    'a negative shape': lambda h: h[NORM].update(shape=[-32, -1]),
    'a shape that is no list': lambda h: h[NORM].update(shape=32),
    'a type that is no text': lambda h: h[NORM].update(dtype=['F32']),
    'a type that is unknown': lambda h: h[NORM].update(dtype='F31'),
    'no entry': lambda h: h.update({NORM: None}),
    'a list in place of an entry': lambda h: h.update({NORM: [1]}),
    'nested lists': lambda h: b'[' * 100_000,
    'a lone surrogate': lambda h: b'{"\\ud800": 1}',
    'bytes that are no text': lambda h: b'{"\xff": 1}',
    'metadata alone': lambda h: b'{"__metadata__": {"a": "b"}}',
}


@pytest.mark.parametrize('name', DAMAGED)
def test_a_damaged_header(broken, name):
    message = reheaded(broken, DAMAGED[name])
    assert 'model.safetensors' in message or name == 'metadata alone'
    assert len(message) < 5000


@pytest.mark.parametrize('name', ['../x.safetensors', '/x.safetensors', '..', 3, None, 'a\0b'])
def test_an_index_cannot_name_files_elsewhere(checkpoint, tmp_path, name):
    folder = shutil.copytree(checkpoint('llama', max_shard_size='20KB'), tmp_path / 'a' / 'copy')
    shutil.copy(next(folder.glob('*.safetensors')), tmp_path / 'a' / 'x.safetensors')
    index = folder / 'model.safetensors.index.json'
    edit_json(index, lambda fields: fields['weight_map'].update({NORM: name}))
    assert f'names the file {name!r}, which is not in its folder' in refusal(folder)


def test_a_missing_shard(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint('llama', max_shard_size='20KB'), tmp_path / 'copy')
    lost = sorted(folder.glob('*.safetensors'))[1]
    lost.unlink()
    message = refusal(folder)
    assert f'model.safetensors.index.json names files that do not exist: {lost.name}' in message


def test_broken_json(broken):
    path = broken / 'config.json'
    path.write_text('{"model_type": ')
    assert f'{path} is not valid JSON' in refusal(broken)
    path.write_text('[]')
    assert f'{path} holds list, not a JSON object' in refusal(broken)


@pytest.mark.parametrize('text', ['{', '{}', '{"weight_map": []}'])
def test_a_broken_index(checkpoint, tmp_path, text):
    folder = shutil.copytree(checkpoint('llama', max_shard_size='20KB'), tmp_path / 'copy')
    path = folder / 'model.safetensors.index.json'
    path.write_text(text)
    assert str(path) in refusal(folder)


def test_folders_that_are_no_checkpoint(tmp_path, monkeypatch, checkpoint):
    assert 'holds no config.json' in refusal(tmp_path)
    (tmp_path / 'config.json').write_text('{}')
    assert 'holds no *.safetensors file' in refusal(tmp_path)

    def offline(name, **_):
        raise OSError('no network')

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
    message = refusal('somebody/some-model')
    assert "pretrained='somebody/some-model' is neither a folder nor a checkpoint" in message
    assert 'no network' in message
    monkeypatch.setattr(
        huggingface_hub, 'snapshot_download', lambda name, **_: str(checkpoint('llama'))
    )
    assert hf.find_folder('somebody/some-model') == checkpoint('llama')


# Export


def export(folder, source, *, dtype, held='float32', **options):
    """Writes what was imported from `source`, with its config.json; returns the folder."""
    model, params, raw = checkpoints.read(source, param_dtype=held)
    folder.mkdir()
    size = hf.save(params, model.config, raw, folder, dtype=dtype, **options)
    shutil.copy(source / 'config.json', folder)
    assert size == sum(t.numel() * t.element_size() for t in tensors_of(folder).values())
    return folder


@pytest.mark.parametrize(
    ('kind', 'dtype'),
    [(kind, 'bfloat16') for kind in FAMILIES]
    + [('phi3', 'float32'), ('qwen3_moe', 'float32')]
    + [
        pytest.param(kind, 'float32', marks=pytest.mark.slow)
        for kind in FAMILIES
        if kind not in ('phi3', 'qwen3_moe')
    ],
)
def test_export_gives_back_what_was_imported(checkpoint, tmp_path, kind, dtype):
    """Bit for bit, and transformers has nothing to say about it."""
    source = checkpoint(kind, getattr(torch, dtype))
    exported = export(tmp_path / 'out', source, dtype=dtype, held=dtype)
    assert same_tensors(exported, source)
    before, _ = checkpoints.open_torch(source, getattr(torch, dtype))
    after, complaints = checkpoints.open_torch(exported, getattr(torch, dtype))
    assert not complaints
    with torch.no_grad():
        assert torch.equal(before(TOKENS).logits, after(TOKENS).logits)


@pytest.mark.parametrize('stored', ['bfloat16', 'float16'])
def test_float32_parameters_hold_narrower_checkpoints_exactly(checkpoint, tmp_path, stored):
    source = checkpoint('qwen2', getattr(torch, stored))
    assert same_tensors(export(tmp_path / 'out', source, dtype=stored), source)


def test_tied_embeddings_are_written_once(tmp_path):
    config = checkpoints.make_config('qwen2', tie_word_embeddings=True)
    source = checkpoints.save(checkpoints.make_torch(config), tmp_path / 'in')
    exported = export(tmp_path / 'out', source, dtype='float32')
    assert same_tensors(exported, source)
    assert 'lm_head.weight' not in tensors_of(exported)
    assert not checkpoints.open_torch(exported)[1]


def test_export_in_shards(checkpoint, tmp_path):
    source, most = checkpoint('llama'), 12_000
    exported = export(tmp_path / 'out', source, dtype='float32', shard_bytes=most)
    assert same_tensors(exported, source)
    files = sorted(exported.glob('*.safetensors'))
    index = hf.read_json(exported / 'model.safetensors.index.json')
    assert files[-1].name == f'model-{len(files):05}-of-{len(files):05}.safetensors'
    assert index['metadata']['total_size'] == sum(
        4 * tensor.numel() for tensor in tensors_of(source).values()
    )
    for path in files:
        held = safetensors.torch.load_file(path)
        assert {name for name, file in index['weight_map'].items() if file == path.name} == set(
            held
        )
        assert len(held) == 1 or sum(4 * tensor.numel() for tensor in held.values()) <= most
    assert not checkpoints.open_torch(exported)[1]
    assert tiny.same(checkpoints.read(exported)[1], checkpoints.read(source)[1])


@pytest.mark.skipif(jax.device_count() < 8, reason='needs eight devices')
def test_export_from_a_mesh(checkpoint, tmp_path):
    source = checkpoint('qwen3_moe')
    model, params, raw = checkpoints.read(source, sharding.make_mesh(fsdp=2, tensor=4))
    hf.save(params, model.config, raw, tmp_path, dtype='float32')
    assert same_tensors(tmp_path, source)


@pytest.mark.parametrize(
    'kind',
    ['llama', 'gemma3_text', *(pytest.param(k, marks=pytest.mark.slow) for k in ('qwen2', 'phi3'))],
)
def test_reward_models_in_and_out(tmp_path, kind):
    """Bit for bit, and transformers has nothing to say about it."""
    source = checkpoints.save(
        torch_scorer(checkpoints.make_config(kind, num_labels=1)), tmp_path / 'in'
    )
    _, params, _ = checkpoints.read(source)
    score = tensors_of(source)['score.weight']
    assert score.shape == (1, 32)
    np.testing.assert_array_equal(params['score'], score.numpy().T)
    exported = export(tmp_path / 'out', source, dtype='float32')
    assert same_tensors(exported, source)
    complaints = open_scorer(exported)[1]
    assert not complaints


def open_scorer(folder):
    """A reward model as transformers loads it, and complaints about its tensors."""
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    return model.eval(), {name: found for name, found in info.items() if found}


def test_a_head_beside_the_score_is_refused(tmp_path):
    """It would have no use, and what wrote it may have meant something else."""
    scorer = torch_scorer(checkpoints.make_config('llama', num_labels=1))
    folder = checkpoints.save(scorer, tmp_path / 'in')
    rewrite(folder, lambda t: t.update({'lm_head.weight': torch.ones(67, 32)}))
    assert '1 tensors do not fit its config.json: lm_head.weight is unknown' in refusal(folder)
    rewrite(folder, lambda t: (t.pop('lm_head.weight'), t.pop('score.weight')))
    assert 'score.weight is missing' in refusal(folder)


@pytest.mark.parametrize('tied', [True, False])
def test_export_of_a_reward_model_that_was_made_here(tmp_path, tied):
    model = tiny.make_model(scalar_head=True, attention_bias=True, head_dim=8, tied_head=tied)
    params = tiny.make_params(model)
    fields = hugging_face_fields(model.config)
    assert fields['architectures'] == ['Qwen2ForSequenceClassification']
    (tmp_path / 'config.json').write_text(json.dumps(fields))
    hf.save(params, model.config, fields, tmp_path, dtype='float32')
    again, read, _ = checkpoints.read(tmp_path, remat=True)
    assert again.config == model.config
    assert tiny.same(read, params)
    reference, complaints = open_scorer(tmp_path)
    assert not complaints
    assert reference.config.num_labels == 1


MADE_HERE = {
    'llama': {'attention_bias': True, 'out_bias': True, 'mlp_bias': True, 'tied_head': False},
    'qwen2': {'attention_bias': True, 'head_dim': 8},
    'qwen3': {'qk_norm': 'head', 'norm_eps': 1e-3},
    'qwen3_moe': {'qk_norm': 'head', 'experts': 4, 'experts_per_token': 2, 'mlp_width': 8},
}


@pytest.mark.parametrize(
    'kind',
    ['qwen3_moe', *(pytest.param(k, marks=pytest.mark.slow) for k in ('llama', 'qwen2', 'qwen3'))],
)
def test_export_of_a_decoder_that_was_made_here(tmp_path, kind):
    """transformers computes from the folder what we compute from the parameters."""
    model = tiny.make_model(remat=False, **MADE_HERE[kind])
    params, rollout = tiny.make_params(model), tiny.make_rollout()
    fields = hugging_face_fields(model.config)
    (tmp_path / 'config.json').write_text(json.dumps(fields))
    hf.save(params, model.config, fields, tmp_path, dtype='float32')
    reference, complaints = checkpoints.open_torch(tmp_path)
    assert not complaints
    assert type(reference).__name__ == FAMILIES[kind].architecture
    again, read, _ = checkpoints.read(tmp_path)
    assert again.config == model.config
    assert tiny.same(read, params)

    @tiny.jit
    def ours(params):
        prompts = rollout.prompts
        hidden = models.completion_hidden(
            model, params, prompts.tokens, prompts.length, rollout.tokens
        )
        return models.apply(model, params, hidden, method='logits')

    expected = checkpoints.completion_logits(reference, rollout)
    assert checkpoints.error(ours(params), expected) < 1e-5
