"""Decode completions, and map positions in their texts to tokens."""

from collections.abc import Collection, Sequence

import numpy as np
from jaxtyping import Bool, Int

from grpo_jax.data.tokenizers import Tokenizer


def completion_texts(
    tokenizer: Tokenizer,
    tokens: Int[np.ndarray, 'N T'],
    mask: Bool[np.ndarray, 'N T'],
    stop_strings: Sequence[str] = (),
    hidden: Collection[int] | None = None,
) -> list[str]:
    """Decode completions, without special tokens.

    Args:
      tokenizer: tokenizer of the model.
      tokens: i32[N, T], completions.
      mask: bool[N, T], true for the tokens to decode.
      stop_strings: a text ends with the first of these that it contains; the remaining characters
        of the same token are cut off.
      hidden: ids that are left out, see `special_tokens.hidden_ids`; None: all special tokens.

    Returns:
      N texts.
    """
    sequences = [ids[used].tolist() for ids, used in zip(tokens, mask, strict=True)]
    texts = decode(tokenizer, sequences, hidden)
    return [_cut_after_stop_string(text, stop_strings) for text in texts]


def decode(
    tokenizer: Tokenizer, sequences: list[list[int]], hidden: Collection[int] | None = None
) -> list[str]:
    """Decode token ids, without those in `hidden`, or without all special tokens if it is None."""
    if hidden is None:
        return tokenizer.batch_decode(sequences, skip_special_tokens=True)
    shown = [[token for token in ids if token not in hidden] for ids in sequences]
    return tokenizer.batch_decode(shown, skip_special_tokens=False)


def char_to_token(
    tokenizer: Tokenizer,
    tokens: Int[np.ndarray, 'N T'],
    mask: Bool[np.ndarray, 'N T'],
    texts: Sequence[str],
    char_counts: Sequence[Sequence[int]],
    *,
    hidden: Collection[int] | None = None,
) -> list[list[int]]:
    """Find the token that completes the first n characters of each completion.

    Args:
      tokenizer: tokenizer of the model.
      tokens: i32[N, T], completions.
      mask: bool[N, T], true for a prefix of each completion.
      texts: N texts of the completions.
      char_counts: for each completion, the numbers of characters n.
      hidden: as in `completion_texts`.

    Returns:
      For each n the index of the first token at which the first n characters are complete. If n is
      the length of the text, the index of the last token, such as the end-of-sequence token.
    """
    lengths = mask.sum(-1)
    queries = [(row, count) for row, counts in enumerate(char_counts) for count in counts]
    low = np.zeros(len(queries), int)
    high = np.array([max(int(lengths[row]) - 1, 0) for row, _ in queries], int)
    whole_text = np.array([count >= len(texts[row]) for row, count in queries], bool)
    low[whole_text] = high[whole_text]
    while (low < high).any():  # bisection, for all queries at once
        middle = (low + high) // 2
        prefixes = [
            tokens[row, : last + 1].tolist() for (row, _), last in zip(queries, middle, strict=True)
        ]
        decoded = decode(tokenizer, prefixes, hidden)
        complete = np.array([
            prefix[:count] == texts[row][:count]
            for prefix, (row, count) in zip(decoded, queries, strict=True)
        ])  # fmt: skip
        high = np.where(complete, middle, high)
        low = np.where(complete, low, np.minimum(middle + 1, high))
    positions = iter(low.tolist())
    return [[next(positions) for _ in counts] for counts in char_counts]


def _cut_after_stop_string(text: str, stop_strings: Sequence[str]) -> str:
    ends = [text.find(stop) + len(stop) for stop in stop_strings if stop in text]
    return text[: min(ends, default=len(text))]
