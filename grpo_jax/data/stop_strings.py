"""Detect stop strings during sampling, by a table of state transitions."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from jaxtyping import Int, UInt

from grpo_jax.data.texts import decode
from grpo_jax.data.tokenizers import Tokenizer, token_ids


def stop_table(
    tokenizer: Tokenizer,
    stop_strings: Sequence[str],
    vocab_size: int,
    hidden: Collection[int] | None = None,
) -> UInt[np.ndarray, 'states V'] | None:
    """Make the table by which a sampler detects that a completion contains a stop string.

    This is the automaton of Aho and Corasick (1975) with whole tokens as its input symbols. A state
    stands for the longest prefix of a stop string that is a suffix of the text so far, and
    `table[state, token]` is the state after one more token. Sampling starts in state 0. The last
    state means that a stop string is complete; all its transitions lead to itself. An incomplete
    UTF-8 character in a token counts as a character that no stop string contains.

    Args:
      tokenizer: tokenizer of the model, whose whole vocabulary is decoded once.
      stop_strings: non-empty strings.
      vocab_size: V of the model, which may differ from the size of the tokenizer's vocabulary.
      hidden: ids that are not part of the text, as in `texts.completion_texts`.

    Returns:
      [states, V], of the smallest unsigned dtype, or None if there are no stop strings.

    Raises:
      ValueError: a stop string is empty.
    """
    if not stop_strings:
        return None
    if not all(stop_strings):
        raise ValueError(
            f'stop strings {tuple(stop_strings)}: an empty one would end every completion; remove '
            'it'
        )
    transitions, char_ids = _automaton(stop_strings)
    spellings = _spell_tokens(tokenizer, char_ids, vocab_size, hidden)
    unique_spellings, spelling_of_token = np.unique(spellings, axis=0, return_inverse=True)
    states = np.repeat(np.arange(len(transitions))[:, None], len(unique_spellings), axis=1)
    for char in unique_spellings.T:  # the n-th character of every spelling
        states = np.where(char < 0, states, transitions[states, np.maximum(char, 0)])
    table = states[:, spelling_of_token.reshape(-1)]
    return table.astype(np.min_scalar_type(len(transitions)))


def _automaton(
    stop_strings: Sequence[str],
) -> tuple[Int[np.ndarray, 'states chars'], dict[str, int]]:
    """Return transitions[state, char id] -> state, and char ids; 0 is any other character."""
    char_ids = {char: n for n, char in enumerate(sorted(set(''.join(stop_strings))), 1)}
    beginnings = {stop[:n] for stop in stop_strings for n in range(len(stop))}
    prefixes = sorted(p for p in beginnings if not any(stop in p for stop in stop_strings))
    state_of = {prefix: state for state, prefix in enumerate(prefixes)}  # '' is state 0
    stopped = len(prefixes)
    transitions = np.zeros((stopped + 1, len(char_ids) + 1), np.int64)
    transitions[stopped] = stopped
    for prefix, state in state_of.items():
        for char, char_id in char_ids.items():
            text = prefix + char
            if any(text.endswith(stop) for stop in stop_strings):
                transitions[state, char_id] = stopped
            else:
                start = next(i for i in range(len(text) + 1) if text[i:] in state_of)
                transitions[state, char_id] = state_of[text[start:]]
    return transitions, char_ids


def _spell_tokens(
    tokenizer: Tokenizer,
    char_ids: Mapping[str, int],
    vocab_size: int,
    hidden: Collection[int] | None,
) -> Int[np.ndarray, 'V chars']:
    """Return the char ids of each token, with -1 after its end."""
    # Some tokenizers drop a space at the start of a text, so each token is decoded after another.
    before = tokenizer.encode('a', add_special_tokens=False)
    start = len(decode(tokenizer, [before], hidden)[0])
    count = min(int(token_ids(tokenizer)[-1]) + 1, vocab_size)
    sequences = [[*before, token] for token in range(count)]
    decoded = decode(tokenizer, sequences, hidden)
    pieces = [text[start:] for text in decoded]
    spellings = np.full((vocab_size, max(map(len, pieces))), -1)
    for spelling, piece in zip(spellings, pieces, strict=False):
        spelling[: len(piece)] = [char_ids.get(char, 0) for char in piece]
    return spellings
