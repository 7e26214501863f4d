"""Load tokenizers, and find the token ids that end a completion."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Tokenizer = PreTrainedTokenizerBase
else:
    Tokenizer = Any  # only type checkers import transformers here, because that takes seconds

# Stops transformers from advising to install PyTorch, which tokenizers do not need.
os.environ.setdefault('TRANSFORMERS_NO_ADVISORY_WARNINGS', '1')


def byte_tokenizer() -> Tokenizer:
    """Make a tokenizer whose ids are the bytes of UTF-8 text, `<pad>` = 256 and `<eos>` = 257.

    It adds no special tokens, and encodes text that spells a special token as bytes.
    """
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    # Byte-level models represent each byte by one visible character: the Latin-1 character of that
    # number if it is visible, otherwise the next unused character after Latin-1.
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    invisible = (byte for byte in range(256) if byte not in visible)
    vocabulary = {chr(byte): byte for byte in visible}
    vocabulary |= {chr(number): byte for number, byte in enumerate(invisible, 256)}
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


def load_tokenizer(name: str) -> Tokenizer:
    """Load a tokenizer.

    Args:
      name: 'bytes' for `byte_tokenizer`, otherwise a folder or a Hugging Face hub repository.

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
            f"tokenizer {name!r} cannot be loaded: give 'bytes', a folder with a tokenizer, or the "
            f'name of one on the Hugging Face hub ({error})'
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


def eos_ids(
    tokenizer: Tokenizer, generation_config: Mapping[str, Any] | None = None
) -> Int[np.ndarray, ' E']:
    """Return the token ids that end a completion, i32[E].

    Args:
      tokenizer: its end-of-sequence token comes first.
      generation_config: content of a checkpoint's `generation_config.json`, whose `eos_token_id`
        may list several ids.
    """
    more = (generation_config or {}).get('eos_token_id')
    more = more if isinstance(more, list) else [more]
    ids = dict.fromkeys([tokenizer.eos_token_id, *(i for i in more if i is not None)])
    return np.array(list(ids), np.int32)
