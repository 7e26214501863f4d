"""The run-time type checker of the suite: shapes and types of all annotated functions."""

import contextlib

import jaxtyping
from beartype import BeartypeConf, beartype

checker = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where a float is asked for


@contextlib.contextmanager
def off():
    """No checks, as users run it: for errors that the package itself raises for wrong shapes."""
    jaxtyping.config.update('jaxtyping_disable', True)
    try:
        yield
    finally:
        jaxtyping.config.update('jaxtyping_disable', False)
