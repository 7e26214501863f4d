"""The families of Hugging Face checkpoints as data: config fields, options and tensor names.

A family maps the fields of its `config.json` to options of `ModelConfig`, and lists the options
that all its checkpoints share and the tensor names that differ from Llama's.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from grpo_jax.models.config import PROJECTIONS, ModelConfig

Json = Mapping[str, Any]


class Family(NamedTuple):
    """How one `model_type` of Hugging Face differs from Llama."""

    architecture: str
    options: Mapping[str, Any] = {}  # of `ModelConfig`, the same for all checkpoints
    fields: Mapping[str, str] = {}  # option -> config field, in addition to `COMMON_FIELDS`
    names: Mapping[str, str] = {}  # parameter -> its tensor in a layer, without '.weight'
    fused: Mapping[str, tuple[str, ...]] = {}  # tensor -> the parameters concatenated in it

    @property
    def scorer(self) -> str:
        """The name of the architecture with a score instead of logits."""
        prefix = self.architecture.removesuffix('ForCausalLM')
        return {'Gemma3': 'Gemma3Text'}.get(prefix, prefix) + 'ForSequenceClassification'


_BIASED = {'attention_bias': 'attention_bias', 'out_bias': 'attention_bias'}
_GEMMA = {
    'norms': 'both',
    'norm_plus_one': True,
    'embedding_scaled': True,
}
_SOFTCAPS = {
    'attention_softcap': 'attn_logit_softcapping',
    'logit_softcap': 'final_logit_softcapping',
}
_ROUTED = {'experts': 'num_local_experts', 'experts_per_token': 'num_experts_per_tok'}

FAMILIES: dict[str, Family] = {
    'llama': Family('LlamaForCausalLM', fields=_BIASED | {'mlp_bias': 'mlp_bias'}),
    'mistral': Family('MistralForCausalLM'),
    'qwen2': Family('Qwen2ForCausalLM', options={'attention_bias': True}),
    'qwen3': Family('Qwen3ForCausalLM', options={'qk_norm': 'head'}, fields=_BIASED),
    'gemma2': Family('Gemma2ForCausalLM', options=_GEMMA, fields=_BIASED | _SOFTCAPS),
    'gemma3_text': Family(
        'Gemma3ForCausalLM',
        options=_GEMMA | {'qk_norm': 'head'},
        fields=_BIASED | {'logit_softcap': 'final_logit_softcapping'},
    ),
    'phi3': Family(
        'Phi3ForCausalLM',
        fused={
            'self_attn.qkv_proj': ('query', 'key', 'value'),
            'mlp.gate_up_proj': ('gate', 'up'),
        },
    ),
    'smollm3': Family('SmolLM3ForCausalLM', fields=_BIASED | {'mlp_bias': 'mlp_bias'}),
    'olmo2': Family(
        'Olmo2ForCausalLM', options={'norms': 'post', 'qk_norm': 'projection'}, fields=_BIASED
    ),
    'mixtral': Family(
        'MixtralForCausalLM',
        fields=_ROUTED,
        names={
            'router': 'block_sparse_moe.gate',
            'gate': 'block_sparse_moe.experts.{expert}.w1',
            'up': 'block_sparse_moe.experts.{expert}.w3',
            'down': 'block_sparse_moe.experts.{expert}.w2',
        },
    ),
    'qwen3_moe': Family(
        'Qwen3MoeForCausalLM',
        options={'qk_norm': 'head'},
        fields=_BIASED
        | _ROUTED
        | {'mlp_width': 'moe_intermediate_size', 'normalize_experts': 'norm_topk_prob'},
        names={
            'router': 'mlp.gate',
            'gate': 'mlp.experts.{expert}.gate_proj',
            'up': 'mlp.experts.{expert}.up_proj',
            'down': 'mlp.experts.{expert}.down_proj',
        },
    ),
}

COMMON_FIELDS = {  # option -> config field that every family has
    'vocab_size': 'vocab_size',
    'width': 'hidden_size',
    'layers': 'num_hidden_layers',
    'heads': 'num_attention_heads',
    'kv_heads': 'num_key_value_heads',
    'mlp_width': 'intermediate_size',
    'tied_head': 'tie_word_embeddings',
    'norm_eps': 'rms_norm_eps',
}


def family_of(raw: Json) -> Family:
    """The family of a `config.json`.

    Raises:
      ValueError: its architecture is not supported.
    """
    family = FAMILIES.get(raw.get('model_type', ''))
    architectures = raw.get('architectures') or []
    if family is None or (
        architectures and not {family.architecture, family.scorer} & {*architectures}
    ):
        architecture = ', '.join(architectures) or raw.get('model_type', 'none')
        supported = ', '.join(f.architecture for f in FAMILIES.values())
        raise ValueError(
            f'architecture {architecture} is not supported: supported are {supported}, and '
            'their ForSequenceClassification with one label'
        )
    return family


def layer_names(config: ModelConfig, family: Family) -> dict[str, str]:
    """Parameter of a layer ('query', 'attention_norm/scale', ...) -> its tensor in 'layers.N.'."""
    norms = {
        'pre': ('input_layernorm', None, 'post_attention_layernorm', None),
        'post': (None, 'post_attention_layernorm', None, 'post_feedforward_layernorm'),
        'both': (
            'input_layernorm',
            'post_attention_layernorm',
            'pre_feedforward_layernorm',
            'post_feedforward_layernorm',
        ),
    }[config.norms]
    ours = ('attention_norm', 'attention_post_norm', 'mlp_norm', 'mlp_post_norm')
    names = {f'{o}/scale': f'{t}.weight' for o, t in zip(ours, norms, strict=True) if t}
    if config.qk_norm:
        names |= {f'{n}_norm/scale': f'self_attn.{n[0]}_norm.weight' for n in ('query', 'key')}
    for parameter, projection in PROJECTIONS.items():
        part = 'mlp' if parameter in ('gate', 'up', 'down') else 'self_attn'
        name = family.names.get(parameter, f'{part}.{projection}')
        names |= {parameter: f'{name}.weight', f'{parameter}_bias': f'{name}.bias'}
    if config.experts:
        names['router'] = f'{family.names["router"]}.weight'
    return names
