"""The families of Hugging Face checkpoints as data: their config fields and their tensor names.

A family is what the fields of its `config.json` say in terms of `ModelConfig`, the options that all
its checkpoints share, and how its tensors are called where that differs from Llama's names.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from grpo_jax.models.config import PROJECTIONS, ModelConfig

Json = Mapping[str, Any]


class Family(NamedTuple):
    """How one `model_type` of Hugging Face differs from Llama."""

    architecture: str
    options: Mapping[str, Any] = {}  # of `ModelConfig`, the same for all checkpoints
    fields: Mapping[str, str] = {}  # option -> config field, besides those of `_FIELDS`
    names: Mapping[str, str] = {}  # parameter -> tensor in a layer, without '.weight'
    fused: Mapping[str, tuple[str, ...]] = {}  # tensor -> the parameters stacked in it

    @property
    def scorer(self) -> str:
        """The architecture that has a score in place of the logits."""
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

_FIELDS = {  # option -> config field that every family has
    'vocab_size': 'vocab_size',
    'width': 'hidden_size',
    'layers': 'num_hidden_layers',
    'heads': 'num_attention_heads',
    'kv_heads': 'num_key_value_heads',
    'mlp_width': 'intermediate_size',
    'tied_head': 'tie_word_embeddings',
    'norm_eps': 'rms_norm_eps',
}

_ACTIVATIONS = {'silu': 'silu', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu'}

# Fields that are read in `model_config` in ways of their own.
_SPECIAL = {
    'model_type', 'architectures', 'head_dim', 'hidden_act', 'hidden_activation', 'layer_types',
    'sliding_window', 'use_sliding_window', 'max_window_layers', 'query_pre_attn_scalar',
    'rope_parameters', 'rope_theta', 'rope_scaling', 'rope_local_base_freq',
    'partial_rotary_factor', 'sliding_window_pattern', '_sliding_window_pattern', 'num_experts',
    'max_position_embeddings', 'original_max_position_embeddings', 'no_rope_layers',
    'no_rope_layer_interval', 'id2label', 'label2id', 'num_labels',
}  # fmt: skip

# Fields that change nothing of what the model computes.
_WITHOUT_EFFECT = {
    'bos_token_id', 'eos_token_id', 'pad_token_id', 'dtype', 'torch_dtype', 'transformers_version',
    'use_cache', 'initializer_range', '_name_or_path', 'auto_map', 'cache_implementation',
    'output_router_logits', 'router_aux_loss_coef', 'router_jitter_noise', '_attn_implementation',
    'attn_implementation', 'chunk_size_feed_forward', 'problem_type',
    'return_dict', 'output_attentions', 'output_hidden_states', 'is_encoder_decoder',
    'pretraining_tp', 'is_llama_config', 'transformers.js_config', 'unsloth_fixed', 'use_mrope',
}  # fmt: skip

# Fields that are supported with one value only (None counts as it) where the family reads none.
_ONLY: dict[str, Any] = {
    'attention_bias': False,
    'attention_dropout': 0.0,
    'attn_logit_softcapping': None,
    'embd_pdrop': 0.0,
    'resid_pdrop': 0.0,
    'full_attn_mod': 1,
    'interpolate_factor': 1,
    'lm_head_bias': False,
    'mlp_bias': False,
    'rope_interleaved': False,
    'use_bidirectional_attention': False,
    'mlp_only_layers': [],
    'decoder_sparse_step': 1,
    'quantization_config': None,
}


def family_of(raw: Json) -> Family:
    """The family of a `config.json`.

    Raises:
      ValueError: it is not supported.
    """
    family = FAMILIES.get(raw.get('model_type', ''))
    architectures = raw.get('architectures') or []
    if family is None or (
        architectures and not {family.architecture, family.scorer} & {*architectures}
    ):
        found = ', '.join(architectures) or raw.get('model_type', 'none')
        known = ', '.join(f.architecture for f in FAMILIES.values())
        raise ValueError(
            f'architecture {found} is not supported: supported are {known}, and '
            'their ForSequenceClassification with one label'
        )
    return family


def model_config(raw: Json, **computed: Any) -> ModelConfig:
    """The `ModelConfig` of a checkpoint.

    Args:
      raw: its `config.json`, as any version of transformers wrote it.
      **computed: dtype, param_dtype, attention, remat and lora.

    Raises:
      ValueError: an architecture or fields that are not supported, all of them named.
    """
    family = family_of(raw)
    _check_fields(raw, family)
    from transformers import CONFIG_MAPPING  # slow to import

    # transformers fills in what older files leave out and renames what it once called otherwise.
    described = CONFIG_MAPPING[raw['model_type']].from_dict(dict(raw))
    scorer = family.scorer in (raw.get('architectures') or [])
    if scorer and described.num_labels != 1:
        raise ValueError(
            f'{family.scorer} with num_labels={described.num_labels} is not supported: a reward '
            'model has num_labels=1'
        )
    fields = described.to_dict()
    options = dict(family.options)
    for option, field in (_FIELDS | dict(family.fields)).items():
        options[option] = fields.get(field) or type(_default(option))()
    activation = fields.get('hidden_activation') or fields['hidden_act']
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f'activation {activation!r} is not supported: supported are {", ".join(_ACTIVATIONS)}'
        )
    head_dim = fields.get('head_dim') or options['width'] // options['heads']
    scalar = fields.get('query_pre_attn_scalar')
    return ModelConfig(
        **options,
        **_windows(fields),
        **_rope(fields),
        head_dim=head_dim,
        activation=_ACTIVATIONS[activation],
        attention_scale=scalar**-0.5 if scalar else 0.0,
        scalar_head=scorer,
        **computed,
    )


def _default(option: str) -> Any:
    default = ModelConfig.__dataclass_fields__[option].default
    return default if isinstance(default, bool | int | float) else 0


def _check_fields(raw: Json, family: Family) -> None:
    known = {*_FIELDS.values(), *family.fields.values()} | _SPECIAL | _WITHOUT_EFFECT
    wrong = [
        f'{name}={value!r}'
        for name, value in raw.items()
        if name not in known and not (name in _ONLY and value in (None, _ONLY[name]))
    ]
    if wrong:
        raise ValueError(
            f'config.json of a {raw["model_type"]} checkpoint has fields that are not supported: '
            f'{", ".join(wrong)}'
        )


def _windows(fields: Json) -> dict[str, Any]:
    layers = fields['num_hidden_layers']
    window = fields.get('sliding_window')
    types = fields.get('layer_types') or ['sliding_attention'] * layers
    chosen = tuple(n for n, kind in enumerate(types) if kind == 'sliding_attention')
    if not window or not chosen:
        return {}
    return {'window': window, 'window_layers': chosen}


def _rope(fields: Json) -> dict[str, Any]:
    parameters = fields['rope_parameters']
    options: dict[str, Any] = {}
    if 'full_attention' in parameters:
        local = parameters.get('sliding_attention') or {}
        if local.get('rope_type', 'default') != 'default':
            raise ValueError(f'rope scaling of windowed layers is not supported: {dict(local)}')
        options['local_rope_theta'] = float(local.get('rope_theta', 0.0))
        parameters = parameters['full_attention']
    scaling = {k: v for k, v in parameters.items() if v is not None}
    options['rope_theta'] = float(scaling.pop('rope_theta'))
    options['rope_fraction'] = fraction = scaling.pop('partial_rotary_factor', 1.0)
    if fraction != 1 and fields['model_type'] != 'phi3':  # transformers reads it there alone
        raise ValueError(
            f'partial_rotary_factor={fraction} is not supported for {fields["model_type"]}'
        )
    scaling.pop('type', None)  # the older name of rope_type
    kind = scaling.get('rope_type', 'default')
    longest = fields['max_position_embeddings']
    if kind == 'dynamic':
        scaling['max_position_embeddings'] = longest
        scaling.pop('original_max_position_embeddings', None)
    elif kind == 'longrope':
        original = scaling.setdefault(
            'original_max_position_embeddings', fields.get('original_max_position_embeddings')
        )
        scaling.setdefault('factor', longest / original)
    unrotated = [n for n, rotated in enumerate(fields.get('no_rope_layers') or []) if not rotated]
    return options | {
        'rope_scaling': {} if kind == 'default' else scaling,
        'unrotated_layers': tuple(unrotated),
    }


def hugging_face_fields(config: ModelConfig) -> dict[str, Any]:
    """A `config.json` for a decoder that was made here.

    Raises:
      ValueError: no family can express it.
    """
    for kind in ('llama', 'qwen2', 'qwen3', 'qwen3_moe', 'mixtral', 'olmo2'):
        family = FAMILIES[kind]
        values = {f: getattr(config, o) for o, f in (_FIELDS | dict(family.fields)).items()}
        raw = values | {
            'model_type': kind,
            'architectures': [family.scorer if config.scalar_head else family.architecture],
            'head_dim': config.head_dim,
            'hidden_act': next(k for k, v in _ACTIVATIONS.items() if v == config.activation),
            'max_position_embeddings': config.rope_scaling.get('max_position_embeddings', 32_768),
            'rope_parameters': {
                'rope_type': 'default', 'rope_theta': config.rope_theta, **config.rope_scaling,
            },
        }  # fmt: skip
        if config.scalar_head:
            raw |= {'id2label': {'0': 'LABEL_0'}, 'label2id': {'LABEL_0': 0}}  # one label
        names = ('dtype', 'param_dtype', 'attention', 'remat', 'lora')
        computed = {name: getattr(config, name) for name in names}
        if model_config(raw, **computed) == config:
            return raw
    raise ValueError(
        f'no Hugging Face architecture is like {config}: export a model whose options are those '
        'of Llama, Qwen or Mixtral, or one that was imported'
    )


def layer_names(config: ModelConfig, family: Family) -> dict[str, str]:
    """Parameter of a layer ('query', 'attention_norm/scale', ...) -> tensor after 'layers.N.'."""
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
