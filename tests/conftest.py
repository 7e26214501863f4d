"""Eight virtual CPU devices for all tests, and the tiny model that most of them share."""

import os
import shutil
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# What short runs compile, for all processes: the workers of pytest-xdist have the variables of the
# process that starts them.
if 'GRPO_JAX_TEST_PROGRAMS' not in os.environ:
    os.environ['GRPO_JAX_TEST_PROGRAMS'] = tempfile.mkdtemp(prefix='grpo-jax-programs-')

import jax
import pytest
import runs
import tiny

# Not through XLA_FLAGS: child processes of a test shall see the machine as it is.
jax.config.update('jax_num_cpu_devices', 8)
# Nearly all programs run once or twice: they compile fast, and run as slowly as they like.
jax.config.update('jax_disable_most_optimizations', True)


def pytest_sessionfinish(session):
    if not hasattr(session.config, 'workerinput'):  # not in the workers of pytest-xdist
        shutil.rmtree(os.environ['GRPO_JAX_TEST_PROGRAMS'], ignore_errors=True)


@pytest.fixture(scope='session')
def model():
    """Two layers with grouped-query attention."""
    return tiny.make_model()


@pytest.fixture(scope='session')
def params(model):
    return tiny.make_params(model)


@pytest.fixture(scope='session')
def rollout():
    """Random ragged completions of ragged prompts: B = 4, G = 3, P = 6, T = 5."""
    return tiny.make_rollout()


@pytest.fixture(scope='session')
def rewards():
    return tiny.make_rewards()


@pytest.fixture(scope='module')
def compiled_once():
    """For modules of short runs: what one of them compiles is kept for the next."""
    with runs.compiled_once():
        yield
