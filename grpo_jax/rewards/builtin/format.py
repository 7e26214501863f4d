"""Rewards for the format of a completion, regardless of its content: 1.0 if right, else 0.0.

`tag_count` also has values in between.
"""

from collections.abc import Sequence

from grpo_jax.rewards.builtin.arithmetic import STEP
from grpo_jax.rewards.messages import on_texts
from grpo_jax.rewards.verify.numbers import normalize_number

_TAGS = ('<think>', '</think>', '<answer>', '</answer>')


@on_texts
def chain_format(
    prompts: Sequence[str], completions: Sequence[str], **columns: object
) -> list[float | None]:
    """1.0 for one or more steps `a∘b=c` joined by single `;`, as in `37+58=95;95+21=116`.

    Whole numbers are in their shortest spelling. White space is allowed at both ends only.
    """
    return [float(_is_chain(completion)) for completion in completions]


@on_texts
def hash_format(
    prompts: Sequence[str], completions: Sequence[str], **columns: object
) -> list[float | None]:
    """1.0 if the last line is `#### n` with a number n, as in GSM8K, and no other `####` occurs."""
    return [float(_ends_in_hashes(completion)) for completion in completions]


@on_texts
def think_format(
    prompts: Sequence[str], completions: Sequence[str], **columns: object
) -> list[float | None]:
    """1.0 for `<think>…</think><answer>…</answer>` and nothing else.

    This is the format of DeepSeek-R1 (arXiv 2501.12948). Each tag occurs once and neither part is
    blank; white space around the parts is allowed. If the prompt ends in `<think>`, as with some
    chat templates, the completion begins inside that part.
    """
    texts = [_with_opening_tag(*pair) for pair in zip(prompts, completions, strict=True)]
    return [float(_is_thought_and_answer(text)) for text in texts]


@on_texts
def tag_count(
    prompts: Sequence[str], completions: Sequence[str], **columns: object
) -> list[float | None]:
    """A quarter for each of `<think>`, `</think>`, `<answer>`, `</answer>` that occurs just once.

    A denser signal than `think_format`. If the prompt ends in `<think>`, that tag counts as well.
    """
    texts = [_with_opening_tag(*pair) for pair in zip(prompts, completions, strict=True)]
    return [sum(text.count(tag) == 1 for tag in _TAGS) / len(_TAGS) for text in texts]


def _with_opening_tag(prompt: str, text: str) -> str:
    return '<think>' + text if prompt.rstrip().endswith('<think>') else text


def _is_chain(text: str) -> bool:
    return all(STEP.fullmatch(piece) for piece in text.strip().split(';'))


def _ends_in_hashes(text: str) -> bool:
    line = text.rstrip().rpartition('\n')[2]
    if not line.startswith('#### ') or text.count('####') != 1:
        return False
    return normalize_number(line.removeprefix('#### ')) is not None


def _is_thought_and_answer(text: str) -> bool:
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
