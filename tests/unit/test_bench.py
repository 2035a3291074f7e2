"""`moe-accel bench`: nothing is timed that was not compared first.

The suites run as a user runs them, one process an arm, on the tiny shape and the CPU; `test_bench_numbers.py` has
the parts.
"""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_accel.bench import arms, table
from moe_accel.bench.options import ARMS, ROUTINGS, SUITES, Case, Options
from moe_accel.bench.run import per_layer, run
from moe_accel.bench.shapes import SHAPES
from moe_accel.errors import ConfigError, DependencyError

PEERS = {
    "kernel": """
        def build(model, shape):
            for name, parameter in model.named_parameters():
                if name.endswith("down_proj"):
                    parameter.register_hook(lambda gradient: gradient * 1.01)
            return model
    """,
    "full": """
        def build(model, shape):
            raise RuntimeError("no kernel image is available")
    """,
    "lora": """
        def build(model, shape):
            for name, parameter in model.named_parameters():
                if "q_proj.lora_B" in name:
                    parameter.requires_grad_(False)
            return model
    """,
}
WRONG = {
    "kernel": "disagrees with transformers: gradient of model.layers.*.mlp.experts.down_proj: ",
    "full": "RuntimeError: no kernel image is available",
    "lora": "disagrees with transformers: gradients of base_model.model.model.layers.0.self_attn.q_proj.lora_B.",
}
SLOW = {"full"}
"""Suites whose three processes the default run does without: `lora` trains, too."""
ROUTED = {"kernel": "random", "full": "zipf", "lora": "hot"}


def write_peer(folder, code):
    lines = code.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    file = folder / "peer.py"
    file.write_text("\n".join(line[indent:] for line in lines) + "\n")
    return str(file)


@pytest.fixture(
    scope="module", params=[pytest.param(each, marks=pytest.mark.slow if each in SLOW else ()) for each in SUITES]
)
def report(request, tmp_path_factory):
    """Of one suite: native, moe_accel and a peer that is wrong."""
    suite = request.param
    peer = write_peer(tmp_path_factory.mktemp(suite), PEERS[suite])
    checkpointing = suite == "lora"
    options = Options(suite, ("tiny",), (ROUTED[suite],), peer_module=peer, device="cpu", checkpointing=checkpointing)
    return run(options, command="test")


def rows_by_arm(report):
    return {row["arm"]: row for row in report["rows"]}


def test_native_and_moe_accel_agree_and_are_timed(report):
    rows = rows_by_arm(report)
    assert rows["native"]["check"]["reference"]
    assert rows["moe_accel"]["check"]["problems"] == []
    assert rows["moe_accel"]["check"]["worst"][1] < 1e-5  # fp32
    assert "kernels     fused" in rows["moe_accel"]["report"]
    for row in (rows["native"], rows["moe_accel"]):
        assert len(row["times_ms"]) == 10
        low, high = row["quartiles_ms"]
        assert min(row["times_ms"]) <= low <= row["median_ms"] <= high <= max(row["times_ms"])
        assert row["tok_s"] == pytest.approx(256 / row["median_ms"] * 1e3, rel=1e-3)
        assert row["tflop_s"] == pytest.approx(row["model_tflop"] / row["median_ms"] * 1e3, rel=0.1, abs=1e-4)
        assert row["peak_gib"] is None


def test_losses_go_down_alike(report):
    rows = rows_by_arm(report)
    native, ours = rows["native"]["losses"], rows["moe_accel"]["losses"]
    assert ours == pytest.approx(native, rel=1e-5)
    assert native == sorted(native, reverse=True)
    assert len(native) == (0 if report["options"]["suite"] == "kernel" else 14)


def test_an_arm_that_is_wrong_or_crashes_is_a_row_without_a_time(report):
    peer = rows_by_arm(report)["peer"]
    assert peer["error"].startswith(WRONG[report["options"]["suite"]])
    assert "median_ms" not in peer
    assert not report["ok"]


