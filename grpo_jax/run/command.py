"""Error messages of the commands. Imports nothing that is slow."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a ValueError or OSError into one line on standard error and exit status 2.

    With the environment variable GRPO_JAX_TRACEBACK set the error is raised as it is.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get('GRPO_JAX_TRACEBACK'):
            raise
        print('error:', ' '.join(str(error).split()), file=sys.stderr)
        sys.exit(2)
