"""`moe-accel doctor`: what it finds is what training would find, faults set the exit status, JSON holds all of it."""

import json
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from typer.testing import CliRunner

from moe_accel import cli, doctor
from moe_accel.dispatch import deepep, topology
from moe_accel.kernels import te
from moe_accel.version import VERSION


@pytest.fixture(autouse=True)
def config_file(monkeypatch, tmp_path):
    """Accelerate's default config file, which is not there."""
    from accelerate.commands.config import config_args

    file = tmp_path / "default_config.yaml"
    monkeypatch.setattr(config_args, "default_config_file", str(file))
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    return file


def part(name):
    (found,) = [each for each in doctor.examine() if each.name == name]
    return found


def run(*arguments):
    done = CliRunner().invoke(cli.app, ["doctor", *arguments])
    return done.exit_code, done.stdout


def test_here_nothing_that_is_needed_is_missing_and_the_versions_are_the_installed_ones():
    code, printed = run("--json")
    record = json.loads(printed)
    assert (code, record["schema"], record["ok"], record["moe_accel"]) == (0, 1, True, VERSION)
    parts = {each["name"]: each for each in record["parts"]}
    for name in ("torch", "transformers", "accelerate", "peft"):
        assert (parts[name]["version"], parts[name]["usable"], parts[name]["fix"]) == (metadata.version(name), True, "")
    assert parts["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert set(parts) >= {"CUDA", "triton", "deep_ep", "transformer_engine", "liger_kernel", "autoload"}


def test_as_text_each_part_is_a_line_and_its_fix_the_next():
    code, printed = run()
    assert code == 0
    assert f"ok     torch               {metadata.version('torch')}  (>=2.11 is supported)\n" in printed
    assert "no     transformer_engine  (it needs a CUDA GPU, and this process computes on cpu)" in printed
    assert "fix: pip install torch, from pytorch.org\n" in printed
    assert "'transformer-engine[pytorch]" not in printed  # nothing to compute with it on


def test_with_a_gpu_transformer_engine_has_its_command(monkeypatch):
    monkeypatch.setattr(doctor, "_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(te, "capability", lambda device: (9, 0))
    assert part("transformer_engine").fix == "pip install --no-build-isolation 'transformer-engine[pytorch]>=2.17'"


def test_a_package_that_is_too_old_is_a_fault_with_its_command(monkeypatch):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.18.1" if name == "peft" else real(name))
    code, printed = run()
    assert code == 1
    assert "FAULT  peft                0.18.1  (>=0.21 is supported)\n" in printed
    assert "fix: pip install 'peft>=0.21'\n" in printed


def test_deep_ep_says_what_the_dispatcher_would_say(monkeypatch):
    found = part("deep_ep")
    assert (found.usable, found.needed, found.what, found.fix) == (
        False,
        False,
        deepep.problem(torch.device("cpu")),
        "",
    )


@pytest.mark.parametrize(
    ("version", "command"),
    {
        "2.11.0+cu130": "pip install --no-deps tokenspeed-deepep==1.2.1.post20251110",
        "2.13.0": "pip install sgl-deep-ep==0.1.0",
        "2.14.1": "pip install 'moe-accel[deepep]'  # brings torch 2.14.1",
    }.items(),
)
def test_the_deep_ep_to_install_depends_on_torch(version, command):
    assert doctor.deep_ep_for(version) == command


def test_what_connects_gpus_is_shown_by_kind(monkeypatch):
    class Gpu:
        uuid, total_memory, major, minor, name = "x", 80 * 2**30, 9, 0, "NVIDIA H100"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Gpu)
    monkeypatch.setattr(topology, "link", lambda one, other: "PCIe" if other.index == 2 else "NVLink")
    found = {(each.name, each.version): (each.usable, each.what) for each in doctor._gpus()}
    assert found["GPU 1", "NVIDIA H100"] == (True, "80 GiB, compute capability 9.0: grouped GEMMs in bf16")
    assert found["between GPUs", "NVLink"] == (True, "0-1")
    assert found["between GPUs", "PCIe"] == (False, "0-2, 1-2")


def test_the_hook_into_accelerate_launch_can_be_off_or_not_there(monkeypatch):
    assert (part("autoload").version, part("autoload").usable) == ("on", True)
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    assert (part("autoload").version, part("autoload").fix) == ("off", "moe-accel launch --config moe.yaml train.py")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    assert (part("autoload").version, part("autoload").fix) == ("", "pip install .")


CONFIG = "distributed_type: FSDP\nnum_processes: 4\nfsdp_config: {fsdp_version: 2}\nmoe_config: {ep_size: %s}\n"


def test_the_default_config_file_is_checked_as_a_launch_would_check_it(config_file):
    assert part("accelerate config").what == f"no default file {config_file}: --config names one"
    config_file.write_text("distributed_type: NO\n")
    assert part("accelerate config").what == "no moe_config section"
    config_file.write_text(CONFIG % 2)
    assert part("accelerate config").what.startswith('moe_config: {"ep_size": 2, "dispatcher": "auto"')
    config_file.write_text(CONFIG % 3)
    code, printed = run()
    assert code == 1
    assert "ep_size=3 must divide num_processes=4" in printed


def test_a_config_that_asks_for_deepep_where_it_cannot_be_is_a_fault(config_file):
    config_file.write_text(CONFIG % "2, dispatcher: deepep")
    found = part("accelerate config")
    assert (found.usable, found.needed) == (False, True)
    assert found.what.startswith("dispatcher=deepep needs the package deep_ep, which is not installed")
    assert found.fix == "dispatcher: auto, or pip install 'moe-accel[deepep]'"


def test_what_breaks_while_it_is_looked_at_does_not_stop_the_rest(monkeypatch):
    def breaks():
        raise OSError("libcudart.so.13")
        yield

    breaks.__name__ = "_deep_ep"
    monkeypatch.setattr(doctor, "_deep_ep", breaks)
    assert part("deep_ep").what == "cannot be looked at: OSError: libcudart.so.13"
    assert part("autoload").usable


def test_help_imports_no_torch():
    code = "import sys; from typer.testing import CliRunner; from moe_accel.cli import app; "
    code += "print(CliRunner().invoke(app, ['doctor', '--help']).exit_code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "0 False\n", done.stderr
