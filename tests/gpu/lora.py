"""One arm, one process, one GPU: a LoRA step of Qwen3-30B-A3B's layer shapes, all experts adapted, optimizer inside.

usage      python tests/gpu/lora.py native|moe_accel [--layers 48] [--batch 2] [--sequence 4096] [--steps 14]
           [--attention-only] [--kept 0]
prints     one JSON line: ms per step (median of all but the first four), tok/s, peak GiB, losses, and gradient norms of
           the first step by kind of parameter

r = 16 on q, k, v, o and on both projections of all experts, alpha 32, adapters in bf16 as the base, gradient
checkpointing of every layer but the last `--kept`. Same weights and tokens for every arm; both factors start as noise,
so that every gradient says something. `moe_accel` is `Accelerator(parallelism_config=MoEConfig()).prepare(...)`.
"""

import argparse
import gc
import json
import os
import sys

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from one_gpu import build, norms_by_kind
from peft import LoraConfig, get_peft_model
from qwen3 import VOCABULARY, profile_of, summary, timed_steps

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def with_adapters(model: torch.nn.Module, experts: bool) -> torch.nn.Module:
    targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    if experts:
        targets["target_parameters"] = EXPERTS
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, **targets), autocast_adapter_dtype=False)
    generator = torch.Generator(model.device).manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
            if "lora_B" in name:
                parameter.data.normal_(std=1e-3, generator=generator)
    return model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("arm", choices=["native", "moe_accel"])
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--attention-only", action="store_true")
    parser.add_argument("--kept", type=int, default=0, help="kept_layers of moe_config")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    model = with_adapters(build(args.layers), experts=not args.attention_only)
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    if args.arm == "moe_accel":
        from accelerate import Accelerator

        from moe_accel import MoEConfig

        model, optimizer = Accelerator(parallelism_config=MoEConfig(kept_layers=args.kept)).prepare(model, optimizer)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (args.batch, args.sequence), generator=generator).cuda()

    def forward_backward() -> torch.Tensor:
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.detach()

    def step() -> torch.Tensor:
        loss = forward_backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    gc.collect()
    gc.freeze()  # the model lives as long as the process: nothing to look for in it
    losses = [forward_backward()]
    norms = norms_by_kind(model)
    optimizer.zero_grad(set_to_none=True)
    more, times = timed_steps(step)
    losses += more
    print(json.dumps(summary(args, losses, norms, times)), flush=True)
    if args.profile:
        print(profile_of(forward_backward, num_rows=40, width=70), file=sys.stderr)


if __name__ == "__main__":
    main()
