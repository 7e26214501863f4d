"""Tables that are generated from the code: config keys, presets, rewards, formats, families."""

import functools
from collections.abc import Callable, Iterable, Sequence

from grpo_jax.algorithm.config import Algorithm
from grpo_jax.models.hf.families import FAMILIES
from grpo_jax.run import config as run_config
from grpo_jax.run import key_help
from grpo_jax.run.catalog import LISTINGS, code

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
    'environment': 'Environment',
    'critic': 'Critic',
    'reward_model': 'Reward model',
    'eval': 'Evaluation',
    'log': 'Logs',
    'checkpoint': 'Checkpoints',
    'health': 'Health',
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
            rows[section].append((f'`{path}`', code(value), descriptions[path]))
    for name, text in key_help.optimizer_options().items():
        default = (
            'see above' if name == 'learning_rate' else code(defaults[f'sft.optimizer.{name}'])
        )
        rows['optimizer'].append((f'`optimizer.{name}`', default, text))
    rates = ', '.join(
        f'`{path.removesuffix(".learning_rate")}` {code(value)}'
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
        (f'`{name}`', code(getattr(options, name)) if name != 'advantage_estimator' else '', text)
        for name, text in key_help.algorithm_options().items()
    ]
    return table(('option', 'default', 'meaning'), rows)


def family_table() -> str:
    """The architectures of Hugging Face that are read and written."""
    rows = [
        (f'`{name}`', f'`{family.architecture}`', f'`{family.scorer}`')
        for name, family in FAMILIES.items()
    ]
    return table(('`model_type`', 'language model', 'reward model'), rows)


def listed(name: str) -> str:
    """A listing that `--help` prints too."""
    return table(*LISTINGS[name]())


TABLES: dict[str, Callable[[], str]] = {
    'config keys': config_keys,
    'algorithm': algorithm_table,
    'families': family_table,
    **{name: functools.partial(listed, name) for name in LISTINGS},
}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ['---'] * len(header), *rows]
    cells = [[cell.replace('|', '\\|') for cell in line] for line in lines]
    return '\n'.join(f'| {" | ".join(line)} |' for line in cells)
