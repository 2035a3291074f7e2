"""What `several.py` measures, in which order, and what the numbers are worth: the plan, the comparison, the tables.

Arms, each of which is what a user would run:

    one          one GPU, stock transformers, the batches of all ranks one after the other: the truth about parity
    stock        stock transformers (grouped_mm, sdpa) under accelerate's FSDP2; PEFT's own LoRA
    stock_newer  the same with the transformers of --newer
    stock_recompute  stock with gradient checkpointing, which fits where stock does not
    native_ep    expert parallelism of transformers itself (>= 5.19): `DistributedConfig(fsdp_size=N, ep_size=N)`
    ep1          moe-accel, ep_size 1: experts sharded like everything else
    alltoall     moe-accel, ep_size N
    gathered     the same with `fsdp_reshard_after_forward: false`: all but the experts stay gathered until backward
    unwrapped    the same with `fsdp_auto_wrap_policy: NO_WRAP`: all but the experts, embeddings and head in one group
    graphs       unwrapped, with `cuda_graphs: true`; `attention_graphs` with `attention` alone; `elastic_graphs` with
                 DeepEP's ElasticBuffer
    compiled     unwrapped, with accelerate's regional compilation of layers by Inductor
    kept         alltoall with gradient checkpointing and `kept_layers: auto`: what one does where stock recomputes
    buffer       moe-accel, ep_size N, dispatcher deepep with `deep_ep.Buffer`; `elastic` with `ElasticBuffer`;
                 `elastic_unwrapped` as the name says
    stock_ram    loading only: stock with `fsdp_cpu_ram_efficient_loading`
    stock_mixed  stock with weights in fp32 and bf16 mixed precision; alltoall_mixed likewise, compared with that

On one GPU `stock` and `ep1` know of no FSDP2: where scaling starts.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.gpu.processes import LOSS_TOLERANCE, NORM_TOLERANCE

ARMS = (
    "one",
    "stock",
    "stock_recompute",
    "stock_newer",
    "native_ep",
    "ep1",
    "alltoall",
    "gathered",
    "unwrapped",
    "attention_graphs",
    "graphs",
    "compiled",
    "kept",
    "buffer",
    "elastic",
    "elastic_unwrapped",
    "elastic_graphs",
    "stock_ram",
    "stock_mixed",
    "alltoall_mixed",
)
"""In the order in which one is what the others are compared with: the first that ran."""

DEEPEP = {"buffer": "buffer", **dict.fromkeys(("elastic", "elastic_unwrapped", "elastic_graphs"), "elastic")}
"""Arms with DeepEP, and by which of its classes."""
GRAPHS = {"graphs": True, "attention_graphs": "attention", "elastic_graphs": True}
UNWRAPPED = ("unwrapped", "compiled", "elastic_unwrapped", *GRAPHS)
RECOMPUTED = ("stock_recompute", "kept")
"""Arms with gradient checkpointing."""
NEWER = ("stock_newer", "native_ep")
KINDS = ("parity", "full", "lora", "ragged", "load")
CHECKSUM_TOLERANCE = 1e-9
"""Of sums in fp64 over the weights that were loaded: the order differs, nothing else."""

MIXED_TOLERANCES = (LOSS_TOLERANCE, NORM_TOLERANCE)
"""Computed in bf16 on every device."""
ROUNDED_MORE = {("gpt-oss-20b", "full"): 1.5e-2}
"""Of a loss, by shape and kind, where two right trainings in bf16 go further apart: of three layers, stock transformers
is up to 5.4e-3 off fp32 within 13 steps, and moe-accel up to 2.6e-3 (`tests.gpu.rounding`)."""

Rows = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One set of processes.

    Attributes:
        kind: `parity` (a short training, with gradient norms), `full` and `lora` (timed), `ragged` (as `full`, with
            padding), `load` (and save).
        arm: see above.
        gpus: ranks, one on each; one process for all their batches in the arm `one`.
        batch: sequences a rank; ragged, as many share the tokens of one.
        layers: depth of the model.
    """

    kind: str
    arm: str
    gpus: int
    batch: int
    layers: int

    @property
    def key(self) -> str:
        """Its name in the JSON."""
        return f"{self.kind}-{self.arm}-{self.gpus}gpus-{self.batch}seq-{self.layers}layers"

    @property
    def num_ranks(self) -> int:
        """Processes."""
        return 1 if self.arm == "one" else self.gpus


def is_mixed(arm: str) -> bool:
    """Whether weights are in fp32, and computed in bf16."""
    return arm.endswith("_mixed")


