"""Error messages of the commands. Imports nothing that is slow."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from grpo_jax.run.errors import problems_of


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a ValueError or OSError into one line on standard error and exit status 2.

    So does a SystemExit, which only code of the user's own raises.

    A `ConfigError` becomes one line for each of its problems.

    With the environment variable GRPO_JAX_TRACEBACK set the error is raised as it is.
    """
    try:
        yield
    except SystemExit as error:  # of code that the config names; status 0 would look like success
        print(f'error: the program was ended by sys.exit({error.code!r})', file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as error:
        if os.environ.get('GRPO_JAX_TRACEBACK'):
            raise
        for problem in problems_of(error):
            print('error:', ' '.join(problem.split()), file=sys.stderr)
        sys.exit(2)
