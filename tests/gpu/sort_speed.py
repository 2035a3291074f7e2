"""Sorting pairs by expert: torch's operations beside the three kernels of `moe_accel/kernels/sort.py`.

usage      python -m tests.gpu.sort_speed [--rounds 50]
prints     one JSON line for each shape: ms between two CUDA events around one sort (median of the rounds, each
           of other choices, the GPU kept busy beforehand so that starting the kernels is not in it), and host
           microseconds per call while nothing is waited for. Torch and kernels take turns in every round.
"""

import argparse
import json
import statistics
from functools import partial

import torch

from moe_accel.kernels.sort import sort_torch, sort_triton
from tests.gpu.timing import device_ms, host_us

SHAPES = [(8192, 8, 128), (16_384, 8, 128), (16_384, 4, 32), (16_384, 2, 8), (16_384, 6, 128)]
WAYS = {"torch": sort_torch, "kernels": sort_triton}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=50)
    rounds = parser.parse_args().rounds
    generator = torch.Generator("cuda").manual_seed(0)
    for num_rows, top_k, num_experts in SHAPES:
        skew = torch.rand(num_experts, device="cuda", generator=generator) * 2
        found: dict[str, list[float]] = {}
        for number in range(rounds + 3):  # the first three compile and warm up
            scores = torch.randn(num_rows, num_experts, device="cuda", generator=generator) + skew
            choices = scores.topk(top_k).indices
            for name, way in WAYS.items():
                sort = partial(way, choices, num_experts)
                ms, us = device_ms(sort), host_us(sort)
                if number >= 3:
                    found.setdefault(f"{name}_ms", []).append(ms)
                    found.setdefault(f"{name}_host_us", []).append(us)
        medians = {name: round(statistics.median(values), 4) for name, values in found.items()}
        shape = {"rows": num_rows, "top_k": top_k, "experts": num_experts, "gpu": torch.cuda.get_device_name()}
        print(json.dumps(shape | medians), flush=True)


if __name__ == "__main__":
    main()
