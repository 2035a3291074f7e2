"""Adapters that PEFT made on tiny models, adapters made by hand, and what their factors mean.

Sizes: E experts, r rank, H hidden, I inner.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.numpy import save_file
from safetensors.torch import load_file

from tests.families import build_tiny

EXPERTS_TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LEAVES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}

Deltas = dict[tuple[str, str, int], torch.Tensor]  # layer's number, role, expert -> [out, in], fp64


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> Any:
    """A tiny model; llama4 too, whose experts are not decorated."""
    if family != "llama4":
        return build_tiny(family, dtype, seed, **config)
    torch.manual_seed(seed)
    config = transformers.Llama4TextConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=24,
        intermediate_size_mlp=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
        pad_token_id=None,
    )
    model = transformers.Llama4ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    return model.to(dtype)


def add_adapter(model: Any, seed: int = 1, scale: float = 0.1, **config: Any) -> Any:
    """The model with a LoRA adapter whose A and B are noise."""
    torch.manual_seed(seed)
    settings = {"r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "o_proj"], "target_parameters": EXPERTS_TARGETS}
    peft_model = get_peft_model(model, LoraConfig(**{**settings, **config}))
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, scale)
    return peft_model


def peft_deltas(peft_model: Any) -> Deltas:
    """What PEFT itself adds to each matrix of each expert."""
    found: Deltas = {}
    for path, module in peft_model.named_modules():
        if not isinstance(module, ParamWrapper):
            continue
        base, number = module.get_base_layer(), re.search(r"layers\.(\d+)\.", path)
        delta = module.get_delta_weight("default").detach().double()
        if getattr(base, "is_transposed", type(base).__name__ == "Llama4TextExperts"):
            delta = delta.transpose(1, 2)
        assert number is not None
        for expert, matrix in enumerate(delta):
            if module.parameter_name == "gate_up_proj":
                if getattr(base, "is_concatenated", True):
                    gate, up = matrix.chunk(2)
                else:
                    gate, up = matrix[::2], matrix[1::2]
                found |= {(number[1], "gate", expert): gate, (number[1], "up", expert): up}
            else:
                found[number[1], LEAVES[module.parameter_name], expert] = matrix
    return found


def file_deltas(folder: Path) -> Deltas:
    """s B A of a per-expert adapter, read in the plainest way there is: alpha / r for all, as serving engines do."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    found: Deltas = {}
    for name, a in tensors.items():
        match = re.fullmatch(
            r"base_model\.model\..*layers\.(\d+)\.(?:.+\.)?experts\.(\d+)\.(\w+)\.lora_A\.weight", name
        )
        if match:
            b = tensors[name.replace("lora_A", "lora_B")]
            scaling = config["lora_alpha"] / config["r"]
            found[match[1], LEAVES[match[3]], int(match[2])] = scaling * b.double() @ a.double()
    return found


def assert_same_deltas(found: Mapping, expected: Mapping, eps: float = torch.finfo(torch.float32).eps) -> None:
    """Equal but for the rounding of sums of at most 32 products in fp32."""
    assert found.keys() == expected.keys()
    for key, delta in expected.items():
        bound = 32 * eps * delta.abs().max().item()
        assert (found[key] - delta).abs().max().item() <= bound, key


# by hand


def factors(
    num_experts: int, rank: int, hidden: int, inner: int, seed: int = 0, gated: bool = True
) -> dict[str, tuple]:
    """A [E, r, in] and B [E, out, r] by role, fp32 noise."""
    rng = np.random.default_rng(seed)
    sizes = {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}
    if not gated:
        del sizes["gate"]
    return {
        role: (
            rng.standard_normal((num_experts, rank, ins), np.float32),
            rng.standard_normal((num_experts, outs, rank), np.float32),
        )
        for role, (ins, outs) in sizes.items()
    }


def write(folder: Path, tensors: Mapping[str, np.ndarray], **config: Any) -> Path:
    """An adapter directory."""
    folder.mkdir(parents=True)
    save_file(
        {name: np.ascontiguousarray(each) for name, each in tensors.items()}, folder / "adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": [], "auto_mapping": auto("qwen3_moe")}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return folder


def auto(model_type: str | None) -> dict[str, str] | None:
    """`auto_mapping` of a model."""
    return {"parent_library": f"transformers.models.{model_type}.modeling_{model_type}"} if model_type else None


def expected_deltas(roles: Mapping[str, tuple], scaling: float, layer: str = "0") -> Deltas:
    """s B A of factors by role."""
    return {
        (layer, role, expert): scaling * torch.from_numpy(b[expert]).double() @ torch.from_numpy(a[expert]).double()
        for role, (a, b) in roles.items()
        for expert in range(len(a))
    }


def fused(roles: Mapping[str, tuple]) -> tuple[np.ndarray, np.ndarray]:
    """Gate and up with gate's A for both."""
    return roles["gate"][0], np.concatenate([roles["gate"][1], roles["up"][1]], axis=1)


def stacked(a: np.ndarray, b: np.ndarray, swapped: bool = False, grouped: bool = False) -> dict[str, np.ndarray]:
    """`lora_A` and `lora_B` as D2 to D5 have them."""
    if swapped:
        a, b = b.transpose(0, 2, 1), a.transpose(0, 2, 1)
    flat = b.transpose(1, 0, 2) if grouped else b.transpose(1, 2, 0)
    return {"lora_A": a.reshape(-1, a.shape[2]), "lora_B": flat.reshape(b.shape[1], -1)}


def per_expert(roles: Mapping[str, tuple], path: str, names: Mapping[str, str]) -> Iterator[tuple[str, np.ndarray]]:
    """D1 tensors."""
    for role, (a, b) in roles.items():
        for expert in range(len(a)):
            for half, of in (("A", a), ("B", b)):
                yield f"base_model.model.{path}.{expert}.{names[role]}.lora_{half}.weight", of[expert]


def is_close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-12)
