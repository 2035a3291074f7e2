"""The measurement on several GPUs, on the CPU: a case, what counts as agreement, and that it can be interrupted."""

import json
import math
import subprocess
import sys
from argparse import Namespace

import pytest

from tests.dist.ranks import ROOT, STOCK_FSDP2, run_alone, run_ranks
from tests.gpu import several
from tests.gpu.processes import Ended
from tests.gpu.several_cases import Case, judge, plan, tables, wrong

TINY = {"shape": "tiny", "sequence": 16, "warmup": 1, "steps": 2, "device": "cpu", "folder": "", "checkpoint": ""}


def trained(**case) -> list[dict]:
    """The parts of a case, on this rank."""
    from tests.gpu.several_rank import Job, train

    return list(train(Job(**case, **TINY)))


def before_fork(**_) -> None:
    import peft  # noqa: F401
    import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

    import tests.gpu.several_rank  # noqa: F401


@pytest.fixture(scope="module")
def parity() -> dict[str, dict]:
    """Rows of the parity case: one process with stock transformers, and two ranks with experts spread over them."""
    case = {"kind": "parity", "gpus": 2, "batch": 1, "layers": 1}
    found = {"one": run_alone(trained, arm="one", **case)}
    found["alltoall"] = run_ranks(trained, 2, STOCK_FSDP2, arm="alltoall", **case)[0]
    return {arm: case | {"arm": arm, "status": "ok", "parts": parts} for arm, parts in found.items()}


def test_experts_on_two_ranks_train_as_one_process_does(parity):
    judge(parity, several.TOLERANCES["cpu"])
    check = parity["alltoall"]["parts"][0]["check"]
    assert check["with"] == "one"
    assert check["agrees"], check
    assert len(parity["one"]["parts"][0]["norms"]) == 2 * TINY["steps"]  # of all, and of the experts
    assert "ep 2" in parity["alltoall"]["parts"][0]["said"]
    assert wrong(parity) == []


@pytest.mark.parametrize("what", ["losses", "norms"])
@pytest.mark.parametrize("change", [lambda each: each * 1.001, lambda _: math.nan], ids=["off", "nan"])
def test_a_loss_or_norm_that_is_off_disagrees(parity, what, change):
    rows = json.loads(json.dumps(parity))
    part = rows["alltoall"]["parts"][0]
    part[what][-1] = change(part[what][-1])
    judge(rows, several.TOLERANCES["cpu"])
    assert not part["check"]["agrees"]
    assert [line for line in tables(rows) if "DISAGREES with one" in line]
    assert len(wrong(rows)) == 1


def timed(losses, ms, peak_gib) -> dict:
    names = ("ms", "ms_without_optimizer", "tok_s", "tok_s_without_optimizer")
    part = {"routing": "random", "losses": losses, "norms": [1.0], "steps": 10, "peak_gib": peak_gib}
    return part | dict.fromkeys(names, ms)


def test_ratios_are_to_stock_and_a_wrong_arm_has_no_time():
    setting = {"kind": "full", "gpus": 2, "batch": 1, "layers": 12, "status": "ok", "gpu": "H100", "torch": "2"}
    rows = {
        "a": setting | {"arm": "stock", "parts": [timed([12.0, 11.0], 300.0, 40.0)]},
        "b": setting | {"arm": "alltoall", "parts": [timed([12.0, 11.001], 200.0, 30.0)]},
        "c": setting | {"arm": "ep1", "parts": [timed([12.0, 11.2], 77.0, 30.0)]},
        "d": setting | {"arm": "native_ep", "status": "out of memory", "reason": "CUDA"},
        "e": setting | {"arm": "buffer", "gpu": "H200", "parts": [timed([12.0, 11.001], 200.0, 30.0)]},
    }
    judge(rows, several.TOLERANCES["cuda"])
    lines = list(tables(rows))
    assert next(line for line in lines if line.startswith("| alltoall")).split(" | ")[9:11] == ["1.50", "0.75"]
    assert next(line for line in lines if line.startswith("| buffer")).split(" | ")[9:11] == ["-", "-"]
    assert "77" not in next(line for line in lines if line.startswith("| ep1"))
    assert "d: out of memory: CUDA" in lines
    assert [each.split(",")[0] for each in wrong(rows)] == ["c"]


@pytest.mark.parametrize(
    ("shape", "kind", "off", "agrees"),
    [
        ("gpt-oss-20b", "full", 1e-2, True),
        ("gpt-oss-20b", "full", 2e-2, False),
        ("gpt-oss-20b", "lora", 2e-3, False),
        ("qwen3-30b-a3b", "full", 2e-3, False),
    ],
)
def test_a_loss_may_be_further_off_only_where_rounding_is_known_to_do_it(shape, kind, off, agrees):
    setting = {"kind": kind, "gpus": 4, "batch": 1, "layers": 24, "status": "ok", "gpu": "H200", "torch": "2"}
    rows = {
        "a": setting | {"arm": "stock", "parts": [timed([12.0, 11.0], 300.0, 40.0)]},
        "b": setting | {"arm": "unwrapped", "parts": [timed([12.0, 11.0 * (1 + off)], 200.0, 30.0)]},
    }
    judge(rows, several.TOLERANCES["cuda"], shape)
    assert rows["b"]["parts"][0]["check"]["agrees"] is agrees


