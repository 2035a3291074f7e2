"""Code in an interpreter of its own."""

import os
import subprocess
import sys
import textwrap


def python(code: str, **variables: str) -> subprocess.CompletedProcess:
    """Run `code` in a fresh interpreter, without any of this process's launch variables."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_", "MOE_ACCEL"))}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        env=clean | variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
