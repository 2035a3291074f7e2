"""The report in full: what was done to a model, as rank 0 prints it."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from moe_accel import experts
from moe_accel.report import Choice, Report, say, short
from moe_accel.told import told_of_wrapping
from moe_accel.version import VERSION
from tests.families import build_tiny

REPORT = Report(
    model="Qwen3MoeForCausalLM",
    mesh=Choice("experts efsdp 2 x ep 4", "all else dp_shard 8, 8 ranks"),
    num_swapped=48,
    experts_classes="Qwen3MoeExperts",
    num_experts="128",
    num_local_experts="32",
    dispatcher=Choice("alltoall", "auto: it needs nothing but torch.distributed"),
    kernels=Choice("fused", "auto: grouped GEMMs for bf16 on this GPU"),
    block=Choice("fused", "193 of 193 norms, rotary embeddings too, 48 of 48 routers"),
    loss=Choice("fused", "output layer and cross-entropy together"),
    padding=Choice("left out", "in training with labels"),
    num_expert_parameters=28_991_029_248,
    num_trainable=28_991_029_248,
)

PRINTED = f"""\
moe-accel {VERSION}: Qwen3MoeForCausalLM
  mesh        experts efsdp 2 x ep 4 (all else dp_shard 8, 8 ranks)
  experts     48 of 48 layers of Qwen3MoeExperts: 128 experts, 32 on each rank
  dispatcher  alltoall (auto: it needs nothing but torch.distributed)
  kernels     fused (auto: grouped GEMMs for bf16 on this GPU)
  block       fused (193 of 193 norms, rotary embeddings too, 48 of 48 routers)
  loss        fused (output layer and cross-entropy together)
  padding     left out (in training with labels)
  trainable   29 B of 29 B expert parameters
"""


def test_a_report_says_each_choice_with_its_reason_on_stderr(capsys):
    say(REPORT)
    assert capsys.readouterr() == ("", PRINTED)


def test_frozen_experts_and_notes_are_said(capsys):
    say(dataclasses.replace(REPORT, num_trainable=0, notes=("gloo on the CPU", "second note")))
    told = "  trainable   0 of 29 B expert parameters (all experts are frozen)\n"
    notes = "  note        gloo on the CPU\n  note        second note\n"
    assert capsys.readouterr().err == PRINTED[: PRINTED.index("  trainable")] + told + notes


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1_000, "1 K"),
        (12_345, "12.3 K"),
        (999_499, "999 K"),
        (999_500, "1 M"),
        (999_999, "1 M"),
        (384_000_000, "384 M"),
        (999_999_999, "1 B"),
        (28_991_029_248, "29 B"),
        (671_000_000_000, "671 B"),
        (1_027_000_000_000, "1.03 T"),
    ],
)
def test_a_count_has_three_digits_and_a_unit(number, text):
    assert short(number) == text


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, "gather all but the experts, 1.0 GB, at once"),
        ({"mixed_precision": "bf16"}, "gather all but the experts, 0.5 GB, at once"),
        ({"device": torch.device("cpu")}, None),
        ({"ep_size": 4}, None),
        ({"policy": None}, None),
        ({"offload": CPUOffloadPolicy()}, None),
        ({"hidden": 140_000}, None),
        ({"fsdp2": False, "policy": None, "checkpointing": True}, None),
        ({"policy": None, "checkpointing": True, "ep_size": 4}, "activation_checkpointing by transformers"),
        ({"policy": torch.nn.Module, "checkpointing": True}, "activation_checkpointing by transformers"),
        ({"checkpointing": True, "offloads_checkpoints": True}, None),
    ],
    ids=[
        "fp32",
        "bf16",
        "cpu",
        "experts-shared",
        "no-wrap",
        "offloaded",
        "much-to-gather",
        "no-fsdp2",
        "checkpointing",
        "own-policy",
        "checkpoints-offloaded",
    ],
)
def test_what_is_gathered_and_checkpointed_by_layers_is_told(changed, told):
    given = {"ep_size": 8, "policy": transformer_auto_wrap_policy, "offload": None, "offloads_checkpoints": False}
    given |= {"device": torch.device("cuda"), "fsdp2": True, "checkpointing": False, "mixed_precision": "no"}
    given |= {"hidden": 15_625} | changed
    with torch.device("meta"):
        mixture = build_tiny("qwen3_moe")
        mixture.dense = torch.nn.Linear(given["hidden"], 16_000, bias=False)  # of fp32
    accelerator: Any = SimpleNamespace(
        device=given["device"],
        is_fsdp2=given["fsdp2"],
        num_processes=8,
        mixed_precision=given["mixed_precision"],
        parallelism_config=SimpleNamespace(ep_size=given["ep_size"]),
        state=SimpleNamespace(
            fsdp_plugin=SimpleNamespace(
                auto_wrap_policy=given["policy"],
                cpu_offload=given["offload"],
                activation_checkpointing=given["checkpointing"],
                activation_checkpointing_offload=given["offloads_checkpoints"],
                transformer_cls_names_to_wrap=None,
            )
        ),
    )
    lines = told_of_wrapping(mixture, experts.find_experts(mixture), accelerator)
    assert len(lines) == (told is not None)
    assert all(told in line for line in lines)
