"""Programs that were compiled once are read from the run's folder, and counted."""

import contextlib
import errno
import os
import threading
import types
import warnings

import jax
import numpy as np
import pytest
import runs

from grpo_jax import train
from grpo_jax.engine.calls import Call
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


STEPS = []  # of a run, that have been written


def written(step, metrics):
    """A logger of a run."""
    STEPS.append(step)


def test_later_steps_trace_nothing(tmp_path):
    """With an evaluation and a save between them, as with those before."""
    config = runs.get_config()
    config.sft.steps = 0
    config.log.to = ('test_compiled:written',)
    late = []

    def listen(event, duration, **about):
        if 'trace' in event and STEPS and STEPS[-1] > 4:
            late.append((STEPS[-1], event, about))

    STEPS.clear()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        runs.train(config, tmp_path / 'run')
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert STEPS[-1] == 8
    assert late == []


def test_everything_is_as_before_afterwards(tmp_path):
    names = ('compilation_cache_dir', 'persistent_cache_min_compile_time_secs')
    before = [getattr(jax.config, f'jax_{name}') for name in names]
    with pytest.raises(KeyError), compiled.kept_in(tmp_path / 'cache'):
        raise KeyError
    assert [getattr(jax.config, f'jax_{name}') for name in names] == before


def test_programs_for_which_there_was_no_room_are_removed(tmp_path):
    """JAX would read one that was cut off again and again, and never replace it."""
    folder = tmp_path / 'cache'
    with compiled.kept_in(folder):
        compute(9)
    (before,) = folder.glob('*-cache')
    os.utime(before, (1, 1))
    full = OSError(errno.ENOSPC, 'No space left on device', 'metrics.jsonl')
    with pytest.raises(OSError, match='No space left'), compiled.kept_in(folder):
        fail_after(lambda: compute(10), full)
    assert list(folder.glob('*-cache')) == [before]
    with pytest.raises(KeyError), compiled.kept_in(folder):
        fail_after(lambda: compute(10), KeyError())
    assert len(list(folder.glob('*-cache'))) == 2


def fail_after(function, error):
    function()
    raise error


def test_of_a_full_disk_one_error_is_enough(tmp_path, recwarn):
    with compiled.kept_in(tmp_path):
        warnings.warn(
            "Error writing persistent compilation cache entry for 'jit_f': OSError: "
            '[Errno 28] No space left on device',
            stacklevel=1,
        )
        warnings.warn('Error writing persistent compilation cache entry: other', stacklevel=1)
    assert [str(warning.message)[-5:] for warning in recwarn] == ['other']


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


def test_a_program_that_was_compiled_ahead_is_not_compiled_again():
    names = []

    def on_duration(event, duration_secs, *, fun_name='', **rest):
        if event.endswith('/backend_compile_duration'):
            names.append((fun_name, threading.current_thread() is threading.main_thread()))

    def double(x, *, y):
        return 2 * x + y

    def wrong(x):
        raise TypeError('no such argument')

    x = jax.ShapeDtypeStruct((3,), np.float32)
    program, failing = jax.jit(double, static_argnames='y'), jax.jit(wrong)
    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        for call in (Call(program, (x,), {'y': 1}), Call(failing, (x,))):
            ahead = compiled.CompiledAhead(lambda call=call: call)
            ahead.wait()
        assert names == [('jit(double)', False)]
        result = Call(program, (np.ones(3, np.float32),), {'y': 1}).run()
        np.testing.assert_array_equal(result, [3, 3, 3])
        assert names == [('jit(double)', False)]
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)
    with pytest.raises(TypeError, match='no such argument'):
        Call(failing, (np.ones(3, np.float32),)).run()


@pytest.mark.parametrize(('processes', 'platform'), [(2, 'cpu'), (1, 'gpu')])
def test_nothing_is_compiled_ahead_where_it_could_disturb(monkeypatch, processes, platform):
    monkeypatch.setattr(compiled.hosts, 'count', lambda: processes)
    monkeypatch.setattr(compiled, 'target_platform', lambda: platform)
    asked = []
    compiled.CompiledAhead(lambda: asked.append(1)).wait()
    assert asked == []


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(compiled.ctypes, 'CDLL', lambda name: types.SimpleNamespace())
    monkeypatch.setattr(compiled, '_LONG', 0.0)
    with compiled.trimmed():
        np.testing.assert_array_equal(compute(12), [13, 157, 301])


def test_a_second_run_compiles_nothing(tmp_path, capsys):
    """Of the same config, in another folder with the same cache: equal to the last bit."""
    jax.clear_caches()  # of other files of short runs
    config = runs.get_config()
    config.model.update(layers=1, qk_norm='')
    config.grpo.algorithm.update(inner_updates=1, entropy=False)
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
