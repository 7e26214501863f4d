"""Tiny Hugging Face checkpoints made without PyTorch, and runs that begin with them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import runs
import tiny

from grpo_jax.data import byte_tokenizer
from grpo_jax.models import hf
from grpo_jax.run import checkpoint, setup
from grpo_jax.run.config import defaults
from grpo_jax.types import TrainState

VOCAB = 264  # more than any of the tokenizers has
EOS, IM_START, IM_END, ANOTHER_END = 257, 258, 259, 263

# How ChatML frames a conversation.
CHATML = (
    '{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n'
    '{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)


def chat_tokenizer():
    """The byte tokenizer with the special tokens and the template of ChatML."""
    tokenizer = byte_tokenizer()
    tokenizer.split_special_tokens = False
    tokenizer.add_special_tokens({'additional_special_tokens': ['<|im_start|>', '<|im_end|>']})
    tokenizer.chat_template = CHATML
    return tokenizer


def write(folder, *, tokenizer=None, generation=None, fields=None, params=None, **options):
    """Writes a random Llama (by its options a Qwen3 or others); returns the folder.

    `generation` is its generation_config.json; `fields` replace some of its config.json; `params`
    makes its parameters from the model.
    """
    model = make_model(**options)
    described = hf.hugging_face_fields(model.config)
    described |= {'eos_token_id': EOS, 'pad_token_id': 256} | (fields or {})
    folder.mkdir(parents=True)
    (folder / 'config.json').write_text(json.dumps(described))
    if generation is not None:
        (folder / 'generation_config.json').write_text(json.dumps(generation))
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    hf.save((params or tiny.make_params)(model), model.config, described, folder, dtype='float32')
    return folder


def make_model(**options):
    return tiny.make_model(**({'vocab_size': VOCAB, 'layers': 1, 'head_dim': 4} | options))


def all_ids(model):
    """The model with logits of the ids that the tokenizer has no tokens for, too."""
    return model.clone(config=dataclasses.replace(model.config, token_ranges=()))


def writing(*likely):
    """Parameters of a model whose every token is one of `likely`, all with the same probability."""

    def make(model):
        width, vocab = model.config.width, model.config.vocab_size
        logits = jnp.full(vocab, -40.0).at[jnp.array(likely)].set(0.0)
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tiny.shapes(model))
        params['embedding'] += 1
        params['final_norm']['scale'] += 1
        return params | {'head': jnp.broadcast_to(logits / width, (width, vocab))}

    return make


def get_config(pretrained='', *, rank=0, sft=0, **data):
    """A short run from a checkpoint: GRPO, after `sft` steps of SFT; with adapters of a rank."""
    config = runs.get_config()
    config.model = defaults().model
    config.pretrained = str(pretrained)
    config.model.lora.rank = rank
    for name, value in data.items():
        config.data[name] = value
    config.sft.update(steps=sft)
    config.grpo.update(steps=3)
    config.grpo.algorithm.update(inner_updates=1, entropy=False)
    config.eval.update(every=3, samples=0)
    config.checkpoint.update(every=2, keep=3)
    return config


def rows(folder, **splits):
    """Writes JSON lines of questions, each answered by '1'; returns keys of a config's data."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, questions in splits.items():
        lines = [json.dumps({'question': q, 'answer': '1', 'solution': '1'}) for q in questions]
        (folder / f'{name}.jsonl').write_text('\n'.join(lines) + '\n')
    return {
        'name': 'jsonl',
        'options': {'folder': str(folder)},
        'cache_dir': str(folder / 'cache'),
        'demonstration': '{solution}',
    }


def pretend(config, workdir, params, *, stage='grpo', step=3):
    """Writes the files of a run that has trained these parameters."""
    workdir.mkdir(parents=True, exist_ok=True)
    checkpoint.claim_workdir(workdir, config)
    setup.keep_description(setup.prepare(config, workdir))
    manager = checkpoint.open_manager(workdir / 'checkpoints' / stage, keep=1)
    checkpoint.save(manager, step, TrainState(jnp.int32(step), params, (), jnp.int32(0)))
    manager.close()
    return workdir
