"""Programs that were compiled once are read from the run's folder, and counted."""

import contextlib
import types

import jax
import numpy as np
import pytest
import runs

from grpo_jax import train
from grpo_jax.run import compiled


@contextlib.contextmanager
def folder(path):
    """As if the user had asked for a cache there; None: for none."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update('jax_compilation_cache_dir', path)
    yield
    jax.config.update('jax_compilation_cache_dir', before)


@pytest.fixture(autouse=True)
def _no_cache():
    with folder(None):
        yield


def compute(scale):
    """A new program for each scale, asked for twice."""
    one = jax.jit(lambda x: scale * x + 1)
    return one(one(np.arange(3, dtype=np.float32)))


def test_programs_are_counted_and_read_again(tmp_path):
    compute(2)  # finds that there is no cache
    with compiled.kept_in(tmp_path / 'cache'), compiled.counted() as count:
        first = compute(3), compute(4)
    assert str(count) == 'compiled programs: 2 (0 from the cache)'
    assert len(list((tmp_path / 'cache').glob('*-cache'))) == 2
    compute(6)  # neither counted nor kept
    with compiled.kept_in(tmp_path / 'cache'), compiled.counted() as again:
        second = compute(3), compute(4)
        compute(5)
    assert (again.programs, again.cached) == (3, 2)
    assert (count.programs, count.cached) == (2, 0)
    np.testing.assert_array_equal(first, second)
    assert len(list((tmp_path / 'cache').glob('*-cache'))) == 3
    with compiled.kept_in(tmp_path / 'other'):
        compute(8)
    assert len(list((tmp_path / 'other').glob('*-cache'))) == 1


def test_everything_is_as_before_afterwards(tmp_path):
    names = ('compilation_cache_dir', 'persistent_cache_min_compile_time_secs')
    before = [getattr(jax.config, f'jax_{name}') for name in names]
    with pytest.raises(KeyError), compiled.kept_in(tmp_path / 'cache'):
        raise KeyError
    assert [getattr(jax.config, f'jax_{name}') for name in names] == before


def test_the_users_cache_is_left_alone(tmp_path):
    with folder(str(tmp_path / 'own')):
        least = jax.config.jax_persistent_cache_min_compile_time_secs
        with compiled.kept_in(tmp_path / 'cache'):
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'own')
            assert jax.config.jax_persistent_cache_min_compile_time_secs == least
            compute(7)
    assert not (tmp_path / 'cache').exists()


def test_memory_is_given_back_after_long_compilations(monkeypatch):
    pads = []
    libc = types.SimpleNamespace(malloc_trim=pads.append)
    monkeypatch.setattr(compiled.ctypes, 'CDLL', lambda name: libc)
    monkeypatch.setattr(compiled.sys, 'platform', 'linux')
    with compiled.trimmed():
        compute(9)
        assert pads == []
        monkeypatch.setattr(compiled, '_LONG', 0.0)
        compute(10)
        assert pads == [0]
    compute(11)
    assert pads == [0]


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(compiled.ctypes, 'CDLL', lambda name: types.SimpleNamespace())
    monkeypatch.setattr(compiled, '_LONG', 0.0)
    with compiled.trimmed():
        np.testing.assert_array_equal(compute(12), [13, 157, 301])


def test_a_second_run_compiles_nothing(tmp_path, capsys):
    """Of the same config, in another folder with the same cache: equal to the last bit."""
    jax.clear_caches()  # of other files of short runs
    config = runs.get_config()
    config.sft.update(steps=2)
    config.sft.optimizer.update(warmup_steps=1)
    config.grpo.update(steps=2)
    config.eval.update(every=2, samples=0)
    printed = []
    for name in ('first', 'second'):
        workdir = tmp_path / name
        workdir.mkdir()
        (workdir / 'cache').symlink_to(tmp_path / 'cache')
        (tmp_path / 'cache').mkdir(exist_ok=True)
        train.train(config, str(workdir))
        lines = capsys.readouterr().out.splitlines()
        printed += [line for line in lines if line.startswith('compiled')]
    programs = len(list((tmp_path / 'cache').glob('*-cache')))
    # Initial parameters, states, updates, rates, greedy and sampled completions; some are shared.
    assert 4 <= programs <= 12
    assert printed[0].endswith(' from the cache)')
    counts = [[int(word) for word in line.replace('(', '').split() if word.isdigit()]
              for line in printed]  # fmt: skip
    assert counts[0][0] - counts[0][1] == programs
    assert counts[1][0] == counts[1][1] > 0  # all that this process does not hold any more
    runs.assert_same_run(tmp_path / 'first', tmp_path / 'second', steps=2)
