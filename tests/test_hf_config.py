"""A family's config.json: what it means, what of it the decoder lacks, and what is written back."""

import ast
import importlib
import inspect

import checkpoints
import published
import pytest
import tiny
from checkpoints import rope, transformers

from grpo_jax.models.hf import families, hugging_face_fields, model_config
from grpo_jax.models.hf.families import FAMILIES

# The telling fields of published checkpoints, as transformers 4 wrote them, and what they mean.
PUBLISHED = {
    'deepseek-math-7b': (
        'llama',
        {'rope_scaling': None, 'rope_theta': 10000.0, 'pretraining_tp': 1, 'attention_bias': False},
        {'rope_theta': 10000.0, 'rope_scaling': {}, 'head_dim': 8, 'tied_head': False},
    ),
    'deepseek-coder-6.7b': (
        'llama',
        {'rope_scaling': {'factor': 4.0, 'type': 'linear'}, 'rope_theta': 100000},
        {'rope_theta': 1e5, 'rope_scaling': {'rope_type': 'linear', 'factor': 4.0}},
    ),
    'Llama-3.2-1B': (
        'llama',
        {
            'rope_scaling': {
                'factor': 32.0, 'high_freq_factor': 4.0, 'low_freq_factor': 1.0,
                'original_max_position_embeddings': 8192, 'rope_type': 'llama3',
            },
            'rope_theta': 500000.0, 'max_position_embeddings': 131072, 'mlp_bias': False,
            'tie_word_embeddings': True, 'head_dim': 64,
        },
        {
            'rope_scaling': {
                'factor': 32.0, 'high_freq_factor': 4.0, 'low_freq_factor': 1.0,
                'original_max_position_embeddings': 8192, 'rope_type': 'llama3',
            },
            'rope_theta': 5e5, 'tied_head': True, 'head_dim': 64,
        },
    ),
    'Mistral-7B-v0.1': (
        'mistral',
        {'rope_theta': 10000.0, 'sliding_window': 4096},
        {'window': 4096, 'window_layers': (0, 1, 2), 'head_dim': 8},
    ),
    'Mistral-7B-v0.3': ('mistral', {'rope_theta': 1e6, 'sliding_window': None}, {'window': 0}),
    'Qwen2.5-1.5B': (
        'qwen2',
        {
            'max_window_layers': 28, 'rope_theta': 1000000.0, 'sliding_window': 131072,
            'tie_word_embeddings': True, 'use_mrope': False, 'use_sliding_window': False,
        },
        {'window': 0, 'attention_bias': True, 'out_bias': False, 'rope_theta': 1e6},
    ),
    'Qwen3-4B': (
        'qwen3',
        {
            'attention_bias': False, 'head_dim': 128, 'max_window_layers': 36,
            'rope_scaling': None, 'rope_theta': 1000000, 'sliding_window': None,
            'use_sliding_window': False,
        },
        {'window': 0, 'head_dim': 128, 'qk_norm': 'head', 'attention_bias': False},
    ),
    'gemma-2-2b': (
        'gemma2',
        {
            'attn_logit_softcapping': 50.0, 'cache_implementation': 'hybrid', 'head_dim': 256,
            'final_logit_softcapping': 30.0, 'hidden_act': 'gelu_pytorch_tanh',
            'hidden_activation': 'gelu_pytorch_tanh', 'query_pre_attn_scalar': 256,
            'rope_theta': 10000.0, 'sliding_window': 4096,
        },
        {
            'attention_softcap': 50.0, 'logit_softcap': 30.0, 'attention_scale': 1 / 16,
            'activation': 'gelu_tanh', 'window': 4096, 'window_layers': (0, 2), 'norms': 'both',
            'embedding_scaled': True, 'norm_plus_one': True, 'tied_head': True,
        },
    ),
    'gemma-3-1b-it': (
        'gemma3_text',
        {
            'attn_logit_softcapping': None, 'cache_implementation': 'hybrid', 'head_dim': 256,
            'eos_token_id': [1, 106], 'final_logit_softcapping': None, 'num_hidden_layers': 8,
            'hidden_activation': 'gelu_pytorch_tanh', 'query_pre_attn_scalar': 256,
            'rope_local_base_freq': 10000, 'rope_scaling': None, 'rope_theta': 1000000,
            'sliding_window': 512, 'sliding_window_pattern': 6,
        },
        {
            'window': 512, 'window_layers': (0, 1, 2, 3, 4, 6, 7), 'rope_theta': 1e6,
            'local_rope_theta': 1e4, 'qk_norm': 'head', 'tied_head': True,
        },
    ),
    'Phi-4-mini-instruct': (
        'phi3',
        {
            'attention_bias': False, 'auto_map': {'AutoConfig': 'configuration_phi3.Phi3Config'},
            'embd_pdrop': 0.0, 'full_attn_mod': 1, 'interpolate_factor': 1, 'lm_head_bias': False,
            'max_position_embeddings': 131072, 'mlp_bias': False, 'partial_rotary_factor': 0.75,
            'original_max_position_embeddings': 4096, 'resid_pdrop': 0.0, 'rope_theta': 10000.0,
            'rope_scaling': {
                'long_factor': [2, 3, 4], 'short_factor': [1, 1, 1.5], 'type': 'longrope',
            },
            'sliding_window': 262144,
        },
        {
            'rope_fraction': 0.75, 'window': 262144,
            'rope_scaling': {
                'rope_type': 'longrope', 'long_factor': [2, 3, 4], 'short_factor': [1, 1, 1.5],
                'factor': 32.0, 'original_max_position_embeddings': 4096,
            },
        },
    ),
    'SmolLM2-1.7B': (
        'llama',
        {
            'is_llama_config': True, 'rope_interleaved': False, 'rope_theta': 130000,
            'rope_scaling': None, 'transformers.js_config': {'dtype': 'q4'},
        },
        {'rope_theta': 130000.0},
    ),
    'SmolLM3-3B': (
        'smollm3',
        {
            'layer_types': ['full_attention'] * 8, 'max_window_layers': 28, 'pretraining_tp': 2,
            'no_rope_layer_interval': 4, 'no_rope_layers': [1, 1, 1, 0] * 2, 'rope_scaling': None,
            'num_hidden_layers': 8, 'rope_theta': 5000000.0, 'sliding_window': None,
            'use_sliding_window': False,
        },
        {'unrotated_layers': (3, 7), 'window': 0, 'rope_theta': 5e6},
    ),
    'Mixtral-8x7B-v0.1': (
        'mixtral',
        {
            'num_experts_per_tok': 2, 'num_local_experts': 8, 'output_router_logits': False,
            'rope_theta': 1000000.0, 'router_aux_loss_coef': 0.02, 'sliding_window': None,
        },
        {'experts': 8, 'experts_per_token': 2, 'normalize_experts': True, 'mlp_width': 40},
    ),
    'Qwen3-30B-A3B': (
        'qwen3_moe',
        {
            'decoder_sparse_step': 1, 'head_dim': 128, 'max_window_layers': 48,
            'mlp_only_layers': [], 'moe_intermediate_size': 768, 'norm_topk_prob': True,
            'num_experts': 128, 'num_experts_per_tok': 8, 'output_router_logits': False,
            'rope_scaling': None, 'rope_theta': 1000000.0, 'router_aux_loss_coef': 0.001,
            'sliding_window': None, 'use_sliding_window': False,
        },
        {'experts': 128, 'experts_per_token': 8, 'normalize_experts': True, 'mlp_width': 768},
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', PUBLISHED)
def test_fields_of_published_checkpoints(name):
    kind, fields, expected = PUBLISHED[name]
    common = {
        'model_type': kind, 'architectures': [FAMILIES[kind].architecture], 'hidden_act': 'silu',
        'attention_dropout': 0.0, 'rms_norm_eps': 1e-5, 'initializer_range': 0.02,
        'torch_dtype': 'bfloat16', 'transformers_version': '4.50.0', 'use_cache': True,
    }  # fmt: skip
    config = model_config(checkpoints.SIZES | common | fields, dtype='bfloat16')
    assert {option: getattr(config, option) for option in expected} == expected
    assert (config.norm_eps, config.dtype, config.kv_heads) == (1e-5, 'bfloat16', 2)


def raw_config(kind, **fields):
    return checkpoints.make_config(kind).to_dict() | {'architectures': None} | fields


@pytest.mark.parametrize(
    ('kind', 'fields', 'message'),
    [
        (
            'llama',
            {'model_type': 'gpt2'},
            r'architecture gpt2 is not supported: supported are Llama',
        ),
        (
            'llama',
            {'architectures': ['LlamaForTokenClassification']},
            r'architecture LlamaForTokenClassification is not supported',
        ),
        (
            'gemma3_text',
            {'attention_dropout': 0.1, 'attn_logit_softcapping': 9.0, 'pad_token_id': 3},
            r'fields that are not supported: attention_dropout=0.1, attn_logit_softcapping=9.0$',
        ),
        (
            'llama',
            {'hidden_act': 'relu'},
            r"activation 'relu' is not supported: supported are silu",
        ),
        ('llama', {'attention_dropout': 0.1}, r'not supported: attention_dropout=0.1$'),
        ('qwen3_moe', {'mlp_only_layers': [0]}, r'not supported: mlp_only_layers=\[0\]$'),
        ('qwen3_moe', {'decoder_sparse_step': 2}, r'not supported: decoder_sparse_step=2$'),
        ('llama', {'quantization_config': {'bits': 4}}, r'not supported: quantization_config='),
        (
            'gemma3_text',
            {'use_bidirectional_attention': True},
            r'use_bidirectional_attention=True$',
        ),
        ('gemma3_text', {'attn_logit_softcapping': 5.0}, r'attn_logit_softcapping=5.0$'),
        ('llama', rope('linear', factor=2.0, partial_rotary_factor=0.5), r'partial_rotary_factor'),
        (
            'gemma3_text',
            {
                'rope_parameters': {
                    'full_attention': {'rope_type': 'default', 'rope_theta': 10.0},
                    'sliding_attention': {'rope_type': 'linear', 'rope_theta': 10.0, 'factor': 2.0},
                }
            },
            r'rope scaling of windowed layers is not supported',
        ),
    ],
)
def test_configs_that_are_refused(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        model_config(raw_config(kind, **fields))


@pytest.mark.parametrize('name', published.CONFIGS)
def test_whole_configs_of_published_checkpoints(name):
    fields, expected = published.CONFIGS[name]
    config = model_config(fields, dtype='bfloat16')
    assert {option: getattr(config, option) for option in expected} == expected
    if 'text_config' not in fields:
        assert (config.width, config.layers) == (
            fields['hidden_size'], fields['num_hidden_layers'],
        )  # fmt: skip


def fields_read(kind):
    """The fields of a config that the code of transformers reads for a family of text models."""
    module = importlib.import_module(transformers.CONFIG_MAPPING[kind].__module__)
    path = module.__name__.replace('configuration', 'modeling')
    tree = ast.parse(inspect.getsource(importlib.import_module(path)))
    names = set()
    for part in tree.body:
        if getattr(part, 'name', '') in WITH_IMAGES:
            continue
        for node in ast.walk(part):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith('config'):
                names.add(node.attr)
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ('getattr', 'hasattr'):
                owner, name, *_ = node.args
                if ast.unparse(owner).endswith('config') and isinstance(name, ast.Constant):
                    names.add(name.value)
    return names


WITH_IMAGES = {
    'Gemma3Model', 'Gemma3MultiModalProjector', 'Gemma3ForConditionalGeneration',
    'Gemma3ForSequenceClassification', 'Gemma3PreTrainedModel', 'create_causal_mask_mapping',
    'get_block_sequence_ids_for_mask',
}  # fmt: skip
# What transformers calls a field whose older name a family's table has, and fields of positions.
RENAMED = {'num_experts': 'num_local_experts', 'partial_rotary_factor': 'rope_parameters'}


@pytest.mark.parametrize('kind', FAMILIES)
def test_the_fields_of_a_family_are_those_that_transformers_reads(kind):
    family = FAMILIES[kind]
    listed = {
        *families.COMMON_FIELDS.values(), *families.COMMON_SPECIAL, *families.UNUSED_FIELDS,
        *family.fields.values(), *family.special, *family.only,
    }  # fmt: skip
    everywhere = {*families.COMMON_ONLY, 'tie_word_embeddings', *families.UNUSED_FIELDS}
    read = {RENAMED.get(name, name) for name in fields_read(kind)}
    listed = {RENAMED.get(name, name) for name in listed}
    assert read - listed - everywhere == set()
    assert listed - read - everywhere - {'head_dim', 'intermediate_size'} == set()


# Fields of other families, or of programs, that a family's code does not read.
IGNORED = {
    'a window in a Llama': ('llama', {'sliding_window': 3, 'use_sliding_window': True}),
    'a window in an OLMo 2': (
        'olmo2', {'sliding_window': 3, 'layer_types': ['sliding_attention'] * 3},
    ),
    'full layers in a Llama': ('llama', {'layer_types': ['full_attention'] * 3}),
    'layers without positions in a Qwen3': ('qwen3', {'no_rope_layers': [0, 1, 0]}),
    'layer types of a Mistral': ('mistral', {'layer_types': ['full_attention'] * 3}),
    'layer types of a Qwen3-MoE': (
        'qwen3_moe',
        {'layer_types': ['full_attention', 'sliding_attention', 'full_attention'], 'qkv_bias': True}
        | {'shared_expert_intermediate_size': 9, 'max_window_layers': 1},
    ),
    'soft caps in a Qwen2': (
        'qwen2', {'final_logit_softcapping': 2.0, 'attn_logit_softcapping': 1.0},
    ),
    'scales of other families': (
        'smollm3',
        {'logits_scaling': 8.0, 'embedding_multiplier': 12.0, 'residual_multiplier': 0.2}
        | {'attention_multiplier': 0.1, 'query_pre_attn_scalar': 3},
    ),
    'biases of a Mistral': ('mistral', {'attention_bias': True, 'mlp_bias': True, 'alibi': True}),
    'clipping in a Llama': ('llama', {'clip_qkv': 1.0, 'use_qk_norm': True, 'alibi': True}),
    'partial rotation in a Llama': ('llama', rope('default', partial_rotary_factor=0.5)),
    'settings of other scalings': (
        'llama', rope('linear', factor=2.0, beta_fast=4, low_freq_factor=2.0, finetuned=True),
    ),
    'another name of the activation': ('llama', {'hidden_activation': 'gelu_pytorch_tanh'}),
    'an older name in a Gemma 3': ('gemma3_text', {'hidden_act': 'relu', 'embd_pdrop': 0.5}),
    'dropout in a Phi-3': ('phi3', {'embd_pdrop': 0.5, 'qk_layernorm': True}),
    'a router in a Llama': ('llama', {'num_local_experts': 7, 'num_experts_per_tok': 2}),
}  # fmt: skip


@pytest.mark.parametrize('name', IGNORED)
def test_fields_that_transformers_ignores_are_ignored(name):
    kind, fields = IGNORED[name]
    plain = raw_config(kind)
    if 'rope_parameters' in fields:
        rope_fields = fields['rope_parameters']
        known = {k: v for k, v in rope_fields.items() if k in ('rope_type', 'rope_theta', 'factor')}
        plain |= {'rope_parameters': known}
    assert model_config(raw_config(kind) | fields) == model_config(plain)
    logits = []
    tokens = checkpoints.torch.arange(3, 14)[None]
    state = None
    for raw in (plain, raw_config(kind) | fields):
        config = transformers.CONFIG_MAPPING[kind].from_dict(dict(raw))
        model = checkpoints.make_torch(config)
        state = state or model.state_dict()
        model.load_state_dict(state)
        with checkpoints.torch.no_grad():
            logits.append(model(tokens, use_cache=False).logits)
    assert checkpoints.torch.equal(*logits)


def test_ignored_fields_are_named_once_they_could_mean_something(caplog):
    model_config(raw_config('llama', alibi=True, clip_qkv=8.0, qkv_bias=False, auto_map={'a': 'b'}))
    assert 'fields without effect in transformers' in caplog.text
    assert caplog.text.strip().endswith(': alibi=True, clip_qkv=8.0')
    caplog.clear()
    model_config(raw_config('qwen3_moe', shared_expert_intermediate_size=0, use_qk_norm=False))
    assert not caplog.text


def test_quantized_checkpoints_are_refused_in_few_words():
    """Their configs list every layer that was left alone."""
    skipped = [f'model.layers.{n}.self_attn.q_proj' for n in range(200)]
    for settings, named in (
        ({'quant_method': 'gptq', 'bits': 4, 'modules_in_block_to_quantize': skipped}, 'gptq in 4'),
        ({'quant_method': 'bitsandbytes', 'load_in_4bit': True}, 'bitsandbytes in 4 bits'),
        ({'quant_method': 'fp8', 'modules_to_not_convert': skipped}, 'fp8'),
        ({'quant_method': 'compressed-tensors', 'ignore': skipped}, 'compressed-tensors'),
        ({'weird': skipped}, 'unnamed'),
    ):
        for field in ('quantization_config', 'compression_config'):
            with pytest.raises(ValueError, match=named) as caught:
                model_config(raw_config('llama', **{field: settings}))
            assert len(str(caught.value)) <= 200


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'hidden_size': 'big'}, r"llama checkpoint has a wrong value: .*'hidden_size'"),
        ({'rms_norm_eps': [1]}, r"wrong value: .*'rms_norm_eps'"),
        ({'rope_parameters': {'rope_type': 'linear', 'rope_theta': 1.0}}, r"'factor'"),
        ({'rope_scaling': 'linear', 'rope_parameters': None}, r'wrong value: '),
        ({'hidden_size': None}, r"wrong value: .*'hidden_size'"),
        ({'layer_types': ['full_attention']}, r'wrong value: .*layer_types'),
        ({'num_hidden_layers': 10**9}, r"wrong value: 'num_hidden_layers' is 10+, but a size"),
        ({'num_attention_heads': True}, r"wrong value: 'num_attention_heads' is True"),
        ({'vocab_size': -1}, r"wrong value: 'vocab_size' is -1, but a size is a whole number"),
        ({'rope_theta': [1], 'rope_parameters': None}, 'wrong value: '),
        ({'architectures': [1]}, 'which are no names'),
        ({'model_type': ['llama']}, 'which are no names'),
    ],
)
def test_errors_of_transformers_are_translated(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        model_config(raw_config('llama') | fields)
    assert '\n' not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_model_with_images_without_its_text():
    with pytest.raises(ValueError, match='a gemma3 checkpoint has no text_config'):
        model_config({'model_type': 'gemma3'})


SCRATCH = {
    'default': {},
    'llama': {'attention_bias': True, 'out_bias': True, 'mlp_bias': True, 'tied_head': False},
    'llama3': {
        'rope_scaling': {'rope_type': 'llama3', 'low_freq_factor': 1.0, 'high_freq_factor': 4.0}
        | {'factor': 4.0, 'original_max_position_embeddings': 8}
    },
    'qwen2': {'attention_bias': True},
    'qwen3': {'qk_norm': 'head', 'head_dim': 8},
    'mixtral': {'experts': 4, 'experts_per_token': 2, 'mlp_width': 8},
    'qwen3_moe': {'experts': 4, 'experts_per_token': 2, 'mlp_width': 8, 'qk_norm': 'head'}
    | {'normalize_experts': False},
    'olmo2': {'norms': 'post', 'qk_norm': 'projection', 'tied_head': False},
    'gelu': {'activation': 'gelu_tanh', 'norm_eps': 1e-3},
}


@pytest.mark.parametrize('name', SCRATCH)
def test_fields_of_a_decoder_that_was_made_here(name):
    config = tiny.make_model(**SCRATCH[name]).config
    fields = hugging_face_fields(config)
    assert fields['model_type'] == (name if name in FAMILIES else 'llama')
    assert model_config(fields) == config


@pytest.mark.parametrize(
    'options',
    [
        {'norms': 'both'},
        {'window': 4, 'window_layers': (0,)},
        {'attention_bias': True, 'qk_norm': 'head'},
        {'logit_softcap': 3.0},
        {'rope_fraction': 1 / 3},
    ],
)
def test_a_decoder_that_no_family_is_like(options):
    with pytest.raises(ValueError, match='no Hugging Face architecture is like ModelConfig'):
        hugging_face_fields(tiny.make_model(**options).config)
