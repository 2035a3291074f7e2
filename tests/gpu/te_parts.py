"""Each part of TransformerEngine beside what moe-accel computes without it: time, and error against fp64 or fp32.

usage      PYTHONPATH=FOLDER_WITH_TE:$PWD python3 tests/gpu/te_parts.py [PART ...] [--seconds 190]
prints     a line for each measurement, a table of ratios (ours / TE: above 1 TE is faster), and why a part is missing;
           $OUT/te_parts.json

Parts, in this order, until the seconds are over:
    gemm        a layer's six grouped GEMMs by shape: torch's grouped_mm, TE with CUTLASS and with cuBLAS streams
    experts     four layers' experts, forward and backward, kernels fused and te: with the host's wait for group sizes
    adam        a step of 1 B parameters against torch's fused AdamW in fp32, bytes a parameter, and the error of the
                update after 20 steps
    router      scores, top-k and sorting; rows to experts and back
    norm        RMSNorm, forward and backward
    attention   4 x 4096 tokens, causal, forward and backward, against torch's sdpa
    fp8         linear layers of attention, forward and backward, against bf16: as in `te_parts`, and TE's own module
"""

import argparse
import json
import os
import statistics
import time
import traceback
from pathlib import Path

import torch

from moe_accel.experts.routing import pick, sort_by_expert
from moe_accel.kernels import te, te_parts
from moe_accel.kernels.grouped import TORCH
from moe_accel.kernels.router import Rule, route
from moe_accel.kernels.rows import gather_rows, sum_rows
from tests.gpu.te_measure import (
    BF16,
    DEVICE,
    MISSING,
    NAMES,
    ROWS,
    SCALE,
    TOKENS,
    Sizes,
    error,
    free,
    ms,
    randn,
    record,
    told,
)
from tests.gpu.te_parts_dense import adam, attention, fp8, norm


def gemm(name):
    sizes = Sizes(name)
    scores = -torch.empty(TOKENS, sizes.E, device=DEVICE).exponential_().log()
    cases = {"random": scores}
    if name == "qwen3-30b-a3b":
        cases["zipf"] = scores - torch.arange(1, sizes.E + 1, device=DEVICE).log()
    for routing, wanted in cases.items():
        sorted_by_expert = sort_by_expert(wanted.topk(sizes.K).indices, sizes.E)
        ends, on_host = sorted_by_expert.ends, sorted_by_expert.ends_on_host
        for projection, (inner, outer) in {"up": (sizes.H, sizes.U), "down": (sizes.I, sizes.H)}.items():
            rows, gradient = randn(TOKENS * sizes.K, inner), randn(TOKENS * sizes.K, outer)
            stack = randn(sizes.E, inner, outer, std=0.02)
            if not sizes.turned:
                stack = stack.transpose(1, 2).contiguous().transpose(1, 2)
            products = {
                "forward": ("multiply", rows, stack),
                "dX": ("multiply", gradient, stack.transpose(1, 2)),
                "dW": ("outer", rows, gradient) if stack.stride(-1) == 1 else ("outer", gradient, rows),
            }
            for product, (how, a, b) in products.items():
                ours = getattr(TORCH, how)
                theirs = getattr(te.GEMM, how)
                exact = exact_group(how, a, b, ends)
                at = group_slice(how, ends)
                found = {"ours_ms": ms(lambda f=ours, a=a, b=b, ends=ends: f(a, b, ends))}
                found["ours_error"] = error(ours(a, b, ends)[at], exact)
                for cutlass, label in (("1", "te"), ("0", "te_streams")):
                    os.environ[te.CUTLASS] = cutlass
                    found[f"{label}_error"] = error(theirs(a, b, on_host)[at], exact)
                    found[f"{label}_ms"] = ms(lambda f=theirs, a=a, b=b, ends=on_host: f(a, b, ends))
                os.environ[te.CUTLASS] = "1"
                tflop = 2 * TOKENS * sizes.K * inner * outer / 1e9
                found |= {f"{k}_tflop_s": round(tflop / found[f"{k}_ms"]) for k in ("ours", "te", "te_streams")}
                record("gemm", name, f"{projection} {product}, {routing}", **found)


def exact_group(how, a, b, ends):
    """In fp64, the product of the last group, at most its last 256 rows."""
    start, stop = last_group(ends)
    if how == "outer":
        return a[start:stop].double().t() @ b[start:stop].double()
    return a[max(start, stop - 256) : stop].double() @ b[-1].double()


def group_slice(how, ends):
    start, stop = last_group(ends)
    return -1 if how == "outer" else slice(max(start, stop - 256), stop)


def last_group(ends):
    return (ends[-2].item(), ends[-1].item())


