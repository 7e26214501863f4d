"""Objects named by a path: modules, functions, classes, and every error."""

import functools
import pathlib
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


# Files, and modules in the folders of `set_folders`


@pytest.fixture(autouse=True)
def no_folders():
    yield
    plugins.set_folders([])


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f'{name}.py').write_text(text)
    return folder


def number(value):
    return f'def f():\n    return {value}\n'


def test_a_folder_is_searched_without_being_on_the_path(tmp_path):
    folder = write(tmp_path, beside_one=number(1), beside_two=number(2))
    plugins.set_folders([folder])
    before = list(sys.path)
    assert plugins.load('beside_one:f')() == 1
    assert plugins.load('beside_one.f')() == 1
    assert sys.path == before
    with pytest.raises(ModuleNotFoundError):
        __import__('beside_two')
    with pytest.raises(
        PluginError, match=r"importing beside_tow raised .*did you mean 'beside_two"
    ):
        plugins.load('beside_tow:f')


def test_equal_names_in_two_folders(tmp_path):
    import_helper = 'from helper_beside import f\n'
    loaded = []
    for value in (1, 2):
        folder = write(tmp_path / str(value), beside=import_helper, helper_beside=number(value))
        plugins.set_folders([folder])
        loaded.append(plugins.load('beside:f'))
        assert plugins.load('beside:f') is loaded[-1]
    assert [f() for f in loaded] == [1, 2]


