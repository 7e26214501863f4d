"""The environment of a run, and how its replies become tokens."""

from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from grpo_jax import data, environments
from grpo_jax.environments import Environment, Renderer
from grpo_jax.run.config_checks import differing_defaults
from grpo_jax.run.errors import renamed


def make_environment(config: ConfigDict, tokenizer: Any = None) -> Environment | None:
    """Make the environment of a config; None if it has none.

    Args:
      config: with every key of `config.defaults()`.
      tokenizer: of the run, whose chat template tells how tool calls are written.

    Raises:
      ValueError: the name or an option is wrong, or options have no effect.
    """
    c = config.environment
    if not c.name:
        reason = "has no effect with environment.name='': name an environment, or remove it"
        for changed, _ in differing_defaults(config, {'environment': ''}):
            raise ValueError(f'{changed} {reason}')
        return None
    name = repr(c.name)
    names = {
        f'unknown environment {name}': f'environment.name={name} is unknown',
        f'environment {name}': f'environment.name={name}',
        'options.': 'environment.options.',
        'options: ': 'environment.options: ',
        'turns=': 'environment.turns=',
        'seconds=': 'environment.reply_seconds=',
        'on_error=': 'environment.on_error=',
        'format=': 'environment.format=',
    }
    with renamed(names):
        return environments.build(
            c.name,
            c.options.to_dict(),
            turns=c.turns,
            seconds=c.reply_seconds,
            format=c.format,
            on_error=c.on_error,
            templates=data.template_texts(tokenizer) if tokenizer and config.data.chat else (),
        )


def make_renderer(config: ConfigDict, tokenizer: Any, hidden: Collection[int]) -> Renderer:
    """Make what renders replies.

    Args:
      config: with every key of `config.defaults()`.
      tokenizer: of the run, with the variables of its chat template bound.
      hidden: ids that are not part of a text.

    Raises:
      ValueError: the template cannot be used, or `environment.reply_tokens` is too small for it.
    """
    c = config.environment
    with renamed({'template=': 'environment.template='}):
        renderer = Renderer(
            tokenizer, chat=config.data.chat, template=c.template, hidden=frozenset(hidden)
        )
    renderer.check(c.reply_tokens)
    return renderer
