"""`moe-accel convert`, `verify`, `inspect`: what is printed where, and the exit status."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from moe_accel import cli
from moe_accel.convert.headers import read_header
from moe_accel.convert.job import VERIFY_LEVELS
from moe_accel.convert.layout import TARGETS
from moe_accel.convert.regions import Tensor
from tests.unit.convert_job import write_file, write_source

COMMANDS = ["convert", "verify", "inspect"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    write_source(folder)
    return folder


def call(monkeypatch, *arguments: object) -> int:
    """Exit status of the command line in this process."""
    monkeypatch.setattr(sys, "argv", ["moe-accel", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_the_choices_are_those_of_the_converter():
    assert tuple(each.value for each in cli.Layout) == (*TARGETS, "peft")
    assert tuple(each.value for each in cli.ModelLayout) == TARGETS
    assert tuple(each.value for each in cli.Verify) == VERIFY_LEVELS


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_quick_imports_no_torch_and_shows_two_examples(command):
    code = (
        "import sys; from moe_accel.cli import main\n"
        "try: main()\n"
        "finally: print(sorted({'torch', 'numpy', 'transformers'} & sys.modules.keys()), file=sys.stderr)"
    )
    seconds = []
    for _ in range(3):  # the best of three, in user time: the machine may be busy, the code may not
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code, command, "--help"], capture_output=True, text=True)
        after = os.times()
        seconds.append(after.children_user - before.children_user)
        assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout.count(f"\n moe-accel {command} ") == 2, "two examples"
    assert min(seconds) < 0.5


def test_a_conversion_imports_no_torch(source, tmp_path):
    code = "import sys; from moe_accel.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, "convert", source, tmp_path / "out", "--to", "nemo"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert (done.returncode, done.stderr) == (0, "")


def test_convert_prints_its_result_on_stdout_and_nothing_on_stderr(source, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "convert", source, tmp_path / "out", "--to", "stacked") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "62 digests equal" in out
    assert "8 tensors pass through unchanged (--json lists them), 3 other files go along" in out
    assert "training_args.bin" in out


def test_json_has_a_schema_and_all_of_it(source, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "convert", source, tmp_path / "out", "--to", "stacked", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["schema"], record["command"], record["to"], record["digests"]) == (1, "convert", "stacked", 62)
    assert record["files"] == {"model.safetensors": (tmp_path / "out" / "model.safetensors").stat().st_size}
    assert record["written"] == ["model.safetensors"]
    assert len(record["passed_through"]) == 8
    assert call(monkeypatch, "inspect", tmp_path / "out", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    (experts,) = record["experts"]
    assert (experts["layers"], experts["experts"], experts["stored"]) == (6, 3, "stacked, gate and up in one")
    assert experts["roles"] == ["gate BF16 [20, 36]", "up BF16 [20, 36]", "down BF16 [36, 20]"]
    assert call(monkeypatch, "verify", source, tmp_path / "out", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["schema"] == 1
    assert (record["equal"], record["experts"], record["tensors"], record["differences"]) == (True, 54, 8, [])


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_dry_run_writes_nothing(source, tmp_path, monkeypatch, capsys, extra):
    assert call(monkeypatch, "convert", source, tmp_path / "out", "--to", "stacked", "--dry-run", *extra) == 0
    assert "stacked" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_verify_exits_with_1_and_the_first_differences(source, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "convert", source, tmp_path / "out", "--to", "stacked", "--json") == 0
    file = tmp_path / "out" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    capsys.readouterr()
    assert call(monkeypatch, "verify", source, tmp_path / "out") == 1
    out, err = capsys.readouterr()
    assert (out.splitlines()[0], err) == ("different in 1 places", "")
    assert out.splitlines()[1].endswith(": differs")


def test_a_failed_check_of_a_conversion_exits_with_1(source, tmp_path, monkeypatch, capsys):
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, bytes(len(data)) if at > 5000 else data, at))
    assert call(monkeypatch, "convert", source, tmp_path / "out", "--to", "nemo") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "is not what was read from" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "{tmp}/nowhere", "{tmp}/out", "--to", "stacked"], "error: {tmp}/nowhere is not a directory"),
        (["convert", "{source}", "{source}/in", "--to", "stacked"], "error: source and target lie inside one another"),
        (["convert", "{source}", "{tmp}/out", "--to", "stacked", "--max-shard-size", "5XB"], "error: max_shard_size"),
        (["convert", "{source}", "{tmp}/out", "--to", "stacked", "--family", "{tmp}/no.toml"], "error: "),
        (
            ["convert", "{source}", "{tmp}/out", "--to", "stacked", "--max-shard-size", "5"],
            "error: max_shard_size='5' would be 5 bytes\nhint: write the unit, as in 5GB",
        ),
        (["convert", "{source}", "{tmp}/out", "--to", "peft"], "error: --to peft is for adapters; {source} holds none"),
        (["convert", "{source}", "{source}/config.json/out", "--to", "stacked"], "error: source and target lie inside"),
        (
            ["convert", "{source}", "{tmp}/taken", "--to", "stacked"],
            "error: {tmp}/taken is a file, and must be a directory",
        ),
        (
            ["convert", "Some/Model-8B", "{tmp}/out", "--to", "stacked"],
            "error: Some/Model-8B is not a directory\nhint: a model of the hub is downloaded first",
        ),
        (["inspect", "{tmp}/gguf"], "error: {tmp}/gguf has no .safetensors files, only model.gguf\nhint: convert it"),
        (["verify", "{source}", "{tmp}/nowhere"], "error: {tmp}/nowhere is not a directory"),
        (["inspect", "{source}/config.json"], "error: {source}/config.json is not a directory"),
        (["inspect", "{tmp}"], "error: {tmp} has no .safetensors files"),
    ],
)
def test_bad_input_exits_with_2_and_one_line_and_no_traceback(
    source, tmp_path, monkeypatch, capsys, arguments, message
):
    names = {"tmp": tmp_path, "source": source}
    (tmp_path / "taken").write_text("")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "model.gguf").write_text("")
    assert call(monkeypatch, *(each.format(**names) for each in arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(message.format(**names))
    assert not (tmp_path / "out").exists()


def test_an_unknown_layout_exits_with_2(source, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "convert", source, tmp_path / "out", "--to", "ggml") == 2
    assert "per-expert" in capsys.readouterr().err


def test_progress_is_shown_on_a_terminal_only(source, tmp_path):
    command = [Path(sys.executable).parent / "moe-accel", "convert", source, tmp_path / "out", "--to", "stacked"]
    leader, follower = pty.openpty()
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=follower, timeout=60, env={**os.environ, "TERM": "xterm"}
    )
    os.close(follower)
    shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert done.returncode == 0
    assert "copy" in shown
    assert "check" in shown
    assert b"digests equal" in done.stdout


def test_a_model_without_experts_is_shown_and_compared_and_not_converted(tmp_path, monkeypatch, capsys):
    (tmp_path / "dense").mkdir()
    tensors = [Tensor("model.norm.weight", "BF16", (5,)), Tensor("empty", "F32", (0, 3))]
    write_file(tmp_path / "dense" / "model.safetensors", tensors)
    assert call(monkeypatch, "inspect", tmp_path / "dense") == 0
    assert "no experts in a layout that is known" in capsys.readouterr().out
    assert call(monkeypatch, "verify", tmp_path / "dense", tmp_path / "dense") == 0
    assert capsys.readouterr().out == "equal: 0 expert matrices, 2 other tensors, 10 B\n"
    assert call(monkeypatch, "convert", tmp_path / "dense", tmp_path / "out", "--to", "stacked") == 2
    assert capsys.readouterr().err.startswith("error: no experts found among 2 tensors")


def write_model(folder: Path, tensors: dict[str, tuple[int, ...]], config: dict, dtype: str = "BF16") -> Path:
    folder.mkdir()
    write_file(folder / "model.safetensors", [Tensor(name, dtype, shape) for name, shape in tensors.items()])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def mixtral(num: int) -> dict[str, tuple[int, ...]]:
    moe = "model.layers.0.block_sparse_moe"
    shapes = {"w1": (6, 8), "w3": (6, 8), "w2": (8, 6)}
    found = {f"{moe}.experts.{e}.{name}.weight": shape for e in range(num) for name, shape in shapes.items()}
    return found | {f"{moe}.gate.weight": (num, 8)}


def test_inspect_and_verify_count_experts_and_not_what_is_renamed_with_them(tmp_path, monkeypatch, capsys):
    folder = write_model(tmp_path / "mixtral", mixtral(5), {"model_type": "mixtral", "num_local_experts": 5})
    assert call(monkeypatch, "inspect", folder, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    (experts,) = record["experts"]
    assert (experts["experts"], experts["stored"], record["other_tensors"]) == (5, "per expert", 1)
    assert experts["roles"] == ["gate BF16 [6, 8]", "up BF16 [6, 8]", "down BF16 [8, 6]"]
    assert call(monkeypatch, "convert", folder, tmp_path / "out", "--to", "stacked") == 0
    manifest = json.loads((tmp_path / "out" / "moe_accel_manifest.json").read_text())
    assert sorted(manifest["experts"]["model.layers.0"]) == ["down", "gate", "gate.weight", "up"]
    capsys.readouterr()
    assert call(monkeypatch, "verify", folder, tmp_path / "out") == 0
    assert capsys.readouterr().out.startswith("equal: 15 expert matrices, 1 other tensors")
    file = tmp_path / "out" / "model.safetensors"
    header = read_header(file)
    data = bytearray(file.read_bytes())
    data[header.starts["model.layers.0.mlp.gate.weight"]] ^= 1
    file.write_bytes(data)
    assert call(monkeypatch, "verify", folder, tmp_path / "out") == 1
    assert capsys.readouterr().out == "different in 1 places\n  model.layers.0 gate.weight: differs\n"


def test_inspect_shows_experts_of_two_sizes_and_what_cannot_move(tmp_path, monkeypatch, capsys):
    sizes = {0: 6, 1: 6, 2: 4, 3: 4}
    shapes = {
        f"model.layers.0.mlp.experts.{e}.{role}_proj.weight": (8, i) if role == "down" else (i, 8)
        for e, i in sizes.items()
        for role in ("gate", "up", "down")
    }
    folder = write_model(tmp_path / "ernie", shapes, {"model_type": "ernie4_5_vl_moe"})
    assert call(monkeypatch, "inspect", folder, "--json") == 0
    (experts,) = json.loads(capsys.readouterr().out)["experts"]
    assert experts["roles"][:3] == ["gate BF16 [6, 8]", "gate BF16 [4, 8]", "up BF16 [6, 8]"]
    awq = {name.replace("weight", "qweight"): (8, 8) for name in shapes}
    folder = write_model(tmp_path / "awq", awq, {"model_type": "qwen3_moe"}, "I32")
    assert call(monkeypatch, "inspect", folder, "--json") == 0
    (experts,) = json.loads(capsys.readouterr().out)["experts"]
    assert (experts["experts"], experts["roles"][0]) == (4, "gate.qweight I32 [8, 8]")
    assert experts["stored"].startswith("per expert, cannot move: qweight: AWQ and GPTQ pack")


@pytest.mark.parametrize("said", [{"num_local_experts": 6}, {"text_config": {"moe_num_experts": [4, 2]}}])
def test_experts_missing_at_the_end_of_every_layer_are_missed(tmp_path, monkeypatch, capsys, said):
    folder = write_model(tmp_path / "mixtral", mixtral(4), {"model_type": "mixtral", **said})
    assert call(monkeypatch, "convert", folder, tmp_path / "out", "--to", "stacked") == 2
    assert "experts 4-5 of 6, as config.json says, missing in every layer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tables_in_a_file_keep_names_in_one_piece(tmp_path, monkeypatch, capsys):
    prefix = "thinker.model.language_model.a_rather_long_name_of_a_tower.layers"
    shapes = {f"{prefix}.0.mlp.experts.gate_up_proj": (3, 12, 8), f"{prefix}.0.mlp.experts.down_proj": (3, 8, 6)}
    folder = write_model(tmp_path / "long", shapes, {"model_type": "qwen3_moe"})
    for arguments in (["inspect", folder], ["convert", folder, tmp_path / "out", "--to", "per-expert", "--dry-run"]):
        assert call(monkeypatch, *arguments) == 0
        assert f"{prefix}.*" in capsys.readouterr().out


def test_a_name_that_the_terminal_cannot_print_stops_nothing(source, tmp_path):
    command = [sys.executable, "-m", "moe_accel", "convert", source, tmp_path / "außen", "--to", "stacked"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "au\\xdfen: 1 files" in done.stdout


def test_a_file_name_that_is_no_text_is_converted_like_any_other(tmp_path, monkeypatch, capsys):
    folder = write_model(tmp_path / "mixtral", mixtral(3), {"model_type": "mixtral"})
    try:
        os.rename(folder / "model.safetensors", os.fsencode(folder) + b"/m\xff.safetensors")
    except OSError:
        pytest.skip("this file system has names of text alone")
    assert call(monkeypatch, "convert", folder, tmp_path / "out", "--to", "stacked") == 0
    assert call(monkeypatch, "verify", folder, tmp_path / "out") == 0
    assert "equal: 9 expert matrices" in capsys.readouterr().out
