"""From text to tokens and back."""

import os
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # importing transformers takes a second or two, so it waits until it is needed
    from transformers import PreTrainedTokenizerBase

# Tokenizers need no PyTorch: transformers need not advise to install it.
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')


def byte_tokenizer() -> 'PreTrainedTokenizerBase':
    """A tokenizer whose ids are the bytes of the UTF-8 text, with `<pad>` = 256 and `<eos>` = 257.

    It adds nothing to a text, and text that spells a special token is encoded as its bytes.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    # Byte-level models name each byte by one visible character: the one of that number where
    # Latin-1 has it, otherwise the next of those that follow Latin-1.
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in visible)
    vocabulary = {chr(byte): byte for byte in visible}
    vocabulary |= {chr(number): byte for number, byte in enumerate(others, 256)}
    vocabulary |= {'<pad>': 256, '<eos>': 257}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = byte_level
    model.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token='<pad>',
        eos_token='<eos>',
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(name: str) -> 'PreTrainedTokenizerBase':
    """The byte tokenizer for 'bytes', otherwise that of a folder or hub repository of this name.

    Raises:
        ValueError: it cannot be loaded, has no end-of-sequence token, or ends every text with it.
    """
    if name == 'bytes':
        return byte_tokenizer()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer {name!r} cannot be loaded: give 'bytes', a folder that holds a tokenizer, "
            f'or the name of one on the Hugging Face hub ({error})'
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f'tokenizer {name!r} has no end-of-sequence token, so no completion could end: set '
            'eos_token in its tokenizer_config.json'
        )
    if tokenizer('1').input_ids[-1] == tokenizer.eos_token_id:
        raise ValueError(
            f'tokenizer {name!r} ends every text with {tokenizer.eos_token}, so no prompt could be '
            'continued: set add_eos_token to false in its tokenizer_config.json'
        )
    return tokenizer


def eos_ids(tokenizer: 'PreTrainedTokenizerBase', *others: str) -> tuple[int, ...]:
    """The ids that end a completion: the end-of-sequence token, then the tokens `others`.

    Raises:
        ValueError: one of `others` is not in the vocabulary.
    """
    vocabulary = tokenizer.get_vocab()
    for token in others:
        if token not in vocabulary:
            raise ValueError(f'{token!r} cannot end completions: it is no token of the vocabulary')
    return (tokenizer.eos_token_id, *(vocabulary[token] for token in others))


def texts(tokenizer: 'PreTrainedTokenizerBase', tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """The text of the tokens i32[N, T] where mask bool[N, T] is true, without special tokens."""
    rows = [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)