def test_the_report_is_json_of_a_numbered_form_with_ceilings(report):
    assert json.loads(json.dumps(report, allow_nan=False)).keys() == report.keys()
    about = ["about", "command", "date", "options", "schema", "shapes", "versions"]
    assert sorted(report) == sorted([*about, "ceilings", "complete", "ok", "per_layer", "rows"])
    assert report["complete"]
    assert (report["schema"], report["command"]) == (1, "test")
    assert report["about"]["device"] == "cpu"
    assert report["about"]["dtype"] == "float32"
    assert report["versions"]["torch"] == torch.__version__
    (ceiling,) = report["ceilings"]
    for row in report["rows"][:2]:
        assert row["of_matmul"] == pytest.approx(row["tflop_s"] / ceiling["matmul_tflop_s"], abs=1e-3)


@pytest.mark.parametrize("plain", [False, True], ids=["rich", "plain"])
def test_the_table_has_a_line_for_each_arm_and_says_what_went_wrong(report, plain, capsys):
    table.render(report, plain)
    text = capsys.readouterr().out
    assert "On a CPU: times only say that the command works" in text
    assert f"\ntiny, {ROUTED[report['options']['suite']]}, " in text
    lines = {arm: next(line for line in text.splitlines() if line.startswith(f"{arm} ")) for arm in rows_by_arm(report)}
    assert lines.keys() == {"native", "moe_accel", "peer"}
    assert lines["native"].rstrip().endswith("reference")
    assert "agrees (" in lines["moe_accel"]
    assert lines["peer"].rstrip().endswith(("DISAGREES", "failed to run"))
    assert f"error: peer, tiny, {ROUTED[report['options']['suite']]}, " in text


def test_the_report_so_far_is_kept_after_every_row():
    kept = []
    options = Options("kernel", ("tiny",), ROUTINGS[:2], timeout_s=0.1)
    report = run(options, keep=lambda report: kept.append((len(report["rows"]), report["complete"])))
    assert kept == [(1, False), (2, False), (3, False), (4, False)]
    assert (report["complete"], report["ok"]) == (True, False)


def test_what_tells_cases_apart_is_a_column_and_what_does_not_stands_in_the_heading():
    row = {
        "shape": "tiny",
        "routing": "hot",
        "tokens": 256,
        "seq_len": 64,
        "arm": "native",
        "batch": 4,
        "error": "lost",
    }
    report = {
        "options": {"suite": "full"},
        "about": {"device": "NVIDIA H100", "dtype": "bfloat16"},
        "versions": dict.fromkeys(("torch", "triton", "transformers"), "1.0"),
        "date": "today",
        "ceilings": [{"shape": "tiny", "tokens": 256, "matmul_tflop_s": 655.04}],
        "rows": [row | {"layers": layers} for layers in (4, 8)],
    }
    first, second, third = table.heading(report)
    assert first == "full: NVIDIA H100, bfloat16, torch 1.0, triton 1.0, transformers 1.0, today"
    assert second == "tiny, hot, 256 tokens a step, 64 tokens a sequence"
    assert third == "ceilings, tiny, 256 tokens: large matmul 655.0, grouped_mm of the shape - TFLOP/s"
    columns, cells = table.rows_table(report)
    assert columns[:2] == ["layers", "arm"]
    assert [row[:3] for row in cells] == [["4", "native", "-"], ["8", "native", "-"]]


def test_a_peer_that_returns_another_model_has_its_parameters_trained(tmp_path):
    peer = arms.load_peer(write_peer(tmp_path, "import copy\ndef build(model, shape): return copy.deepcopy(model)"))
    model = AutoModelForCausalLM.from_config(SHAPES["tiny"].config(1))
    built, optimizer, _ = arms.apply("peer", model, None, SHAPES["tiny"], torch.device("cpu"), "auto", peer, True)
    assert built is not model
    assert {id(each) for each in optimizer.param_groups[0]["params"]} == {id(each) for each in built.parameters()}


def test_a_peer_without_build_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no function build\(model, shape\)"):
        arms.load_peer(write_peer(tmp_path, "made = 1"))


def test_liger_that_is_not_installed_is_an_error_with_the_remedy():
    if importlib.util.find_spec("liger_kernel"):
        pytest.skip("it is installed")
    with pytest.raises(DependencyError, match="pip install liger-kernel"):
        arms.before_build("liger", SHAPES["tiny"], None)


