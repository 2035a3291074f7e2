"""Two checkouts measured in turns: what is compared, and that each computes with its own code."""

import json
import subprocess
import sys

import pytest

from tests.dist.ranks import ROOT
from tests.gpu import turns
from tests.gpu.turns import OTHER, THIS


def run_of(side, turn, all_ms, losses=(3.0, 2.0), norms=(1.0, 0.5), **more):
    part = {"routing": "random", "ms": all_ms[0], "all_ms": all_ms, "losses": list(losses), "norms": list(norms)}
    return {"side": side, "turn": turn, "status": "ok", "parts": [part]} | more


def test_medians_are_of_all_steps_and_the_ratio_is_to_the_other_code():
    runs = [run_of(OTHER, 1, [10.0, 12.0, 50.0]), run_of(THIS, 1, [8.0, 9.0]), run_of(OTHER, 2, [11.0])]
    _, _, other, this = turns.summary(runs)
    assert other == "| random | other | 11.5 | 12.0, 11.0 | 1.000 |"
    assert this == "| random | this | 8.5 | 8.5 | 0.739 |"


@pytest.mark.parametrize("change", [{"losses": (3.0, 2.1)}, {"norms": (1.0, float("nan"))}, {"losses": (3.0,)}])
def test_another_training_disagrees(change):
    name, tolerances = next(iter(change)), (1e-3, 3e-2)
    assert turns.wrong([run_of(OTHER, 1, [1.0]), run_of(THIS, 1, [1.0])], tolerances) == []
    (found,) = turns.wrong([run_of(OTHER, 1, [1.0]), run_of(THIS, 1, [1.0], **change)], tolerances)
    assert found.startswith(f"random: {name} differ by")


def test_a_run_that_failed_is_told():
    runs = [run_of(OTHER, 1, [1.0]), run_of(THIS, 1, [1.0], status="failed", reason="rank 1 ended")]
    assert turns.wrong(runs, (1.0, 1.0)) == ["this 1: rank 1 ended"]


def test_code_from_elsewhere_is_refused(tmp_path):
    (tmp_path / "moe_accel").mkdir()
    with pytest.raises(SystemExit, match="do not come from"):
        turns.check(tmp_path, turns.of_checkout(tmp_path))
    turns.check(ROOT, turns.of_checkout(ROOT))


@pytest.mark.slow
def test_the_command_runs_without_a_gpu(tmp_path):
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tmp_path / "other")], check=True)
    out = tmp_path / "turns.json"
    command = [sys.executable, "-m", "tests.gpu.turns", str(tmp_path / "other"), "--gpus", "2", "--device", "cpu"]
    done = subprocess.run([*command, "--turns", "1", "--out", str(out)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| balanced | this |" in done.stdout
    assert [run["side"] for run in json.loads(out.read_text())["runs"]] == [OTHER, THIS]
