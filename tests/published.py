"""The `config.json` of published checkpoints, all their fields, and what they mean.

Name -> (fields, options of `ModelConfig`). Lists of one entry per layer are written as products.
"""

FULL, SLIDING = 'full_attention', 'sliding_attention'


def _llama(**fields):
    return {
        'architectures': ['LlamaForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
        'bos_token_id': 1, 'eos_token_id': 2, 'hidden_act': 'silu', 'hidden_size': 4096,
        'initializer_range': 0.02, 'intermediate_size': 11008, 'max_position_embeddings': 4096,
        'model_type': 'llama', 'num_attention_heads': 32, 'num_hidden_layers': 32,
        'num_key_value_heads': 32, 'pretraining_tp': 1, 'rms_norm_eps': 1e-05,
        'rope_scaling': None, 'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.38.0', 'use_cache': True, 'vocab_size': 32000,
    } | fields  # fmt: skip


def _llama31(factor):
    return {
        'factor': factor, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
        'original_max_position_embeddings': 8192, 'rope_type': 'llama3',
    }  # fmt: skip


def _qwen2(**fields):
    return {
        'architectures': ['Qwen2ForCausalLM'], 'attention_dropout': 0.0, 'bos_token_id': 151643,
        'eos_token_id': 151645, 'hidden_act': 'silu', 'hidden_size': 1536,
        'initializer_range': 0.02, 'intermediate_size': 8960, 'max_position_embeddings': 32768,
        'max_window_layers': 21, 'model_type': 'qwen2', 'num_attention_heads': 12,
        'num_hidden_layers': 28, 'num_key_value_heads': 2, 'rms_norm_eps': 1e-06,
        'rope_theta': 1000000.0, 'sliding_window': 32768, 'tie_word_embeddings': True,
        'torch_dtype': 'bfloat16', 'transformers_version': '4.43.1', 'use_cache': True,
        'use_sliding_window': False, 'vocab_size': 151936,
    } | fields  # fmt: skip


def _qwen3(**fields):
    return {
        'architectures': ['Qwen3ForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
        'bos_token_id': 151643, 'eos_token_id': 151645, 'head_dim': 128, 'hidden_act': 'silu',
        'hidden_size': 1024, 'initializer_range': 0.02, 'intermediate_size': 3072,
        'max_position_embeddings': 40960, 'max_window_layers': 28, 'model_type': 'qwen3',
        'num_attention_heads': 16, 'num_hidden_layers': 28, 'num_key_value_heads': 8,
        'rms_norm_eps': 1e-06, 'rope_scaling': None, 'rope_theta': 1000000,
        'sliding_window': None, 'tie_word_embeddings': True, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.51.0', 'use_cache': True, 'use_sliding_window': False,
        'vocab_size': 151936,
    } | fields  # fmt: skip


def _qwen3_moe(**fields):
    return _qwen3(
        architectures=['Qwen3MoeForCausalLM'], decoder_sparse_step=1, hidden_size=2048,
        intermediate_size=6144, max_window_layers=48, mlp_only_layers=[], model_type='qwen3_moe',
        moe_intermediate_size=768, norm_topk_prob=True, num_attention_heads=32, num_experts=128,
        num_experts_per_tok=8, num_hidden_layers=48, num_key_value_heads=4,
        output_router_logits=False, rope_theta=1000000.0, router_aux_loss_coef=0.001,
        tie_word_embeddings=False,
    ) | fields  # fmt: skip


def _mistral(**fields):
    return {
        'architectures': ['MistralForCausalLM'], 'bos_token_id': 1, 'eos_token_id': 2,
        'hidden_act': 'silu', 'hidden_size': 4096, 'initializer_range': 0.02,
        'intermediate_size': 14336, 'max_position_embeddings': 32768, 'model_type': 'mistral',
        'num_attention_heads': 32, 'num_hidden_layers': 32, 'num_key_value_heads': 8,
        'rms_norm_eps': 1e-05, 'rope_theta': 10000.0, 'sliding_window': 4096,
        'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.34.0.dev0', 'use_cache': True, 'vocab_size': 32000,
    } | fields  # fmt: skip


def _gemma2(**fields):
    return {
        'architectures': ['Gemma2ForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
        'attn_logit_softcapping': 50.0, 'bos_token_id': 2, 'cache_implementation': 'hybrid',
        'eos_token_id': 1, 'final_logit_softcapping': 30.0, 'head_dim': 256,
        'hidden_act': 'gelu_pytorch_tanh', 'hidden_activation': 'gelu_pytorch_tanh',
        'hidden_size': 2304, 'initializer_range': 0.02, 'intermediate_size': 9216,
        'max_position_embeddings': 8192, 'model_type': 'gemma2', 'num_attention_heads': 8,
        'num_hidden_layers': 26, 'num_key_value_heads': 4, 'pad_token_id': 0,
        'query_pre_attn_scalar': 256, 'rms_norm_eps': 1e-06, 'rope_theta': 10000.0,
        'sliding_window': 4096, 'torch_dtype': 'float32', 'transformers_version': '4.42.4',
        'use_cache': True, 'vocab_size': 256000,
    } | fields  # fmt: skip


def _gemma3_text(**fields):
    return {
        'architectures': ['Gemma3ForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
        'attn_logit_softcapping': None, 'bos_token_id': 2, 'cache_implementation': 'hybrid',
        'eos_token_id': [1, 106], 'final_logit_softcapping': None, 'head_dim': 256,
        'hidden_activation': 'gelu_pytorch_tanh', 'hidden_size': 1152, 'initializer_range': 0.02,
        'intermediate_size': 6912, 'max_position_embeddings': 32768, 'model_type': 'gemma3_text',
        'num_attention_heads': 4, 'num_hidden_layers': 26, 'num_key_value_heads': 1,
        'pad_token_id': 0, 'query_pre_attn_scalar': 256, 'rms_norm_eps': 1e-06,
        'rope_local_base_freq': 10000, 'rope_scaling': None, 'rope_theta': 1000000,
        'sliding_window': 512, 'sliding_window_pattern': 6, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.50.0.dev0', 'use_cache': True, 'vocab_size': 262144,
    } | fields  # fmt: skip


def _gemma3(text, **fields):
    return {
        'architectures': ['Gemma3ForConditionalGeneration'], 'boi_token_index': 255999,
        'eoi_token_index': 256000, 'eos_token_id': [1, 106], 'image_token_index': 262144,
        'initializer_range': 0.02, 'mm_tokens_per_image': 256, 'model_type': 'gemma3',
        'text_config': {'model_type': 'gemma3_text'} | text, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.50.0.dev0',
        'vision_config': {
            'hidden_size': 1152, 'image_size': 896, 'intermediate_size': 4304,
            'model_type': 'siglip_vision_model', 'num_attention_heads': 16,
            'num_hidden_layers': 27, 'patch_size': 14, 'vision_use_head': False,
        },
    } | fields  # fmt: skip


def _phi3(**fields):
    return {
        '_name_or_path': 'Phi-3-mini-4k-instruct', 'architectures': ['Phi3ForCausalLM'],
        'attention_bias': False, 'attention_dropout': 0.0, 'bos_token_id': 1,
        'auto_map': {'AutoConfig': 'configuration_phi3.Phi3Config'}, 'embd_pdrop': 0.0,
        'eos_token_id': 32000, 'hidden_act': 'silu', 'hidden_size': 3072,
        'initializer_range': 0.02, 'intermediate_size': 8192, 'max_position_embeddings': 4096,
        'model_type': 'phi3', 'num_attention_heads': 32, 'num_hidden_layers': 32,
        'num_key_value_heads': 32, 'original_max_position_embeddings': 4096, 'pad_token_id': 32000,
        'resid_pdrop': 0.0, 'rms_norm_eps': 1e-05, 'rope_scaling': None, 'rope_theta': 10000.0,
        'sliding_window': 2047, 'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.40.2', 'use_cache': True, 'vocab_size': 32064,
    } | fields  # fmt: skip


def _olmo2(**fields):
    return {
        'architectures': ['Olmo2ForCausalLM'], 'attention_bias': False, 'attention_dropout': 0.0,
        'eos_token_id': 100257, 'hidden_act': 'silu', 'hidden_size': 4096,
        'initializer_range': 0.02, 'intermediate_size': 11008, 'max_position_embeddings': 4096,
        'model_type': 'olmo2', 'num_attention_heads': 32, 'num_hidden_layers': 32,
        'num_key_value_heads': 32, 'pad_token_id': 100277, 'rms_norm_eps': 1e-06,
        'rope_scaling': None, 'rope_theta': 500000, 'tie_word_embeddings': False,
        'torch_dtype': 'float32', 'transformers_version': '4.47.0', 'use_cache': True,
        'vocab_size': 100352,
    } | fields  # fmt: skip


def _mixtral(**fields):
    return {
        'architectures': ['MixtralForCausalLM'], 'attention_dropout': 0.0, 'bos_token_id': 1,
        'eos_token_id': 2, 'hidden_act': 'silu', 'hidden_size': 4096, 'initializer_range': 0.02,
        'intermediate_size': 14336, 'max_position_embeddings': 32768, 'model_type': 'mixtral',
        'num_attention_heads': 32, 'num_experts_per_tok': 2, 'num_hidden_layers': 32,
        'num_key_value_heads': 8, 'num_local_experts': 8, 'output_router_logits': False,
        'rms_norm_eps': 1e-05, 'rope_theta': 1000000.0, 'router_aux_loss_coef': 0.02,
        'sliding_window': None, 'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
        'transformers_version': '4.36.0.dev0', 'use_cache': True, 'vocab_size': 32000,
    } | fields  # fmt: skip


_PHI4_MINI = {
    'attention_bias': False, 'bos_token_id': 199999, 'eos_token_id': 199999,
    'full_attn_mod': 1, 'interpolate_factor': 1, 'lm_head_bias': False, 'mlp_bias': False,
    'num_attention_heads': 24, 'num_key_value_heads': 8, 'pad_token_id': 199999,
    'partial_rotary_factor': 0.75, 'max_position_embeddings': 131072, 'sliding_window': 262144,
    'rope_scaling': {
        'long_factor': [1.0 + n / 10 for n in range(48)], 'short_factor': [1.0] * 48,
        'type': 'longrope',
    },
    'tie_word_embeddings': True, 'vocab_size': 200064,
}  # fmt: skip

CONFIGS = {
    'Llama-2-7b-hf': (
        _llama(_name_or_path='meta-llama/Llama-2-7b-hf', torch_dtype='float16'),
        {'head_dim': 128, 'kv_heads': 32, 'rope_theta': 1e4, 'window': 0},
    ),
    'Llama-2-70b-hf': (
        _llama(hidden_size=8192, intermediate_size=28672, num_attention_heads=64)
        | {'num_hidden_layers': 80, 'num_key_value_heads': 8},
        {'layers': 80, 'heads': 64, 'kv_heads': 8},
    ),
    'TinyLlama-1.1B-Chat-v1.0': (
        _llama(hidden_size=2048, intermediate_size=5632, max_position_embeddings=2048)
        | {'num_hidden_layers': 22, 'num_key_value_heads': 4, 'rope_theta': 10000.0},
        {'kv_heads': 4, 'head_dim': 64},
    ),
    'vicuna-7b-v1.5': (
        {
            '_name_or_path': 'vicuna-7b-v1.5', 'architectures': ['LlamaForCausalLM'],
            'bos_token_id': 1, 'eos_token_id': 2, 'hidden_act': 'silu', 'hidden_size': 4096,
            'initializer_range': 0.02, 'intermediate_size': 11008, 'max_position_embeddings': 4096,
            'model_type': 'llama', 'num_attention_heads': 32, 'num_hidden_layers': 32,
            'num_key_value_heads': 32, 'pad_token_id': 0, 'pretraining_tp': 1,
            'rms_norm_eps': 1e-05, 'rope_scaling': None, 'tie_word_embeddings': False,
            'torch_dtype': 'float16', 'transformers_version': '4.31.0', 'use_cache': True,
            'vocab_size': 32000,
        },
        {'vocab_size': 32000, 'attention_bias': False},
    ),
    'CodeLlama-7b-hf': (
        _llama(max_position_embeddings=16384, rope_theta=1000000, vocab_size=32016),
        {'rope_theta': 1e6, 'vocab_size': 32016},
    ),
    'Meta-Llama-3-8B-Instruct': (
        _llama(bos_token_id=128000, eos_token_id=128009, intermediate_size=14336)
        | {'num_key_value_heads': 8, 'rope_theta': 500000.0, 'vocab_size': 128256},
        {'rope_theta': 5e5, 'rope_scaling': {}},
    ),
    'Llama-3.1-8B-Instruct': (
        _llama(eos_token_id=[128001, 128008, 128009], rope_scaling=_llama31(8.0), mlp_bias=False)
        | {'max_position_embeddings': 131072, 'num_key_value_heads': 8, 'rope_theta': 500000.0},
        {'rope_scaling': _llama31(8.0), 'mlp_bias': False},
    ),
    'Llama-3.2-1B': (
        _llama(rope_scaling=_llama31(32.0), head_dim=64, hidden_size=2048, tie_word_embeddings=True)
        | {'max_position_embeddings': 131072, 'num_key_value_heads': 8, 'num_hidden_layers': 16},
        {'tied_head': True, 'head_dim': 64, 'rope_scaling': _llama31(32.0)},
    ),
    'Llama-3.2-1B-Instruct of unsloth': (
        _llama(rope_scaling=_llama31(32.0), head_dim=64, hidden_size=2048, tie_word_embeddings=True)
        | {'unsloth_fixed': True, 'unsloth_version': '2025.1.1', 'pad_token_id': 128004},
        {'tied_head': True},
    ),
    'Llama-3.3-70B-Instruct': (
        _llama(rope_scaling=_llama31(8.0), hidden_size=8192, num_attention_heads=64, head_dim=128)
        | {'num_hidden_layers': 80, 'num_key_value_heads': 8, 'intermediate_size': 28672},
        {'layers': 80, 'head_dim': 128},
    ),
    'deepseek-math-7b-rl': (
        _llama(bos_token_id=100000, eos_token_id=100001, num_hidden_layers=30, rms_norm_eps=1e-06)
        | {'rope_theta': 10000.0, 'vocab_size': 102400, 'pad_token_id': 100001},
        {'layers': 30, 'vocab_size': 102400, 'norm_eps': 1e-6},
    ),
    'deepseek-coder-6.7b-instruct': (
        _llama(rope_scaling={'factor': 4.0, 'type': 'linear'}, rope_theta=100000)
        | {'max_position_embeddings': 16384, 'vocab_size': 32256, 'rms_norm_eps': 1e-06},
        {'rope_scaling': {'rope_type': 'linear', 'factor': 4.0}, 'rope_theta': 1e5},
    ),
    'DeepSeek-R1-Distill-Llama-8B': (
        _llama(bos_token_id=128000, eos_token_id=128001, rope_scaling=_llama31(8.0))
        | {'mlp_bias': False, 'num_key_value_heads': 8, 'rope_theta': 500000.0},
        {'rope_scaling': _llama31(8.0)},
    ),
    'SmolLM2-1.7B': (
        _llama(is_llama_config=True, rope_interleaved=False, rope_theta=130000, mlp_bias=False)
        | {'transformers.js_config': {'dtype': 'q4', 'kv_cache_dtype': {'fp16': 'float16'}}},
        {'rope_theta': 130000.0},
    ),
    'Yi-1.5-6B': (
        _llama(rope_theta=5000000.0, num_key_value_heads=4, pad_token_id=0, vocab_size=64000),
        {'rope_theta': 5e6, 'kv_heads': 4},
    ),
    'a Llama trained by others, with fields of a window': (
        _llama(sliding_window=4096, use_sliding_window=True, max_window_layers=2)
        | {'layer_types': [FULL] * 32, 'qkv_bias': False, 'use_qk_norm': True, 'no_rope_layers': []}
        | {'_attn_implementation_autoset': True, 'shared_expert_intermediate_size': 0},
        {'window': 0, 'window_layers': (), 'qk_norm': '', 'unrotated_layers': ()},
    ),
    'Mistral-7B-v0.1': (_mistral(), {'window': 4096, 'window_layers': (*range(32),)}),
    'Mistral-7B-Instruct-v0.2': (
        _mistral(attention_dropout=0.0, rope_theta=1000000.0, sliding_window=None),
        {'window': 0, 'rope_theta': 1e6},
    ),
    'Mistral-7B-Instruct-v0.3': (
        _mistral(attention_dropout=0.0, rope_theta=1000000.0, sliding_window=None)
        | {'vocab_size': 32768, 'head_dim': None},
        {'vocab_size': 32768, 'head_dim': 128},
    ),
    'Mistral-Nemo-Instruct-2407': (
        _mistral(head_dim=128, hidden_size=5120, max_position_embeddings=1024000)
        | {'num_hidden_layers': 40, 'sliding_window': None, 'vocab_size': 131072},
        {'head_dim': 128, 'width': 5120, 'window': 0},
    ),
    'Mistral-Small-24B-Instruct-2501': (
        _mistral(attention_dropout=0.0, head_dim=128, hidden_size=5120, num_hidden_layers=40)
        | {'rope_theta': 100000000.0, 'sliding_window': None, 'intermediate_size': 32768},
        {'rope_theta': 1e8},
    ),
    'zephyr-7b-beta': (
        _mistral(pad_token_id=2, _name_or_path='mistralai/Mistral-7B-v0.1'),
        {'window': 4096},
    ),
    'Mixtral-8x7B-v0.1': (_mixtral(), {'experts': 8, 'experts_per_token': 2, 'window': 0}),
    'Mixtral-8x22B-v0.1': (
        _mixtral(hidden_size=6144, intermediate_size=16384, num_attention_heads=48)
        | {'num_hidden_layers': 56, 'router_jitter_noise': 0.0, 'head_dim': None},
        {'layers': 56, 'head_dim': 128},
    ),
    'Qwen2-1.5B-Instruct': (_qwen2(), {'window': 0, 'attention_bias': True, 'out_bias': False}),
    'Qwen2.5-0.5B': (
        _qwen2(hidden_size=896, num_attention_heads=14, num_hidden_layers=24, use_mrope=False)
        | {'max_window_layers': 24, 'eos_token_id': 151643},
        {'head_dim': 64, 'tied_head': True},
    ),
    'Qwen2.5-7B-Instruct': (
        _qwen2(hidden_size=3584, num_attention_heads=28, num_key_value_heads=4)
        | {'max_window_layers': 28, 'sliding_window': 131072, 'tie_word_embeddings': False}
        | {'vocab_size': 152064},
        {'tied_head': False, 'vocab_size': 152064},
    ),
    'Qwen2.5-Math-1.5B': (
        _qwen2(max_position_embeddings=4096, rope_theta=10000, use_mrope=False)
        | {'max_window_layers': 21, 'sliding_window': 4096},
        {'rope_theta': 1e4, 'window': 0},
    ),
    'QwQ-32B-Preview, stretched as its card says': (
        _qwen2(rope_scaling={'factor': 4.0, 'original_max_position_embeddings': 32768})
        | {'rope_scaling': {
            'type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32768,
        }},
        {'rope_scaling': {
            'rope_type': 'yarn', 'factor': 4.0, 'original_max_position_embeddings': 32768,
        }},
    ),
    'DeepSeek-R1-Distill-Qwen-1.5B': (
        _qwen2(bos_token_id=151646, eos_token_id=151643, max_position_embeddings=131072)
        | {'rope_theta': 10000, 'sliding_window': 4096, 'use_mrope': False},
        {'rope_theta': 1e4, 'window': 0},
    ),
    'Qwen3-0.6B': (_qwen3(), {'qk_norm': 'head', 'head_dim': 128, 'tied_head': True}),
    'Qwen3-4B-Instruct-2507': (
        _qwen3(hidden_size=2560, max_position_embeddings=262144, rope_theta=5000000),
        {'rope_theta': 5e6},
    ),
    'Qwen3-8B': (
        _qwen3(hidden_size=4096, num_attention_heads=32, num_hidden_layers=36)
        | {'max_window_layers': 36, 'tie_word_embeddings': False},
        {'layers': 36, 'tied_head': False},
    ),
    'Qwen3-0.6B, saved again by transformers 5': (
        {k: v for k, v in _qwen3().items() if k not in ('rope_theta', 'torch_dtype')}
        | {'dtype': 'bfloat16', 'layer_types': [FULL] * 28, 'pad_token_id': None}
        | {'rope_parameters': {'rope_theta': 1000000, 'rope_type': 'default'}},
        {'rope_theta': 1e6, 'window': 0},
    ),
    'Qwen3-30B-A3B': (
        _qwen3_moe(),
        {'experts': 128, 'experts_per_token': 8, 'normalize_experts': True, 'mlp_width': 768},
    ),
    'Qwen3-30B-A3B-Instruct-2507': (
        _qwen3_moe(max_position_embeddings=262144, rope_theta=10000000)
        | {'shared_expert_intermediate_size': 0, 'qkv_bias': False, 'use_qk_norm': True}
        | {'head_dim': 128, 'rope_scaling': None},
        {'rope_theta': 1e7, 'attention_bias': False, 'qk_norm': 'head'},
    ),
    'gemma-2-2b-it': (
        _gemma2(),
        {
            'attention_softcap': 50.0, 'logit_softcap': 30.0, 'attention_scale': 1 / 16,
            'window_layers': (*range(0, 26, 2),), 'tied_head': True, 'embedding_scaled': True,
        },
    ),
    'gemma-2-9b': (
        _gemma2(hidden_size=3584, sliding_window_size=4096, num_attention_heads=16)
        | {'num_hidden_layers': 42, 'num_key_value_heads': 8},
        {'window': 4096, 'layers': 42},
    ),
    'gemma-2-27b': (
        _gemma2(head_dim=128, hidden_size=4608, query_pre_attn_scalar=144, _attn_implementation='x')
        | {'num_attention_heads': 32, 'num_hidden_layers': 46, 'num_key_value_heads': 16}
        | {'_attn_implementation': 'eager'},
        {'attention_scale': 1 / 12, 'head_dim': 128},
    ),
    'gemma-3-1b-it': (
        _gemma3_text(),
        {
            'window': 512, 'window_layers': tuple(n for n in range(26) if n % 6 != 5),
            'rope_theta': 1e6, 'local_rope_theta': 1e4, 'qk_norm': 'head', 'tied_head': True,
        },
    ),
    'gemma-3-270m': (
        _gemma3_text(_sliding_window_pattern=6, hidden_size=640, layer_types=[
            *[SLIDING] * 5, FULL, *[SLIDING] * 5, FULL, *[SLIDING] * 5, FULL,
        ])
        | {'num_hidden_layers': 18, 'use_bidirectional_attention': False, 'rope_theta': 1000000.0}
        | {'rope_local_base_freq': 10000.0},
        {'window_layers': tuple(n for n in range(18) if n % 6 != 5)},
    ),
    'gemma-3-4b-it, its text': (
        _gemma3({
            'hidden_size': 2560, 'intermediate_size': 10240, 'num_hidden_layers': 34,
            'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'}, 'sliding_window': 1024,
        }),
        {
            'width': 2560, 'layers': 34, 'heads': 8, 'kv_heads': 4, 'head_dim': 256,
            'vocab_size': 262208, 'rope_scaling': {'rope_type': 'linear', 'factor': 8.0},
            'local_rope_theta': 1e4, 'window': 1024, 'tied_head': True,
        },
    ),
    'gemma-3-27b-it, its text': (
        _gemma3({
            'head_dim': 128, 'hidden_size': 5376, 'intermediate_size': 21504,
            'num_attention_heads': 32, 'num_hidden_layers': 62, 'num_key_value_heads': 16,
            'query_pre_attn_scalar': 168, 'sliding_window': 1024,
            'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'},
        }),
        {'attention_scale': 168**-0.5, 'heads': 32, 'head_dim': 128},
    ),
    'Phi-3-mini-4k-instruct': (_phi3(), {'window': 2047, 'head_dim': 96, 'rope_fraction': 1.0}),
    'Phi-3-mini-128k-instruct': (
        _phi3(max_position_embeddings=131072, sliding_window=262144, rope_scaling={
            'long_factor': [1.5] * 48, 'short_factor': [1.0] * 48, 'type': 'longrope',
        }),
        {'rope_scaling': {
            'rope_type': 'longrope', 'long_factor': [1.5] * 48, 'short_factor': [1.0] * 48,
            'factor': 32.0, 'original_max_position_embeddings': 4096,
        }},
    ),
    'phi-4': (
        _phi3(bos_token_id=100257, eos_token_id=100265, hidden_size=5120, num_attention_heads=40)
        | {'num_key_value_heads': 10, 'rope_theta': 250000, 'sliding_window': None}
        | {'max_position_embeddings': 16384, 'original_max_position_embeddings': 16384},
        {'window': 0, 'kv_heads': 10, 'rope_theta': 2.5e5},
    ),
    'Phi-4-mini-instruct': (
        _phi3(**_PHI4_MINI),
        {'rope_fraction': 0.75, 'tied_head': True, 'window': 262144, 'head_dim': 128},
    ),
    'SmolLM3-3B': (
        {
            'architectures': ['SmolLM3ForCausalLM'], 'attention_bias': False,
            'attention_dropout': 0.0, 'bos_token_id': None, 'eos_token_id': 128012,
            'hidden_act': 'silu', 'hidden_size': 2048, 'initializer_range': 0.02,
            'intermediate_size': 11008, 'layer_types': [FULL] * 36, 'max_window_layers': 28,
            'max_position_embeddings': 65536, 'mlp_bias': False, 'model_type': 'smollm3',
            'no_rope_layer_interval': 4, 'no_rope_layers': [1, 1, 1, 0] * 9,
            'num_attention_heads': 16, 'num_hidden_layers': 36, 'num_key_value_heads': 4,
            'pad_token_id': 128004, 'pretraining_tp': 2, 'rms_norm_eps': 1e-06,
            'rope_scaling': None, 'rope_theta': 5000000.0, 'sliding_window': None,
            'tie_word_embeddings': True, 'torch_dtype': 'bfloat16',
            'transformers_version': '4.54.0.dev0', 'use_cache': False, 'use_sliding_window': False,
            'vocab_size': 128256,
        },
        {'unrotated_layers': (*range(3, 36, 4),), 'window': 0, 'rope_theta': 5e6},
    ),
    'OLMo-2-1124-7B': (_olmo2(), {'norms': 'post', 'qk_norm': 'projection', 'window': 0}),
    'OLMo-2-0425-1B': (
        _olmo2(hidden_size=2048, intermediate_size=8192, num_attention_heads=16)
        | {'num_hidden_layers': 16, 'num_key_value_heads': 16, 'sliding_window': None},
        {'layers': 16, 'window': 0},
    ),
    'OLMo-2-1124-7B with the fields of a window': (
        _olmo2(sliding_window=1024, layer_types=[SLIDING] * 32, use_sliding_window=True),
        {'window': 0, 'window_layers': ()},
    ),
}  # fmt: skip