def plan(gpus: int, deep: int, shallow: int, load_layers: int) -> list[Case]:
    """Every case, the most valuable first.

    Args:
        gpus: of the machine.
        deep: layers of which every arm trains one sequence a GPU.
        shallow: layers of which every arm trains four.
        load_layers: of the checkpoint that is loaded.
    """
    small = (gpus, 2, min(2, shallow))
    one, four, most = (gpus, 1, deep), (gpus, 4, shallow), (gpus, 4, deep)
    cases: list[Case] = []

    def add(kind: str, at: tuple[int, int, int], *arms: str) -> None:
        cases.extend(Case(kind, arm, *at) for arm in arms)

    add("parity", small, "one", "alltoall")
    add("full", one, "stock", "alltoall", "ep1")
    add("full", most, "alltoall", "stock_recompute", "kept")
    add("full", one, "gathered", "unwrapped", "attention_graphs", "graphs", "compiled")
    add("full", four, "stock", "alltoall", "ep1")
    add("full", one, "native_ep")
    add("full", four, "native_ep")
    for arm in ("buffer", "elastic"):
        add("parity", small, arm)
        add("full", one, arm)
        add("full", four, arm)
    add("full", one, "elastic_unwrapped", "elastic_graphs")
    add("lora", one, "stock", "alltoall", "ep1", "unwrapped", "attention_graphs", "graphs")
    add("ragged", most, "stock", "alltoall", "unwrapped", "attention_graphs", "graphs")
    add("lora", four, "stock", "alltoall", "ep1")
    add("full", most, "alltoall", "unwrapped", "ep1", "stock", "native_ep")
    add("full", one, "stock_newer")
    add("full", four, "stock_newer")
    fewer = 1
    while fewer < gpus:
        add("full", (fewer, 4, shallow), "stock", "ep1", *(["alltoall"] if fewer > 1 else []))
        fewer *= 2
    add("load", (gpus, 0, load_layers), "alltoall", "stock", "native_ep", "stock_ram")
    add("full", one, "stock_mixed", "alltoall_mixed")
    add("parity", small, "stock", "native_ep", "ep1")
    add("lora", most, "alltoall", "ep1", "stock")
    add("lora", one, "buffer", "elastic")
    add("lora", one, "native_ep")
    return list(dict.fromkeys(cases))  # of few layers `most` may be `four`


# ---- what the numbers are worth


def judge(rows: Rows, tolerances: tuple[float, float], shape: str = "") -> None:
    """Write into every part of every row, as `check`, what it was compared with and by how much it differs.

    Args:
        rows: by key.
        tolerances: largest relative difference of a loss and of a gradient norm, in any step.
        shape: of all of them.
    """
    for row in rows.values():
        for part in row.get("parts", ()):
            reference = _reference(row, part, rows.values())
            if reference is None or reference[0] is row:
                part["check"] = {"reference": reference is not None}
                continue
            theirs = reference[1]
            found = [largest_difference(part.get(name), theirs.get(name)) for name in ("losses", "norms")]
            most = allowed(row["kind"], row["arm"], tolerances, shape)
            agrees = all(each is None or each <= limit for each, limit in zip(found, most, strict=True))
            part["check"] = {
                "with": reference[0]["arm"],
                "loss": found[0],
                "norm": found[1],
                "agrees": agrees,
            }


def allowed(kind: str, arm: str, tolerances: tuple[float, float], shape: str = "") -> tuple[float, float]:
    """Largest relative difference of what is compared first (losses, sums over weights), and of a gradient norm."""
    if kind == "load":
        return CHECKSUM_TOLERANCE, 0.0
    loss, norm = MIXED_TOLERANCES if is_mixed(arm) else tolerances
    return max(loss, ROUNDED_MORE.get((shape, kind), 0.0)), norm


def _reference(row: dict, part: dict, rows: Iterable[dict]) -> tuple[dict, dict] | None:
    """The first arm that has numbers for the same case."""
    same = [(each, its) for each in rows if _setting(each) == _setting(row) for its in each.get("parts", ())]
    same = [(each, its) for each, its in same if its["routing"] == part["routing"]]
    return min(same, key=lambda pair: ARMS.index(pair[0]["arm"]), default=None)


def _setting(row: dict) -> tuple:
    return *(row[name] for name in ("kind", "gpus", "batch", "layers")), is_mixed(row["arm"])


def largest_difference(ours: list[float] | None, theirs: list[float] | None) -> float | None:
    """Relative, over the steps; infinite for one that is not a number or missing."""
    if not ours or not theirs:
        return None
    if len(ours) != len(theirs):
        return float("inf")
    found = [abs(a - b) / max(abs(b), 1e-30) for a, b in zip(ours, theirs, strict=True)]
    return max(each if each == each else float("inf") for each in found)


def wrong(rows: Rows) -> list[str]:
    """What disagrees or failed, as sentences; what does not fit the memory or was left out is neither."""
    found = []
    for key, row in rows.items():
        if row["status"] == "failed":
            found.append(f"{key}: {row['reason']}")
        for part in row.get("parts", ()):
            check = part.get("check", {})
            if check.get("agrees") is False:
                loss, norm = (f"{check[name]:.1e}" if check[name] is not None else "-" for name in ("loss", "norm"))
                found.append(f"{key}, {part['routing']}: losses differ by {loss}, norms by {norm} from {check['with']}")
    return found


