"""RMSNorm's kernels with different tiles, and how near the memory's bound they are: what `rms_norm.tiles` chooses from.

usage      python3 -m tests.gpu.norm_speed [--widths 2048,2880,4096,7168,128] [--rounds 20] [--inductor] --out FILE
prints     one JSON line for each tile and direction: ms by the GPU's clock (median of the rounds; nothing of the
           tensors in its L2 cache, the GPU kept busy beforehand so that starting the kernels is not in it), GB/s of
           what must be read and written, and bound_ms, what that takes at 3.0 TB/s. "before": the tile, the 1024
           programs and torch's sum and cast of dweight of the version before; "chosen": what `tiles` says. All take
           turns in every round. Then both directions through autograd (with the host's microseconds for each, and as
           triton's do_bench counts them: the host is in it where it is slower than the GPU), torch's own with
           --inductor, and for each width the fastest tiles.
stops      where a tile's values are further from fp64 than rounding takes them, or differ from run to run.

Without a GPU it runs small, to see that it runs: TRITON_INTERPRET=1.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe_accel.kernels.device import launch
from moe_accel.kernels.rms_norm import (
    Tile,
    _backward_kernel,
    _constants,
    normalise,
    normalise_backward,
    normalise_torch,
    padded,
    rms_norm,
    tiles,
)
from tests.gpu.timing import Way, device_ms, host_us

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32  # the interpreter computes bf16 wrongly
NUM_ROWS, HEADS = (16_384, 36) if ON_GPU else (12, 2)
BOUND_BYTES_S = 3.0e12  # what an H100 reaches of its 3.35e12
LARGEST_ERROR = 2.0**-8  # of all values together; rounding to bf16 alone is 0.0017
EPS = 1e-6


def forward_tiles(width: int) -> list[Tile]:
    """Candidates beside the chosen one."""
    columns = padded(width)
    if columns < 1024:
        rows = max(1, 1024 // columns)
        at_once = ((1, 16), (2, 12), (4, 10))  # programs that registers allow
        of_one = [Tile(rows * k, 4, programs, 1) for k, most in at_once for programs in (None, most)]
        return [*of_one, Tile(rows, 4, 12, 2)]
    warps = min(32, columns // 256)
    one_load = [Tile(1, warps, None, 1), Tile(1, warps, 64 // warps, 1), Tile(1, warps, 64 // warps, 2)]
    two_loads = [Tile(1, warps // 2, None, 1), Tile(1, warps // 2, 64 // warps, 2)]
    return one_load + two_loads + [Tile(2, warps, None, 1), Tile(2, warps, max(1, 32 // warps), 2)]


def backward_tiles(width: int) -> list[Tile]:
    """Candidates beside the chosen one."""
    columns = padded(width)
    if columns < 1024:
        rows = max(1, 1024 // columns)
        at_once = ((1, 9), (2, 7), (4, 4))  # programs that registers allow
        of_one = [Tile(rows * k, 4, programs * more, 1) for k, programs in at_once for more in (1, 2)]
        return [*of_one, Tile(rows, 4, 9, 2), Tile(rows, 4, 9, 3)]
    warps = min(32, columns // 256)
    programs = 32 // warps
    one_load = [Tile(1, warps, programs * more, stages) for more in (1, 2) for stages in (1, 2, 3)]
    two_loads = [Tile(1, warps // 2, programs, stages) for stages in (2, 3)]
    return one_load + two_loads + ([Tile(2, warps, max(1, programs // 2), 2)] if warps < 32 else [])


def before(width: int) -> Tile:
    return Tile(max(1, 4096 // padded(width)), 4, None, 1)


def backward_before(gradient: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """1024 programs, their sums added by torch."""
    num_rows, width = x.shape
    tile = before(width)
    num_programs = min(1024, -(-num_rows // tile.num_rows))
    x_grad, sums = torch.empty_like(x), x.new_empty(num_programs, width, dtype=torch.float32)
    tensors = gradient, x, weight, inverse, x_grad, sums
    constants = _constants(tile, width)
    launch(_backward_kernel, (num_programs,), *tensors, num_rows, OF_WEIGHT=True, offset=0.0, **constants)
    return x_grad, sums.sum(0).to(weight.dtype)


class Case:
    """Rows of one width, their fp64 results, and what is timed of them."""

    def __init__(self, width: int, rounds: int) -> None:
        self.width, self.rounds = width, rounds
        self.num_rows = NUM_ROWS * HEADS if width <= 128 else NUM_ROWS
        generator = torch.Generator(DEVICE).manual_seed(width)
        shape = self.num_rows, width
        self.x, self.gradient = (torch.randn(shape, device=DEVICE, generator=generator).to(DTYPE) for _ in range(2))
        self.weight = torch.rand(width, device=DEVICE, generator=generator).add(0.5).to(DTYPE)
        self.inverse = normalise_torch(self.x, self.weight, EPS, 0.0)[1]
        x, weight = (each.double().requires_grad_() for each in (self.x, self.weight))
        y = normalise_torch(x, weight, EPS, 0.0)[0]
        self.exact = y.detach(), *torch.autograd.grad(y, (x, weight), self.gradient.double())
        self.records: list[dict[str, Any]] = []

    def forward(self, tile: Tile | None) -> tuple[Tensor]:
        return (normalise(self.x, self.weight, EPS, 0.0, tile)[0],)

    def backward(self, tile: Tile | None) -> tuple[Tensor | None, ...]:
        return normalise_backward(self.gradient, self.x, self.weight, self.inverse, 0.0, tile=tile)

    def frozen(self, tile: Tile | None) -> tuple[Tensor | None, ...]:
        arguments = self.gradient, self.x, self.weight, self.inverse
        return normalise_backward(*arguments, 0.0, of_weight=False, tile=tile)[:1]

    def error(self, way: Way, exact: tuple[Tensor, ...]) -> float:
        """The largest, relative, of the tensors; raises where it is too large, or another run gives other bits."""
        found, again = way(), way()
        pairs = list(zip(found, exact, strict=True))
        error = max(float((one.detach().double() - other).norm() / other.norm()) for one, other in pairs)
        if not error <= LARGEST_ERROR or not all(map(torch.equal, found, again)):
            raise SystemExit(
                f"width {self.width}, {way}: error {error:.2e} of {LARGEST_ERROR:.2e}, or other bits again"
            )
        return error

    def compare(self, direction: str, ways: dict[str, tuple[Tile, Way]], num_tensors: int) -> None:
        """One record for each way of a direction, which reads and writes `num_tensors` as large as x."""
        exact = {"forward": self.exact[:1], "backward": self.exact[1:], "backward, weight frozen": self.exact[1:2]}
        errors = {name: self.error(way, exact[direction]) for name, (_, way) in ways.items()}
        took: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(self.rounds):
            for name, (_, way) in ways.items():
                flush()
                took[name].append(device_ms(way))
        num_bytes = num_tensors * self.x.numel() * self.x.element_size()
        for name, (tile, _) in ways.items():
            ms = statistics.median(took[name])
            values = {"ms": round(ms, 4), "gb_s": round(num_bytes / ms / 1e6), "error": float(f"{errors[name]:.3g}")}
            bound = {"bound_ms": round(num_bytes / BOUND_BYTES_S * 1e3, 4)}
            self.record({"direction": direction, "way": name, "tile": list(tile)} | values | bound)

    def record(self, values: dict[str, Any]) -> None:
        self.records.append({"width": self.width, "rows": self.num_rows} | values)
        print(json.dumps(self.records[-1]), flush=True)

    def directions(self) -> None:
        chosen = tiles(self.width)
        old = before(self.width)
        ways = {"before": (old, partial(self.forward, old))}
        ways |= named(chosen[0], forward_tiles(self.width), self.forward)
        self.compare("forward", ways, 2)
        arguments = self.gradient, self.x, self.weight, self.inverse
        ways = {"before": (old, partial(backward_before, *arguments))}
        ways |= named(chosen[1], backward_tiles(self.width), self.backward)
        self.compare("backward", ways, 3)
        self.compare("backward, weight frozen", {"chosen": (chosen[1], partial(self.frozen, None))}, 3)

    def both(self, inductor: bool) -> None:
        """Through autograd, forward and backward."""
        leaves = self.x.clone().requires_grad_(), self.weight.clone().requires_grad_()
        forms = {"ours": lambda x, weight: rms_norm(x, weight, EPS)}
        if inductor:
            usual = partial(functional.rms_norm, normalized_shape=(self.width,), eps=EPS)
            forms["torch, compiled"] = torch.compile(lambda x, weight: usual(x, weight=weight), dynamic=False)
        for name, form in forms.items():
            forward = partial(form, *leaves)

            def backward(forward=forward):
                return partial(torch.autograd.grad, forward(), leaves, self.gradient)

            def way(forward=forward):
                y = forward()
                return y, *torch.autograd.grad(y, leaves, self.gradient)

            error = self.error(way, self.exact)
            took: dict[str, list[float]] = {}
            for number in range(self.rounds + 3):
                flush()
                found = {"ms": device_ms(way), "forward_ms": timed(forward), "backward_ms": timed(backward())}
                found |= {"host_us": host_us(way), "forward_host_us": host_us(forward)}
                found |= {"backward_host_us": host_us(backward())}
                for key, value in found.items() if number >= 3 else ():
                    took.setdefault(key, []).append(value)
            values = {key: round(statistics.median(each), 4) for key, each in took.items()}
            values["error"] = float(f"{error:.3g}")
            if ON_GPU:
                from triton.testing import do_bench

                values["do_bench_ms"] = round(do_bench(way, warmup=10, rep=60, return_mode="median"), 4)
            bound = 5 * self.x.numel() * self.x.element_size() / BOUND_BYTES_S * 1e3
            self.record({"direction": "both", "way": name} | values | {"bound_ms": round(bound, 4)})

    def fastest(self) -> dict[str, Any]:
        """Of each direction: the tile, its ms, and how much longer the chosen and the former one take."""
        found: dict[str, Any] = {"width": self.width}
        for direction in ("forward", "backward"):
            records = [each for each in self.records if each["direction"] == direction]
            ms = {each["way"]: each["ms"] for each in records}
            best = min((each for each in records if each["way"] != "before"), key=lambda each: each["ms"])
            ratios = {f"{name}_takes": round(ms[name] / best["ms"], 3) for name in ("chosen", "before")}
            found[direction] = {"tile": str(Tile(*best["tile"])), "ms": best["ms"]} | ratios
        return found


def named(chosen: Tile, others: list[Tile], way: Any) -> dict[str, tuple[Tile, Way]]:
    """Ways by name, the chosen tile first; each tile once."""
    ways = {"chosen": (chosen, partial(way, chosen))}
    return ways | {str(tuple(tile)): (tile, partial(way, tile)) for tile in others if tile != chosen}


def timed(way: Way) -> float:
    flush()
    return device_ms(way)


_others: list[Tensor] = []


def flush() -> None:
    """Read other values, so that none of ours are in the L2 cache, and none there wait to be written."""
    if not _others:
        _others.append(torch.zeros(2**28 if ON_GPU else 1, dtype=torch.uint8, device=DEVICE))
    _others[0].max()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", default="2048,2880,4096,7168,128" if ON_GPU else "2048,40")
    parser.add_argument("--rounds", type=int, default=20 if ON_GPU else 1)
    parser.add_argument("--inductor", action="store_true", help="time torch's own, compiled, too")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not ON_GPU:
        from tests import interpreter

        interpreter.read_bounds_of_loops()
    name = torch.cuda.get_device_name() if ON_GPU else "no GPU"
    result: dict[str, Any] = {"gpu": name, "torch": torch.__version__, "dtype": str(DTYPE), "fastest": [], "rows": []}
    for width in map(int, arguments.widths.split(",")):
        case = Case(width, arguments.rounds)
        case.directions()
        case.both(arguments.inductor)
        result["rows"] += case.records
        result["fastest"].append(case.fastest())
        if arguments.out:  # after each width, for the case that time runs out
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        del case
    print(*map(json.dumps, result["fastest"]), sep="\n")


if __name__ == "__main__":
    main()
