"""Which form of the segmented row sum is fastest on this GPU: what `moe_accel/kernels/rows.py` chooses between.

usage      python tests/gpu/rows.py
prints     ms of each form, N = 16,384 rows, K = 8 copies, H = 2048, bf16 (0.60 GB moved: 0.2 ms at 3 TB/s)
"""

import torch
from triton.testing import do_bench

from moe_accel.kernels.cross_entropy import softmax_gradient_
from moe_accel.kernels.glu import glu, glu_backward
from moe_accel.kernels.rows import sum_triton


def main() -> None:
    num_rows, top_k, width = 16_384, 8, 2048
    y = torch.randn(num_rows * top_k, width, device="cuda", dtype=torch.bfloat16)
    copies = torch.randperm(num_rows * top_k, device="cuda")
    starts = torch.arange(0, num_rows * top_k, top_k, device="cuda")
    exact = y.double()[copies].view(num_rows, top_k, width).sum(1)
    forms = {
        "embedding_bag": lambda: torch.embedding_bag(y, copies, starts, mode=0)[0],
        "embedding_bag_forward_only": lambda: torch.ops.aten._embedding_bag_forward_only(y, copies, starts)[0],
        "embedding_bag_int32": lambda: torch.embedding_bag(y, copies.int(), starts.int(), mode=0)[0],
        "gather_sum": lambda: y[copies].view(num_rows, top_k, width).sum(1),
        "index_add": lambda: y.new_zeros(num_rows, width).index_add_(0, copies.argsort() // top_k, y),
        "index_select": lambda: y.index_select(0, copies),
        "segment_reduce": lambda: torch.segment_reduce(
            y[copies], "sum", offsets=torch.cat([starts, starts.new_tensor([num_rows * top_k])]), axis=0
        ),
    }
    forms["triton"] = lambda: sum_triton(y, copies, starts)
    for name, form in forms.items():
        try:
            result = form()
            error = (result.double() - exact).norm() / exact.norm() if result.shape == exact.shape else float("nan")
            print(f"{name:<28} {do_bench(form, return_mode='median'):7.3f} ms  error {float(error):.1e}", flush=True)
        except RuntimeError as problem:
            print(f"{name:<28} {str(problem).splitlines()[0]}", flush=True)
    u, gradient = (torch.randn(num_rows * top_k, w, device="cuda", dtype=torch.bfloat16) for w in (1536, 768))
    weight = torch.rand(num_rows * top_k, device="cuda")
    print(f"swiglu {do_bench(lambda: glu(u, weight), return_mode='median'):.3f} ms (0.60 GB)")
    took = do_bench(lambda: glu_backward(gradient, u, weight), return_mode="median")
    print(f"swiglu backward {took:.3f} ms (1.21 GB)")
    logits, labels = torch.randn(3533, 151_936, device="cuda").bfloat16(), torch.arange(3533, device="cuda")
    scale = torch.ones(1, device="cuda")
    took = do_bench(lambda: softmax_gradient_(logits, labels, scale), return_mode="median")
    print(f"softmax gradient {took:.3f} ms (2.1 GB, 3.2 if read twice)")


if __name__ == "__main__":
    main()
