"""Tiny Hugging Face checkpoints made without PyTorch, and a config of runs that begin with them."""

import json

import runs
import tiny

from grpo_jax import tokens
from grpo_jax.models import families, hf

# How ChatML frames a conversation.
CHATML = (
    '{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n'
    '{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
IM_START, IM_END = 258, 259


def chat_tokenizer():
    """The byte tokenizer with the special tokens and the template of ChatML."""
    tokenizer = tokens.byte_tokenizer()
    tokenizer.split_special_tokens = False
    tokenizer.add_special_tokens({'additional_special_tokens': ['<|im_start|>', '<|im_end|>']})
    tokenizer.chat_template = CHATML
    return tokenizer


def write(folder, *, tokenizer=None, generation=None, seed=0, fields=None, **options):
    """A random Llama (by its options Qwen3 and others) with a byte tokenizer; returns the folder.

    `generation` is its generation_config.json, `fields` change its config.json.
    """
    model = tiny.make_model(**({'vocab_size': 264, 'layers': 1, 'head_dim': 4} | options))
    described = families.hugging_face_fields(model.config) | (fields or {})
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(described))
    if generation is not None:
        (folder / 'generation_config.json').write_text(json.dumps(generation))
    (tokenizer or tokens.byte_tokenizer()).save_pretrained(folder)
    params = tiny.make_params(model, seed)
    hf.save(params, model.config, described, folder, dtype='float32')
    return folder


def get_config(pretrained, *, rank=0):
    """A short run of both stages from a checkpoint; adapters where the rank is not 0."""
    config = runs.get_config()
    usual = runs.grpo_defaults().model
    config.model = usual
    config.pretrained = str(pretrained)
    config.model.lora.rank = rank
    config.sft.update(steps=2)
    config.grpo.update(steps=3)
    config.grpo.algorithm.update(inner_updates=1, entropy=False)
    config.eval.update(every=3, samples=0)
    config.checkpoint.update(every=1)
    return config