# ---- tables, in Markdown


def tables(rows: Rows) -> Iterator[str]:
    """Lines of the report."""
    yield from _table(PARITY, [_parity(row, part) for row, part in _parts(rows, "parity")])
    for kind in ("full", "lora", "ragged"):
        yield from _table([kind, *TIMES], [_times(row, part, rows) for row, part in _parts(rows, kind)])
    yield from _table(LOAD, [_load(row, part) for row, part in _parts(rows, "load")])
    yield from _table(SCALING, list(_scaling(rows)))
    for key, row in rows.items():
        if row["status"] != "ok":
            yield f"{key}: {row['status']}: {row.get('reason', '')}"


PARITY = ["parity", "GPUs", "steps", "compared with", "largest difference of a loss", "of a gradient norm", "check"]
TIMES = ["GPUs", "sequences, layers", "router", "ms", "without optimizer", "tok/s/GPU", "without optimizer"]
TIMES += ["peak GiB", "x stock", "GiB / stock's", "steps", "largest loss difference", "check"]
LOAD = ["load", "GPUs", "GB", "load s", "host GiB a rank", "save s", "check"]
SCALING = ["scaling of full", "sequences, layers", "router", "GPUs", "tok/s/GPU", "of one GPU's"]


def _parts(rows: Rows, kind: str) -> list[tuple[dict, dict]]:
    return [(row, part) for row in rows.values() if row["kind"] == kind for part in row.get("parts", ())]


def _table(columns: list[str], cells: list[list[Any]]) -> Iterator[str]:
    if cells:
        yield from (f"| {' | '.join(columns)} |", "|" + "---|" * len(columns))
        yield from (f"| {' | '.join(map(_shown, row))} |" for row in cells)
        yield ""


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.01 else f"{value:.1e}"
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else value


def _verdict(part: dict) -> str:
    check = part["check"]
    if "agrees" not in check:
        return "reference" if check["reference"] else "nothing to compare with"
    return f"agrees with {check['with']}" if check["agrees"] else f"DISAGREES with {check['with']}"


def _counts(part: dict) -> bool:
    """Whether a time counts: not without a comparison, nor after one that failed."""
    return part["check"].get("agrees", part["check"].get("reference", False))


def _parity(row: dict, part: dict) -> list[Any]:
    check = part["check"]
    return [
        row["arm"],
        row["gpus"],
        len(part["losses"]),
        check.get("with"),
        check.get("loss"),
        check.get("norm"),
        _verdict(part),
    ]


def _times(row: dict, part: dict, rows: Rows) -> list[Any]:
    cells = [row["arm"], row["gpus"], f"{row['batch']}, {row['layers']}", part["routing"]]
    ratios = [None, None]
    if _counts(part):
        cells += [part[name] for name in ("ms", "ms_without_optimizer", "tok_s", "tok_s_without_optimizer", "peak_gib")]
        stock = [
            its
            for each, its in _parts(rows, row["kind"])
            if each["arm"] in ("stock", "stock_mixed") and _setting(each) == _setting(row)
            and its["routing"] == part["routing"] and all(each.get(name) == row.get(name) for name in ("gpu", "torch"))
        ]  # fmt: skip
        if stock:
            ratios[0] = stock[0]["ms"] / part["ms"]
            ratios[1] = part["peak_gib"] / stock[0]["peak_gib"] if stock[0]["peak_gib"] else None
    else:
        cells += [None] * 5
    return [*cells, *ratios, part["steps"], part["check"].get("loss"), _verdict(part)]


def _load(row: dict, part: dict) -> list[Any]:
    return [
        row["arm"],
        row["gpus"],
        part["bytes"] / 1e9,
        part["load_s"],
        part["host_gib"],
        part.get("save_s"),
        _verdict(part),
    ]


def _scaling(rows: Rows) -> Iterator[list[Any]]:
    """Each arm on more GPUs beside what it starts from on one; for ours that is ep_size 1."""
    parts = [(row, part) for row, part in _parts(rows, "full") if _counts(part)]
    for row, part in parts:
        start = {"stock": "stock", "ep1": "ep1", "alltoall": "ep1"}.get(row["arm"])
        alone = [
            its["tok_s"]
            for each, its in parts
            if (each["gpus"], each["arm"]) == (1, start) and its["routing"] == part["routing"]
            and (each["batch"], each["layers"]) == (row["batch"], row["layers"])
            and each.get("gpu") == row.get("gpu")
        ]  # fmt: skip
        if alone:
            setting = f"{row['batch']}, {row['layers']}"
            yield [row["arm"], setting, part["routing"], row["gpus"], part["tok_s"], part["tok_s"] / alone[0]]
