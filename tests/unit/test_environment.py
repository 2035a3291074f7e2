"""MOE_ACCEL_CONFIG=path, under torchrun or plain python: what the file sets, and ranks without a device."""

import json
import logging
from types import SimpleNamespace

import pytest

from moe_accel import cpu
from moe_accel.environment import launch_environment
from moe_accel.errors import ConfigError
from tests.unit.fresh_python import python


def test_variables_of_a_config_file_are_those_of_accelerates_launcher(tmp_path, monkeypatch):
    file = tmp_path / "moe.yaml"
    file.write_text(
        "distributed_type: FSDP\nmixed_precision: bf16\nnum_machines: 2\nmachine_rank: 1\nnum_processes: 16\n"
        "main_process_ip: 10.0.0.1\nmain_process_port: 1234\n"
        "fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP, fsdp_offload_params: true,\n"
        "              fsdp_state_dict_type: SHARDED_STATE_DICT}\n"
        "parallelism_config: {parallelism_config_dp_replicate_size: 2}\n"
        "moe_config: {ep_size: 2}\n"
    )
    monkeypatch.setenv("WORLD_SIZE", "16")
    handlers = list(logging.root.handlers)
    exported = launch_environment(str(file))
    assert {
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
        "FSDP_VERSION": "2",
        "FSDP_OFFLOAD_PARAMS": "true",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    }.items() <= exported.items()
    assert not [name for name in exported if not name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_"))]
    assert logging.root.handlers == handlers, "logging.basicConfig is the script's to call"


def test_a_file_with_the_section_alone_exports_nothing(tmp_path):
    file = tmp_path / "moe.yaml"
    for text in ("ep_size: 2\n", "moe_config: {ep_size: 2}\n"):
        file.write_text(text)
        assert launch_environment(str(file)) == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("num_procs: 2\nfsdp_config: {fsdp_version: 2}", "unknown keys (['num_procs'])"),
        ("fsdp_config: {fsdp_version: 1}", "ep_size=2 needs FSDP version 2, not 1"),
    ],
)
def test_a_file_that_cannot_launch_is_named(tmp_path, text, told):
    file = tmp_path / "moe.yaml"
    file.write_text(f"distributed_type: FSDP\n{text}\nmoe_config: {{ep_size: 2}}\n")
    with pytest.raises(ConfigError) as caught:
        launch_environment(str(file))
    assert str(caught.value).startswith(f"{file}: ")
    assert told in str(caught.value)
    assert "/tmp/tmp" not in str(caught.value).replace(str(file), "")


def test_a_deepspeed_file_is_left_to_accelerates_own_launcher(tmp_path):
    file = tmp_path / "moe.yaml"
    file.write_text("distributed_type: DEEPSPEED\nmoe_config: {ep_size: 1}\n")
    with pytest.raises(ConfigError, match="DEEPSPEED needs accelerate's own launcher"):
        launch_environment(str(file))


def test_variables_the_user_set_win_over_the_file_and_trainer_reads_the_rest(tmp_path):
    file = tmp_path / "moe.yaml"
    file.write_text(
        "distributed_type: FSDP\nmixed_precision: bf16\nnum_processes: 1\nmoe_config: {ep_size: 1}\n"
        "fsdp_config: {fsdp_version: 2, fsdp_state_dict_type: SHARDED_STATE_DICT}\n"
    )
    done = python(
        f"""
        import os
        from transformers import TrainingArguments
        assert "FSDP_VERSION" not in os.environ
        args = TrainingArguments({str(tmp_path / "out")!r}, report_to=[], bf16=False)
        print(args.mixed_precision, os.environ["FSDP_STATE_DICT_TYPE"], os.environ["FSDP_VERSION"])
        print(os.environ["MOE_ACCEL_CONFIG"])
        """,
        MOE_ACCEL_CONFIG=str(file),
        FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
    )
    first, second = done.stdout.splitlines()
    assert first == "bf16 FULL_STATE_DICT 2", done.stderr
    assert json.loads(second)["ep_size"] == 1, "children get JSON, since they may have another working directory"


# ---- FSDP2 without a device


@pytest.mark.parametrize(
    ("variables", "cpu_asked", "expected"),
    [
        ({"LOCAL_RANK": "0", "ACCELERATE_USE_FSDP": "true"}, False, ("gloo", "MULTI_GPU")),
        ({"LOCAL_RANK": "0", "ACCELERATE_USE_FSDP": "true"}, True, "accelerate's own"),
        ({"LOCAL_RANK": "0", "ACCELERATE_USE_FSDP": "false"}, False, "accelerate's own"),
        ({"ACCELERATE_USE_FSDP": "true"}, False, "accelerate's own"),
    ],
    ids=["launched-fsdp", "cpu-asked", "no-fsdp", "not-launched"],
)
def test_only_a_launched_rank_that_asks_for_fsdp_goes_to_gloo(monkeypatch, variables, cpu_asked, expected):
    for name in ("LOCAL_RANK", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    prepare_backend = cpu._gloo_for_fsdp(lambda self, cpu, *args: "accelerate's own")
    got = prepare_backend(None, cpu_asked, False, None)
    assert (got if isinstance(got, str) else (got[0], got[1].name)) == expected


def test_the_device_of_such_a_rank_is_the_cpu_and_others_keep_theirs():
    import torch
    from accelerate.utils import DistributedType

    asked = []
    set_device = cpu._cpu_for_gloo(asked.append)
    ours = SimpleNamespace(device=None, distributed_type=DistributedType.MULTI_GPU)
    other = SimpleNamespace(device=None, distributed_type=DistributedType.MULTI_CPU)
    set_device(ours)
    set_device(other)
    assert ours.device == torch.device("cpu")
    assert other.device is None
    assert asked == [ours, other]


def test_a_machine_with_a_device_is_left_alone(monkeypatch):
    import torch
    from accelerate import PartialState

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    before = PartialState._prepare_backend, PartialState.set_device
    assert cpu.enable_fsdp_on_cpu() is False
    assert (PartialState._prepare_backend, PartialState.set_device) == before
