"""Load tokenizers, and find which ids they use and which of them end a completion."""

import json
import os
import pathlib
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

# Texts without a leading space, where versions of sentencepiece tokenizers differ on purpose.
_PROBES = (
    'Hello, world! How many apples are 12345 + 67?',
    'def f(x):\n    return  x ** 2\t# comment\n\n',
    'The answer is $\\frac{1}{2}$, i.e. 3.14 × 10^5; naïve café — “ok”. 数学很有趣。 😀',
)


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

    It begins texts with the beginning-of-sequence token as `add_bos_token` in its
    `tokenizer_config.json` says, which some versions of transformers ignore.

    Args:
      name: 'bytes' for `byte_tokenizer`, otherwise a folder or a Hugging Face hub repository.

    Raises:
      ValueError: it cannot be loaded, has no end-of-sequence token, ends every text with it, or
        encodes texts differently than its `tokenizer.json`.
    """
    if name == 'bytes':
        return byte_tokenizer()
    from transformers import AutoTokenizer

    try:
        # Code in the folder is never run, and nobody is asked whether it may.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokenizer(_PROBES[0])  # a wrong value in a file may be used here first
    except Exception as error:  # of many types, some of them from other libraries
        raise ValueError(
            f"tokenizer {name!r} cannot be loaded: give 'bytes', a folder with a tokenizer, or the "
            f'name of one on the Hugging Face hub ({type(error).__name__}: {error})'
        ) from error
    _check_ids(tokenizer, name)
    _add_bos_as_stated(tokenizer, name)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f'tokenizer {name!r} has no end-of-sequence token, so no completion could end: set '
            'eos_token in its tokenizer_config.json'
        )
    digit = tokenizer('1').input_ids
    if not digit:
        raise ValueError(
            f"tokenizer {name!r} has no tokens for '1', and perhaps for no text at all: copy its "
            'tokenizer.json again'
        )
    if digit[-1] == tokenizer.eos_token_id:
        raise ValueError(
            f'tokenizer {name!r} ends every text with {tokenizer.eos_token}, so no prompt could be '
            'continued: set add_eos_token to false in its tokenizer_config.json'
        )
    return tokenizer


def _find_file(name: str, file: str) -> pathlib.Path | None:
    """Return the path of a tokenizer's file, in its folder or the cache of the hub."""
    if pathlib.Path(name).is_dir():
        path = pathlib.Path(name) / file
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, file)
    return pathlib.Path(cached) if isinstance(cached, str) else None


def _check_ids(tokenizer: Tokenizer, name: str) -> None:
    """Raise ValueError if transformers encodes texts differently than the `tokenizer.json`."""
    path = _find_file(name, 'tokenizer.json')
    if path is None:
        return
    import tokenizers
    import transformers

    stored = tokenizers.Tokenizer.from_file(str(path))
    for text in _PROBES:
        expected = stored.encode(text, add_special_tokens=False).ids
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if ids != expected:
            at = next(
                (i for i, pair in enumerate(zip(ids, expected, strict=False)) if len({*pair}) > 1),
                0,
            )
            raise ValueError(
                f'tokenizer {name!r}: transformers {transformers.__version__} loads it as '
                f'{type(tokenizer).__name__}, which encodes {text!r} as [..., {ids[at]}, ...] at '
                f'token {at}, but its tokenizer.json as [..., {expected[at]}, ...]. Copy the files '
                'of the tokenizer into another folder, without config.json, set tokenizer_class to '
                "'PreTrainedTokenizerFast' in its tokenizer_config.json, and name the folder as "
                'the tokenizer'
            )


def _add_bos_as_stated(tokenizer: Tokenizer, name: str) -> None:
    """Make the tokenizer begin texts with its BOS token, or not, as its configuration says."""
    path = _find_file(name, 'tokenizer_config.json')
    settings = json.loads(path.read_text()) if path else {}
    stated = settings.get('add_bos_token') if isinstance(settings, dict) else None
    if not isinstance(stated, bool) or tokenizer.bos_token_id is None:
        return
    if (tokenizer('1').input_ids[:1] == [tokenizer.bos_token_id]) != stated:
        tokenizer.add_bos_token = stated


def token_ids(tokenizer: Tokenizer) -> Int[np.ndarray, ' N']:
    """Return the ids that the tokenizer has tokens for, ascending; there may be gaps."""
    return np.unique(np.fromiter(tokenizer.get_vocab().values(), np.int32))


def token_ranges(ids: Int[np.ndarray, ' N']) -> tuple[tuple[int, int], ...]:
    """Return ascending ids as ranges (first, last + 1)."""
    ends = np.flatnonzero(np.diff(ids, append=ids[-1] + 2) > 1)
    starts = np.concatenate([[0], ends[:-1] + 1])
    pairs = zip(ids[starts].tolist(), (ids[ends] + 1).tolist(), strict=True)
    return tuple(pairs)


def check_token_ids(ids: Int[np.ndarray, '...'], tokenizer: Tokenizer, vocab_size: int) -> None:
    """Check that the model has an embedding for every token that is used.

    Raises:
      ValueError: an id is at least `vocab_size`.
    """
    largest = int(ids.max(initial=0))
    if largest >= vocab_size:
        raise ValueError(
            f'{tokenizer.convert_ids_to_tokens(largest)!r} is token {largest} of the tokenizer, '
            f'but the checkpoint embeds {vocab_size} tokens: use the tokenizer of the checkpoint, '
            'or remove this token from the prompts, the chat template and the special tokens'
        )


def eos_ids(
    tokenizer: Tokenizer, generation_config: Mapping[str, Any] | None = None
) -> Int[np.ndarray, ' E']:
    """Return the token ids that end a completion, i32[E].

    Args:
      tokenizer: its end-of-sequence token comes first.
      generation_config: content of a checkpoint's `generation_config.json` or `config.json`, whose
        `eos_token_id` may list several ids.
    """
    more = (generation_config or {}).get('eos_token_id')
    more = more if isinstance(more, list) else [more]
    ids = dict.fromkeys([tokenizer.eos_token_id, *(i for i in more if i is not None)])
    return np.array(list(ids), np.int32)
