"""Rewards for the form of a completion, whatever its content: 1.0 in form, else 0.0.

`tag_count` alone gives shares.
"""

from collections.abc import Sequence
from typing import Any

from grpo_jax.rewards.arithmetic import STEP
from grpo_jax.rewards.numbers import normalize_number

_TAGS = ('<think>', '</think>', '<answer>', '</answer>')


def chain_format(
    prompts: Sequence[str], completions: Sequence[str], **columns: Any
) -> list[float | None]:
    """Only steps `a∘b=c` joined by single `;`, as in `37+58=95;95+21=116`; any number of them.

    Whole numbers in their shortest spelling and no white space but at both ends.
    """
    return [float(_is_chain(completion)) for completion in completions]


def hash_format(
    prompts: Sequence[str], completions: Sequence[str], **columns: Any
) -> list[float | None]:
    """The last line is `#### n` with a number n (GSM8K's ending) and `####` is nowhere else."""
    return [float(_ends_in_hashes(completion)) for completion in completions]


def think_format(
    prompts: Sequence[str], completions: Sequence[str], **columns: Any
) -> list[float | None]:
    """`<think>…</think><answer>…</answer>` and nothing else (DeepSeek-R1, arXiv 2501.12948).

    Each tag occurs once, neither part is blank, and white space around the parts is free. Where the
    prompt ends in `<think>`, as some chat templates do, the completion begins inside that part.
    """
    texts = [_with_opening(*pair) for pair in zip(prompts, completions, strict=True)]
    return [float(_thinks(text)) for text in texts]


def tag_count(
    prompts: Sequence[str], completions: Sequence[str], **columns: Any
) -> list[float | None]:
    """A quarter for each of `<think>`, `</think>`, `<answer>`, `</answer>` that occurs just once.

    A gentler way towards `think_format`, and like it begun by a prompt that ends in `<think>`.
    """
    texts = [_with_opening(*pair) for pair in zip(prompts, completions, strict=True)]
    return [sum(text.count(tag) == 1 for tag in _TAGS) / len(_TAGS) for text in texts]


def _with_opening(prompt: str, text: str) -> str:
    return '<think>' + text if prompt.rstrip().endswith('<think>') else text


def _is_chain(text: str) -> bool:
    return all(STEP.fullmatch(piece) for piece in text.strip().split(';'))


def _ends_in_hashes(text: str) -> bool:
    line = text.rstrip().rpartition('\n')[2]
    if not line.startswith('#### ') or text.count('####') != 1:
        return False
    return normalize_number(line.removeprefix('#### ')) is not None


def _thinks(text: str) -> bool:
    text = text.strip()
    if any(text.count(tag) != 1 for tag in _TAGS):
        return False
    thought, _, rest = text.partition('</think>')
    rest = rest.strip()
    return (
        thought.startswith('<think>')
        and rest.startswith('<answer>')
        and rest.endswith('</answer>')
        and bool(thought.removeprefix('<think>').strip())
        and bool(rest.removeprefix('<answer>').removesuffix('</answer>').strip())
    )