def test_the_command_prints_json_and_writes_it_and_exits_1_where_an_arm_is_late(tmp_path):
    out = tmp_path / "new" / "report.json"
    command = [sys.executable, "-m", "moe_accel", "bench", "--suite", "kernel", "--shape", "tiny", "--timeout", "0.2"]
    done = subprocess.run([*command, "--json", "--out", str(out)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report == json.loads(out.read_text())
    errors = [row["error"] for row in report["rows"]]
    assert errors == ["not ready after 0.2 s", "no reference to compare with: not ready after 0.2 s"]
    assert "kernel tiny random, 1 layers, 256 tokens: native\n  not ready after 0.2 s\n" in done.stderr


def test_the_command_exits_2_where_options_are_wrong():
    command = [sys.executable, "-m", "moe_accel", "bench", "--suite", "full", "--layers", "four"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: layers='four' must be whole numbers, separated by commas\nhint: --layers 4,8")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"suite": "ful"}, "suite='ful' must be one of kernel, full, lora (did you mean 'full'?)"),
        ({"arms": ("native", "moeaccel")}, "arms='moeaccel' must be one of native, compile, liger, moe_accel"),
        ({"shapes": ()}, "shape is empty; at least one of qwen3-30b-a3b, "),
        ({"routings": ("even",)}, "routing='even' must be one of random, balanced, zipf, hot"),
        ({"steps": 9}, "steps=9 must be at least 10, for a median"),
        ({"warmup": 0}, "warmup=0 must be at least 1: the first step compiles kernels"),
        ({"tokens": (8192,), "batch": 2}, "tokens=8192 and batch=2 both say how many tokens; give one of them"),
        ({"tokens": (10_000,)}, "tokens=10000 must be a multiple of seq_len=4096"),
        ({"suite": "full", "layers": (49,)}, "layers=49 is more than the 48 of qwen3-30b-a3b"),
        ({"layers": (2,)}, "layers and checkpointing are for the suites full and lora; kernel is one MoE block"),
        ({"suite": "full", "layers": (0,)}, "layers=0 must be above 0"),
        ({"peer_module": "there/is/none.py"}, "peer_module='there/is/none.py' is neither a .py file nor a module"),
        ({"kernels": "quick"}, "kernels='quick' must be one of auto, reference, fused, te"),
    ],
)
def test_a_broken_rule_is_said_with_its_numbers(values, said):
    with pytest.raises(ConfigError) as caught:
        Options(**values).check()
    assert said in caught.value.message


def test_every_broken_rule_is_said_at_once():
    with pytest.raises(ConfigError, match="3 problems"):
        Options(steps=1, warmup=0, device="tpu").check()


def test_cases_are_every_combination_native_first_and_the_peer_last():
    options = Options("full", ("qwen3-30b-a3b", "tiny"), ("zipf", "hot"), layers=(8, 4), tokens=(8192, 16_384))
    cases = list(options.cases())
    assert len(cases) == 16
    assert cases[0] == Case("full", "qwen3-30b-a3b", "zipf", 4, 8192, 4096)
    assert cases[0].batch == 2
    assert Options(arms=ARMS[::-1], peer_module="x").all_arms() == ("native", "moe_accel", "liger", "compile", "peer")


def test_ms_per_layer_is_the_difference_of_neighbouring_depths():
    case = {"suite": "full", "shape": "tiny", "routing": "random", "tokens": 256, "seq_len": 64, "arm": "native"}
    rows = [case | {"layers": layers, "median_ms": ms} for layers, ms in ((8, 60.0), (4, 40.0), (12, 88.0))]
    rows += [case | {"layers": 12, "arm": "moe_accel", "median_ms": 1.0}, case | {"layers": 16, "error": "too large"}]
    found = {tuple(each["layers"]): each["ms_per_layer"] for each in per_layer(rows)}
    assert found == {(4, 8): 5.0, (8, 12): 7.0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_before_anything_runs():
    command = [sys.executable, "-m", "moe_accel", "bench", "--suite", "kernel", "--shape", "tiny", "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: device=cuda, but this torch sees no CUDA GPU\nhint: moe-accel doctor")