def test_the_plan_begins_with_parity_and_repeats_nothing():
    for gpus in (2, 4, 8):
        cases = plan(gpus, 6 * gpus, 4, 6 * gpus)
        assert [case.arm for case in cases[:4]] == ["one", "alltoall", "stock", "alltoall"]
        assert len({case.key for case in cases}) == len(cases)
        assert {case.gpus for case in cases if case.kind == "full"} == {1, 2, 4, 8} - set(range(gpus + 1, 9))


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """Each case is in the file before the next one starts; only those without a lasting result run again."""
    out, started = tmp_path / "out.json", []
    command = ["several", "--gpus", "2", "--device", "cpu", "--out", str(out), "--kinds", "parity"]
    outcomes = {
        "one": {"status": "ok", "parts": [{"routing": "random", "losses": [1.0], "norms": [1.0], "steps": 0}]},
        "alltoall": {"status": "out of memory", "reason": "full"},
        "stock": {"status": "failed", "reason": "broke"},
        "native_ep": {"status": "skipped", "reason": "too old"},
    }

    def ranks(case: Case, *_):
        started.append(case.arm)
        if case.arm == "ep1" and started.count("ep1") == 1:
            raise KeyboardInterrupt
        return outcomes.get(case.arm, outcomes["one"]) | {"seconds": 1.0}

    def call(*more: str) -> int | str | None:
        started.clear()
        monkeypatch.setattr(sys, "argv", [*command, *more])
        with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
            several.main()
        return getattr(ended.value, "code", "killed")

    monkeypatch.setattr(several, "NATIVE_EP_SINCE", (5, 0))
    monkeypatch.setattr(several, "ranks", ranks)
    assert call() == "killed"
    assert started == ["one", "alltoall", "stock", "native_ep", "ep1"]
    statuses = {row["arm"]: row["status"] for row in json.loads(out.read_text())["rows"].values()}
    assert statuses == {
        "one": "ok", "alltoall": "out of memory", "buffer": "skipped", "elastic": "skipped", "stock": "failed",
        "native_ep": "skipped",
    }  # fmt: skip
    monkeypatch.setattr(several, "ranks", lambda case, *_: started.append(case.arm) or outcomes["one"] | {"seconds": 1})
    assert call() == 1  # stock has failed
    assert started == ["native_ep", "ep1"]
    assert "failed: broke" in capsys.readouterr().out
    assert call("--retry") == 0
    assert started == ["stock"]
    assert call(
        "--steps", "5"
    ) == f"{out} is of {_settings(out)}, and this call of {_settings(out) | {'steps': 5}}: " + ("choose another --out")


PART = {"parts": [{"routing": "random"}]}
FULL = {"status": "out of memory", "reason": "OutOfMemoryError: CUDA"}


@pytest.mark.parametrize(
    ("ranks", "codes", "status"),
    [
        ([PART | {"status": "ok"}, {"status": "ok"}], [0, 0], "ok"),
        ([PART, FULL], [None, 1], "out of memory"),
        ([PART | {"status": "failed", "reason": "a peer is gone"}, FULL], [1, 1], "out of memory"),
        ([PART | {"status": "skipped", "reason": "-"}, {"status": "skipped", "reason": "-"}], [0, 0], "skipped"),
        ([PART, {}], [None, None], "out of time"),
        ([PART, {}], [None, -9], "failed"),
    ],
)
def test_what_the_ranks_leave_is_one_status_and_the_parts_before_it(tmp_path, monkeypatch, ranks, codes, status):
    def run(command, num_ranks, environment, folder, limit_s):
        for rank, each in enumerate(ranks):
            if each:
                (folder / f"{rank}.json").write_text(json.dumps(each))
        return Ended(codes, [f"rank {rank} printed this" for rank in range(num_ranks)], 1.0)

    monkeypatch.setattr(several, "run_ranks", run)
    given = Namespace(device="cpu", newer=None, shape="tiny", sequence=16, warmup=1, steps=2)
    row = several.ranks(Case("full", "alltoall", 2, 1, 1), given, tmp_path, 60)
    assert row["status"] == status
    assert row["parts"] == PART["parts"]
    if status in ("out of memory", "failed"):
        assert row["log"] == ["rank 1 printed this"]


def _settings(out) -> dict:
    return json.loads(out.read_text())["settings"]


@pytest.mark.slow
def test_the_command_runs_without_a_gpu(tmp_path):
    out = tmp_path / "out.json"
    command = ["-m", "tests.gpu.several", "--gpus", "2", "--device", "cpu", "--out", str(out)]
    command += ["--arms", "one", "stock", "alltoall", "--kinds", "parity", "lora", "load"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["kind"] for row in rows.values()} == {"parity", "lora", "load"}
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert "nothing failed, nothing disagrees" in done.stdout
