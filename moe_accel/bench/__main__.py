"""`python -m moe_accel.bench '{"suite": "full", "layers": [4, 8]}'`: the command where typer and rich are missing.

The one argument is JSON, its keys those of `Options`; a second one is the file that the report goes to.
"""

import json
import sys
from pathlib import Path
from typing import Any

from moe_accel.bench.command import bench
from moe_accel.bench.options import Options
from moe_accel.errors import MoEAccelError


def main() -> None:
    """Parse, run, exit: 2 for options that are wrong."""
    given = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    try:
        status = bench(Options(**values), False, Path(sys.argv[2]) if len(sys.argv) > 2 else None)
    except (MoEAccelError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    raise SystemExit(status)


if __name__ == "__main__":
    main()
