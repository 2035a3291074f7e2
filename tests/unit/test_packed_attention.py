"""Attention of packed sequences: the kernel's arguments, the masks that are known, and where transformers meets it."""

import inspect
from itertools import pairwise

import pytest
import torch
from torch.nn.attention import SDPBackend
from transformers import masking_utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from moe_accel.errors import UnsupportedModelError
from moe_accel.kernels import sinks
from moe_accel.padding import attention
from moe_accel.padding.attention import Packed, attend, by_sequence, fits_kernel, sdpa_choice, window_of
from moe_accel.padding.rows import Rows, of_batch

LENGTHS = (5, 1, 0, 12, 7)
NUM_TOKENS = sum(LENGTHS)


def rows() -> Rows:
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return Rows(1, NUM_TOKENS, LENGTHS, bounds, None)


def operands(q_heads=4, kv_heads=4, width=16, v_width=16):
    generator = torch.Generator().manual_seed(0)
    shapes = (q_heads, width), (kv_heads, width), (kv_heads, v_width)
    return [
        torch.randn(1, heads, NUM_TOKENS, size, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads, size in shapes
    ]


def scores_of(query, key, value, allowed, scale, sinks=None):
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(*scores.shape[:-1], 1)), -1)
    return scores.softmax(-1)[..., : key.shape[-2]] @ value


def dense(query, key, value, window, scale, sinks=None):
    """Attention under a whole mask [N,N]."""
    of = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    at = torch.arange(NUM_TOKENS)
    distance = at[:, None] - at
    allowed = (of[:, None] == of) & (distance >= 0) & (distance < (window or NUM_TOKENS))
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return scores_of(query, key, value, allowed, scale, sinks).transpose(1, 2)


def kernel_of(knows_groups):
    """A stand-in for torch's varlen_attn, of 2.11 or later: its signature, its demands, its window."""

    def varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), **options):
        assert cu_seq_q.dtype == torch.int32
        assert max_q == max_k == max(LENGTHS)
        assert query.shape[-1] == value.shape[-1]
        assert query.shape[1] == key.shape[1] or options == {"enable_gqa": True}
        left, right = window_size
        assert right == 0
        key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
        done = []
        bounds = cu_seq_q.tolist()
        for start, end in pairwise(bounds):
            at = torch.arange(end - start)
            distance = at[:, None] - at
            allowed = (distance >= 0) & ((distance <= left) if left >= 0 else True)
            parts = (each[start:end].transpose(0, 1) for each in (query, key, value))
            done.append(scores_of(*parts, allowed, scale).transpose(0, 1))
        return torch.cat(done)

    def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size):
        return varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)

    def later(q, k, v, a, b, c, d, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False):
        return varlen(q, k, v, a, b, c, d, scale=scale, window_size=window_size, enable_gqa=enable_gqa)

    return later if knows_groups else of_2_11


SHAPES = {"plain": (4, 4, 16, 16), "groups": (4, 2, 16, 16), "narrow-values": (4, 4, 24, 16), "both": (6, 2, 24, 8)}