def experts(name):
    """Four layers in a row on the same weights, so that a wait for the device at each of them has work to wait for."""
    from moe_accel import experts as product
    from tests.gpu.experts_speed import SHAPES as FAMILIES
    from tests.gpu.experts_speed import build

    found = next(each for key, each in FAMILIES.items() if key.startswith(name))
    sizes = {k: v // SCALE // 8 * 8 if k in "HI" else v for k, v in found[2].items()}
    product.register()
    module = build(found[0], found[1], sizes, DEVICE.type)
    x = randn(TOKENS, sizes["H"], std=0.1).requires_grad_()
    gradient, index = randn(TOKENS, sizes["H"]), torch.rand(TOKENS, sizes["E"], device=DEVICE).topk(sizes["K"]).indices
    weights = torch.rand(TOKENS, sizes["K"], device=DEVICE).softmax(-1).requires_grad_()
    inputs = [x, weights, *module.parameters()]

    def step(layers=4):
        y = x
        for _ in range(layers):
            y = y + module(y, index, weights.to(BF16))
        return [y, *torch.autograd.grad(y, inputs, gradient)]

    times, results = {}, {}
    for kernels in ("fused", "te"):
        product.install(module, product.Settings(kernels))
        results[kernels] = step(1)
        times[kernels] = ms(step, rep=150)
    off = max(error(a, b) for a, b in zip(results["te"], results["fused"], strict=True))
    record("experts", name, "4 layers", ours_ms=times["fused"], te_ms=times["te"], largest_difference=off)


def chosen(sizes, logits, bias):
    """Routing weights [N,K] and experts [N,K], as transformers' routers compute them."""
    if not sizes.sigmoid:
        values, index = logits.softmax(-1, dtype=torch.float32).topk(sizes.K)
        return values / values.sum(-1, keepdim=True), index
    scores = logits.sigmoid()
    wanted = scores.detach() + bias
    if sizes.groups is not None:
        num_groups, top_groups = sizes.groups
        best = wanted.view(len(wanted), num_groups, -1).topk(2).values.sum(-1).topk(top_groups).indices
        mask = torch.zeros(len(wanted), num_groups, device=DEVICE).scatter_(1, best, 1).bool()
        wanted = wanted.masked_fill(~mask.repeat_interleave(sizes.E // num_groups, 1), 0.0)
    index = wanted.topk(sizes.K).indices
    values = scores.gather(1, index)
    return values / (values.sum(-1, keepdim=True) + 1e-20) * 2.5, index


def router(name):
    from transformer_engine.pytorch import moe_permute, moe_permute_with_probs, moe_unpermute
    from transformer_engine.pytorch.router import fused_topk_with_score_function

    sizes = Sizes(name)
    pairs = TOKENS * sizes.K
    logits = randn(TOKENS, sizes.E, dtype=torch.float32).requires_grad_()
    x = randn(TOKENS, sizes.H).requires_grad_()
    bias = torch.rand(sizes.E, device=DEVICE) * 0.1
    out_grad, probs_grad = randn(TOKENS, sizes.H), randn(TOKENS, sizes.E, dtype=torch.float32)
    pair_grad = randn(pairs, dtype=torch.float32)
    num_groups, top_groups = sizes.groups or (None, None)
    kind = ("sigmoid", bias) if sizes.sigmoid else ("softmax", None)
    scale = 2.5 if sizes.sigmoid else None

    def score(**more):
        return fused_topk_with_score_function(logits, sizes.K, False, num_groups, top_groups, scale, *kind, **more)

    groups = {} if sizes.groups is None else {"num_groups": num_groups, "top_groups": top_groups}
    rule = Rule(sizes.K, sizes.sigmoid, True, scale or 1.0, 1e-20 if sizes.sigmoid else 0.0, **groups)

    def torch_router():
        weights, _ = chosen(sizes, logits, bias)
        return torch.autograd.grad(weights, logits, probs_grad[:, : sizes.K])

    def ours_router():
        weights, _ = route(logits, bias if sizes.sigmoid else None, rule, torch.float32)
        return torch.autograd.grad(weights, logits, probs_grad[:, : sizes.K])

    def te_dense():
        return torch.autograd.grad(score()[0], logits, probs_grad)

    def te_router():
        where = torch.empty(TOKENS, sizes.K, dtype=torch.int64, device=DEVICE)
        weights = score(topk_indices=where)[0].gather(1, where)
        return torch.autograd.grad(weights, logits, probs_grad[:, : sizes.K])

    weights, index = chosen(sizes, logits, bias)
    dense = torch.zeros_like(logits).scatter(1, index, weights)
    probs, mask = score()
    same = (dense.bool() == mask).all(1)
    off = error(probs[same], dense[same])
    gradients = [torch.autograd.grad(each, logits, probs_grad * same[:, None])[0] for each in (probs, dense)]
    values = {"te_error": off, "te_gradient_error": error(*gradients), "same_choice": same.float().mean().item()}
    values |= {"torch_ms": ms(torch_router), "te_dense_ms": ms(te_dense)}
    record(
        "router", name, "weights and experts [N,K], both ways", ours_ms=ms(ours_router), te_ms=ms(te_router), **values
    )

    probs = probs.detach().requires_grad_()
    whole_map, index = mask.to(torch.int32), mask.nonzero()[:, 1].view(TOKENS, sizes.K)
    weights = probs.detach().gather(1, index).requires_grad_()

    def ours_rows():
        routing = sort_by_expert(index, sizes.E)
        rows, weight_p = gather_rows(x, routing.rows), pick(weights, routing)
        return rows, weight_p, sum_rows(rows, routing.rows)

    def te_mask():
        rows, weight_p, where = moe_permute_with_probs(x, probs, whole_map, num_out_tokens=pairs)
        return rows, weight_p, moe_unpermute(rows, where, restore_shape=x.shape, map_type="mask")

    narrow, ones = index.to(torch.int32), torch.ones(TOKENS, sizes.K, device=DEVICE)

    def te_index():
        rows, where = moe_permute(x, narrow, num_out_tokens=pairs, max_token_num=TOKENS, map_type="index")
        return rows, None, moe_unpermute(rows, where, merging_probs=ones, map_type="index")

    def both_ways(function, of):
        rows, weight_p, out = function()
        grads = [out_grad] if weight_p is None else [out_grad, pair_grad]
        return rows, out, *torch.autograd.grad([out, weight_p][: len(grads)], [x, of][: len(grads)], grads)

    ours = both_ways(ours_rows, weights)
    for label, function in {"mask map": te_mask, "index map, no weights": te_index}.items():
        found = both_ways(function, probs)
        off = {"rows_equal": torch.equal(ours[0], found[0]), "out_error": error(found[1], ours[1])}
        off["x_gradient_error"] = error(found[2], ours[2])
        if len(found) == 4:
            off["weight_gradient_error"] = error(found[3].gather(1, index), ours[3])
        times = {"ours_ms": ms(lambda: both_ways(ours_rows, weights))}
        times["te_ms"] = ms(lambda f=function: both_ways(f, probs))
        record("router", name, f"sort, rows to experts and back, both ways: {label}", **times, **off)


# ---- all of them


PARTS = {
    "gemm": (gemm, NAMES),
    "experts": (experts, NAMES),
    "adam": (adam, [""]),
    "router": (router, NAMES),
    "norm": (norm, NAMES),
    "attention": (attention, NAMES),
    "fp8": (fp8, NAMES),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", help="all of them, if none is named")
    parser.add_argument("--seconds", type=float, default=190)
    args = parser.parse_args()
    begun = time.monotonic()
    gpu = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "none"
    problem = te_parts.problem(DEVICE, "experts")
    print(f"torch {torch.__version__}, transformer_engine {te.version()}, GPU {gpu}, kernels te: {problem or 'usable'}")
    for part in args.parts or PARTS:
        function, shapes = PARTS[part]
        for shape in shapes:
            label = f"{part}, {shape}".removesuffix(", ")
            if time.monotonic() - begun > args.seconds:
                MISSING[label] = f"not started: {args.seconds:.0f} seconds are over"
                continue
            torch.manual_seed(0)
            try:
                function(shape)
            except Exception as failure:
                MISSING[label] = told(failure)
                traceback.print_exc()
            free()
        print(f"{part} done after {time.monotonic() - begun:.0f} s", flush=True)
    show()
    head = {"torch": torch.__version__, "transformer_engine": te.version(), "gpu": gpu, "tokens": TOKENS}
    result = {**head, "seconds": round(time.monotonic() - begun), "rows": ROWS, "missing": MISSING}
    Path(os.environ.get("OUT", "."), "te_parts.json").write_text(json.dumps(result, indent=1) + "\n")


def show():
    print(f"\n{'part':<10} {'shape':<16} {'what':<62} {'ours ms':>9} {'TE ms':>9} {'ours/TE':>8}")
    for row in ROWS:
        times = (f"{row.get(key, float('nan')):9.3f}" for key in ("ours_ms", "te_ms"))
        print(f"{row['part']:<10} {row['shape']:<16} {row['what']:<62} {' '.join(times)} {row.get('ratio', '')!s:>8}")
    for part in PARTS:
        ratios = [row["ratio"] for row in ROWS if row["part"] == part and "ratio" in row]
        if ratios:
            print(f"{part:<10} median ratio {statistics.median(ratios):.2f} of {len(ratios)}")
    for label, why in MISSING.items():
        print(f"missing: {label}: {why}")


if __name__ == "__main__":
    main()
