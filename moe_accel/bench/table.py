"""The report as tables and sentences, with rich or without."""

import importlib.util
from typing import Any

TEXT = ("shape", "routing", "arm", "check")
"""Columns that are words, and stand on the left; the rest are numbers."""
WIDTH = 240
"""A row is a line, whatever the terminal."""
CASE = {"shape": "", "routing": "", "layers": " layers", "tokens": " tokens a step", "seq_len": " tokens a sequence"}
"""What makes a case, and how it is said in a sentence."""


def render(report: dict[str, Any], plain: bool = False) -> None:
    """Print the report on stdout; `plain` without rich, which is also done where it is not installed."""
    show = _plain if plain or importlib.util.find_spec("rich") is None else _rich
    for line in heading(report):
        print(line)
    show(*rows_table(report))
    if report["per_layer"]:
        print("\nms of one more layer, by difference of two depths:")
        show(*layers_table(report))
    for line in remarks(report):
        print(line)


def heading(report: dict[str, Any]) -> list[str]:
    """What was measured where."""
    options, about, versions = report["options"], report["about"] or {}, report["versions"]
    device, dtype = about.get("device", "?"), about.get("dtype", "?")
    software = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers") if versions[name])
    lines = [f"{options['suite']}: {device}, {dtype}, {software}, {report['date']}"]
    if same := [_named(name, report["rows"][0][name]) for name in CASE if name not in _varying(report["rows"])]:
        lines.append(", ".join(same))
    if device == "cpu":
        lines.append("On a CPU: times only say that the command works; no memory is measured.")
    for each in report["ceilings"]:
        grouped = _number(each.get("grouped_mm_tflop_s"), 1)
        ceiling = f"large matmul {_number(each.get('matmul_tflop_s'), 1)}, grouped_mm of the shape {grouped} TFLOP/s"
        lines.append(f"ceilings, {each['shape']}, {each['tokens']:,} tokens: {ceiling}")
    return lines


def _varying(rows: list[dict[str, Any]]) -> list[str]:
    """What tells the cases apart; the rest stands in the heading, once."""
    return [name for name in CASE if len({row[name] for row in rows}) > 1]


def _named(name: str, value: Any) -> str:
    said = (f"{value:,}" if isinstance(value, int) else value) + CASE[name]
    return said.removesuffix("s") if (name, value) == ("layers", 1) else said


def rows_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of all rows."""
    varying = _varying(report["rows"])
    columns = [*varying, "arm", "ms", "quartiles", "x native", "tok/s", "TFLOP/s", "% matmul", "% grouped_mm"]
    columns += ["peak GiB", "check"]
    rows = []
    for row in report["rows"]:
        case = [f"{row[name]:,}" if isinstance(row[name], int) else row[name] for name in varying]
        rows.append([*case, row["arm"], *_measures(row, report["rows"]), _check(row)])
    return columns, rows


def _measures(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    if "median_ms" not in row:
        return ["-"] * 8
    native = [each for each in rows if each["arm"] == "native" and all(each[name] == row[name] for name in CASE)]
    ratio = native[0]["median_ms"] / row["median_ms"] if native and "median_ms" in native[0] else None
    digits = 1 if row["median_ms"] >= 100 else 2
    return [
        _number(row["median_ms"], digits),
        " to ".join(_number(each, digits) for each in row["quartiles_ms"]),
        _number(ratio, 2),
        _number(row["tok_s"], 0),
        _number(row["tflop_s"], 1 if row["tflop_s"] >= 10 else 3),
        _number(row.get("of_matmul"), 1, 100),
        _number(row.get("of_grouped_mm"), 1, 100),
        _number(row["peak_gib"], 1),
    ]


def _check(row: dict[str, Any]) -> str:
    check = row.get("check")
    if check is None:
        return "failed to run"
    if check.get("reference"):
        return "reference"
    if not check["ok"]:
        return "DISAGREES"
    return f"agrees ({check['worst'][1]:.0e} of {check['worst'][2]:.0e})"


def layers_table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the differences between depths."""
    columns = ["shape", "routing", "layers", "tokens", "arm", "ms per layer"]
    rows = []
    for each in report["per_layer"]:
        of = [each["shape"], each["routing"], "{} to {}".format(*each["layers"]), f"{each['tokens']:,}", each["arm"]]
        rows.append([*of, _number(each["ms_per_layer"], 2)])
    return columns, rows


def remarks(report: dict[str, Any]) -> list[str]:
    """What the tables cannot say: how shapes differ from the released models, and what went wrong."""
    lines = [f"{name}: {of['note']}" for name, of in report["shapes"].items() if of["note"]]
    for row in report["rows"]:
        where = ", ".join([row["arm"], *(_named(name, row[name]) for name in CASE if name != "seq_len")])
        if "error" in row:
            lines.append(f"error: {where}: {row['error']}")
        check = row.get("check") or {}
        if check.get("sequences", row["batch"]) < row["batch"]:
            lines.append(f"{where}: checked on {check['sequences']} of {row['batch']} sequences; more did not fit")
        if check.get("says_nothing"):
            lines.append(f"{where}: only norms compared of {', '.join(check['says_nothing'])}; elements are noise")
    return lines


def _number(value: float | None, digits: int, scale: float = 1) -> str:
    return "-" if value is None else f"{value * scale:,.{digits}f}"


def _rich(columns: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in TEXT else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False, width=WIDTH).print(table)


def _plain(columns: list[str], rows: list[list[str]]) -> None:
    widths = [max(len(row[at]) for row in [columns, *rows]) for at in range(len(columns))]
    for row in [columns, *rows]:
        cells = zip(columns, row, widths, strict=True)
        padded = [cell.ljust(width) if column in TEXT else cell.rjust(width) for column, cell, width in cells]
        print("  ".join(padded).rstrip())
