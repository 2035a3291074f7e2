"""What a command prints: letters the terminal lacks stop nothing, and a full disk behind a pipe is said in a line."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def printed() -> Iterator[None]:
    """While the block prints; what could not be printed ends the process, with 1 for a closed pipe and else with 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        if error.filename is not None:  # of a file, not of a stream
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes there
        if error.errno == errno.EPIPE:
            sys.exit(1)
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(2)
