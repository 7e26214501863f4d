"""What `--help` says of the config keys: their defaults and the comments beside them."""

import ast
import shutil
import textwrap
from typing import Any

from grpo_jax.algorithm import optimizer
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.engine.compute import Compute
from grpo_jax.models import Lora, ModelConfig
from grpo_jax.run.catalog import TOPICS, topic_text
from grpo_jax.run.comments import Source, docstring_entries
from grpo_jax.run.config import flatten
from grpo_jax.run.defaults import defaults, optimizer_fields
from grpo_jax.run.suggestions import suggest
from grpo_jax.types import Sampling

_INDENT = 44  # characters before a description


def help_text(prefix: str = '') -> str:
    """The keys that begin with `prefix`, such as 'grpo.algorithm', grouped by section.

    For a key of `catalog.TOPICS` it is what a config can name.

    Raises:
      ValueError: no key begins so.
    """
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 120))
    if prefix in TOPICS:
        return topic_text(prefix, width)
    values, texts = flatten(defaults()), descriptions()
    chosen = [path for path in values if f'{path}.'.startswith(f'{prefix}.' if prefix else '')]
    if not chosen:
        raise ValueError(f'--help={prefix}: no such config key or section: {suggest(prefix)}')
    lines: list[str] = []
    section = None
    for path in sorted(chosen, key=lambda path: path.rpartition('.')[0]):
        parent = path.rpartition('.')[0]
        if parent != section:
            section = parent
            lines += ['', f'[{parent or "general"}]']
        value = values[path]
        value = value.to_dict() if hasattr(value, 'to_dict') else value
        key = f'  {path}={value!r}' if value is not None else f'  {path}=None (automatic)'
        text = texts[path].replace('`', '')
        if len(key) < _INDENT - 1:
            text = key.ljust(_INDENT) + text
        else:
            lines.append(key)
            text = ' ' * _INDENT + text
        lines += textwrap.wrap(
            text,
            width,
            subsequent_indent=' ' * _INDENT,
            drop_whitespace=True,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return '\n'.join(lines).strip('\n')


def descriptions() -> dict[str, str]:
    """The description of every key of `run.config.defaults()`, by its dotted path."""
    described = _comments_of_defaults()
    described |= {
        f'{section}.{name}': text
        for section, texts in (
            ('model', Source(ModelConfig).fields()),
            ('model.lora', Source(Lora).fields()),
            ('grpo.algorithm', _algorithm_keys()),
            ('grpo.compute', docstring_entries(Compute, 'Attributes')),
            ('grpo.sampling', Source(Sampling).fields()),
        )
        for name, text in texts.items()
        if not described.get(f'{section}.{name}')
    }
    shared = optimizer_options()
    return {
        path: shared[path.rpartition('.')[2]] if '.optimizer.' in path else described.get(path, '')
        for path in flatten(defaults())
    }


def _comments_of_defaults() -> dict[str, str]:
    source = Source(defaults)
    comments: dict[str, str] = {}
    for target, value, line in source.assignments():
        name = target.removeprefix('config.')
        if isinstance(value, ast.Dict):
            comments |= {f'{name}.{key}': text for key, text in source.items(value).items()}
        comments.setdefault(name, source.comment(line, value.end_lineno or line))
    return comments


def _algorithm_keys() -> dict[str, str]:
    """`algorithm_options` of a config, where an empty string stands for None."""
    return {name: text.replace('`None`', "`''`") for name, text in algorithm_options().items()}


def algorithm_options() -> dict[str, str]:
    """The descriptions of the options of `Algorithm`, with the values that a choice has."""
    comments = Source(Algorithm).fields()
    del comments['terms']  # derived
    for name in comments:
        if values := _known_values(name):
            comments[name] = f'one of {values}: {comments[name]}'
    return comments


def _known_values(name: str) -> str:
    """The values of an option, from the error for a wrong one; empty if it is not a choice."""
    options: dict[str, Any] = {name: '?'}
    try:
        Algorithm(**options)
    except (ValueError, TypeError) as error:
        beginning = f"{name}='?' is unknown: use one of "
        if str(error).startswith(beginning):
            return ', '.join(f'`{x}`' for x in str(error).removeprefix(beginning).split(', '))
    return ''


def optimizer_options() -> dict[str, str]:
    """The descriptions of the keys of an `optimizer` section."""
    source = Source(optimizer_fields)
    (options,) = (
        node
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Dict)
        and "'learning_rate'" in map(ast.unparse, filter(None, node.keys))
    )
    arguments = docstring_entries(optimizer.adamw, 'Args')
    comments = source.items(options)
    return {name: text or arguments.get(name, '') for name, text in comments.items()}