def test_the_folder_comes_before_the_path(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(write(tmp_path / 'path', twice_there=number(1)))
    plugins.set_folders([write(tmp_path / 'folder', twice_there=number(2))])
    assert plugins.load('twice_there:f')() == 2


def test_a_module_of_the_standard_library_is_not_replaced(tmp_path):
    plugins.set_folders([write(tmp_path, math=number(5), uses='import math\nf = math.gcd\n')])
    assert plugins.load('math:f')() == 5
    assert plugins.load('uses:f')(4, 6) == 2
    assert __import__('math').gcd(4, 6) == 2


def test_packages_in_a_folder(tmp_path):
    package = write(tmp_path / 'own_package', a='from .b import f\nfrom own_package.b import g\n')
    write(package, b=f'{number(3)}g = f\n')
    plugins.set_folders([tmp_path])
    assert plugins.load('own_package.a:f')() == 3  # without an __init__.py
    write(package, __init__='')
    assert plugins.load('own_package.b:g')() == 3


def test_a_module_that_python_finds_is_the_same_module(monkeypatch):
    plugins.set_folders([pathlib.Path(__file__).parent])
    assert plugins.load('test_plugins:double') is double
    assert plugins.load('optax.contrib:muon') is optax.contrib.muon


def test_files(tmp_path, monkeypatch):
    folder = write(tmp_path / 'a', mine=number(1))
    write(tmp_path / 'a', **{'run-1.5b': number(15)})
    plugins.set_folders([folder])
    assert plugins.load('./mine.py:f')() == plugins.load('mine.py:f')() == 1
    assert plugins.load('../a/mine.py:f')() == 1
    assert plugins.load(f'{folder}/mine.py:f') is plugins.load('./mine.py:f')
    assert plugins.load('./mine.py:f') is plugins.load('mine:f')
    assert plugins.load('./run-1.5b.py:f')() == 15
    plugins.set_folders([])
    monkeypatch.chdir(tmp_path)
    assert plugins.load('./a/mine.py:f')() == 1  # relative to the working directory
    with pytest.raises(PluginError, match=r'importing ./b/mine.py raised FileNotFound.*/b/mine.py'):
        plugins.load('./b/mine.py:f')
    with pytest.raises(PluginError, match=r"has no 'g', did you mean 'f'"):
        plugins.load('./a/mine.py:g')
    with pytest.raises(PluginError, match=r'not of the form'):
        plugins.load('./a/mine.py')


def test_suggestions_are_what_the_file_defines(tmp_path):
    text = """import os
from collections import namedtuple
from beside import nopes
LIMIT = 3
def reward(**_): return [0.0]
class Scale:
    def nope(self): pass
"""
    write(tmp_path, mine=text, beside='def nopes(): pass\n', empty='import nope_or_os as os\n')
    write(tmp_path, nope_or_os='')
    plugins.set_folders([tmp_path])
    with pytest.raises(
        PluginError, match=r"mine.py has no 'nope', did you mean '(Scale|reward)'\?$"
    ):
        plugins.load('./mine.py:nope')
    with pytest.raises(PluginError, match=r"has no 'limit', did you mean '(Scale|reward)'\?$"):
        plugins.load('./mine.py:limit')
    with pytest.raises(PluginError, match=r"has no 'Scale.nop', did you mean 'nope'\?$"):
        plugins.load('./mine.py:Scale.nop')
    with pytest.raises(PluginError, match=r"empty.py has no 'oss', did you mean 'os'\?$"):
        plugins.load('./empty.py:oss')
    with pytest.raises(PluginError, match="did you mean 'sample'"):
        plugins.load('grpo_jax:sampel')  # which loads its names when they are first used


def raised_by(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError('nothing was raised')


def test_the_place_of_an_error(tmp_path):
    """Lines are counted by hand; the last one that is the user's own."""
    text = """import json
from beside import divide

def direct(): return 1 / 0
def through_python(): return json.loads('{')
def through_another_file(): return divide()
def through_a_package(): return json.loads('{', cls=Own)

class Own(json.JSONDecoder):
    def decode(self, text):
        return [][0]
"""
    write(tmp_path, mine=text, beside='def divide():\n    return 1 / 0\n')
    write(tmp_path / 'site-packages', installed='import json\ndef f():\n    json.loads("{")\n')
    plugins.set_folders([tmp_path])
    places = {
        'direct': ' (mine.py:4)',
        'through_python': ' (mine.py:5)',
        'through_another_file': ' (beside.py:2)',
        'through_a_package': ' (mine.py:11)',
    }
    for name, place in places.items():
        assert plugins.place_of(raised_by(plugins.load(f'./mine.py:{name}'))) == place
    for call in (
        lambda: plugins.load('./site-packages/installed.py:f')(),
        lambda: plugins.load('json:loads')('{'),
    ):
        error = raised_by(call)
        outside = error.with_traceback(error.__traceback__.tb_next.tb_next)  # not of this file
        assert plugins.place_of(outside) == ''
    assert plugins.place_of(ValueError()) == ''
    write(tmp_path, broken='import json\n\njson.loads("{")\n')
    with pytest.raises(PluginError, match=r"^'./broken.py:f' \(broken.py:3\): importing .* raised"):
        plugins.load('./broken.py:f')
    with pytest.raises(PluginError, match=r"^'./missing.py:f': importing"):
        plugins.load('./missing.py:f')


@pytest.mark.parametrize('text', ['import sys\nsys.exit(0)\n', 'raise SystemExit\n', 'exit()\n'])
def test_a_file_that_exits(tmp_path, text):
    write(tmp_path, leaves=text)
    with pytest.raises(PluginError, match=r'importing .*leaves\.py raised SystemExit'):
        plugins.load(f'{tmp_path}/leaves.py:f')
    write(tmp_path, leaves=number(1))  # the failure is not remembered
    assert plugins.load(f'{tmp_path}/leaves.py:f')() == 1


def test_the_path_of_a_function(tmp_path):
    folder = write(tmp_path, mine='class A:\n    @staticmethod\n    def g(x):\n        return x\n')
    plugins.set_folders([folder])
    method = plugins.load('mine:A.g')
    assert plugins.path_of(method) == './mine.py:A.g'
    assert plugins.load('./mine.py:A.g') is method
    plugins.set_folders([])
    assert plugins.path_of(method) == f'{folder}/mine.py:A.g'
    assert plugins.load(plugins.path_of(method)) is method
    assert plugins.path_of(double) == 'test_plugins:double'
    assert plugins.path_of(optax.adamw) == f'{optax.adamw.__module__}:adamw'


@pytest.mark.parametrize('function', [lambda: 1, functools.partial(double), (lambda: lambda: 1)()])
def test_functions_without_a_path(function):
    with pytest.raises(PluginError, match='cannot be saved with the run, because no path leads'):
        plugins.path_of(function)


def test_a_script_and_a_notebook(tmp_path):
    code = f'{number(4)}from grpo_jax import plugins\nprint(plugins.path_of(f))\n'
    write(tmp_path, script=code)
    run = functools.partial(subprocess.run, capture_output=True, text=True)
    result = run([sys.executable, tmp_path / 'script.py'], check=True)
    assert result.stdout.strip() == f'{tmp_path}/script.py:f'
    result = run([sys.executable, '-c', code])
    assert 'PluginError' in result.stderr
    assert 'define it at the top level of a file' in result.stderr
