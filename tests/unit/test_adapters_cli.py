"""`convert`, `inspect`, `verify` and `merge` of adapters: what is printed, the exit status, and damaged input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file

from moe_accel.adapters.config import CONFIG, WEIGHTS
from tests.unit.adapters_made import EXPERTS_TARGETS, add_adapter, build, factors, per_expert, write
from tests.unit.test_convert_cli import call

NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
EXPERTS = "base_model.model.model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A base model, an adapter of PEFT's, and its twin with one pair of matrices an expert."""
    folder = tmp_path_factory.mktemp("adapters")
    model = build("qwen3_moe")
    model.save_pretrained(folder / "base")
    add_adapter(model).save_pretrained(folder / "peft")
    command = [sys.executable, "-m", "moe_accel", "convert", folder / "peft", folder / "single", "--to", "per-expert"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def copied(source: Path, target: Path, **config) -> Path:
    """An adapter to damage, with `config` in its config."""
    target.mkdir()
    (target / WEIGHTS).write_bytes((source / WEIGHTS).read_bytes())
    (target / CONFIG).write_text(json.dumps(json.loads((source / CONFIG).read_text()) | config))
    return target


def test_help_of_merge_is_quick_imports_no_torch_and_shows_two_examples():
    code = (
        "import sys; from moe_accel.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'numpy', 'transformers'} & sys.modules.keys()), file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code, "merge", "--help"], capture_output=True, text=True)
        seconds.append(os.times().children_user - before.children_user)
        assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout.count("\n moe-accel merge ") == 2
    assert min(seconds) < 0.5


@pytest.mark.parametrize("command", ["convert", "merge"])
def test_neither_conversion_nor_merge_imports_torch(folder, tmp_path, command):
    code = "import sys; from moe_accel.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    arguments = {
        "convert": [folder / "peft", tmp_path / "out", "--to", "per-expert"],
        "merge": [folder / "peft", "--base", folder / "base", "--out", tmp_path / "out"],
    }[command]
    done = subprocess.run([sys.executable, "-c", code, command, *arguments], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert (done.returncode, done.stderr) == (0, "")


def test_convert_prints_what_it_found_and_what_it_took_for_granted(folder, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "convert", folder / "peft", tmp_path / "out", "--to", "per-expert") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "D2, stacked as PEFT >= 0.19.1 does" in out
    assert "note: qwen3_moe, says auto_mapping of adapter_config.json" in out
    assert "note: gate and up share A: written for both" in out
    assert "104 tensors" in out
    assert "read back and equal" in out


def test_json_has_a_schema_and_all_of_it(folder, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "convert", folder / "peft", tmp_path / "out", "--to", "per-expert", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["schema"], record["command"], record["to"], record["tensors"]) == (1, "convert", "per-expert", 104)
    assert (record["dialects"], record["model_type"], len(record["passed_through"])) == (["D2"], "qwen3_moe", 8)
    assert call(monkeypatch, "inspect", tmp_path / "out", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["schema"], record["dialects"], record["config"]["r"]) == (1, ["D1"], 6)
    assert [each["path"] for each in record["layers"]] == [f"model.layers.{n}.mlp.experts" for n in range(2)]
    assert record["layers"][0]["experts"] == 8
    arguments = (folder / "peft", "--base", folder / "base", "--out", tmp_path / "merged", "--json")
    assert call(monkeypatch, "merge", *arguments) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["schema"], record["command"], record["matrices"]) == (1, "merge", 52)
    assert set(record["roles"]) == {"experts gate", "experts up", "experts down", "q_proj", "o_proj"}
    assert record["total"]["gain"] == pytest.approx(1)


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_dry_run_writes_nothing(folder, tmp_path, monkeypatch, capsys, extra):
    assert (
        call(monkeypatch, "convert", folder / "peft", tmp_path / "out", "--to", "per-expert", "--dry-run", *extra) == 0
    )
    arguments = (folder / "peft", "--base", folder / "base", "--out", tmp_path / "out", "--dry-run")
    assert call(monkeypatch, "merge", *arguments, *extra) == 0
    assert "52" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_inspect_shows_an_adapter(folder, monkeypatch, capsys):
    assert call(monkeypatch, "inspect", folder / "single") == 0
    out = capsys.readouterr().out
    assert out.startswith("LoRA adapter, r=6, alpha=9, for qwen3_moe (auto_mapping of adapter_config.json)")
    assert "D1, one pair of matrices an expert" in out
    assert "outside of the experts: 8 tensors" in out


def test_verify_compares_factors_across_dialects(folder, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "verify", folder / "peft", folder / "single") == 0
    assert capsys.readouterr().out.startswith("equal: 96 factors of experts, 8 other tensors")
    tensors = load_file(folder / "single" / WEIGHTS)
    tensors[f"{EXPERTS}.3.up_proj.lora_B.weight"][0, 0] += 1
    other = copied(folder / "single", tmp_path / "other")
    save_file(tensors, other / WEIGHTS)
    assert call(monkeypatch, "verify", folder / "peft", other) == 1
    assert capsys.readouterr().out.splitlines()[1].endswith("layers.1.mlp.experts.3.up_proj.lora_B.weight: differs")
    copied(folder / "single", tmp_path / "scaled", lora_alpha=12)
    assert call(monkeypatch, "verify", folder / "peft", tmp_path / "scaled", "--json") == 1
    record = json.loads(capsys.readouterr().out)
    assert all("scaling 1.5 and 2" in each for each in record["differences"])
    assert len(record["differences"]) == 2 * 3 + 4


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_peft_reads_an_adapter_apart_as_we_convert_it(tmp_path):
    """PEFT joins gate and up of such an adapter itself, for this family: the same A and the same block-diagonal B."""
    roles, tensors = factors(8, 3, 32, 24), {}
    for layer in range(2):
        tensors |= dict(per_expert(roles, f"model.layers.{layer}.mlp.experts", NAMES))
    write(tmp_path / "single", tensors, target_modules=list(NAMES.values()))
    code = [sys.executable, "-m", "moe_accel", "convert", tmp_path / "single", tmp_path / "peft", "--to", "peft"]
    assert subprocess.run(code, capture_output=True).returncode == 0
    loaded = PeftModel.from_pretrained(build("qwen3_moe"), tmp_path / "single").state_dict()
    ours = load_file(tmp_path / "peft" / WEIGHTS)
    theirs = {name: each for name, each in loaded.items() if "lora_" in name}
    assert len(theirs) == len(ours) == 8
    for name, value in ours.items():
        assert torch.equal(theirs[name.replace(".weight", ".default.weight")], torch.from_numpy(value)), name


# what is refused


def shortened(folder: Path) -> None:
    file = folder / WEIGHTS
    file.write_bytes(file.read_bytes()[:-7])


def edited(change):
    def edit(folder: Path) -> None:
        tensors = dict(load_file(folder / WEIGHTS))
        change(tensors)
        save_file({name: np.ascontiguousarray(each) for name, each in tensors.items()}, folder / WEIGHTS)

    return edit


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def without(name: str):
    return edited(lambda tensors: tensors.pop(f"{EXPERTS}.{name}"))


def cut(name: str):
    def change(tensors):
        tensors[f"{EXPERTS}.{name}"] = tensors[f"{EXPERTS}.{name}"][:4]

    return edited(change)


def dropped(pattern: str):
    return edited(lambda tensors: [tensors.pop(name) for name in list(tensors) if pattern in name])


def added(name: str, shape=(2, 2)):
    return edited(lambda tensors: tensors.update({f"{EXPERTS}.{name}": np.ones(shape, np.float32)}))


SINGLE = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), "has no adapter_config.json"),
    "config is no JSON": (lambda folder: (folder / CONFIG).write_text("{"), "the adapter's config is not JSON"),
    "other method": (lambda folder: (folder / CONFIG).write_text('{"peft_type": "LOHA", "r": 2}'), "only LORA is"),
    "no rank": (lambda folder: (folder / CONFIG).write_text('{"r": 0}'), "r must be a positive number"),
    "truncated": (shortened, "is cut short: needs"),
    "pickle": (pickled, r"as pickle \(adapter_model.bin\), which can run code"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "expert missing": (dropped(".layers.1.mlp.experts.3."), r"experts 3 of 8 missing in model.layers.1.mlp.experts"),
    "last expert missing": (dropped(".layers.1.mlp.experts.7."), r"has 7 experts and .* 8: 7 missing"),
    "one projection missing": (
        dropped(".layers.1.mlp.experts.2.up_proj"),
        "up_proj of experts 2 of 8 missing in model.layers.1.mlp.experts",
    ),
    "half a pair": (without("3.up_proj.lora_B.weight"), r"lora_A.weight is there and its lora_B is not"),
    "rank of one": (cut("3.up_proj.lora_A.weight"), "shapes differ inside a group"),
    "DoRA": (added("3.up_proj.lora_magnitude_vector"), "no LoRA factor of experts that is known"),
    "two kinds": (added("lora_A.weight"), "has two kinds of factors"),
    "unknown projection": (added("3.router.lora_A.weight"), "lora_A.weight is there and its lora_B is not"),
}