def assert_same(found, expected, tensors):
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected)
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for one, other in zip(*(torch.autograd.grad(each, tensors, probe) for each in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("window", [None, 1, 3, 12, 99])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("how", ["loop", "kernel-2.11", "kernel"])
def test_values_and_gradients_are_those_under_a_mask(how, shape, window, monkeypatch):
    if how != "loop":
        attention._knows_groups.cache_clear()
        monkeypatch.setattr(attention, "varlen_attn", kernel_of(how == "kernel"))
        monkeypatch.setattr(attention, "fits_kernel", lambda *_: True)
    for scale in (None, 0.3):
        tensors = operands(*shape)
        assert_same(attend(*tensors, Packed(rows(), window), scale), dense(*tensors, window, scale), tensors)
    attention._knows_groups.cache_clear()


def flash(query, key, value, bounds, _, longest, __, dropout, causal, debug, *, scale, **window):
    """A stand-in for torch's flash attention, forward: its out [N,Q,D] and logarithms of sums [Q,N]."""
    assert (bounds.dtype, longest, dropout, causal, debug) == (torch.int32, max(LENGTHS), 0.0, True, False)
    scores, value = flash_scores(query, key, value, bounds, scale, **window)
    sums = scores.logsumexp(-1)
    out = (scores - sums[..., None]).exp() @ value
    return out.transpose(0, 1), sums, torch.empty(2), torch.empty(0), torch.empty(0)


def flash_backward(gradient, query, key, value, out, sums, bounds, *_, scale, **window):
    """And backward."""
    assert gradient.is_contiguous()
    tensors = [each.detach().requires_grad_() for each in (query, key, value)]
    with torch.enable_grad():
        scored = flash_scores(*tensors, bounds, scale, **window)
    return from_sums(tensors, *scored, gradient.transpose(0, 1), out.transpose(0, 1), sums[..., None])


def from_sums(tensors, scores, values, gradient, out, sums):
    """Gradients as the paper has them: all that they know of the softmax is out and the sums."""
    weights = (scores.detach() - sums).exp()
    of_weights = gradient @ values.detach().transpose(-1, -2)
    of_scores = weights * (of_weights - (gradient * out).sum(-1, keepdim=True))
    return torch.autograd.grad((scores, values), tensors, (of_scores, weights.transpose(-1, -2) @ gradient))


def flash_scores(query, key, value, bounds, scale, window_size_left, window_size_right):
    assert window_size_right == (None if window_size_left is None else 0)
    of = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff().long())
    at = torch.arange(len(of))
    distance = at[:, None] - at
    left = len(of) if window_size_left is None else window_size_left
    allowed = (of[:, None] == of) & (distance >= 0) & (distance <= left)
    groups = query.shape[1] // key.shape[1]
    query, key, value = (each.transpose(0, 1) for each in (query, key, value))
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    return (query @ key.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf), value


def stand_in(monkeypatch, **operators):
    of_kernels = {"add_sinks": sinks.add_sinks_torch, "sinks_gradient": sinks.sinks_gradient_torch}
    for name, value in (of_kernels | operators).items():
        monkeypatch.setattr(sinks, name, value)


@pytest.mark.parametrize("window", [None, 1, 3, 99])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("how", ["loop", "kernel"])
def test_sinks_are_one_more_score_of_each_head(how, shape, window, monkeypatch):
    if how == "kernel":
        for name, value in {"fits_kernel": lambda *_: True, "HAS_TRITON": True}.items():
            monkeypatch.setattr(attention, name, value)
        stand_in(monkeypatch, flash_forward=flash, flash_backward=flash_backward)
    tensors = operands(*shape)
    tensors.append(torch.linspace(-3, 5, shape[0], dtype=torch.float64).requires_grad_())
    found = attend(*tensors[:3], Packed(rows(), window), None, tensors[3])
    assert_same(found, dense(*tensors[:3], window, None, tensors[3]), tensors)


def cudnn(query, key, value, bias, with_sums, dropout, causal, debug, *, scale):
    """A stand-in for cuDNN's attention, forward: its out [B,Q,T,V] and logarithms of sums [B,Q,T,1]."""
    assert (bias, with_sums, dropout, causal, debug) == (None, True, 0.0, True, False)
    scores, value = row_scores(query, key, value, scale)
    sums = scores.logsumexp(-1, keepdim=True)
    seed = torch.zeros((), dtype=torch.int64)
    return (scores - sums).exp() @ value, sums, None, None, 4, 4, seed, seed + 1, None


def cudnn_backward(gradient, query, key, value, out, sums, seed, offset, *rest, scale):
    """And backward."""
    assert (int(seed), int(offset), rest) == (0, 1, (None, None, None, 4, 4, 0.0, True))
    tensors = [each.detach().requires_grad_() for each in (query, key, value)]
    with torch.enable_grad():
        scored = row_scores(*tensors, scale)
    return from_sums(tensors, *scored, gradient, out, sums)


def row_scores(query, key, value, scale):
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    return scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf), value


@pytest.mark.parametrize(
    ("has_sinks", "chosen"),
    [(False, SDPBackend.MATH), (True, SDPBackend.MATH), (True, SDPBackend.FLASH_ATTENTION)],
)
def test_rows_that_sdpa_has_no_kernel_for_are_sequences(has_sinks, chosen, monkeypatch):
    for name, value in {"fits_kernel": lambda *_: True, "HAS_TRITON": True, "sdpa_choice": lambda *_: chosen}.items():
        monkeypatch.setattr(attention, name, value)
    monkeypatch.setattr(attention, "by_kernel", lambda *given: given)
    mask = Packed(of_batch(2, 4, torch.device("cpu")), None)
    some = torch.zeros(4) if has_sinks else None
    assert attend(*(each[:, :, :8] for each in operands()), mask, 0.3, some)[-3:] == (mask, 0.3, some)


def test_the_choice_is_that_of_sdpa():
    query, key, value = (torch.zeros(1, heads, 8, 16) for heads in (4, 2, 2))
    assert sdpa_choice(query, key, value, 0.3) in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)


