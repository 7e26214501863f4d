"""The `config.json` of Hugging Face checkpoints: reading it as a `ModelConfig`, and writing it."""

import functools
import logging
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from grpo_jax.models import rope
from grpo_jax.models.config import ModelConfig
from grpo_jax.models.hf.families import (
    COMMON_FIELDS,
    COMMON_ONLY,
    COMMON_SPECIAL,
    FAMILIES,
    Family,
    Json,
    family_of,
    text_part,
)
from grpo_jax.models.hf.folder import read_json

log = logging.getLogger('grpo_jax')

_ACTIVATIONS = {'silu': 'silu', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu'}

# Older names of the fields that families read, and what transformers computes those from.
_SOURCES = {
    'layer_types': ('max_window_layers', 'sliding_window_pattern', '_sliding_window_pattern'),
    'no_rope_layers': ('no_rope_layer_interval',),
    'num_local_experts': ('num_experts',),
    'rope_parameters': (
        'rope_theta', 'rope_scaling', 'rope_local_base_freq', 'partial_rotary_factor',
        'original_max_position_embeddings',
    ),
    'sliding_window': ('use_sliding_window',),
}  # fmt: skip

_LONGEST = 120  # characters of a value in an error message
_SIZES = [f for o, f in COMMON_FIELDS.items() if o not in ('tied_head', 'norm_eps')]
_LARGEST, _MOST_LAYERS = 2**31 - 1, 10_000


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The `config.json` of a folder, or that of the text part of a model with images."""
    return dict(text_part(read_json(folder / 'config.json')))


def model_config(raw: Json, **computed: Any) -> ModelConfig:
    """The `ModelConfig` of a checkpoint.

    What the code of transformers does not read for this family is ignored, as transformers does.

    Args:
      raw: its `config.json`, written by any version of transformers.
      **computed: dtype, param_dtype, attention, remat, lora and token_ranges.

    Raises:
      ValueError: the architecture or some fields are not supported, or transformers cannot read
        them; the message lists all that are not supported.
    """
    raw = text_part(raw)
    family = family_of(raw)
    _check_sizes(raw)
    hf_config = _parse(raw)
    try:
        made = _convert(raw, hf_config, family, computed)
    except (TypeError, KeyError, AttributeError, IndexError, ArithmeticError) as error:
        raise ValueError(_wrong_value(raw, error)) from error
    for name, value in vars(made).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(_wrong_value(raw, ValueError(f'{name} is {value}')))
    return made


def _convert(raw: Json, hf_config: Any, family: Family, computed: Json) -> ModelConfig:
    """The `ModelConfig` of a config object of transformers."""
    fields = hf_config.to_dict()
    _check_fields(raw, fields, family)
    scorer = family.scorer in (raw.get('architectures') or [])
    if scorer and hf_config.num_labels != 1:
        raise ValueError(
            f'{family.scorer} with num_labels={hf_config.num_labels} is not supported: a reward '
            'model has num_labels=1'
        )
    options = dict(family.options)
    for option, field in (COMMON_FIELDS | dict(family.fields)).items():
        options[option] = fields.get(field) or type(_default(option))()
    (activation_field,) = family.special & {'hidden_act', 'hidden_activation'}
    activation = fields[activation_field]
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f'activation {activation!r} is not supported: supported are {", ".join(_ACTIVATIONS)}'
        )
    head_dim = fields.get('head_dim') or options['width'] // options['heads']
    scalar = fields['query_pre_attn_scalar'] if 'query_pre_attn_scalar' in family.special else 0
    return ModelConfig(
        **options,
        **_windows(fields, family),
        **_rope(fields, family),
        head_dim=head_dim,
        activation=_ACTIVATIONS[activation],
        attention_scale=scalar**-0.5 if scalar else 0.0,
        scalar_head=scorer,
        **computed,
    )


def _parse(raw: Json) -> Any:
    """The config object of transformers, which renames old fields and adds defaults."""
    from transformers import CONFIG_MAPPING  # slow to import

    quantized = raw.get('quantization_config') or raw.get('compression_config')
    if quantized:
        described = quantized if isinstance(quantized, Mapping) else {}
        method = str(described.get('quant_method', 'unnamed'))[:40]
        bits = [f'{n} bits' for n in (8, 4) if described.get(f'load_in_{n}bit')]
        bits += [f'{described["bits"]} bits'] if isinstance(described.get('bits'), int) else []
        method = ' in '.join([method, *bits])
        raise ValueError(
            f'quantized weights are not supported: quantization_config={method}; use the '
            'checkpoint that was quantized, in 16 or 32 bits'
        )
    try:
        return CONFIG_MAPPING[raw['model_type']].from_dict(dict(raw))
    except Exception as error:  # of many types, some of them from other libraries
        raise ValueError(_wrong_value(raw, error)) from error


def _wrong_value(raw: Json, error: Exception) -> str:
    missing = f'{error} is missing' if isinstance(error, KeyError) else str(error)
    reason = ' '.join(missing.split())
    return (
        f'config.json of a {raw["model_type"]} checkpoint has a wrong value: {reason[:300]}; '
        'copy it again, or correct it'
    )


def _check_sizes(raw: Json) -> None:
    """Refuses sizes that are no numbers or too large; transformers would make lists of them."""
    for name in _SIZES:
        value, most = raw.get(name), _MOST_LAYERS if name == 'num_hidden_layers' else _LARGEST
        if value is not None and not (type(value) is int and 0 < value <= most):
            raise ValueError(
                f'config.json of a {raw["model_type"]} checkpoint has a wrong value: {name!r} is '
                f'{value!r:.80}, but a size is a whole number from 1 to {most}'
            )


def _default(option: str) -> Any:
    default = ModelConfig.__dataclass_fields__[option].default
    return default if isinstance(default, bool | int | float) else 0


def _check_fields(raw: Json, fields: Json, family: Family) -> None:
    """Refuses values that the family applies and this package does not; warns of unknown fields."""
    unsupported = [
        f'{name}={str(fields[name])[:_LONGEST]}'
        for name, value in {**COMMON_ONLY, **family.only}.items()
        if fields.get(name) not in (None, value)
    ]
    if unsupported:
        raise ValueError(
            f'config.json of a {raw["model_type"]} checkpoint has fields that are not supported: '
            f'{", ".join(unsupported)}'
        )
    read = {*COMMON_FIELDS.values(), *family.fields.values(), *COMMON_SPECIAL, *family.special}
    sources = {source for name in read for source in _SOURCES.get(name, ())}
    known = read | sources | {*COMMON_ONLY, *family.only, *_standard_fields(raw['model_type'])}
    ignored = [
        f'{name}={str(value)[:_LONGEST]}'
        for name, value in raw.items()
        if name not in known and name not in _DESCRIPTIONS and value not in (None, False, 0, [], {})
    ]
    if ignored:
        log.warning(
            'config.json of a %s checkpoint has fields without effect in transformers, which are '
            'ignored here too: %s',
            raw['model_type'],
            ', '.join(ignored),
        )


# Fields that describe a checkpoint or set up a program, and that some published checkpoints have.
_DESCRIPTIONS = {
    '_name_or_path', '_attn_implementation', '_attn_implementation_autoset', 'attn_implementation',
    'auto_map', 'cache_implementation', 'is_llama_config', 'pretraining_tp', 'torch_dtype',
    'transformers.js_config', 'transformers_version', 'unsloth_fixed', 'unsloth_version',
    'use_cache', 'use_mrope',
}  # fmt: skip


@functools.cache
def _standard_fields(kind: str) -> frozenset[str]:
    """The fields that transformers defines for a family, most of them for all families."""
    from transformers import CONFIG_MAPPING

    return frozenset(CONFIG_MAPPING[kind]().to_dict())


def _windows(fields: Json, family: Family) -> dict[str, Any]:
    layers = range(fields['num_hidden_layers'])
    window = fields.get('sliding_window') if 'sliding_window' in family.special else None
    windowed = tuple(layers)
    if 'layer_types' in family.special:
        types = fields['layer_types']
        other = {*types} - {'full_attention', 'sliding_attention'}
        if other:
            raise ValueError(
                f'layer_types of {fields["model_type"]}: {", ".join(sorted(other))} is not '
                'supported: supported are full_attention and sliding_attention'
            )
        windowed = tuple(n for n in layers if types[n] == 'sliding_attention')
    if not window or not windowed:
        return {}
    return {'window': window, 'window_layers': windowed}


def _rope(fields: Json, family: Family) -> dict[str, Any]:
    parameters = fields['rope_parameters']
    options: dict[str, Any] = {}
    if 'full_attention' in parameters:
        local = parameters.get('sliding_attention') or {}
        if local.get('rope_type', 'default') != 'default':
            raise ValueError(f'rope scaling of windowed layers is not supported: {dict(local)}')
        options['local_rope_theta'] = float(local.get('rope_theta', 0.0))
        parameters = parameters['full_attention']
    settings = {k: v for k, v in parameters.items() if v is not None}
    options['rope_theta'] = float(settings['rope_theta'])
    kind = settings.get('rope_type', 'default')
    fraction = settings.get('partial_rotary_factor', 1.0)
    if 'partial_rotary_factor' in family.special:
        options['rope_fraction'] = fraction
    elif fraction != 1 and kind != 'default':  # without scaling, the other families ignore it
        raise ValueError(
            f'partial_rotary_factor={fraction} with rope_type={kind!r} is not supported for '
            f'{fields["model_type"]}'
        )
    unrotated = []
    if 'no_rope_layers' in family.special:
        unrotated = [n for n, rotated in enumerate(fields['no_rope_layers']) if not rotated]
    return options | {
        'rope_scaling': _scaling(kind, settings, fields),
        'unrotated_layers': tuple(unrotated),
    }


def _scaling(kind: str, settings: Json, fields: Json) -> dict[str, Any]:
    """The settings that a kind of scaling reads; transformers ignores the others, too."""
    if kind == 'default':
        return {}
    scaling = {k: v for k, v in settings.items() if k in ('rope_type', *rope.settings_of(kind))}
    longest = fields['max_position_embeddings']
    if kind == 'dynamic':
        scaling['max_position_embeddings'] = longest
    elif kind == 'longrope':
        original = scaling.setdefault(
            'original_max_position_embeddings', fields.get('original_max_position_embeddings')
        )
        scaling.setdefault('factor', longest / original)
    return scaling


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
