"""Configs of published model shapes, for `grpo_jax.plan`; nothing is downloaded.

    python -m grpo_jax.plan --config=benchmarks/plan_configs.py:deepseekmath_7b --topology=v5p:4x4x4

The fields are those of the published `config.json`. They are written to a temporary folder, as the
description of a checkpoint without weights. Prompts are those of the generated arithmetic task,
which do not change the shapes of a program.
"""

import json
import pathlib
import tempfile

from ml_collections import ConfigDict

from grpo_jax.run import config as grpo_config

_LLAMA = {'architectures': ['LlamaForCausalLM'], 'model_type': 'llama', 'attention_bias': False}
_QWEN2 = {'architectures': ['Qwen2ForCausalLM'], 'model_type': 'qwen2', 'rope_theta': 1e6}
_QWEN3 = {'rope_theta': 1e6, 'attention_bias': False, 'head_dim': 128, 'vocab_size': 151936}

# Name -> (width, MLP width, layers, heads, key/value heads) and the other fields.
SHAPES = {
    'deepseekmath_7b': (
        (4096, 11008, 30, 32, 32),
        {**_LLAMA, 'vocab_size': 102400, 'rope_theta': 1e4, 'rms_norm_eps': 1e-6},
    ),
    'llama_70b': (
        (8192, 28672, 80, 64, 8),
        {**_LLAMA, 'vocab_size': 128256, 'rope_theta': 5e5, 'rms_norm_eps': 1e-5},
    ),
    'qwen2_5_1_5b': (
        (1536, 8960, 28, 12, 2),
        {**_QWEN2, 'vocab_size': 151936, 'tie_word_embeddings': True},
    ),
    'qwen2_5_7b': ((3584, 18944, 28, 28, 4), {**_QWEN2, 'vocab_size': 152064}),
    'qwen3_4b': (
        (2560, 9728, 36, 32, 8),
        {
            **_QWEN3,
            'architectures': ['Qwen3ForCausalLM'],
            'model_type': 'qwen3',
            'tie_word_embeddings': True,
        },
    ),
    'qwen3_30b_a3b': (
        (2048, 6144, 48, 32, 4),
        {
            **_QWEN3,
            'architectures': ['Qwen3MoeForCausalLM'],
            'model_type': 'qwen3_moe',
            'moe_intermediate_size': 768,
            'num_experts': 128,
            'num_experts_per_tok': 8,
            'norm_topk_prob': True,
            'decoder_sparse_step': 1,
            'mlp_only_layers': [],
        },
    ),
}


def get_config(name: str) -> ConfigDict:
    """The paper's GRPO run with a model of this shape, or with `_lora` after the name, adapters."""
    shape = name.removesuffix('_lora')
    config = grpo_config.defaults()
    config.pretrained = _description(shape)
    config.tokenizer = 'bytes'
    config.model.dtype = 'bfloat16'
    config.mesh.fsdp = -1
    config.data.update(
        name='arithmetic', heldout_split='', prompt_length=512, completion_length=1024
    )
    config.grpo.update(steps=500, batch_size=16, group_size=64)
    config.grpo.algorithm.update(beta=0.04, clip_low=0.2, clip_high=0.2)
    config.grpo.rewards = {'exact_answer': 1.0}
    config.grpo.optimizer.update(learning_rate=1e-6)
    if name.endswith('_lora'):
        config.model.update(param_dtype='bfloat16')
        config.model.lora.rank = 16
        config.data.update(prompt_length=256, completion_length=512)
        config.grpo.update(batch_size=8, group_size=16)
    return config


def _description(name: str) -> str:
    """A folder with the `config.json` of a shape."""
    (width, mlp_width, layers, heads, kv_heads), fields = SHAPES[name]
    folder = pathlib.Path(tempfile.gettempdir()) / 'grpo_jax_plan_configs' / name
    folder.mkdir(parents=True, exist_ok=True)
    ends = {'bos_token_id': 0, 'eos_token_id': 1}
    description = {
        'hidden_size': width,
        'intermediate_size': mlp_width,
        'num_hidden_layers': layers,
        'num_attention_heads': heads,
        'num_key_value_heads': kv_heads,
        'hidden_act': 'silu',
        'rms_norm_eps': 1e-6,
        'tie_word_embeddings': False,
        'torch_dtype': 'bfloat16',
        'max_position_embeddings': 32768,
        **fields,
        **ends,
    }
    (folder / 'config.json').write_text(json.dumps(description, indent=2))
    return str(folder)
