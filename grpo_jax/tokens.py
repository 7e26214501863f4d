"""From text to tokens and back."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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


def eos_ids(
    tokenizer: 'PreTrainedTokenizerBase', generation: Mapping[str, Any] | None = None
) -> np.ndarray:
    """The ids i32[E] that end a completion.

    Args:
        tokenizer: its end-of-sequence token comes first.
        generation: a checkpoint's `generation_config.json`, whose `eos_token_id` may name several.
    """
    others = (generation or {}).get('eos_token_id')
    others = others if isinstance(others, list) else [others]
    ids = dict.fromkeys([tokenizer.eos_token_id, *(i for i in others if i is not None)])
    return np.array(list(ids), np.int32)


def texts(
    tokenizer: 'PreTrainedTokenizerBase',
    tokens: np.ndarray,
    mask: np.ndarray,
    stops: Sequence[str] = (),
) -> list[str]:
    """The text of the tokens i32[N, T] where mask bool[N, T] is true, without special tokens.

    It ends with the first of the strings `stops` that it holds; what its token holds behind is cut.
    """
    rows = [row[kept].tolist() for row, kept in zip(tokens, mask, strict=True)]
    decoded = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return [_up_to(text, stops) for text in decoded]


def tokens_at(
    tokenizer: 'PreTrainedTokenizerBase',
    tokens: np.ndarray,
    mask: np.ndarray,
    texts: Sequence[str],
    ends: Sequence[Sequence[int]],
) -> list[list[int]]:
    """Where in the tokens i32[N, T] the first n characters of each row's text are complete.

    Args:
        tokenizer: decodes prefixes of the rows.
        tokens: completions.
        mask: bool[N, T], a prefix of each row.
        texts: those of the rows.
        ends: numbers of characters n for each row.

    Returns:
        For each n the index of the first token with which these n characters are complete; for all
        of a text its row's last token, the one that ended it.
    """
    used = mask.sum(-1)
    asked = [(row, end) for row, some in enumerate(ends) for end in some]
    low = np.zeros(len(asked), int)
    high = np.array([max(int(used[row]) - 1, 0) for row, _ in asked], int)
    inside = np.array([end < len(texts[row]) for row, end in asked], bool)
    low[~inside] = high[~inside]
    while (low < high).any():  # all of them by bisection together
        middle = (low + high) // 2
        prefixes = [
            tokens[row, : m + 1].tolist() for (row, _), m in zip(asked, middle, strict=True)
        ]
        read = tokenizer.batch_decode(prefixes, skip_special_tokens=True)
        enough = np.array([
            t[:end] == texts[row][:end] for t, (row, end) in zip(read, asked, strict=True)
        ])  # fmt: skip
        high = np.where(enough, middle, high)
        low = np.where(enough, low, np.minimum(middle + 1, high))
    found = iter(low.tolist())
    return [[next(found) for _ in some] for some in ends]


def _up_to(text: str, stops: Sequence[str]) -> str:
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    return text[: min(ends, default=len(text))]


# Stop strings


def stop_table(
    tokenizer: 'PreTrainedTokenizerBase', stops: Sequence[str], vocab_size: int
) -> np.ndarray | None:
    """A table by which a sampler sees that one of the strings `stops` has been written.

    It is the automaton of Aho and Corasick (1975), stepped by whole tokens: state s is how much of
    a stop string the text so far ends in, and `table[s, token]` the state after one more token. The
    last state, once a stop string is complete, is never left. A token that holds part of a
    character counts as a character that is in no stop string.

    Args:
        tokenizer: its tokens' texts are decoded once.
        stops: not empty strings.
        vocab_size: V, which may be larger than the tokenizer's.

    Returns:
        [states, V], or None without stop strings.

    Raises:
        ValueError: a stop string is empty.
    """
    if not stops:
        return None
    if not all(stops):
        raise ValueError(f'stop strings {tuple(stops)}: an empty one would end every completion')
    step, letters = _automaton(stops)
    spelled = _spell(tokenizer, letters, vocab_size)
    patterns, which = np.unique(spelled, axis=0, return_inverse=True)
    state = np.repeat(np.arange(len(step))[:, None], len(patterns), axis=1)
    for column in patterns.T:
        state = np.where(column < 0, state, step[state, np.maximum(column, 0)])
    return state[:, which.reshape(-1)].astype(np.min_scalar_type(len(step)))


def _automaton(stops: Sequence[str]) -> tuple[np.ndarray, dict[str, int]]:
    """step[state, letter] -> state, and the number of each letter; 0 stands for all others."""
    letters = {letter: n for n, letter in enumerate(sorted(set(''.join(stops))), 1)}
    beginnings = {stop[:n] for stop in stops for n in range(len(stop))}
    parts = sorted(part for part in beginnings if not any(stop in part for stop in stops))
    number = {part: n for n, part in enumerate(parts)}  # '' is the first
    step = np.zeros((len(parts) + 1, len(letters) + 1), np.int64)
    step[-1] = len(parts)
    for part in parts:
        for letter, column in letters.items():
            text = part + letter
            if any(text.endswith(stop) for stop in stops):
                step[number[part], column] = len(parts)
            else:
                longest = next(i for i in range(len(text) + 1) if text[i:] in number)
                step[number[part], column] = number[text[longest:]]
    return step, letters


def _spell(
    tokenizer: 'PreTrainedTokenizerBase', letters: Mapping[str, int], vocab_size: int
) -> np.ndarray:
    """i64[V, longest token]: each token's letters, -1 behind its end."""
    # Some tokenizers drop a blank at the start of a text, so tokens are read behind another one.
    before = tokenizer.encode('a', add_special_tokens=False)
    start = len(tokenizer.decode(before, skip_special_tokens=True))
    count = min(len(tokenizer), vocab_size)
    rows = [[*before, token] for token in range(count)]
    pieces = [text[start:] for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]
    spelled = np.full((vocab_size, max(map(len, pieces))), -1)
    for row, piece in zip(spelled, pieces, strict=False):
        row[: len(piece)] = [letters.get(letter, 0) for letter in piece]
    return spelled
