"""Short training runs in this process, one of them shared, and the config that they have.

The shared run needs rewards that vary and an accuracy between 0 and 1 without any learning:
`lucky` calls about half of all completions right, `bonus` likes three characters. The tests of
failures put another function in the place of `bonus`.
"""

import contextlib
import functools
import io
import json
import os
import re
import threading
import zlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
import tiny

from configs import smoke
from grpo_jax import models
from grpo_jax import train as command
from grpo_jax.algorithm import optimizer, program
from grpo_jax.run import compiled, policy_trainer, report

FILES = ('metrics.jsonl', 'completions.jsonl', 'heldout.jsonl')
TIMES = re.compile('timing/|step_time$|perf/')


def get_config():
    """The smoke config with fewer steps. This file can be given as --config."""
    config = smoke.get_config()
    config.sft.update(steps=5)
    config.sft.optimizer.update(warmup_steps=2)
    config.grpo.update(steps=8)
    config.grpo.rewards = {'runs:lucky': 1.0, 'chain_format': 0.5, 'runs:bonus': 1.0}
    config.eval.update(every=4, batch_size=4, correct='runs:lucky')
    config.checkpoint.update(every=3)
    config.log.completions = 16  # all of them
    return config


def lucky(prompts, completions, **columns):
    pairs = zip(prompts, completions, strict=True)
    return [float(zlib.crc32((prompt + text).encode()) % 2) for prompt, text in pairs]


def bonus(prompts, completions, **columns):
    return [-0.125 * abs(len(text) - 3) for text in completions]


def infinite_above_100(rewards):
    """An advantage estimator that fails for large rewards."""
    return jnp.where(rewards.max() > 100, jnp.inf, rewards - rewards.mean())


# What a run compiles is kept for the next one.
_adamw, _make_step = functools.cache(optimizer.adamw), functools.cache(program.make_train_step)
_init = models.init_params
_traced = jax.jit(_init, static_argnums=0, inline=True)  # the same program, traced once
_made = {}


def _init_once(model, key):
    if isinstance(key, jax.core.Tracer):
        return _traced(model, key)
    name = (model, jax.random.key_data(key).tobytes())
    if name not in _made:
        _made[name] = _init(model, key)
    return _made[name]


@contextlib.contextmanager
def compiled_once():
    kept = compiled.kept_in(os.environ['GRPO_JAX_TEST_PROGRAMS'])
    with pytest.MonkeyPatch.context() as patch, kept:
        patch.setattr(optimizer, 'adamw', _adamw)
        patch.setattr(policy_trainer, 'make_train_step', _make_step)
        patch.setattr(models, 'init_params', _init_once)
        yield


@contextlib.contextmanager
def updates_compiled_ahead():
    """Checks that updates find the program that a thread has compiled for abstract arrays."""
    compiled_late = []

    def on_duration(event, duration_secs, *, fun_name='', **rest):
        main = threading.current_thread() is threading.main_thread()
        if main and event.endswith('/jaxpr_to_mlir_module_duration') and fun_name == 'jit(step)':
            compiled_late.append(fun_name)

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(on_duration)
    assert compiled_late == []


def train(config, workdir, *, picture=False, **options):
    """Trains and returns what was printed; Matplotlib takes a third of a short run's time."""
    with (
        compiled_once(),
        updates_compiled_ahead(),
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):
        if not picture:
            patch.setattr(report, 'plot', lambda folder, steps: folder / 'reward.png')
        command.train(config, str(workdir), **options)
    return printed.getvalue()


@functools.cache
def finished(folder):
    """The workdir and the printed text of the shared run, which began with a mistake."""
    workdir = folder / 'runs' / 'finished'
    config = get_config()
    config.data.prompt_length = 3
    with pytest.raises(ValueError, match='all 10 prompts are longer than prompt_length=3 tokens'):
        command.train(config, str(workdir))
    return workdir, train(get_config(), workdir, picture=True)


def lines(path):
    """The objects of a JSON lines file; what JSON does not know, such as NaN, is refused."""

    def refuse(name):
        raise AssertionError(f'{path}: {name} is not JSON')

    texts = path.read_bytes().decode().split('\n')[:-1]  # not at other ends of lines
    return [json.loads(text, parse_constant=refuse) for text in texts]


def final_state(workdir, step=8):
    with ocp.CheckpointManager(workdir / 'checkpoints' / 'grpo') as manager:
        assert manager.latest_step() == step
        items = ('params', 'rest')
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore() for name in items})
        return {name: manager.restore(step, args=args)[name] for name in items}


def assert_same_run(workdir, other, steps=8, *, except_for=(), files=FILES):
    """Everything but times, and the metrics in `except_for`, is equal, to the last bit."""

    def rows(path):
        return [
            {k: v for k, v in row.items() if not TIMES.match(k) and k not in except_for}
            for row in lines(path)
        ]

    for name in files:
        assert rows(workdir / name) == rows(other / name)
    states = final_state(workdir, steps), final_state(other, steps)
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    assert len(jax.tree.leaves(states[0])) > 20
    assert tiny.same(*states)
