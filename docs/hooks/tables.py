"""Tables that are generated from the code: config keys, presets, rewards, formats, families."""

import ast
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from grpo_jax.algorithm import presets
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.data import FORMATS
from grpo_jax.models.hf.families import FAMILIES
from grpo_jax.rewards import registry
from grpo_jax.run import config as run_config
from grpo_jax.run import key_help, methods
from grpo_jax.run.comments import Source, first_paragraph

SECTIONS = {
    '': 'General',
    'model': 'Model',
    'mesh': 'Mesh',
    'data': 'Data',
    'sft': 'Supervised fine-tuning',
    'grpo': 'GRPO and the other methods',
    'grpo.algorithm': 'Algorithm',
    'grpo.compute': 'Compute',
    'grpo.sampling': 'Sampling',
    'critic': 'Critic',
    'reward_model': 'Reward model',
    'eval': 'Evaluation',
    'log': 'Logs',
    'checkpoint': 'Checkpoints',
    'optimizer': 'Optimizers',
}


def config_keys() -> str:
    """A section with a table for each section of the config."""
    defaults = run_config.flatten(run_config.defaults())
    descriptions = key_help.descriptions()
    rows: dict[str, list[tuple[str, str, str]]] = {section: [] for section in SECTIONS}
    for path, value in defaults.items():
        section = max((s for s in SECTIONS if path.startswith(f'{s}.')), key=len, default='')
        if '.optimizer.' not in path:
            rows[section].append((f'`{path}`', _code(value), descriptions[path]))
    for name, text in key_help.optimizer_options().items():
        default = (
            'see above' if name == 'learning_rate' else _code(defaults[f'sft.optimizer.{name}'])
        )
        rows['optimizer'].append((f'`optimizer.{name}`', default, text))
    rates = ', '.join(
        f'`{path.removesuffix(".learning_rate")}` {_code(value)}'
        for path, value in defaults.items()
        if path.endswith('optimizer.learning_rate')
    )
    notes = {
        'optimizer': 'The sections `sft.optimizer`, `grpo.optimizer`, `critic.optimizer` and '
        '`reward_model.optimizer` have the same keys. Only the default learning rates differ: '
        f'{rates}.\n\n',
        'critic': 'The critic of PPO has an optimizer only, see the last section.\n\n',
    }
    parts = []
    for section, title in SECTIONS.items():
        heading = f'### {title}' + (f' (`{section}`)' if section not in ('', 'optimizer') else '')
        body = notes.get(section, '')
        if rows[section]:
            body += table(('key', 'default', 'meaning'), rows[section])
        parts.append(f'{heading}\n\n{body}')
    return '\n\n'.join(parts)


def algorithm_table() -> str:
    """The options of `Algorithm`."""
    options = Algorithm()
    rows = [
        (f'`{name}`', _code(getattr(options, name)) if name != 'advantage_estimator' else '', text)
        for name, text in key_help.algorithm_options().items()
    ]
    return table(('option', 'default', 'meaning'), rows)


def preset_table() -> str:
    """Every preset: its options of `Algorithm`, what a config has beside them, and its source."""
    source = Source(presets)
    assigned = {target: value for target, value, _ in source.assignments()}
    table_of_presets = assigned['PRESETS']
    assert isinstance(table_of_presets, ast.Dict)
    comments = source.items(table_of_presets)
    rows = []
    for name, options in presets.PRESETS.items():
        beside = {f'grpo.{key}': value for key, value in methods._RUN.get(name, {}).items()}
        sets = ', '.join(f'`{key}={value!r}`' for key, value in options.items())
        also = ', '.join(f'`{key}={value!r}`' for key, value in beside.items())
        rows.append((f'`{name}`', sets, also, comments.get(name, '')))
    return table(('preset', 'options of `Algorithm`', 'in a config also', 'source'), rows)


def convention_table() -> str:
    """The conventions of other code bases."""
    rows = [
        (f'`{name}`', ', '.join(f'`{key}={value!r}`' for key, value in options.items()))
        for name, options in presets.CONVENTIONS.items()
    ]
    return table(('name', 'options of `Algorithm`'), rows)


def reward_table() -> str:
    """The built-in reward functions."""
    return _functions(registry._REWARDS)


def step_reward_table() -> str:
    """The built-in step functions."""
    return _functions(registry._STEP_REWARDS)


def extractor_table() -> str:
    """The built-in extractors."""
    return _functions(registry._EXTRACTORS)


def format_table() -> str:
    """The prompt formats."""
    rows = [
        (f'`{name}`', _code(form.user), str(form.shots), ', '.join(map(_code, form.stops)))
        for name, form in FORMATS.items()
    ]
    return table(('format', 'template of the question', 'worked examples', 'stop strings'), rows)


def family_table() -> str:
    """The architectures of Hugging Face that are read and written."""
    rows = [
        (f'`{name}`', f'`{family.architecture}`', f'`{family.scorer}`')
        for name, family in FAMILIES.items()
    ]
    return table(('`model_type`', 'language model', 'reward model'), rows)


TABLES: dict[str, Callable[[], str]] = {
    'config keys': config_keys,
    'algorithm': algorithm_table,
    'presets': preset_table,
    'conventions': convention_table,
    'rewards': reward_table,
    'step rewards': step_reward_table,
    'extractors': extractor_table,
    'prompt formats': format_table,
    'families': family_table,
}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ['---'] * len(header), *rows]
    cells = [[cell.replace('|', '\\|') for cell in line] for line in lines]
    return '\n'.join(f'| {" | ".join(line)} |' for line in cells)


def _functions(functions: Any) -> str:
    rows = []
    for name, function in functions.items():
        parameters = inspect.signature(function).parameters.values()
        options = [
            f'`{p.name}`' if p.default is p.empty else f'`{p.name}={p.default!r}`'
            for p in parameters
            if p.kind == p.KEYWORD_ONLY
        ]
        columns = [
            f'`{p.name}`'
            for p in parameters
            if p.kind == p.POSITIONAL_OR_KEYWORD
            and p.name not in ('prompts', 'completions', 'completion_ids', 'text', 'completion')
        ]
        text = first_paragraph(function)
        rows.append((f'`{name}`', text, ', '.join(columns), ', '.join(options)))
    return table(('name', 'value', 'columns', 'options'), rows)


def _code(value: Any) -> str:
    if value is None:
        return 'automatic'
    return f'`{value.to_dict() if hasattr(value, "to_dict") else value!r}`'.replace('\n', '\\n')
