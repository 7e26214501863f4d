r"""From a row of a data set to the text of its prompt: formats by name, templates, chat templates.

`render` makes the texts. What a format is called in `FORMATS` is what `data.prompt` of a config may
hold in the place of a template.

Sources: DeepSeekMath (arXiv 2402.03300) asks chat models in zero-shot, GSM8K with 8 and MATH with 4
worked examples (Wei et al., arXiv 2201.11903; Lewkowycz et al., arXiv 2206.14858). DeepSeek-R1
(arXiv 2501.12948) has the reasoning and the answer in tags. The sentences here are our own, but
for the request to box the answer, which DeepSeekMath's models were trained on.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

if TYPE_CHECKING:  # importing transformers takes a second or two, so it waits until it is needed
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, str]

_MARK = 'the-words-of-the-assistant'  # stands for a completion where a chat template is explored
_PUNCTUATION = re.compile(r' ?([^\w\s]) ?')
_CALCULATOR = re.compile(r'<<[^<>]*>>')  # GSM8K's annotations


class Format(NamedTuple):
    """How a question is put.

    A chat template takes `system` and `user`; without one, `frame` puts them together.
    """

    user: str  # template over the columns of a row
    frame: str = '{user}'  # template over `user` and `system`
    system: str = ''
    shots: int = 0  # worked examples before the question
    example: str = ''  # template of one over the columns, and `worked` (see `_example`)
    stops: tuple[str, ...] = ()  # texts at which a completion is over


FORMATS = {
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


def get(template: str) -> Format:
    """The format of this name, or that of a template over columns, which is a text with braces.

    Raises:
        ValueError: there are no braces, and no format of this name.
    """
    if '{' in template or '}' in template:
        return Format(template)
    if template not in FORMATS:
        raise ValueError(
            f'unknown prompt format {template!r}: choose {", ".join(FORMATS)}, or write a '
            "template over the data set's columns, such as '{question}'"
        )
    return FORMATS[template]


def stops(template: str) -> tuple[str, ...]:
    """The texts at which a completion is over, the first of which cuts it off."""
    return get(template).stops


def shots(template: str) -> int:
    """The number of worked examples that stand before each question."""
    return get(template).shots


def question_key(question: str) -> str:
    """What two spellings of one question have in common.

    Case, kinds of white space, white space next to punctuation and compatibility forms of
    characters (NFKC) make no difference.
    """
    text = unicodedata.normalize('NFKC', question).casefold()
    return _PUNCTUATION.sub(r'\1', ' '.join(text.split()))


def render(
    template: str,
    rows: Sequence[Row],
    *,
    examples: Iterable[Row] = (),
    system: str = '',
    chat: 'PreTrainedTokenizerBase | None' = None,
) -> list[str]:
    """The text of every row's prompt.

    Args:
        template: the name of a format or a template over columns, as `get` takes it.
        rows: what to ask.
        examples: where a format with worked examples takes them from: the first rows, without the
            question that is asked and without repetitions.
        system: a system message in the place of the format's.
        chat: a tokenizer whose chat template frames the texts, up to where the assistant speaks. It
            writes special tokens, so its texts are to be tokenised without adding any.

    Raises:
        ValueError: the template does not fit the columns, there are too few examples, the tokenizer
            has no chat template or one that does not take these messages, or nothing takes the
            system message.
    """
    chosen = get(template)
    system = system or chosen.system
    users = [fill(chosen.user, row) for row in rows]
    if chosen.shots:
        pool = _distinct(examples, chosen.shots + 1)
        worked = {key: _example(chosen.example, row) for key, row in pool.items()}
        before = [_before(worked, row, template, chosen.shots) for row in rows]
        users = [text + user for text, user in zip(before, users, strict=True)]
    if chat is not None:
        return _in_chat(chat, users, system)
    if system and '{system}' not in chosen.frame:
        raise ValueError(
            f'prompt {template!r} has no place for a system message: set chat=True, or write it '
            'into a template'
        )
    return [chosen.frame.format(user=user, system=system) for user in users]


def fill(template: str, row: Row) -> str:
    """The template with the columns of the row.

    Raises:
        ValueError: it does not fit them.
    """
    try:
        return template.format_map(row)
    except (KeyError, IndexError, AttributeError, ValueError) as error:
        names = ', '.join(f'{{{name}}}' for name in row)
        raise ValueError(
            f'template {template!r} does not fit the data ({type(error).__name__}: {error}): the '
            f'columns are {names}; write a literal brace twice'
        ) from error


def turn_end(tokenizer: 'PreTrainedTokenizerBase') -> tuple[str, int]:
    """How the chat template ends what the assistant says: the text before the token, and its id.

    The token is the first special one after the words, such as `<|im_end|>`; the tokenizer's own
    end-of-sequence token where the template writes none.

    Raises:
        ValueError: as `render` with `chat`.
    """
    words = [{'role': 'user', 'content': 'x'}, {'role': 'assistant', 'content': _MARK}]
    _, found, rest = _apply(tokenizer, [words], add_generation_prompt=False)[0].rpartition(_MARK)
    if not found:
        raise ValueError("the chat template leaves the assistant's words out: use another one")
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    longest_first = sorted(special, key=len, reverse=True)
    match = re.search('|'.join(map(re.escape, longest_first)), rest) if special else None
    if match is None:
        return '', tokenizer.eos_token_id
    return rest[: match.start()], tokenizer.get_vocab()[match.group()]


def _distinct(examples: Iterable[Row], count: int) -> dict[str, Row]:
    """The first `count` rows with different questions, by their keys."""
    found: dict[str, Row] = {}
    for row in examples:
        found.setdefault(question_key(fill('{question}', row)), row)
        if len(found) == count:
            break
    return found


def _example(template: str, row: Row) -> str:
    """A worked example. `worked` is the solution, without GSM8K's annotations and last line."""
    solution = _CALCULATOR.sub('', row.get('solution', '')).strip()
    steps, marker, _ = solution.rpartition('####')
    solution = steps.strip() if marker else solution
    return fill(template, {**row, 'worked': f'{solution}\n' if solution else ''})


