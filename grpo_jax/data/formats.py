r"""Prompt formats: templates that turn the columns of a row into a prompt.

The key `data.prompt` of a config holds the name of a format in `FORMATS` or a template.

Sources: DeepSeekMath (arXiv 2402.03300) evaluates chat models zero-shot, and base models with 8
worked examples on GSM8K and 4 on MATH (Wei et al., arXiv 2201.11903; Lewkowycz et al., arXiv
2206.14858). DeepSeek-R1 (arXiv 2501.12948) puts the reasoning and the answer in tags. The wording
here is our own, except for the request to put the answer in a box, on which DeepSeekMath's models
were trained.
"""

import string
from collections.abc import Mapping
from typing import Any, NamedTuple

from grpo_jax.data.conversations import is_conversation
from grpo_jax.data.rows import Row
from grpo_jax.data.values import text_of


class Format(NamedTuple):
    """A prompt format.

    A chat template receives the texts of `system` and `user`; without one, `frame` joins them.
    """

    user: str  # template over the columns of a row
    frame: str = '{user}'  # template over `user` and `system`
    system: str = ''  # system message
    shots: int = 0  # number of worked examples before the question
    example: str = ''  # template of a worked example, over the columns and `worked`, the solution
    stops: tuple[str, ...] = ()  # stop strings, which end a completion


FORMATS: Mapping[str, Format] = {
    'deepseekmath': Format(
        '{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}.',
        frame='User: {user}\n\nAssistant:',
    ),
    'deepseekmath_zh': Format(
        '{question}\n请一步一步推理，并把最后的答案写在\\boxed{{}}里。',
        frame='User: {user}\n\nAssistant:',
    ),
    'gsm8k_8shot': Format(
        'Q: {question}\nA:',
        shots=8,
        example='Q: {question}\nA: {worked}The answer is {answer}.',
        stops=('\nQ:',),
    ),
    'math_4shot': Format(
        'Problem: {question}\nSolution:',
        shots=4,
        example='Problem: {question}\nSolution: {worked}The answer is ${answer}$.',
        stops=('\nProblem:',),
    ),
    'r1': Format(
        '{question}',
        frame='{system}\n\nUser: {user}\nAssistant:',
        system=(
            'The user poses a problem and the assistant works it out. The assistant first thinks '
            'it through, all of it between <think> and </think>, and then states the result alone, '
            'between <answer> and </answer>: <think> the way to the result </think> '
            '<answer> the result </answer>.'
        ),
    ),
}


def get_format(template: str) -> Format:
    """Return the format of this name, or a format made from a template over columns.

    Args:
      template: a name in `FORMATS`, or a text with braces such as '{question}'.

    Raises:
      ValueError: it has no braces and is not the name of a format.
    """
    if '{' in template or '}' in template:
        return Format(template)
    if template not in FORMATS:
        raise ValueError(
            f'unknown prompt format {template!r}: choose {", ".join(FORMATS)}, or write a '
            "template over the data set's columns, such as '{question}'"
        )
    return FORMATS[template]


def fill(template: str, row: Row) -> str:
    """Fill a template with the columns of a row.

    Values that are not text are written as JSON, with numbers as in the file: `[7, 7]`, `null`.
    `{nums[0]}` and `{meta[name]}` are elements of a list and a dictionary.

    Raises:
      ValueError: the template is malformed, or names a column that the row lacks or that is a
        conversation.
    """
    try:
        return _FORMATTER.vformat(template, (), row)
    except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
        names = ', '.join(f'{{{name}}}' for name in row)
        raise ValueError(
            f'template {template!r} does not fit the data ({type(error).__name__}: {error}): the '
            f'columns are {names}; write a literal brace twice'
        ) from error


class _Formatter(string.Formatter):
    """Fills templates with values as text."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if is_conversation(value):
            raise ValueError('a column of conversations has to stand alone')
        return format(value, format_spec) if format_spec else text_of(value)


_FORMATTER = _Formatter()
