"""`moe-accel bench`: nothing is timed that was not compared first, and the numbers it divides by are right.

The suites run as a user runs them, one process an arm, on the tiny shape and the CPU.
"""

import json
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from moe_accel.bench import check, flops, routing, suites, table
from moe_accel.bench.options import ARMS, ROUTINGS, SUITES, Case, Options
from moe_accel.bench.run import per_layer, run
from moe_accel.bench.shapes import SHAPES
from moe_accel.errors import ConfigError

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
ROUTED = {"kernel": "random", "full": "zipf", "lora": "hot"}


def write_peer(folder, code):
    lines = code.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    file = folder / "peer.py"
    file.write_text("\n".join(line[indent:] for line in lines) + "\n")
    return str(file)


@pytest.fixture(scope="module", params=SUITES)
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
    assert json.loads(json.dumps(report)) == json.loads(json.dumps(report, default=str))
    names = {
        "schema",
        "command",
        "date",
        "versions",
        "options",
        "shapes",
        "about",
        "ceilings",
        "rows",
        "per_layer",
        "ok",
    }
    assert set(report) == names
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
    lines = {line.split()[4]: line for line in text.splitlines() if line.startswith("tiny   ")}
    assert lines.keys() == {"native", "moe_accel", "peer"}
    assert lines["native"].rstrip().endswith("reference")
    assert "agrees (" in lines["moe_accel"]
    assert lines["peer"].rstrip().endswith(("DISAGREES", "failed to run"))
    assert f"error: peer, tiny, {ROUTED[report['options']['suite']]}, " in text


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
        ({"peer_module": "there/is/none.py"}, "peer_module='there/is/none.py' is neither a file nor a module"),
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


# numbers of the shapes


@pytest.mark.parametrize(
    ("name", "parameters", "flops_a_token"),
    [
        ("qwen3-30b-a3b", 30.53e9, 23.08e9),
        ("mixtral-8x7b", 46.70e9, 79.7e9),
        ("gpt-oss-20b", 20.91e9, 22.9e9),
        ("nemotron-3-nano", 31.58e9, 20.2e9),
    ],
)
def test_a_shape_has_the_parameters_of_the_released_model(name, parameters, flops_a_token):
    """Parameters: of the model cards. Operations: counted by hand from the released configs, 4096 tokens a sequence."""
    shape = SHAPES[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config(shape.released_layers), dtype=torch.bfloat16)
    assert sum(each.numel() for each in model.parameters()) == pytest.approx(parameters, rel=1e-3)
    assert flops.step_flops(model, 1, 4096) == pytest.approx(flops_a_token, rel=2e-3)


def counted(model, tokens):
    """Operations that torch counts, but for the product that makes the angles of the rotary embedding."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens).loss.backward()
    angles = 2 * tokens.shape[1] * SHAPES["tiny"].values["head_dim"] // 2
    return counter.get_total_flops() - angles


def tiny_model(**more):
    how = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_config(SHAPES["tiny"].config(2, **how, **more)).train()
    suites.randomise(model)
    return model


def test_operations_of_a_full_step_are_those_that_torch_counts():
    model, tokens = tiny_model(), torch.arange(32).view(2, 16)
    assert flops.step_flops(model, 32, 16, causal=False) == counted(model, tokens)


def test_causal_attention_counts_half_and_a_window_counts_its_keys():
    model = tiny_model()
    weights = flops.step_flops(model, 1, 0.0001)
    full = flops.step_flops(model, 1, 64, causal=False) - weights
    assert flops.step_flops(model, 1, 64) - weights == pytest.approx(full / 2, rel=1e-3)
    for module in model.modules():
        if hasattr(module, "sliding_window"):
            module.sliding_window = 16
    assert flops.step_flops(model, 1, 64) - weights == pytest.approx(full * (16 - 16**2 / 128) / 64, rel=1e-3)


def test_operations_of_lora_are_those_that_torch_counts():
    """Adapters on attention only: PEFT's own experts compute whole weight gradients, which are no work of the model."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    model.enable_input_require_grads()  # or the first layer needs no gradient of its input
    suites.randomise(model)
    tokens = torch.arange(32).view(2, 16)
    assert flops.step_flops(model, 32, 16, causal=False) == counted(model, tokens)


def test_adapters_on_experts_count_for_the_experts_that_a_token_meets():
    model = tiny_model()
    frozen = flops.active_parameters(model)
    adapted = suites.adapt(model, 4)
    attention = 4 * (64 + 64) * 2 + 4 * (64 + 32) * 2  # q and o, k and v
    experts = 2 * (4 * (64 + 64) + 4 * (32 + 64))  # top-2 of both projections
    assert flops.active_parameters(adapted) - frozen == 2 * (attention + experts)


# routing