def _before(worked: Mapping[str, str], row: Row, template: str, count: int) -> str:
    """`count` examples, none of which asks the question of the row."""
    asked = question_key(fill('{question}', row))
    chosen = [text for key, text in worked.items() if key != asked][:count]
    if len(chosen) < count:
        raise ValueError(
            f'prompt {template!r} shows {count} worked examples, but there are {len(chosen)} '
            'beside the question that is asked: give more rows to take them from'
        )
    return ''.join(f'{text}\n\n' for text in chosen)


def _in_chat(tokenizer: 'PreTrainedTokenizerBase', users: Sequence[str], system: str) -> list[str]:
    first = [{'role': 'system', 'content': system}] if system else []
    messages = [[*first, {'role': 'user', 'content': user}] for user in users]
    texts = _apply(tokenizer, messages, add_generation_prompt=True)
    if first and texts[:1] == _apply(
        tokenizer, [words[1:] for words in messages[:1]], add_generation_prompt=True
    ):
        raise ValueError(
            f'the chat template leaves the system message {system!r} out: write it into the '
            'prompt template'
        )
    return texts


def _apply(
    tokenizer: 'PreTrainedTokenizerBase',
    messages: list[list[dict[str, str]]],
    *,
    add_generation_prompt: bool,
) -> list[str]:
    if not tokenizer.chat_template:
        raise ValueError(
            f'tokenizer {tokenizer.name_or_path!r} has no chat template: set chat=False, or use '
            'the tokenizer of a chat model'
        )
    try:
        import jinja2
    except ImportError as error:
        raise ValueError('chat templates need jinja2: pip install jinja2') from error
    try:
        return cast(
            list[str],
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            ),
        )
    except jinja2.TemplateError as error:
        if messages and messages[0][0]['role'] == 'system':
            without = [words[1:] for words in messages[:1]]
            _apply(tokenizer, without, add_generation_prompt=add_generation_prompt)
            raise ValueError(
                f'the chat template takes no system message ({error}): leave it away, and write '
                'it into the prompt template'
            ) from error
        raise ValueError(f'the chat template fails: {error}') from error