@pytest.mark.parametrize("case", SINGLE)
def test_a_damaged_adapter_apart_is_refused_with_the_reason(folder, tmp_path, monkeypatch, capsys, case):
    damage, message = SINGLE[case]
    damage(copied(folder / "single", tmp_path / "in"))
    assert call(monkeypatch, "convert", tmp_path / "in", tmp_path / "out", "--to", "peft") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert re.search(message, err), err
    assert not (tmp_path / "out").exists()


STACKED = {
    "wrong rank": ({"r": 5}, None, r"48 rows are no multiple of r=5"),
    "half the rank": ({"r": 3}, None, r"experts"),
    "other rank": ({"rank_pattern": {"down_proj": 3}}, None, "would be 8 experts, .* 16"),
    "parameters not named": ({"target_parameters": []}, dropped("base_layer"), "names none of the experts"),
    "biases": (
        {"target_parameters": [*EXPERTS_TARGETS, "mlp.experts.gate_up_proj_bias"]},
        None,
        "LoRA of mlp.experts.gate_up_proj_bias cannot be converted",
    ),
    "unknown B layout": ({"lora_B_layout": "diagonal"}, None, "lora_B_layout is 'diagonal'"),
    "two scalings": ({"alpha_pattern": {"q_proj": 1}}, None, "one scaling for all modules.*; this one has 1.5"),
}


