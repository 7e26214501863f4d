"""Imports go one way: a package may import what is listed before it, and nothing else of ours."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1] / 'grpo_jax'
LEAVES = {'types', 'plugins'}
MAY_IMPORT = {
    'types': set(),
    'plugins': set(),
    'sharding': {'types'},
    'rewards': LEAVES,
    'data': LEAVES,
    'environments': {*LEAVES, 'rewards', 'data'},
    'models': {'types', 'sharding'},
    'engine': {'types', 'sharding', 'models'},
    'algorithm': {*LEAVES, 'sharding', 'models', 'engine'},
    'run': {
        *LEAVES, 'sharding', 'rewards', 'data', 'environments', 'models', 'engine', 'algorithm',
    },
}  # fmt: skip
COMMANDS = {'train', 'evaluate', 'export', 'plan', 'replay', 'show', 'verify'}
MODULES = sorted(ROOT.rglob('*.py'))


def unit(path):
    return path.relative_to(ROOT).parts[0].removesuffix('.py')


def imports(path):
    """Dotted names of what a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == 'grpo_jax':
            yield from (f'grpo_jax.{alias.name}' for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{path}: relative import'
            yield node.module


@pytest.mark.parametrize('path', MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    here = unit(path)
    if here in COMMANDS:
        allowed = {'run'}
    elif here == '__init__':
        allowed = MAY_IMPORT.keys()
    else:
        allowed = MAY_IMPORT[here] | {here}
    names = list(imports(path))
    ours = {name.split('.')[1] for name in names if name.startswith('grpo_jax.')}
    assert ours <= set(allowed), f'{here} may not import {ours - set(allowed)}'
    if here != 'models':
        assert not any(name.split('.')[0] == 'flax' for name in names)
    if here not in ('run', *COMMANDS):
        assert not any(name.split('.')[0] == 'ml_collections' for name in names)


def test_few_units_on_few_levels():
    units = {unit(path) for path in MODULES}
    assert units == {*MAY_IMPORT, *COMMANDS, '__init__'}
    assert len(units - COMMANDS) <= 11

    def level(name):
        return 1 + max(map(level, MAY_IMPORT[name]), default=0)

    assert max(map(level, MAY_IMPORT)) + 1 <= 8  # the commands are above `run`


@pytest.mark.parametrize('path', MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_can_be_read_in_one_sitting(path):
    lines = len(path.read_text().splitlines())
    assert lines <= (60 if unit(path) in COMMANDS else 300)


@pytest.mark.parametrize('path', MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_take_few_parameters(path):
    """Six at most by position. A Pallas kernel takes its operands and results."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and not node.name.endswith('_kernel'):
            parameters = [a.arg for a in node.args.posonlyargs + node.args.args]
            count = len([name for name in parameters if name not in ('self', 'cls')])
            assert count <= 6, f'{path.name}:{node.lineno} {node.name} takes {count}'


def test_the_algorithm_is_short():
    """Six files, read from top to bottom without opening the engine."""
    names = ('advantages', 'losses', 'logprobs', 'sample', 'update')
    files = [ROOT / 'types.py', *(ROOT / 'algorithm' / f'{name}.py' for name in names)]
    assert sum(len(path.read_text().splitlines()) for path in files) <= 1000
