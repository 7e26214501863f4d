"""Makes a small Hugging Face checkpoint with random weights, to try training from a folder.

    python benchmarks/make_checkpoint.py --output=runs/tiny

A Qwen2 of about 5 million parameters with a byte-level BPE tokenizer of 4,096 tokens, trained on
the questions and solutions of GSM8K's training file under $GRPO_JAX_DATA_DIR. Needs PyTorch
(`pip install -e '.[parity]'`).
"""

import json
import os
import pathlib

import torch
import transformers
from absl import app, flags

OUTPUT = flags.DEFINE_string('output', None, 'the folder to write', required=True)
VOCABULARY = flags.DEFINE_integer('vocabulary', 4096, 'tokens')
WIDTH = flags.DEFINE_integer('width', 256, 'of the hidden states')
LAYERS = flags.DEFINE_integer('layers', 5, 'layers')


def make_tokenizer(texts: list[str], size: int) -> transformers.Qwen2Tokenizer:
    """A byte-level BPE tokenizer that splits texts into words as Qwen2's does."""
    empty = transformers.Qwen2Tokenizer(pad_token='<|endoftext|>', eos_token='<|im_end|>')
    return empty.train_new_from_iterator(texts, size, show_progress=False)


def main(arguments: list[str]) -> None:
    """Writes the folder."""
    if arguments[1:]:
        raise app.UsageError(f'unexpected arguments: {arguments[1:]}')
    path = pathlib.Path(os.environ.get('GRPO_JAX_DATA_DIR', ''), 'gsm8k', 'train.jsonl')
    if not path.is_file():
        raise app.UsageError(
            f'{path}: no such file: GRPO_JAX_DATA_DIR has to name a folder with it'
        )
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tokenizer = make_tokenizer(
        [row['question'] + '\n' + row['answer'] for row in rows], VOCABULARY.value
    )
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH.value,
        intermediate_size=3 * WIDTH.value,
        num_hidden_layers=LAYERS.value,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(OUTPUT.value)
    tokenizer.save_pretrained(OUTPUT.value)
    print(f'{model.num_parameters() / 1e6:.1f} million parameters in {OUTPUT.value}')


if __name__ == '__main__':
    app.run(main)
