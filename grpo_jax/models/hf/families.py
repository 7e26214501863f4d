"""The families of Hugging Face checkpoints as data: config fields, options and tensor names.

A family maps the fields of its `config.json` to options of `ModelConfig`, and lists the options
that all its checkpoints share and the tensor names that differ from Llama's. Together with
`COMMON_FIELDS` and `UNUSED_FIELDS` the fields of a family are exactly those that the code of
transformers reads for it; `tests/test_hf_config.py` compares them with that code. So a field that
is listed nowhere has no effect on a checkpoint of this family.
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
    # Fields that the family reads in addition, which `hf.config` turns into options.
    special: frozenset[str] = frozenset({'hidden_act'})
    only: Mapping[str, Any] = {}  # field that the family reads -> the only value supported
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
_WINDOW = frozenset({'hidden_act', 'sliding_window'})  # in all layers
_WINDOWED_LAYERS = _WINDOW | {'layer_types'}
_GEMMA_SPECIAL = frozenset({
    'hidden_activation', 'sliding_window', 'layer_types', 'query_pre_attn_scalar'
})  # fmt: skip

FAMILIES: dict[str, Family] = {
    'llama': Family('LlamaForCausalLM', fields=_BIASED | {'mlp_bias': 'mlp_bias'}),
    'mistral': Family('MistralForCausalLM', special=_WINDOW),
    'qwen2': Family('Qwen2ForCausalLM', options={'attention_bias': True}, special=_WINDOWED_LAYERS),
    'qwen3': Family(
        'Qwen3ForCausalLM',
        options={'qk_norm': 'head'},
        fields=_BIASED,
        special=_WINDOWED_LAYERS,
    ),
    'gemma2': Family(
        'Gemma2ForCausalLM',
        options=_GEMMA,
        fields=_BIASED | _SOFTCAPS,
        special=_GEMMA_SPECIAL,
        only={'use_bidirectional_attention': False},
    ),
    'gemma3_text': Family(
        'Gemma3ForCausalLM',
        options=_GEMMA | {'qk_norm': 'head'},
        fields=_BIASED | {'logit_softcap': 'final_logit_softcapping'},
        special=_GEMMA_SPECIAL,
        only={'attn_logit_softcapping': None, 'use_bidirectional_attention': False},
    ),
    'phi3': Family(
        'Phi3ForCausalLM',
        special=_WINDOW | {'original_max_position_embeddings', 'partial_rotary_factor'},
        only={'resid_pdrop': 0.0},
        fused={
            'self_attn.qkv_proj': ('query', 'key', 'value'),
            'mlp.gate_up_proj': ('gate', 'up'),
        },
    ),
    'smollm3': Family(
        'SmolLM3ForCausalLM',
        fields=_BIASED | {'mlp_bias': 'mlp_bias'},
        special=_WINDOWED_LAYERS | {'no_rope_layers', 'use_sliding_window'},
    ),
    'olmo2': Family(
        'Olmo2ForCausalLM', options={'norms': 'post', 'qk_norm': 'projection'}, fields=_BIASED
    ),
    'mixtral': Family(
        'MixtralForCausalLM',
        fields=_ROUTED,
        special=_WINDOW,
        only={'router_jitter_noise': 0.0},
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
        special=_WINDOW,
        only={'mlp_only_layers': [], 'decoder_sparse_step': 1},
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
COMMON_SPECIAL = frozenset({'head_dim', 'rope_parameters', 'max_position_embeddings'})
COMMON_ONLY: Mapping[str, Any] = {  # as `Family.only`, of all families
    'attention_dropout': 0.0,
    'quantization_config': None,
    'compression_config': None,
}

# Fields that the code of transformers reads without an effect on logits: how it computes, how it
# initializes, and what it adds to its own loss.
UNUSED_FIELDS = frozenset({
    '_attn_implementation', 'initializer_range', 'output_router_logits', 'pad_token_id',
    'router_aux_loss_coef',
})  # fmt: skip

# The `model_type` of checkpoints for text and images -> that of their text part.
TEXT_PARTS = {'gemma3': 'gemma3_text'}


def text_part(raw: Json) -> Json:
    """The `config.json` of the decoder of text: `raw` itself, or its part in a model with images.

    Raises:
      ValueError: the part is missing.
    """
    _check_names(raw)
    kind = TEXT_PARTS.get(raw.get('model_type', ''))
    if kind is None:
        return raw
    text = raw.get('text_config')
    if not isinstance(text, Mapping):
        raise ValueError(
            f'config.json of a {raw["model_type"]} checkpoint has no text_config: copy it again'
        )
    shared = {name: raw[name] for name in _SHARED_FIELDS if raw.get(name) is not None}
    return {**text, **shared, 'model_type': kind, 'architectures': [FAMILIES[kind].architecture]}


def _check_names(raw: Json) -> None:
    """Refuses a `model_type` that is no text, and `architectures` that are no texts."""
    kind, architectures = raw.get('model_type', ''), raw.get('architectures') or []
    named = isinstance(architectures, list) and all(isinstance(x, str) for x in architectures)
    if not isinstance(kind, str) or not named:
        raise ValueError(
            f'config.json has model_type={kind!r:.80} and architectures={architectures!r:.80}, '
            'which are no names: copy it again'
        )


# Fields that are stated for the whole of a model with images.
_SHARED_FIELDS = (
    'bos_token_id', 'compression_config', 'dtype', 'eos_token_id', 'pad_token_id',
    'quantization_config', 'tie_word_embeddings', 'torch_dtype', 'transformers_version',
)  # fmt: skip


def family_of(raw: Json) -> Family:
    """The family of a `config.json`.

    Raises:
      ValueError: its architecture is not supported.
    """
    _check_names(raw)
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
