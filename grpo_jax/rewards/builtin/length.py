"""Penalties on the tokens of a completion, from 0 down to -1.

They are negative themselves, so their weights are positive.
"""

from collections.abc import Sequence

from grpo_jax.rewards.messages import on_texts


@on_texts
def soft_overlong(
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    cache_tokens: int,
    **columns: object,
) -> list[float | None]:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), in tokens.

    0 up to `max_tokens - cache_tokens`, then falling linearly to -1 at `max_tokens` and beyond.

    Raises:
        ValueError: `cache_tokens` is not between 1 and `max_tokens`.
    """
    if not 1 <= cache_tokens <= max_tokens:
        raise ValueError(
            f'cache_tokens={cache_tokens} with max_tokens={max_tokens}: '
            'make it at least 1 and at most max_tokens'
        )
    free = max_tokens - cache_tokens
    return [-min(max((len(ids) - free) / cache_tokens, 0.0), 1.0) for ids in completion_ids]


@on_texts
def repetition(
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    n: int = 4,
    **columns: object,
) -> list[float | None]:
    """Minus the share of the token n-grams that occurred before in the same completion.

    0 where all differ or there is no n-gram, near -1 for a loop. Of the 4 bigrams of the tokens
    1 2 1 2 1, two are repetitions: -0.5.

    Raises:
        ValueError: `n` is less than 1.
    """
    if n < 1:
        raise ValueError(f'n={n}: n-grams have at least one token')
    return [_repetition(list(ids), n) for ids in completion_ids]


def _repetition(ids: list[int], n: int) -> float:
    ngrams = list(zip(*(ids[k:] for k in range(n)), strict=False))
    return len(set(ngrams)) / len(ngrams) - 1 if ngrams else 0.0
