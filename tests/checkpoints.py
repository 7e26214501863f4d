"""Small Hugging Face checkpoints of every family, made and computed by transformers.

Importing this module skips the tests that do so where PyTorch is not installed.
"""

import copy
import functools

import jax
import numpy as np
import pytest

from grpo_jax import models
from grpo_jax.models import hf

torch = pytest.importorskip('torch', reason='PyTorch is the reference for checkpoints')
transformers = pytest.importorskip('transformers')

torch.set_num_threads(1)  # these models are too small for more

VOCAB = 67
SIZES = {
    'vocab_size': VOCAB,
    'hidden_size': 32,
    'intermediate_size': 40,
    'num_hidden_layers': 3,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'max_position_embeddings': 32,
    'bos_token_id': 1,
    'eos_token_id': 2,
    'pad_token_id': 0,
}
EXPERTS = {'num_local_experts': 5, 'num_experts_per_tok': 2}

# Options in addition to SIZES that make a model small, or that define its family.
SMALL = {
    'mistral': {'sliding_window': 6},
    'gemma2': {'head_dim': 12, 'sliding_window': 5, 'query_pre_attn_scalar': 20},
    'gemma3_text': {
        'head_dim': 12,
        'sliding_window': 5,
        'query_pre_attn_scalar': 20,
        'layer_types': ['sliding_attention', 'sliding_attention', 'full_attention'],
    },
    'qwen3': {'head_dim': 10},
    'smollm3': {'no_rope_layers': [1, 0, 1]},
    'mixtral': EXPERTS,
    'qwen3_moe': EXPERTS | {'moe_intermediate_size': 24, 'head_dim': 10, 'norm_topk_prob': True},
}


def rope(kind, **settings):
    """The field of a config.json that says how positions are stretched."""
    return {'rope_parameters': {'rope_type': kind, 'rope_theta': 500.0, **settings}}


def make_config(kind, **options):
    """The transformers config of a small model of the family `kind`."""
    return transformers.AutoConfig.for_model(kind, **(SIZES | SMALL.get(kind, {}) | options))


def make_torch(config, seed=0):
    """A random model in float32: no bias is 0, no norm at its neutral scale, no softmax flat."""
    torch.manual_seed(seed)  # parameters are made before they are filled
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation='eager', dtype=torch.float32
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if 'norm' in name:
                parameter += 0.2 * noise
            elif parameter.ndim == 1:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(_spread(name, config) * noise * parameter.shape[-1] ** -0.5)
    return model


def _spread(name, config):
    if 'embed' in name and 'gemma' in config.model_type:
        return 0.4  # else a scaled and tied embedding only repeats the last token
    if 'embed' in name or 'lm_head' in name:
        return 3.0  # else the best token is hardly better than the next
    return 1.5 if any(part in name for part in ('q_proj', 'k_proj', 'qkv_proj')) else 1.0


def save(model, folder, **options):
    """Writes a checkpoint as transformers does; returns the folder."""
    model.save_pretrained(folder, **options)
    return folder


def read(folder, mesh=None, **computed):
    """(model, parameters, config.json) of a folder, imported by the package."""
    raw = hf.read_json(folder / 'config.json')
    model = models.Transformer(hf.model_config(raw, **({'remat': False} | computed)))
    shapes = jax.eval_shape(functools.partial(models.init_params, model), jax.random.key(0))
    return model, hf.load(folder, model.config, shapes, mesh), raw


def open_torch(folder, dtype=torch.float32):
    """A folder as transformers loads it: the model, and complaints about its tensors."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation='eager', output_loading_info=True
    )
    return model.eval(), {name: found for name, found in info.items() if found}


def completion_logits(model, rollout, *, cached=False):
    """[B, G, T, V] by transformers, each sequence alone.

    With `cached` the prompt is read at once and the completion token by token over its cache: the
    lengths by which dynamic and longrope positions are stretched.
    """
    prompts = rollout.prompts
    rows = []
    for b, group in enumerate(np.asarray(rollout.tokens)):
        prompt = np.asarray(prompts.tokens[b][: prompts.length[b]])
        one = _cached_logits if cached else _plain_logits
        rows.append([one(model, torch.tensor(prompt), torch.tensor(row)) for row in group])
    return np.array(rows)


@torch.no_grad()
def _plain_logits(model, prompt, completion):
    tokens = torch.cat([prompt, completion])[None]
    return model(tokens).logits[0, len(prompt) - 1 : -1].numpy()


@torch.no_grad()
def _cached_logits(model, prompt, completion):
    model = copy.deepcopy(model)  # it remembers the longest sequence that it has seen
    out = model(prompt[None], use_cache=True)
    logits = [out.logits[0, -1]]
    for token in completion[:-1]:
        out = model(token[None, None], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[0, -1])
    return torch.stack(logits).numpy()


def error(ours, reference):
    """Largest difference, relative to the largest value."""
    return float(np.abs(np.asarray(ours) - reference).max() / np.abs(reference).max())