@pytest.mark.parametrize("kind", ROUTINGS[1:])
def test_a_fixed_choice_has_different_experts_for_each_token_and_the_load_it_promises(kind):
    num_tokens, num_experts, top_k = 4096, 128, 8
    index = routing.choices(kind, num_tokens, num_experts, top_k)
    assert torch.equal(index, routing.choices(kind, num_tokens, num_experts, top_k))
    assert (index.sort(1).values.diff(dim=1) > 0).all()
    load = index.flatten().bincount(minlength=num_experts)
    if kind == "balanced":
        assert load.unique().tolist() == [num_tokens * top_k // num_experts]
    if kind == "hot":
        assert load[routing.HOT] == num_tokens
    if kind == "zipf":
        assert load[0] == load.max()
        assert 0.08 < load[0] / load.sum() < 0.12


def test_the_choice_reaches_the_experts_inside_of_peft():
    adapted = suites.adapt(tiny_model(), 4)
    routing.install(adapted, "hot", 32, 2, 8)
    seen = []
    for module in adapted.modules():
        if type(module).__name__ == "Qwen3MoeExperts":
            module.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    adapted(input_ids=torch.arange(32).view(2, 16))
    assert len(seen) == 2
    assert all((index == routing.HOT).any(1).all() for index in seen)


# the comparison


def prints(**changes):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.{at}.up.weight": torch.randn(64, 96, generator=generator) for at in range(3)}
    tensors |= {name: tensor * changes.get("scale", 1) for name, tensor in tensors.items()}
    if "noise" in changes:
        noise = {name: torch.randn(each.shape, generator=generator) for name, each in tensors.items()}
        tensors = {name: tensor + changes["noise"] * noise[name] for name, tensor in tensors.items()}
    return check.fingerprint(changes.get("loss", 2.0), tensors)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scale": 1.02}, "gradient of layers.*.up.weight: norm off by 2.0e-02, 1.0e-02 allowed"),
        ({"scale": -1}, "gradient of layers.*.up.weight: elements off by 2.0e+00, 2.0e-02 allowed"),
        ({"noise": 0.05}, "gradient of layers.*.up.weight: elements off by 5.0e-02, 2.0e-02 allowed"),
        ({"loss": 2.01}, "loss 2.01 differs from 2 by 5.0e-03, 2.0e-03 allowed"),
        ({"loss": float("nan")}, "loss nan differs from 2 by nan, 2.0e-03 allowed"),
        ({"scale": float("nan")}, "gradient of layers.*.up.weight: norm off by nan, 1.0e-02 allowed"),
    ],
)
def test_a_difference_above_its_limit_is_said(changes, said):
    verdict = check.compare(prints(**changes), prints(), [prints(noise=0.001)], torch.bfloat16)
    assert said in verdict.problems


def test_a_limit_is_four_times_the_most_noise_of_the_reference_itself():
    noisy = [prints(noise=0.001), prints(noise=0.02)]
    assert check.compare(prints(noise=0.07), prints(), noisy, torch.bfloat16).problems == ()
    assert check.compare(prints(noise=0.09), prints(), noisy, torch.bfloat16).problems != ()


def test_elements_that_are_noise_are_named_and_their_norm_is_compared_still():
    noisy = [prints(noise=0.3)]
    verdict = check.compare(prints(noise=0.3), prints(), noisy, torch.bfloat16)
    assert (verdict.problems, verdict.says_nothing) == ((), ("layers.*.up.weight",))
    assert check.compare(prints(scale=2), prints(), noisy, torch.bfloat16).problems != ()


def test_kept_elements_come_from_every_column_of_every_expert():
    gradient = torch.arange(64 * 96 * 128).view(64, 96, 128).float()
    _, sample = check.fingerprint(None, {"x": gradient}).tensors["x"]
    assert 40_000 < len(sample) <= check.KEPT + 1
    assert len((sample % 128).unique()) == 128
    assert len((sample // (96 * 128)).unique()) == 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_noise_moves_a_quarter_of_all_elements_and_none_by_more_than_the_epsilon(dtype):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    moved = check.move(x, 1)
    assert 0.2 < (moved != x).double().mean() < 0.35
    assert ((moved.float() - x.float()).abs() <= x.float().abs() * torch.finfo(x.dtype).eps).all()


def test_ms_per_layer_is_the_difference_of_neighbouring_depths():
    case = {"suite": "full", "shape": "tiny", "routing": "random", "tokens": 256, "seq_len": 64, "arm": "native"}
    rows = [case | {"layers": layers, "median_ms": ms} for layers, ms in ((8, 60.0), (4, 40.0), (12, 88.0))]
    rows += [case | {"layers": 12, "arm": "moe_accel", "median_ms": 1.0}, case | {"layers": 16, "error": "too large"}]
    found = {tuple(each["layers"]): each["ms_per_layer"] for each in per_layer(rows)}
    assert found == {(4, 8): 5.0, (8, 12): 7.0}
