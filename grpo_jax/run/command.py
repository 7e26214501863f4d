"""Error messages of the commands. Imports nothing that is slow."""

import io
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from grpo_jax.run.errors import is_disk_full, problems_of


@contextmanager
def one_line_errors() -> Iterator[None]:
    r"""Turns a ValueError or OSError into one line on standard error and exit status 2.

    So does a SystemExit, which only code of the user's own raises, and any error of a library that
    has found the disk full.

    A `ConfigError` becomes one line for each of its problems. Control characters are shown as
    `\x1b`, so that what a message quotes does nothing to the terminal.

    With the environment variable GRPO_JAX_TRACEBACK set the error is raised as it is.

    If the reader of standard output has gone, as `head` does, the program ends quietly with the
    status of one that SIGPIPE ended, 141.
    """
    try:
        yield
        sys.stdout.flush()
    except SystemExit as error:  # of code that the config names; status 0 would look like success
        print(f'error: the program was ended by sys.exit({error.code!r})', file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not isinstance(error, (ValueError, OSError)) and not is_disk_full(error):
            raise
        if isinstance(error, BrokenPipeError) and _output_has_no_reader():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # flushed at the exit
            sys.exit(128 + signal.SIGPIPE)
        if os.environ.get('GRPO_JAX_TRACEBACK'):
            raise
        from grpo_jax.rewards.output import printable  # slow, and needed here alone

        for problem in problems_of(error):
            print('error:', printable(' '.join(problem.split())), file=sys.stderr)
        sys.exit(2)


def _output_has_no_reader() -> bool:
    """Whether standard output is a pipe that nothing reads; another pipe may have broken."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), select.POLLOUT)
    except io.UnsupportedOperation:  # it is no file
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
