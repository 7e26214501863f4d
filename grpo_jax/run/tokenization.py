"""The tokens of a run: its chat template, the ids that the model knows, and what ends a text."""

import datetime
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from grpo_jax import data
from grpo_jax.models import hf
from grpo_jax.rewards.deadlines import CannotInterrupt, DeadlineExceeded, call_within

# Seconds that the chat template may take, and for each conversation in addition.
_TEMPLATE_SECONDS, _CONVERSATION_SECONDS = 30.0, 0.1


def bind_chat_template(
    config: ConfigDict, tokenizer: Any, tools: Sequence[Mapping[str, Any]] = ()
) -> ConfigDict:
    """Sets the variables of the chat template, and the date that it writes, in the tokenizer.

    Args:
      config: of the run.
      tokenizer: changed in place.
      tools: schemas of the environment's tools, which the template shows to the model.

    Returns:
      The config, with today as `data.date` if the template writes a date and the config has none.

    Raises:
      ValueError: variables without a chat template, a date that is none, or tools that neither the
        template nor the prompt shows.
    """
    _limit_time(tokenizer)
    settings = config.data
    variables = settings.chat_template_kwargs.to_dict()
    if not settings.chat:
        if variables or settings.date:
            name = 'chat_template_kwargs' if variables else 'date'
            raise ValueError(f'data.{name} has no effect with data.chat=False: remove it')
        return config
    if settings.date is None and data.template_uses_date(tokenizer):
        config = config.copy_and_resolve_references()
        config.data.date = datetime.date.today().isoformat()
    try:
        date = config.data.date and datetime.date.fromisoformat(config.data.date)
    except ValueError as error:
        raise ValueError(f"data.date={config.data.date!r}: write it as '2026-01-31'") from error
    if tools and _template_shows_tools(config, tokenizer, tools):
        variables['tools'] = list(tools)
    data.bind_template(tokenizer, variables, date)
    return config


def _template_shows_tools(
    config: ConfigDict, tokenizer: Any, tools: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether the chat template has a place for tools.

    Raises:
      ValueError: it has none, and neither the prompt nor the system message names the tools.
    """
    if any(re.search(r'\btools\b', text) for text in data.template_texts(tokenizer)):
        if 'tools' in config.data.chat_template_kwargs:
            raise ValueError(
                'data.chat_template_kwargs.tools are those of environment.name='
                f'{config.environment.name!r}: remove them'
            )
        return True
    prompt = data.get_format(config.data.prompt)
    written = '\n'.join((prompt.user, prompt.frame, prompt.system, config.data.system))
    names = [tool['function']['name'] for tool in tools]
    if not all(name in written for name in names):
        raise ValueError(
            f'environment.name={config.environment.name!r} has tools, and the chat template has no '
            f'place for them: describe {", ".join(names)} in data.system or data.prompt'
        )
    return False


def _limit_time(tokenizer: Any) -> None:
    """Gives the chat template a deadline: a checkpoint may bring one that never ends."""
    render = tokenizer.apply_chat_template

    def render_in_time(conversations: Any, *arguments: Any, **options: Any) -> Any:
        seconds = _TEMPLATE_SECONDS + _CONVERSATION_SECONDS * len(conversations)
        try:
            return call_within(
                seconds, 'the chat template', lambda: render(conversations, *arguments, **options)
            )
        except (DeadlineExceeded, CannotInterrupt) as error:
            raise ValueError(f'the chat template: {error}; use another tokenizer') from error

    tokenizer.apply_chat_template = render_in_time


def vocabulary(
    tokenizer: Any, ends: Int[np.ndarray, ' E'], size: int | None = None
) -> dict[str, Any]:
    """The options `vocab_size` and `token_ranges` of a `ModelConfig` for a tokenizer.

    Args:
      tokenizer: of the run.
      ends: tokens that end a completion, which the checkpoint may know better than the tokenizer.
      size: tokens that the checkpoint embeds; None: as many as the tokenizer needs.
    """
    ids = np.union1d(data.token_ids(tokenizer), ends)
    size = int(ids.max()) + 1 if size is None else size
    within = data.token_ranges(ids[ids < size])
    return {'vocab_size': size, 'token_ranges': () if within == ((0, size),) else within}


def end_ids(
    config: ConfigDict, tokenizer: Any, source: pathlib.Path | None
) -> Int[np.ndarray, ' E']:
    """The tokens that end a completion, by the tokenizer, the checkpoint and the chat template.

    As in transformers, the list in `config.json` counts where `generation_config.json` has none.
    """
    stated: dict[str, Any] = {}
    if source is not None:
        path = source / 'generation_config.json'
        stated = hf.read_json(path) if path.is_file() else {}
        if stated.get('eos_token_id') is None:
            stated = hf.read_config(source)
    ends = data.eos_ids(tokenizer, stated)
    if config.data.chat:
        ends = np.union1d(ends, [data.turn_end(tokenizer)[1]]).astype(np.int32)
    return ends


def hidden_ids(config: ConfigDict, tokenizer: Any, ends: Int[np.ndarray, ' E']) -> frozenset[int]:
    """The ids that are not part of a completion's text, by `data.visible_tokens`."""
    prompt = data.get_format(config.data.prompt)
    texts = (prompt.user, prompt.frame, prompt.system, config.data.system)
    visible = config.data.visible_tokens
    return data.hidden_ids(tokenizer, ends.tolist(), visible=visible, texts=texts)
