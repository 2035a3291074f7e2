"""The parts of te_parts.py that have nothing to do with experts: optimizer, norm, attention, fp8."""

import torch
from torch import nn
from torch.nn import functional

from moe_accel.kernels import te_attention, te_fp8, te_norm
from moe_accel.kernels.rms_norm import rms_norm
from tests.gpu.te_measure import (
    BF16,
    DEVICE,
    MISSING,
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


def adam(_):
    from transformer_engine.pytorch.optimizers import FusedAdam

    total, number = (2**30, 64) if DEVICE.type == "cuda" else (2**12, 4)
    arms = {  # name: dtype of the parameters, optimizer, whether its parameters have master weights to read
        "torch AdamW, fp32": (torch.float32, lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0, fused=True)),
        "torch AdamW, bf16": (BF16, lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0, fused=True)),
        "TE fp32": (torch.float32, lambda p: FusedAdam(p, lr=1e-3)),
        "TE bf16, fp32 master and states": (BF16, lambda p: FusedAdam(p, lr=1e-3, master_weights=True)),
        "TE bf16, remainders, fp32 states": (BF16, reduced(FusedAdam, torch.float32, torch.float32)),
        "TE bf16, remainders, bf16 states": (BF16, reduced(FusedAdam, BF16, BF16)),
        "TE bf16, remainders, fp16 states": (BF16, reduced(FusedAdam, torch.float16, torch.float16)),
        "TE bf16, remainders, fp8 and bf16 states": (BF16, reduced(FusedAdam, torch.uint8, BF16)),
        "TE bf16, remainders, fp8 and fp16 states": (BF16, reduced(FusedAdam, torch.uint8, torch.float16)),
        "TE bf16, remainders, fp8 states": (BF16, reduced(FusedAdam, torch.uint8, torch.uint8)),
    }
    baseline = {}
    for label, (dtype, make) in arms.items():
        try:
            off = adam_error(dtype, make)
            free()
            before = allocated()
            parameters = [nn.Parameter(randn(total // number, std=0.02, dtype=dtype)) for _ in range(number)]
            for each in parameters:
                each.grad = torch.full_like(each, 1e-3)
            optimizer = make(parameters)
            optimizer.step()
            kept = (allocated() - before) / total
            if DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            optimizer.step()
            most = (allocated(peak=True) - before) / total
            took = ms(optimizer.step, rep=100)
            baseline[label] = took
            values = {"bytes_a_parameter": kept, "most_bytes_in_a_step": most, "update_error": off}
            record("adam", f"{total / 1e9:.2f} B", label, ours_ms=baseline["torch AdamW, fp32"], te_ms=took, **values)
        except Exception as failure:
            MISSING[f"adam, {label}"] = told(failure)
        parameters = optimizer = None
        free()


def reduced(kind, first, second):
    how = {"master_weights": True, "store_param_remainders": True, "exp_avg_dtype": first, "exp_avg_sq_dtype": second}
    return lambda parameters: kind(parameters, lr=1e-3, **how)


def adam_error(dtype, make, size=2**16, steps=20):
    """Of the weights' way from their start, against Adam in fp64 with the same gradients."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    start = torch.randn(size, device=DEVICE, generator=generator).mul_(0.02).to(dtype)
    parameter, exact = nn.Parameter(start.clone()), nn.Parameter(start.double())
    ours, truth = make([parameter]), torch.optim.AdamW([exact], lr=1e-3, weight_decay=0.0)
    spread = torch.randn(size, device=DEVICE, generator=generator).mul_(2).exp_()  # gradients of many sizes
    for _ in range(steps):
        gradient = (torch.randn(size, device=DEVICE, generator=generator) * spread * 1e-3).to(dtype)
        parameter.grad, exact.grad = gradient, gradient.double()
        ours.step()
        truth.step()
    found, rest = parameter.detach(), ours.state[parameter].get("master_param")
    if rest is not None and rest.dtype == torch.int16:  # the lower half of fp32, where bf16 was rounded to the nearest
        high = found.view(torch.int16).int() - (rest < 0).int()
        found = ((high << 16) | (rest.int() & 0xFFFF)).view(torch.float32)
    elif rest is not None:
        found = rest
    return error(found.double() - start.double(), exact.detach() - start.double())


def allocated(peak=False):
    if DEVICE.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def norm(name):
    import transformer_engine.pytorch as tep

    width = Sizes(name).H
    cases = {f"{width} wide": (TOKENS, width)}
    if name == "qwen3-30b-a3b":
        cases["128 wide, queries"] = (TOKENS * 32 // SCALE, 128)
    for label, shape in cases.items():
        x, gradient = randn(*shape).requires_grad_(), randn(*shape)
        module = tep.RMSNorm(shape[1], eps=1e-6, device=DEVICE, dtype=BF16)
        with torch.no_grad():
            module.weight.uniform_(0.5, 1.5)
        weight = module.weight

        def way(function, x=x, gradient=gradient, weight=weight):
            y = function(x)
            return y, *torch.autograd.grad(y, (x, weight), gradient)

        exact_x, exact_weight = (each.detach().double().requires_grad_() for each in (x, weight))
        exact = exact_x * (exact_x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * exact_weight
        exact = exact, *torch.autograd.grad(exact, (exact_x, exact_weight), gradient.double())
        arms = {
            "ours": lambda x=x, weight=weight, way=way: way(lambda x: rms_norm(x, weight, 1e-6)),
            "te_module": lambda module=module, way=way: way(module),
            "te": lambda x=x, weight=weight, way=way: way(lambda x: te_norm.rms_norm(x, weight, 1e-6)),
        }
        found = {}
        for arm, function in arms.items():
            pairs = zip(("", "_dx", "_dw"), function(), exact, strict=True)
            found |= {f"{arm}_error{of}": error(one, other) for of, one, other in pairs}
            found[f"{arm}_ms"] = ms(function)
        record("norm", name, label, **found)
        del exact, exact_x
        free()


def attention(name):
    sizes = Sizes(name)
    width, value_width, kv_heads = sizes.head_dim, sizes.head_dim, sizes.kv_heads
    if name == "deepseek-v3":
        width, value_width = 192, 128
    batch, length = (1 if name == "deepseek-v3" else 4, 4096) if DEVICE.type == "cuda" else (1, 16)

    def torch_sdpa(q, k, v):
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=sizes.heads != kv_heads)
        return y.transpose(1, 2).flatten(2)

    def by_te(q, k, v):
        return te_attention.attend_rows(*(each.transpose(1, 2) for each in (q, k, v)), width**-0.5).flatten(2)

    def inputs(batch, length):
        shapes = (sizes.heads, width), (kv_heads, width), (kv_heads, value_width)
        return [randn(batch, length, *shape).requires_grad_() for shape in shapes]

    def way(function, tensors, gradient):
        y = function(*tensors)
        return y, *torch.autograd.grad(y, tensors, gradient)

    small = inputs(1, min(length, 512))
    gradient = randn(1, small[0].shape[1], sizes.heads * value_width)
    exact = way(torch_sdpa, [each.detach().double().requires_grad_() for each in small], gradient.double())
    found = {}
    for arm, function in (("ours", torch_sdpa), ("te", by_te)):
        pairs = zip(way(function, small, gradient), exact, strict=True)
        found[f"{arm}_error"] = max(error(one, other) for one, other in pairs)
    del exact
    large = inputs(batch, length)
    gradient = randn(batch, length, sizes.heads * value_width)
    found["ours_ms"] = ms(lambda: way(torch_sdpa, large, gradient), rep=150)
    found["te_ms"] = ms(lambda: way(by_te, large, gradient), rep=150)
    from transformer_engine.pytorch.attention.dot_product_attention import _attention_backends as backends

    used = [key for key in ("use_flash_attention", "use_fused_attention", "use_unfused_attention") if backends.get(key)]
    what = f"{batch} x {length}, {sizes.heads}/{kv_heads} heads of {width}"
    record("attention", name, what, **found, te_backend=f"{used[0] if used else 'unknown'}")


def fp8(name):
    import transformer_engine.pytorch as tep
    from transformer_engine.common.recipe import DelayedScaling, Float8CurrentScaling

    sizes = Sizes(name)
    queries, keys = sizes.heads * sizes.head_dim // SCALE, sizes.kv_heads * sizes.head_dim // SCALE
    layers = {"q": (sizes.H, queries), "k": (sizes.H, keys), "o": (queries, sizes.H)}
    if name == "deepseek-v3":
        layers = {"q_a": (7168, 1536), "q_b": (1536, 24_576), "o": (16_384, 7168)}
        layers = {key: tuple(each // SCALE for each in value) for key, value in layers.items()}
    for layer, (inner, outer) in layers.items():
        x, gradient = randn(TOKENS, inner).requires_grad_(), randn(TOKENS, outer)
        module = tep.Linear(inner, outer, bias=False, params_dtype=BF16, device=DEVICE)
        weight = module.weight

        def bf16(x=x, gradient=gradient, weight=weight):
            y = functional.linear(x, weight)
            return y, *torch.autograd.grad(y, (x, weight), gradient)

        def in_ours(x=x, gradient=gradient, weight=weight):
            y = te_fp8.linear(x, weight, None)
            return y, *torch.autograd.grad(y, (x, weight), gradient)

        def in_fp8(recipe, x=x, gradient=gradient, weight=weight, module=module):
            with tep.autocast(enabled=True, recipe=recipe):
                y = module(x)
            return y, *torch.autograd.grad(y, (x, weight), gradient)

        exact = exact_linear(x, weight, gradient)
        ours = {"ours_ms": ms(bf16), "ours_error": max(error(a, b) for a, b in zip(bf16(), exact, strict=True))}
        off = max(error(a, b) for a, b in zip(in_ours(), exact, strict=True))
        record("fp8", name, f"{layer} {inner} -> {outer}, te_parts", te_ms=ms(in_ours), te_error=off, **ours)
        for recipe in (DelayedScaling(), Float8CurrentScaling()):
            label = f"{layer} {inner} -> {outer}, {type(recipe).__name__}"
            try:
                for _ in range(3):  # delayed scaling learns its scales
                    found = in_fp8(recipe)
                off = max(error(a, b) for a, b in zip(found, exact, strict=True))
                took = ms(lambda r=recipe, f=in_fp8: f(r))
                record("fp8", name, label, te_ms=took, te_error=off, **ours)
            except Exception as failure:
                MISSING[f"fp8, {name}, {label}"] = told(failure)
        del exact
        free()


def exact_linear(x, weight, gradient):
    """In fp32, without TF32: output, and gradients of x and of the weight."""
    x, weight, gradient = x.detach().float(), weight.detach().float(), gradient.float()
    return x @ weight.t(), gradient @ weight, gradient.t() @ x
