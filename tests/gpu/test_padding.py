"""Batches without their padding on a GPU, in bf16: as near to the truth as the padded batch of stock transformers.

run: pytest -m gpu tests/gpu
"""

import copy
import warnings

import pytest
import torch
from torch.nn import functional
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from moe_accel import loss, padding
from moe_accel.padding import attention
from moe_accel.padding.attention import Packed, attend, fits_kernel
from moe_accel.padding.batch import Flat, Proof, flatten
from moe_accel.padding.rows import Rows

pytestmark = pytest.mark.gpu

LENGTHS = (300, 77, 512, 1)
BF16_SLACK = 1.5
"""How much larger than native's our error may be: both round to bf16 at about as many places."""
EQUAL = (256, 256, 256)
SHAPES = {
    "qwen3": (32, 4, 128, 128, None, LENGTHS, False),
    "window": (8, 2, 64, 64, 100, LENGTHS, False),
    "latent": (16, 16, 192, 128, None, LENGTHS, False),
    "no-groups": (8, 8, 256, 256, None, LENGTHS, False),
    "one-length": (32, 4, 128, 128, None, EQUAL, False),
    "one-length-latent": (16, 16, 192, 128, None, EQUAL, False),
    "gpt-oss": (64, 8, 64, 64, None, LENGTHS, True),
    "gpt-oss-window": (64, 8, 64, 64, 128, LENGTHS, True),
    "gpt-oss-one-length": (64, 8, 64, 64, None, EQUAL, True),
    "gpt-oss-odd-length": (64, 8, 64, 64, None, (201, 201), True),
    "mimo": (64, 8, 192, 128, 128, EQUAL, True),
    "mimo-all-tokens": (64, 4, 192, 128, None, EQUAL, False),
}
"""Heads of queries, of keys and values, width, of values, window, lengths of sequences, whether there are sinks."""


def packed_rows(lengths) -> Rows:
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    return Rows(1, sum(lengths), lengths, bounds, None)


def under_a_mask(query, key, value, window, lengths, sinks=None):
    """Attention under a whole mask [N,N], as transformers computes a padded or packed batch, or with sinks."""
    of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).cuda()
    at = torch.arange(sum(lengths), device="cuda")
    distance = at[:, None] - at
    allowed = (of[:, None] == of) & (distance >= 0) & (distance < (window or sum(lengths)))
    if sinks is not None:
        module = torch.nn.Module()
        module.sinks, module.num_key_value_groups = sinks, query.shape[1] // key.shape[1]
        mask = torch.zeros_like(allowed, dtype=query.dtype).masked_fill(~allowed, torch.finfo(query.dtype).min)
        return eager_attention_forward(module, query, key, value, mask, query.shape[-1] ** -0.5)[0]
    key, value = (each.repeat_interleave(query.shape[1] // key.shape[1], 1) for each in (key, value))
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed).transpose(1, 2)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bf16_attention_is_about_as_close_to_fp64_as_under_a_mask(shape):
    q_heads, kv_heads, width, v_width, window, lengths, has_sinks = shape
    made = {"device": "cuda", "generator": torch.Generator(device="cuda").manual_seed(0)}
    sizes = (q_heads, width), (kv_heads, width), (kv_heads, v_width)
    low = [torch.randn(1, n, sum(lengths), size, **made).bfloat16().requires_grad_() for n, size in sizes]
    low += [torch.randn(q_heads, **made).bfloat16().requires_grad_()] if has_sinks else []
    exact = [each.detach().double().requires_grad_() for each in low]
    assert fits_kernel(low[0], low[2])
    probe = torch.randn(1, sum(lengths), q_heads, v_width, **made).bfloat16()
    packed = Packed(packed_rows(lengths), window)
    results = []
    for tensors, compute in (
        (exact, lambda q, k, v, *sinks: under_a_mask(q, k, v, window, lengths, *sinks)),
        (low, lambda q, k, v, *sinks: under_a_mask(q, k, v, window, lengths, *sinks)),
        (low, lambda q, k, v, *sinks: attend(q, k, v, packed, None, *sinks)),
    ):
        out = compute(*tensors)
        results.append((out, *torch.autograd.grad(out, tensors, probe.to(out.dtype))))
    for true, native, found in zip(*results, strict=True):
        assert found.shape == true.shape
        error, allowed = ((each.double() - true).norm() / true.norm() for each in (found, native))
        assert error <= BF16_SLACK * allowed, f"{error:.2e}, native {allowed:.2e}"


def small_model() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=256,
        moe_intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        attn_implementation="sdpa",
        experts_implementation="eager",
        output_router_logits=False,
    )
    return Qwen3MoeForCausalLM(config).cuda().train()


def ragged() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4096, (len(LENGTHS), max(LENGTHS) + 8), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    labels = ids.where((mask == 1) & (torch.rand(ids.shape, generator=generator) < 0.6), -100)
    return {"input_ids": ids.cuda(), "attention_mask": mask.cuda(), "labels": labels.cuda()}


def gradients(model, **how):
    with torch.autocast("cuda", torch.bfloat16, **how):
        found = model(**ragged()).loss
    found.backward()
    return torch.cat([found.detach().float().view(1), *(each.grad.float().view(-1) for each in model.parameters())])


def without_padding(model):
    ours = copy.deepcopy(model)
    loss.install(ours)
    assert padding.install(ours).value == "left out"
    return ours


def test_a_model_in_fp32_has_the_same_loss_and_gradients():
    model = small_model()
    expected, found = (gradients(each, enabled=False) for each in (model, without_padding(model)))
    assert (found - expected).norm() <= 1e-3 * expected.norm()  # tf32 is off; experts are summed in another order


def test_a_model_in_bf16_is_about_as_close_to_fp32_as_with_padding():
    truth = gradients(small_model(), enabled=False)
    model = small_model()
    native, found = (gradients(each) for each in (model, without_padding(model)))
    error, allowed = ((each - truth).norm() / truth.norm() for each in (found, native))
    assert error <= BF16_SLACK * allowed, f"{error:.2e}, native {allowed:.2e}"


def test_the_host_waits_once_for_the_device_to_know_what_is_padding():
    model, batch = small_model(), ragged()
    flatten(model, batch, Proof())
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            flat = flatten(model, batch, Proof())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waited = [str(each.message) for each in caught if "called a synchronizing" in str(each.message)]
    assert isinstance(flat, Flat)
    assert len(waited) <= 1, waited


def test_no_mask_of_all_tokens_is_made(monkeypatch):
    ours = without_padding(small_model())
    monkeypatch.setattr(attention, "by_sequence", lambda *_: pytest.fail("one call a sequence"))
    with torch.autocast("cuda", torch.bfloat16):
        ours(**ragged()).loss.backward()
