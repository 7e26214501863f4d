"""The `config.json` of Hugging Face checkpoints: reading it as a `ModelConfig`, and writing it."""

from typing import Any

from grpo_jax.models.config import ModelConfig
from grpo_jax.models.hf.families import COMMON_FIELDS, FAMILIES, Family, Json, family_of

_ACTIVATIONS = {'silu': 'silu', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu'}

# Fields that `model_config` handles individually.
_SPECIAL = {
    'model_type', 'architectures', 'head_dim', 'hidden_act', 'hidden_activation', 'layer_types',
    'sliding_window', 'use_sliding_window', 'max_window_layers', 'query_pre_attn_scalar',
    'rope_parameters', 'rope_theta', 'rope_scaling', 'rope_local_base_freq',
    'partial_rotary_factor', 'sliding_window_pattern', '_sliding_window_pattern', 'num_experts',
    'max_position_embeddings', 'original_max_position_embeddings', 'no_rope_layers',
    'no_rope_layer_interval', 'id2label', 'label2id', 'num_labels',
}  # fmt: skip

# Fields that do not change what the model computes.
_WITHOUT_EFFECT = {
    'bos_token_id', 'eos_token_id', 'pad_token_id', 'dtype', 'torch_dtype', 'transformers_version',
    'use_cache', 'initializer_range', '_name_or_path', 'auto_map', 'cache_implementation',
    'output_router_logits', 'router_aux_loss_coef', 'router_jitter_noise', '_attn_implementation',
    'attn_implementation', 'chunk_size_feed_forward', 'problem_type',
    'return_dict', 'output_attentions', 'output_hidden_states', 'is_encoder_decoder',
    'pretraining_tp', 'is_llama_config', 'transformers.js_config', 'unsloth_fixed', 'use_mrope',
}  # fmt: skip

# Fields that are supported only with this value or None, unless the family reads them.
_SINGLE_VALUE: dict[str, Any] = {
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


def model_config(raw: Json, **computed: Any) -> ModelConfig:
    """The `ModelConfig` of a checkpoint.

    Args:
      raw: its `config.json`, written by any version of transformers.
      **computed: dtype, param_dtype, attention, remat and lora.

    Raises:
      ValueError: the architecture or some fields are not supported; the message lists all of them.
    """
    family = family_of(raw)
    _check_fields(raw, family)
    from transformers import CONFIG_MAPPING  # slow to import

    # transformers adds the defaults that older files omit and renames fields that it has renamed.
    hf_config = CONFIG_MAPPING[raw['model_type']].from_dict(dict(raw))
    scorer = family.scorer in (raw.get('architectures') or [])
    if scorer and hf_config.num_labels != 1:
        raise ValueError(
            f'{family.scorer} with num_labels={hf_config.num_labels} is not supported: a reward '
            'model has num_labels=1'
        )
    fields = hf_config.to_dict()
    options = dict(family.options)
    for option, field in (COMMON_FIELDS | dict(family.fields)).items():
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
    known = {*COMMON_FIELDS.values(), *family.fields.values()} | _SPECIAL | _WITHOUT_EFFECT
    unsupported = [
        f'{name}={value!r}'
        for name, value in raw.items()
        if name not in known
        and not (name in _SINGLE_VALUE and value in (None, _SINGLE_VALUE[name]))
    ]
    if unsupported:
        raise ValueError(
            f'config.json of a {raw["model_type"]} checkpoint has fields that are not supported: '
            f'{", ".join(unsupported)}'
        )


def _windows(fields: Json) -> dict[str, Any]:
    layers = fields['num_hidden_layers']
    window = fields.get('sliding_window')
    types = fields.get('layer_types') or ['sliding_attention'] * layers
    windowed = tuple(n for n, kind in enumerate(types) if kind == 'sliding_attention')
    if not window or not windowed:
        return {}
    return {'window': window, 'window_layers': windowed}


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
    if fraction != 1 and fields['model_type'] != 'phi3':  # transformers reads it for phi3 only
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
    """The `config.json` for a decoder that was not imported from Hugging Face.

    Raises:
      ValueError: no family has these options.
    """
    for kind in ('llama', 'qwen2', 'qwen3', 'qwen3_moe', 'mixtral', 'olmo2'):
        family = FAMILIES[kind]
        values = {f: getattr(config, o) for o, f in (COMMON_FIELDS | dict(family.fields)).items()}
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
        f'no Hugging Face architecture is like {config}: export a model with the options of Llama, '
        'Qwen or Mixtral, or an imported one'
    )