@pytest.mark.parametrize("has_sinks", [False, True], ids=["sdpa", "sinks"])
def test_rows_of_one_length_without_windows_are_rows(has_sinks, monkeypatch):
    monkeypatch.setattr(attention, "by_kernel", lambda *_: pytest.fail("flash attention"))
    for name, value in {"fits_kernel": lambda *_: True, "HAS_TRITON": True}.items():
        monkeypatch.setattr(attention, name, value)
    stand_in(monkeypatch, cudnn_forward=cudnn, cudnn_backward=cudnn_backward)
    monkeypatch.setattr(attention, "sdpa_choice", lambda *_: SDPBackend.CUDNN_ATTENTION)
    generator = torch.Generator().manual_seed(0)
    sizes = (4, 16), (2, 16), (2, 8)
    tensors = [
        torch.randn(1, heads, 12, size, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads, size in sizes
    ]
    mask = Packed(of_batch(3, 4, torch.device("cpu")), None)
    if has_sinks:
        tensors.append(torch.linspace(-3, 5, 4, dtype=torch.float64).requires_grad_())
    given = tensors[:3], tensors[3:]
    assert_same(attend(*given[0], mask, None, *given[1]), by_sequence(*given[0], mask, 0.25, *given[1]), tensors)


def test_the_kernel_is_torchs_and_takes_what_it_is_given():
    parameters = inspect.signature(attention.varlen_attn).parameters
    assert list(parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= set(parameters)
    assert parameters["window_size"].default == (-1, -1)


def test_flash_attention_takes_what_it_is_given():
    expected = [
        "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask",
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal rng_state unused",
    ]
    expected += [
        "query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask",
        "grad_out query key value out logsumexp philox_seed philox_offset attn_bias cum_seq_q cum_seq_k max_q max_k"
        " dropout_p is_causal",
    ]
    options = {"scale", "window_size_left", "window_size_right"}
    operators = sinks.flash_forward, sinks.flash_backward, sinks.cudnn_forward, sinks.cudnn_backward
    for operator, names, known in zip(operators, expected, [options, options, {"scale"}, {"scale"}], strict=True):
        arguments = operator.default._schema.arguments
        assert [each.name for each in arguments if not each.kwarg_only] == names.split()
        assert known <= {each.name for each in arguments if each.kwarg_only}


def test_the_kernel_is_for_gpus():
    query, _, value = (each.detach().bfloat16() for each in operands())
    assert not fits_kernel(query, value)


def asked(mask_function, **more):
    return {"mask_function": mask_function, "q_length": 9, "kv_length": 9, "q_offset": 0, "kv_offset": 0, **more}


def test_masks_are_known_by_what_they_compute():
    causal, sliding = masking_utils.causal_mask_function, masking_utils.sliding_window_causal_mask_function
    assert window_of(**asked(causal)) is None
    assert window_of(**asked(sliding(7), local_size=7)) == 7
    zeros = torch.zeros(1, dtype=torch.int64)
    others = [
        asked(masking_utils.bidirectional_mask_function),
        asked(sliding(7)),
        asked(sliding(7), local_size=8),
        asked(causal, local_size=7),
        asked(masking_utils.chunked_causal_mask_function(7, zeros), local_size=7),
        asked(masking_utils.and_masks(causal, masking_utils.packed_sequence_mask_function(zeros[None]))),
        asked(causal, use_vmap=True),
        asked(causal, q_length=1),
        asked(causal, q_offset=3, kv_offset=3),
    ]
    for other in others:
        with pytest.raises(UnsupportedModelError, match="cannot be computed without padding") as error:
            window_of(**other)
        assert "padding_free: off" in error.value.hint


def test_transformers_finds_attention_where_it_is_put_once():
    attention.install()
    known = [each._global_mapping["sdpa"] for each in (AttentionMaskInterface, AttentionInterface)]
    assert [function.__module__ for function in known] == [attention.__name__] * 2
    attention.install()
    assert known == [each._global_mapping["sdpa"] for each in (AttentionMaskInterface, AttentionInterface)]


@pytest.mark.parametrize("more", [{"dropout": 0.1}, {"position_bias": torch.ones(1)}, {"softcap": 30.0}], ids=str)
def test_what_the_kernel_cannot_do_is_an_error(more):
    attention.install()
    attend = AttentionInterface._global_mapping["sdpa"]
    with pytest.raises(UnsupportedModelError, match=f"attention with {next(iter(more))}"):
        attend(torch.nn.Module(), *operands(), Packed(rows(), None), **more)


def test_other_attention_is_transformers_own():
    attention.install()
    query, key, value = operands()
    found, _ = AttentionInterface._global_mapping["sdpa"](torch.nn.Module(), query, key, value, None)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert torch.equal(found, expected.transpose(1, 2))
