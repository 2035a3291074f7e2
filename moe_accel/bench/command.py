"""What `moe-accel bench` prints: results on stdout, progress on stderr, exit 1 where an arm failed."""

import json
import signal
import sys
from pathlib import Path
from typing import Any

from moe_accel.bench.options import Options
from moe_accel.bench.run import run
from moe_accel.bench.table import render
from moe_accel.errors import ConfigError

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130


def bench(options: Options, as_json: bool, out: Path | None) -> int:
    """Measure, write after every row, and print; returns the exit status.

    Raises:
        ConfigError: the options break a rule, or `out` cannot be written.
    """
    options.check()

    def keep(report: dict[str, Any]) -> None:
        if out is not None:
            out.write_text(json.dumps(report, indent=2) + "\n")

    if out is not None:
        try:  # now, and not after an hour
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a"):
                pass
        except OSError as error:
            raise ConfigError(f"cannot write {out}: {error.strerror}", "--out takes a file") from error
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a process that is measured must not stay behind
    try:
        report = run(options, lambda line: print(line, file=sys.stderr, flush=True), keep=keep)
    except KeyboardInterrupt:
        print(f"interrupted{f': {out} has the rows so far' if out else ''}", file=sys.stderr)
        return EXIT_INTERRUPTED
    keep(report)
    print(json.dumps(report, indent=2)) if as_json else render(report)
    return 0 if report["ok"] else EXIT_FAILED
