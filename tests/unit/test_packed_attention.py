"""Attention of packed sequences: the kernel's arguments, the masks that are known, and where transformers meets it."""

import inspect
from itertools import pairwise

import pytest
import torch
from transformers import masking_utils
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from moe_accel.errors import UnsupportedModelError
from moe_accel.padding import attention
from moe_accel.padding.attention import Packed, by_kernel, by_sequence, fits_kernel, window_of
from moe_accel.padding.rows import Rows

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


def scores_of(query, key, value, allowed, scale):
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ value


def dense(query, key, value, window, scale):
    """Attention under a whole mask [N,N]."""
    of = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    at = torch.arange(NUM_TOKENS)
    distance = at[:, None] - at
    allowed = (of[:, None] == of) & (distance >= 0) & (distance < (window or NUM_TOKENS))
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    return scores_of(query, key, value, allowed, query.shape[-1] ** -0.5 if scale is None else scale).transpose(1, 2)


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


@pytest.mark.parametrize("window", [None, 1, 3, 12, 99])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("how", ["loop", "kernel-2.11", "kernel"])
def test_values_and_gradients_are_those_under_a_mask(how, shape, window, monkeypatch):
    if how != "loop":
        attention._knows_groups.cache_clear()
        monkeypatch.setattr(attention, "varlen_attn", kernel_of(how == "kernel"))
    compute = by_sequence if how == "loop" else by_kernel
    for scale in (None, 0.3):
        tensors = operands(*shape)
        found = compute(*tensors, Packed(rows(), window), scale)
        expected = dense(*tensors, window, scale)
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected)
        probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for one, other in zip(*(torch.autograd.grad(each, tensors, probe) for each in (found, expected)), strict=True):
            torch.testing.assert_close(one, other)
    attention._knows_groups.cache_clear()


def test_the_kernel_is_torchs_and_takes_what_it_is_given():
    parameters = inspect.signature(attention.varlen_attn).parameters
    assert list(parameters)[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= set(parameters)
    assert parameters["window_size"].default == (-1, -1)


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