@pytest.mark.parametrize("case", STACKED)
def test_a_stacked_adapter_that_does_not_fit_its_config_is_refused(folder, tmp_path, monkeypatch, capsys, case):
    config, damage, message = STACKED[case]
    copied(folder / "peft", tmp_path / "in", **config)
    if damage:
        damage(tmp_path / "in")
    status = call(monkeypatch, "convert", tmp_path / "in", tmp_path / "out", "--to", "per-expert")
    out, err = capsys.readouterr()
    if case == "half the rank":  # 16 experts of rank 3: nothing in the file contradicts it, the base would
        assert status == 0
        assert call(monkeypatch, "merge", tmp_path / "in", "--base", folder / "base", "--out", tmp_path / "m") == 2
        assert "the base has experts 0-7" in capsys.readouterr().err
        return
    assert (status, out) == (2, "")
    assert re.search(message, err), err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["stacked", "hub"])
def test_adapters_have_two_forms_and_models_have_no_peft_form(folder, tmp_path, monkeypatch, capsys, to):
    assert call(monkeypatch, "convert", folder / "peft", tmp_path / "out", "--to", to) == 2
    assert "adapters take --to peft or per-expert" in capsys.readouterr().err
    assert call(monkeypatch, "convert", folder / "base", tmp_path / "out", "--to", "peft") == 2
    assert "--to peft is for adapters" in capsys.readouterr().err


def test_options_of_the_other_kind_are_refused(folder, tmp_path, monkeypatch, capsys):
    arguments = ("convert", folder / "base", tmp_path / "out", "--to", "stacked", "--lora-order", "swapped")
    assert call(monkeypatch, *arguments) == 2
    assert "--lora-order is for adapters" in capsys.readouterr().err
    arguments = ("convert", folder / "peft", tmp_path / "out", "--to", "peft", "--dequantize", "bf16")
    assert call(monkeypatch, *arguments) == 2
    assert "--dequantize is for models" in capsys.readouterr().err


def test_a_directory_that_is_not_empty_is_kept(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / WEIGHTS).write_bytes(b"mine")
    arguments = ("convert", folder / "peft", tmp_path / "out", "--to", "per-expert")
    assert call(monkeypatch, *arguments) == 2
    assert "is not empty" in capsys.readouterr().err
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == b"mine"
    assert call(monkeypatch, *arguments, "--overwrite") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {WEIGHTS, CONFIG, "README.md"}
