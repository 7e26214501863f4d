"""Objects named by a path: modules, functions, classes, and every error."""

import subprocess
import sys

import optax
import pytest

from grpo_jax import plugins
from grpo_jax.plugins import PluginError


def double(x):
    return 2 * x


LIMIT = 3
BUILTIN = {'double': double, 'square': lambda x: x**2}


def test_load():
    assert plugins.load('test_plugins:double') is double
    assert plugins.load('test_plugins.double') is double
    assert plugins.load('optax.contrib:muon') is optax.contrib.muon
    assert plugins.load('optax.contrib.muon') is optax.contrib.muon
    assert plugins.load('optax:adamw') is optax.adamw
    assert plugins.load('fractions:Fraction')(1, 2) == 0.5  # a class


def test_load_imports_a_file_of_the_user(tmp_path, monkeypatch):
    (tmp_path / 'my_file_of_plugins.py').write_text('def triple(x):\n    return 3 * x\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins.load('my_file_of_plugins:triple')(2) == 6


@pytest.mark.parametrize(
    ('path', 'message'),
    [
        ('test_plugins:doubel', "^'test_plugins:doubel': test_plugins has no 'doubel', did "),
        ('test_plugins:doubel', "did you mean 'double'"),
        ('test_plugins.doubel', "did you mean 'double'"),
        ('optax.contrib:moun', "optax.contrib has no 'moun', did you mean 'muon'"),
        ('optax.contribb:muon', "importing optax.contribb raised .*, did you mean 'contrib'"),
        ('optaxx:adam', "importing optaxx raised ModuleNotFoundError.*, did you mean 'optax'"),
        ('no_such_module_at_all:f', 'ModuleNotFoundError.*: is the folder of its file on PYTHONPA'),
        ('math.trig:sine', "importing math.trig raised .* 'math' is not a package$"),
        ('test_plugins:LIMIT', "'test_plugins:LIMIT' is 3, which cannot be called"),
        ('double', "'double' is not of the form 'package.module:name'"),
        ('', 'not of the form'),
        ('test_plugins:', 'not of the form'),
        (':double', 'not of the form'),
        ('.double', 'not of the form'),
        ('a:b:c', 'not of the form'),
        ('a b:c', 'not of the form'),
    ],
)
def test_load_errors(path, message):
    with pytest.raises(PluginError, match=message):
        plugins.load(path)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('1 / 0', 'importing broken_plugin raised ZeroDivisionError: division by zero$'),
        ('import no_such_dependency', "raised ModuleNotFoundError: No .* 'no_such_dependency'$"),
        ('def', 'raised SyntaxError'),
    ],
)
def test_a_module_that_raises(tmp_path, monkeypatch, text, message):
    (tmp_path / 'broken_plugin.py').write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PluginError, match=message) as error:
        plugins.load('broken_plugin:f')
    assert error.value.__cause__ is not None  # the traceback shows the user's own line


def test_lookup():
    assert plugins.lookup('loss', 'double', BUILTIN) is double
    assert plugins.lookup('loss', 'optax:adam', BUILTIN) is optax.adam
    assert plugins.lookup('loss', 'optax.adam', BUILTIN) is optax.adam


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('squar', r"^unknown loss 'squar', did you mean 'square'\? \(built in are double, squ"),
        ('', "unknown loss ''"),
        ('optax:adm', "^loss 'optax:adm': optax has no 'adm', did you mean 'adam'"),
    ],
)
def test_lookup_errors(name, message):
    with pytest.raises(PluginError, match=message):
        plugins.lookup('loss', name, BUILTIN)


def test_lookup_shows_the_error_of_a_module():
    with pytest.raises(PluginError) as error:
        plugins.lookup('loss', 'no_such_module_at_all:f', BUILTIN)
    assert isinstance(error.value.__cause__, ModuleNotFoundError)


def test_did_you_mean():
    assert plugins.did_you_mean('adm', ['sgd', 'adam', '_adm']) == ", did you mean 'adam'?"
    assert plugins.did_you_mean('adm', []) == ''
    assert plugins.did_you_mean('adm', ['lion'], cutoff=0.6) == ''


@pytest.mark.parametrize('module', ['grpo_jax.plugins', 'grpo_jax.rewards'])
def test_imports_neither_jax_nor_other_parts_of_the_package(module):
    code = (
        f'import sys; sys.modules["grpo_jax"] = type(sys)("grpo_jax"); '
        'sys.modules["grpo_jax"].__path__ = sys.argv[1:]; '
        f'import {module}; print(*sys.modules)'
    )
    folder = plugins.__file__.removesuffix('/plugins.py')
    result = subprocess.run(
        [sys.executable, '-c', code, folder], capture_output=True, text=True, check=True
    )
    names = result.stdout.split()
    assert not {'jax', 'flax', 'sympy', 'math_verify', 'asyncio'} & set(names)
    ours = {name.split('.')[1] for name in names if name.startswith('grpo_jax.')}
    assert ours <= {'plugins', 'rewards', 'types'}
