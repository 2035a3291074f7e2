"""What `moe-accel bench` prints: results on stdout, progress on stderr, exit 1 where an arm failed."""

import json
import sys
from pathlib import Path

from moe_accel.bench.options import Options
from moe_accel.bench.run import run
from moe_accel.bench.table import render

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


def bench(options: Options, as_json: bool, out: Path | None) -> int:
    """Measure, write and print; returns the exit status."""
    try:
        report = run(options, lambda line: print(line, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    text = json.dumps(report, indent=2)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
    print(text) if as_json else render(report)
    return 0 if report["ok"] else EXIT_FAILED
