"""Variables and the date of chat templates, which are the same for all texts of a run."""

import datetime
import json
import re
from collections.abc import Mapping
from typing import Any

from grpo_jax.data.tokenizers import Tokenizer

_RESERVED = ('messages', 'add_generation_prompt')
_DIRECTIVES = 'aAbBdeFHIjmMpSuUwWxXyYZ'  # of strftime


def template_texts(tokenizer: Tokenizer) -> list[str]:
    """Return the tokenizer's chat templates, of which there may be none or several."""
    template = tokenizer.chat_template
    return list(template.values()) if isinstance(template, dict) else [template] if template else []


def template_uses_date(tokenizer: Tokenizer) -> bool:
    """Return whether a chat template writes the current date."""
    return any('strftime_now' in text for text in template_texts(tokenizer))


def bind_template(
    tokenizer: Tokenizer, variables: Mapping[str, Any], date: datetime.date | None = None
) -> None:
    """Set variables of the tokenizer's chat templates, such as `enable_thinking`.

    The templates themselves are changed, so that prompts, demonstrations and the end of a turn are
    rendered with the same values.

    Args:
      tokenizer: changed in place.
      variables: JSON values by name.
      date: what `strftime_now` returns, at midnight; None: the time of the call.

    Raises:
      ValueError: there is no chat template, or none mentions a variable.
    """
    texts = template_texts(tokenizer)
    for name in variables:
        if name in _RESERVED or not any(re.search(rf'\b{re.escape(name)}\b', t) for t in texts):
            fault = 'is set for every prompt' if name in _RESERVED else 'is not in the template'
            raise ValueError(f'data.chat_template_kwargs={dict(variables)}: {name!r} {fault}')
    lines = [f'{{% set {name} = {_literal(value)} %}}' for name, value in variables.items()]
    if date is not None and template_uses_date(tokenizer):
        lines.append(_fixed_clock(date))
    if not lines:
        return
    head = ''.join(lines) + "{{ '' }}"  # after a tag, a template's first line break is dropped
    template = tokenizer.chat_template
    if 'tools' in variables and isinstance(template, dict):
        template = template.get('tool_use', template)  # which transformers uses with tools
    if isinstance(template, dict):
        tokenizer.chat_template = {name: head + text for name, text in template.items()}
    else:
        tokenizer.chat_template = head + template


def _literal(value: Any) -> str:
    """Return a JSON value as Jinja writes it."""
    if value is None:
        return 'none'
    if isinstance(value, Mapping):
        return '{' + ', '.join(f'{json.dumps(k)}: {_literal(v)}' for k, v in value.items()) + '}'
    if isinstance(value, list | tuple):
        return '[' + ', '.join(map(_literal, value)) + ']'
    return json.dumps(value, ensure_ascii=False)


def _fixed_clock(date: datetime.date) -> str:
    """Return a Jinja macro that replaces transformers' function `strftime_now`."""
    time = datetime.datetime.combine(date, datetime.time())
    forms = [f'%{flag}{letter}' for flag in ('-', '') for letter in _DIRECTIVES]
    replaced = ''.join(
        f'.replace({json.dumps(form)}, {json.dumps(time.strftime(form))})' for form in forms
    )
    return f'{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}'
