"""The other parts of a `transformer_engine` that runs anywhere: their own names, arguments and rules.

What is checked is what the real one would read wrongly in silence or stop at: it looks at no strides, multiplies FP8 by
what was quantised along that dimension, in sizes that 16 divides, and wants bounds as int32. Read in 2.20.2, as in
`fake_transformer_engine.py`: `csrc/extensions/normalization.cpp`, `tensor/float8_tensor.py`, `quantized_tensor.py`.
"""

import itertools
import types

import torch
from torch.nn import functional

NAMES = (
    ".attention",
    ".attention.dot_product_attention",
    ".constants",
    ".quantized_tensor",
    ".router",
    ".tensor",
    ".tensor.float8_tensor",
    ".triton",
    ".triton.permutation",
)
DTYPES = types.SimpleNamespace(kFloat8E4M3="e4m3", kFloat8E5M2="e5m2")
BACKENDS = {"use_unfused_attention": False}
"""What the last attention was computed by."""
FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def fill(modules, calls):
    """Put the functions into modules of these names, which count what was called."""
    extension, of_torch = modules["transformer_engine_torch"], "transformer_engine.pytorch"
    extension.DType = DTYPES
    modules[f"{of_torch}.constants"].TE_DType = {torch.bfloat16: "kBFloat16", torch.float16: "kFloat16"}

    def rmsnorm_fwd(x, weight, eps, out, quantizer, dtype, sm_margin, zero_centered_gamma):
        assert (out, quantizer, sm_margin) == (None, None, 0)
        assert x.ndim == 2
        assert x.is_contiguous()
        assert {"kBFloat16": torch.bfloat16, "kFloat16": torch.float16}[dtype] == x.dtype == weight.dtype
        calls["norm"] += 1
        inverse = (x.float().square().mean(-1) + eps).rsqrt()
        scale = weight.float() + (1 if zero_centered_gamma else 0)
        return (x.float() * inverse[:, None] * scale).to(x.dtype), None, inverse

    def rmsnorm_bwd(gradient, x, inverse, weight, sm_margin, zero_centered_gamma):
        assert gradient.shape == x.shape
        assert gradient.is_contiguous()
        calls["norm backward"] += 1
        n = x.float() * inverse[:, None]
        g = gradient.float() * (weight.float() + (1 if zero_centered_gamma else 0))
        x_grad = inverse[:, None] * (g - n * (g * n).mean(-1, keepdim=True))
        return x_grad.to(x.dtype), (gradient.float() * n).sum(0).to(weight.dtype)

    extension.rmsnorm_fwd, extension.rmsnorm_bwd = rmsnorm_fwd, rmsnorm_bwd

    class DotProductAttention:
        def __init__(self, heads, channels, num_gqa_groups, qkv_format, attn_mask_type, softmax_scale):
            assert (qkv_format, attn_mask_type) in (("bshd", "causal"), ("thd", "padding_causal"))
            assert len(channels) == 2
            self.sizes, self.form, self.scale = (heads, num_gqa_groups, *channels), qkv_format, softmax_scale

        def forward(
            self,
            query_layer,
            key_layer,
            value_layer,
            qkv_format=None,
            cu_seqlens_q=None,
            cu_seqlens_kv=None,
            max_seqlen_q=None,
            max_seqlen_kv=None,
            window_size=None,
        ):
            given = query_layer, key_layer, value_layer
            assert all(each.is_contiguous() for each in given)
            shapes = [each.shape[-2:] for each in given]
            heads, groups, width, value_width = self.sizes
            assert shapes == [(heads, width), (groups, width), (groups, value_width)]
            calls[self.form] += 1
            torch.rand(1)  # as cuDNN's does, dropout or not
            if self.form == "bshd":
                assert (cu_seqlens_q, window_size) == (None, None)
                return self.attend(*given, None).flatten(2)
            assert cu_seqlens_q is cu_seqlens_kv
            assert cu_seqlens_q.dtype == torch.int32
            bounds = cu_seqlens_q.tolist()
            assert (bounds[0], bounds[-1]) == (0, len(query_layer))
            longest = max(stop - start for start, stop in itertools.pairwise(bounds))
            assert max_seqlen_q == max_seqlen_kv == longest
            left, right = window_size
            assert right == 0
            spans = itertools.pairwise(bounds)
            done = [self.attend(*(each[None, a:b] for each in given), None if left < 0 else left) for a, b in spans]
            return torch.cat(done, 1)[0].flatten(1)

        __call__ = forward

        def attend(self, query, key, value, left):
            query, key, value = (each.transpose(1, 2) for each in (query, key, value))
            key, value = (each.repeat_interleave(self.sizes[0] // self.sizes[1], 1) for each in (key, value))
            at = torch.arange(query.shape[2])
            distance = at[:, None] - at
            seen = (distance >= 0) & (distance <= (len(at) if left is None else left))
            return functional.scaled_dot_product_attention(query, key, value, seen, scale=self.scale).transpose(1, 2)

    modules[of_torch].DotProductAttention = DotProductAttention
    modules[f"{of_torch}.attention.dot_product_attention"]._attention_backends = BACKENDS
    fill_fp8(modules, calls)
    fill_routing(modules, calls)


def fill_routing(modules, calls):
    """The same of routers and of permutation, by the names of their arguments."""
    of_torch = "transformer_engine.pytorch"

    def fused_topk_with_score_function(
        logits,
        topk,
        use_pre_softmax,
        num_groups,
        group_topk,
        scaling_factor,
        score_function,
        expert_bias,
        routing_map_format="bytemap",
        topk_indices=None,
        qb_histogram=None,
    ):
        assert logits.dtype == torch.float32, "weights are rounded to the dtype of the logits"
        assert logits.is_contiguous()
        assert topk_indices.shape == (len(logits), topk)
        assert score_function in ("softmax", "sigmoid")
        assert (num_groups is None) == (group_topk is None)
        calls[score_function] += 1
        scores = logits.sigmoid() if score_function == "sigmoid" else logits
        if use_pre_softmax:
            scores = logits.softmax(-1)
        wanted = scores.detach() if expert_bias is None else scores.detach() + expert_bias
        if num_groups is not None:
            of_group = wanted.view(len(wanted), num_groups, -1).topk(topk // group_topk).values.sum(-1)
            near = torch.zeros_like(of_group).scatter_(1, of_group.topk(group_topk).indices, 1).bool()
            wanted = wanted.masked_fill(~near.repeat_interleave(wanted.shape[1] // num_groups, 1), float("-inf"))
        topk_indices.copy_(wanted.topk(topk).indices.sort(-1).values)  # in an order of its own
        chosen = scores.gather(1, topk_indices)
        if score_function == "sigmoid":
            chosen = chosen / (chosen.sum(-1, keepdim=True) + 1e-20) if topk > 1 else chosen
        elif not use_pre_softmax:
            chosen = chosen.softmax(-1)
        chosen = chosen * (1.0 if scaling_factor is None else scaling_factor)
        return torch.zeros_like(logits).scatter(1, topk_indices, chosen), topk_indices

    def permute_with_mask_map(
        inp,
        row_id_map,
        probs,
        scale,
        pad_offsets,
        num_tokens,
        num_experts,
        num_out_tokens,
        hidden_size,
        scale_hidden_dim,
    ):
        assert (probs, scale, pad_offsets, scale_hidden_dim) == (None,) * 4
        assert num_out_tokens > 0
        assert inp.shape == (num_tokens, hidden_size)
        calls["permute"] += 1
        out = inp.new_full((num_out_tokens, hidden_size), float("nan"))
        for source, places in zip(inp, listed(row_id_map, num_tokens, num_experts), strict=True):
            out[places] = source
        return out, None, None

    def unpermute_with_mask_map(
        inp, row_id_map, merging_probs, permuted_probs, pad_offsets, num_tokens, num_experts, hidden_size
    ):
        assert (merging_probs, permuted_probs, pad_offsets) == (None,) * 3
        assert inp.shape[1] == hidden_size
        calls["unpermute"] += 1
        sums = [inp[places].float().sum(0) for places in listed(row_id_map, num_tokens, num_experts)]
        return torch.stack(sums).to(inp.dtype), None

    def listed(row_id_map, num_tokens, num_experts):
        assert row_id_map.dtype == torch.int32
        assert row_id_map.shape == (num_tokens, 2 * num_experts + 1)
        return [row[: row[2 * num_experts]] for row in row_id_map.tolist()]

    modules[f"{of_torch}.router"].fused_topk_with_score_function = fused_topk_with_score_function
    moves = modules[f"{of_torch}.triton.permutation"]
    moves.permute_with_mask_map, moves.unpermute_with_mask_map = permute_with_mask_map, unpermute_with_mask_map


class Storage:
    """A matrix in FP8: its scale's inverse, and values for products along rows, and along columns."""

    def __init__(self, values, by_rows, by_columns, scale_inverse):
        self.values = {"rows": values if by_rows else None, "columns": values if by_columns else None}
        self.scale_inverse = scale_inverse

    def update_usage(self, rowwise_usage=None):
        assert rowwise_usage is False
        self.values["rows"] = None

    def prepare_for_saving(self):
        saved = [*self.values.values(), self.scale_inverse]
        self.values, self.scale_inverse = dict.fromkeys(self.values), None
        return saved, self

    def restore_from_saved(self, tensors):
        rows, columns, self.scale_inverse, *rest = tensors
        self.values = {"rows": rows, "columns": columns}
        return rest

    def exact(self, along):
        assert self.values[along] is not None, f"nothing was quantised along {along}"
        return self.values[along].float() * self.scale_inverse


def fill_fp8(modules, calls):
    """The same of FP8."""
    of_torch = "transformer_engine.pytorch"

    class Float8CurrentScalingQuantizer:
        internal = False

        def __init__(self, fp8_dtype, device, *, rowwise=True, columnwise=True):
            self.how, self.by_rows, self.by_columns = FORMATS[fp8_dtype], rowwise, columnwise

        def __call__(self, values):
            assert self.internal
            assert values.ndim == 2
            assert values.is_contiguous()
            scale = torch.finfo(self.how).max / values.float().abs().amax().clamp_min(1e-12)
            calls["quantised"] += 1
            return Storage((values.float() * scale).to(self.how), self.by_rows, self.by_columns, scale.reciprocal())

    def general_gemm(A, B, out_dtype=None, layout="TN", bias=None, use_split_accumulator=False, grad=False):
        assert layout in ("TN", "NN", "NT")
        assert grad == use_split_accumulator == (layout != "TN")
        a = A.exact("rows" if layout[0] == "T" else "columns")
        b = B.exact("columns" if layout[1] == "T" else "rows")
        assert not any(size % 16 for size in (*a.shape, *b.shape))
        calls[f"fp8 {layout}"] += 1
        product = {"TN": lambda: b @ a.t(), "NN": lambda: b @ a, "NT": lambda: b.t() @ a}[layout]()
        return [(product if bias is None else product + bias).to(out_dtype), None, None, None]

    def prepare_for_saving(*tensors):
        pairs = [each.prepare_for_saving() for each in tensors]
        return [one for saved, _ in pairs for one in saved], [each for _, each in pairs]

    def restore_from_saved(tensors, saved):
        for each in tensors:
            saved = each.restore_from_saved(saved)
        return tensors

    modules[f"{of_torch}.tensor.float8_tensor"].Float8CurrentScalingQuantizer = Float8CurrentScalingQuantizer
    modules[f"{of_torch}.cpp_extensions"].general_gemm = general_gemm
    tensors = modules[f"{of_torch}.quantized_tensor"]
    tensors.prepare_for_saving, tensors.restore_from_saved = prepare_for_saving, restore_from_saved
