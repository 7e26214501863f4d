"""Eight virtual CPU devices for all tests, and the tiny model that most of them share."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import pytest
import runs
import tiny

# Not through XLA_FLAGS: child processes of a test shall see the machine as it is.
jax.config.update('jax_num_cpu_devices', 8)


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
