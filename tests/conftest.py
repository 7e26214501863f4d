"""Eight virtual CPU devices for all tests, and the tiny model that most of them share."""

import gc
import os
import shutil
import signal
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# What short runs compile, for all processes: the workers of pytest-xdist have the variables of the
# process that starts them.
if 'GRPO_JAX_TEST_PROGRAMS' not in os.environ:
    os.environ['GRPO_JAX_TEST_PROGRAMS'] = tempfile.mkdtemp(prefix='grpo-jax-programs-')

import hypothesis
import jax
import jaxtyping
import pytest
import typechecking

# Before anything of the package is imported: shapes and types of its arguments are checked.
jaxtyping.install_import_hook('grpo_jax', 'typechecking.checker')
jaxtyping.jaxtyped = typechecking.jaxtyped

import runs  # noqa: E402
import tiny  # noqa: E402

# With XLA's older code generator programs compile in a third of the time, those of child processes
# too. Versions after 0.11.0 do not have it, and abort at an unknown flag.
FAST_COMPILER = '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
if jax.__version_info__ < (0, 11, 1) and FAST_COMPILER not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {FAST_COMPILER}'.strip()
# Not through XLA_FLAGS too: child processes of a test shall see the machine as it is.
jax.config.update('jax_num_cpu_devices', 8)
# Nearly all programs run once or twice: they compile fast, and run as slowly as they like.
jax.config.update('jax_disable_most_optimizations', True)
# No deadlines, the same examples every time; --hypothesis-profile=ci tries a hundred of them.
hypothesis.settings.register_profile(
    'short', hypothesis.settings.get_profile('ci'), max_examples=30
)
# A process of so many programs has over a million objects, and Python would go through them often.
gc.set_threshold(200_000, 20, 20)


def pytest_sessionfinish(session):
    gc.freeze()  # else pytest goes through them all at its end, for longer than pytest-xdist waits
    if not hasattr(session.config, 'workerinput'):  # not in the workers of pytest-xdist
        shutil.rmtree(os.environ['GRPO_JAX_TEST_PROGRAMS'], ignore_errors=True)


def of_short_runs(item):
    """Whether a test is in a file of short runs, which share their programs."""
    return item is not None and hasattr(item.module, 'runs')


def pytest_collection_modifyitems(items):
    """Files of short runs are first, one after another; those that compile nothing are last."""
    items.sort(key=lambda item: (not of_short_runs(item), 'test_rewards_' in item.module.__name__))


def pytest_runtest_teardown(item, nextitem):
    """XLA has crashed while compiling in a process that held all the suite's programs.

    What is traced for one file of short runs is kept for the next.
    """
    same_file = nextitem is not None and nextitem.module is item.module
    if not same_file and not (of_short_runs(item) and of_short_runs(nextitem)):
        jax.clear_caches()


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt; shells start background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """The workdir of the run that all tests of a process share."""
    return runs.finished(tmp_path_factory.getbasetemp())[0]


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
    """A folder for prepared data sets."""
    return str(tmp_path_factory.mktemp('cache'))
