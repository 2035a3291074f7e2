"""Deferred logits: the same loss, gradients and, where somebody asks for them, logits as transformers' own."""

import copy
import math

import pytest
import torch
from torch.nn import functional
from torch.utils._pytree import tree_map

from moe_accel import loss
from moe_accel.kernels import cross_entropy
from moe_accel.padding.rows import Rows
from tests.families import build_tiny

TOKENS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
LABELS = TOKENS.clone()
LABELS[0, 3:5] = -100


VOCABULARY = 96


def pair(family="qwen3_moe"):
    """The same tiny model twice, the second with deferred logits."""
    model = build_tiny(family, torch.float64, num_hidden_layers=1).train()
    assert model.config.vocab_size == VOCABULARY
    model.set_experts_implementation("eager")
    deferred = copy.deepcopy(model)
    return model, deferred, loss.install(deferred)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


CALLS = {
    "mean": {},
    "num-items-tensor": {"num_items_in_batch": torch.tensor(11)},
    "num-items-int": {"num_items_in_batch": 11},
    "aux-loss": {"output_router_logits": True},
}


@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
def test_same_loss_and_gradients_as_transformers(arguments):
    model, deferred, choice = pair()
    assert choice.value == "fused"
    expected, found = (each(input_ids=TOKENS, labels=LABELS, **arguments) for each in (model, deferred))
    assert isinstance(found.logits, loss.DeferredLogits)
    # native rounds the logits of an fp64 model to fp32
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=1e-6, check_dtype=False)
    expected.loss.backward()
    found.loss.backward()
    ours, theirs = gradients(deferred), gradients(model)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(
            ours[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda said, name=name: f"{name}: {said}"
        )


@pytest.mark.parametrize("trained", ["all but the head", "only the head"])
def test_nothing_is_computed_for_what_is_frozen(trained, monkeypatch):
    model, deferred, _ = pair()
    asked = []

    def seen(hidden, weight, *rest):
        asked.append((hidden.requires_grad, weight.requires_grad))
        return cross_entropy.linear_cross_entropy(hidden, weight, *rest)

    monkeypatch.setattr(loss, "linear_cross_entropy", seen)
    for each in (model, deferred):
        each.requires_grad_(trained == "all but the head")
        each.lm_head.requires_grad_(trained == "only the head")
        each(input_ids=TOKENS, labels=LABELS).loss.backward()
    assert asked == [(True, False) if trained == "all but the head" else (False, True)]
    ours, theirs = gradients(deferred), gradients(model)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-7)


def test_gradients_come_through_the_logits_where_the_head_is_frozen():
    model, deferred, _ = pair()
    for each in (model, deferred):
        each.lm_head.requires_grad_(False)
        (each(input_ids=TOKENS, labels=LABELS).logits ** 2).sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradients(deferred)[name], gradient)


def test_whoever_wants_the_logits_gets_them():
    model, deferred, _ = pair()
    expected = model(input_ids=TOKENS, labels=LABELS).logits
    logits = deferred(input_ids=TOKENS, labels=LABELS).logits
    assert (logits.shape, logits.dtype, logits.device) == (expected.shape, expected.dtype, expected.device)
    assert torch.equal(logits[:, :-1].argmax(-1), expected[:, :-1].argmax(-1))
    assert torch.equal(torch.softmax(logits, -1), torch.softmax(expected, -1))
    assert torch.equal(logits / 2, expected / 2)
    assert torch.equal(torch.cat([logits, logits]), torch.cat([expected, expected]))
    smoothed = functional.cross_entropy(logits.view(-1, VOCABULARY), LABELS.view(-1), label_smoothing=0.1)
    assert torch.equal(
        smoothed, functional.cross_entropy(expected.view(-1, VOCABULARY), LABELS.view(-1), label_smoothing=0.1)
    )


def test_small_fp16_gradients_survive_as_they_do_in_transformers():
    model = build_tiny("qwen3_moe", torch.float32, num_hidden_layers=1)
    with torch.no_grad():
        model.lm_head.weight[64:] = 0  # never a label; of their probability, fp16 loses the 4092nd part
        model.lm_head.weight[:64] *= 4
    deferred = copy.deepcopy(model)
    loss.install(deferred)
    tokens = torch.randint(64, (4, 1024), generator=torch.Generator().manual_seed(0))
    for each in (model, deferred):
        with torch.autocast("cpu", torch.float16):
            found = each(input_ids=tokens, labels=tokens).loss
        (2.0**16 * found).backward()  # the first factor of a GradScaler
    ours, theirs = (each.lm_head.weight.grad[64:] for each in (deferred, model))
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


@pytest.mark.parametrize("case", ["eval", "no-grad", "no-labels"])
def test_logits_are_tensors_where_no_loss_is_trained(case):
    _, deferred, _ = pair()
    deferred.train(case != "eval")
    with torch.set_grad_enabled(case != "no-grad"):
        output = deferred(input_ids=TOKENS, **({} if case == "no-labels" else {"labels": LABELS}))
    assert type(output.logits) is torch.Tensor


def test_a_copy_computes_with_its_own_weights():
    _, deferred, _ = pair()
    other = copy.deepcopy(deferred)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    found = other(input_ids=TOKENS, labels=LABELS).loss
    assert math.isclose(found.item(), math.log(VOCABULARY), rel_tol=1e-6)
    assert abs(deferred(input_ids=TOKENS, labels=LABELS).loss.item() - found.item()) > 1e-6


def test_an_error_in_a_forward_leaves_the_next_one_untouched():
    _, deferred, _ = pair()
    with pytest.raises(IndexError):
        deferred(input_ids=TOKENS + 10**6, labels=LABELS)
    assert type(deferred.lm_head(torch.zeros(1, deferred.config.hidden_size, dtype=torch.float64))) is torch.Tensor


def test_the_output_layer_takes_its_input_by_name():
    model, deferred, _ = pair()
    hidden = torch.ones(1, deferred.config.hidden_size, dtype=torch.float64)
    assert torch.equal(deferred.lm_head(input=hidden), model.lm_head(input=hidden))


def test_says_why_not():
    model = build_tiny("qwen3_moe", torch.float32, num_hidden_layers=1)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, 64, bias=True)
    assert "has a bias" in loss.install(model).reason
    model = build_tiny("qwen3_moe", torch.float32, num_hidden_layers=1)
    for of_model, precision in ((torch.float32, "fp16"), (torch.float16, "no")):
        choice = loss.install(model.to(of_model), precision)
        assert choice.value == "native"
        assert "fp16" in choice.reason


def test_a_cast_of_what_the_layer_puts_out_is_a_cast_of_the_logits():
    _, deferred, _ = pair()
    output = deferred(input_ids=TOKENS, labels=LABELS)
    cast = tree_map(lambda value: value.float() if isinstance(value, torch.Tensor) else value, output)
    expected = output.logits.tensor()
    assert (cast.logits.dtype, cast.logits.hidden.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(cast.logits.tensor(), expected.float())  # the weights were cast too


def test_logits_whose_weight_is_gone_are_an_error():
    _, deferred, _ = pair()
    logits = deferred(input_ids=TOKENS, labels=LABELS).logits
    logits.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="FSDP has taken the output layer's weight apart"):
        logits.argmax(-1)


def cross_entropy_of(logits):
    return functional.cross_entropy(logits.float().view(-1, VOCABULARY), LABELS.view(-1))


def test_logits_asked_for_after_autocast_are_those_computed_under_it():
    model = build_tiny("qwen3_moe", torch.float32, num_hidden_layers=1)
    deferred = copy.deepcopy(model)
    loss.install(deferred)
    with torch.autocast("cpu", torch.bfloat16):
        expected, logits = (each(input_ids=TOKENS, labels=LABELS).logits for each in (model, deferred))
    assert isinstance(logits, loss.DeferredLogits)
    assert logits.dtype == expected.dtype == torch.bfloat16
    found = cross_entropy_of(logits)
    torch.testing.assert_close(found, cross_entropy_of(expected), rtol=1e-6, atol=0)  # both sum bf16 products in fp32
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))
    with torch.autocast("cpu", torch.bfloat16):
        logits = deferred.lm_head.to(torch.bfloat16)(torch.ones(2, deferred.config.hidden_size))
    assert logits.dtype == torch.bfloat16
    assert (logits + 1).dtype == torch.bfloat16


METADATA = {
    "size": lambda logits: (logits.size(), logits.size(-1), logits.shape, len(logits)),
    "dimensions": lambda logits: (logits.ndim, logits.dim(), logits.numel(), logits.nelement()),
    "memory": lambda logits: (logits.stride(), logits.is_contiguous(), logits.element_size(), logits.layout),
    "dtype": lambda logits: (logits.dtype, logits.is_floating_point(), logits.float().dtype),
    "device": lambda logits: (logits.device, logits.is_cuda, logits.get_device()),
    "requires grad": lambda logits: logits.requires_grad,
    "casts": lambda logits: [
        logits.to(*args, **how).dtype
        for args, how in (((logits.device,), {}), ((torch.float32,), {}), ((), {"dtype": torch.float32}))
    ],
}


@pytest.mark.parametrize("ask", METADATA.values(), ids=METADATA)
def test_asking_for_sizes_and_types_computes_nothing(ask, monkeypatch):
    model, deferred, _ = pair()
    expected, logits = (each(input_ids=TOKENS, labels=LABELS).logits for each in (model, deferred))
    monkeypatch.setattr(loss.DeferredLogits, "tensor", lambda self: pytest.fail("computed"))
    assert ask(logits) == ask(expected)


def test_a_cast_that_rounds_is_computed():
    _, deferred, _ = pair()
    logits = deferred(input_ids=TOKENS, labels=LABELS).logits
    for found in (logits.to(torch.bfloat16), logits.to(torch.float32, copy=True)[:], logits.to(LABELS.double())):
        assert torch.equal(found + 0, logits.tensor().to(found.dtype))


def assigned(logits):
    logits[..., 5] = -1e3
    return logits


def assigned_after_a_view(logits):
    flat = logits.view(-1, VOCABULARY)
    logits[..., 5] = -1e3
    return flat


def assigned_through_a_view(logits):
    logits.view(-1, VOCABULARY)[:, 5] = -1e3
    return logits


def looked_at_without_gradient(logits):
    with torch.no_grad():
        logits.argmax(-1)
    return logits


def multiplied(logits):
    kept = logits
    logits *= 2
    logits.sub_(1)
    return kept


CHANGES = [assigned, assigned_after_a_view, assigned_through_a_view, looked_at_without_gradient, multiplied]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_logits_are_those_of_a_loss_that_comes_later(change):
    model, deferred, _ = pair()
    for each in (model, deferred):
        logits = each(input_ids=TOKENS, labels=LABELS).logits
        each.found = cross_entropy_of(change(logits))
        each.found.backward()
    torch.testing.assert_close(deferred.found, model.found)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradients(deferred)[name], gradient, rtol=1e-5, atol=1e-7)


def test_computed_logits_leave_a_layer_as_a_tensor():
    _, deferred, _ = pair()
    output = deferred(input_ids=TOKENS, labels=LABELS)
    output.logits[..., 5] = 0
    cast = tree_map(lambda value: value.float() if isinstance(value, torch.Tensor) else value, output)
    assert torch.equal(cast.logits, output.logits.tensor().float())


def test_an_output_layer_with_a_forward_of_its_own_keeps_it_and_the_report_says_so():
    model = build_tiny("qwen3_moe")
    own = model.lm_head.forward
    model.lm_head.forward = lambda x: 2 * own(x)
    expected = model(input_ids=TOKENS, labels=LABELS).loss
    assert loss.install(model).value == "native"
    assert torch.equal(model(input_ids=TOKENS, labels=LABELS).loss, expected)


def test_installing_twice_is_still_fused_and_hooks_once():
    model = build_tiny("qwen3_moe")
    assert [loss.install(model).value for _ in range(2)] == ["fused", "fused"]
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == (1, 1)


LEGACY = {
    "size-average-off": {"size_average": False},
    "reduce-off": {"reduce": False},
    "smoothing": {"label_smoothing": 0.1},
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum"},
}


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize("options", LEGACY.values(), ids=LEGACY)
def test_every_option_of_torchs_cross_entropy_is_heeded(options):
    _, deferred, _ = pair()
    logits = deferred(input_ids=TOKENS, labels=LABELS).logits.view(-1, VOCABULARY)
    assert isinstance(logits, loss.DeferredLogits)
    found = functional.cross_entropy(logits, LABELS.view(-1), **options)
    torch.testing.assert_close(found, functional.cross_entropy(logits.tensor(), LABELS.view(-1), **options))


def test_options_by_their_place_and_labels_of_another_size_are_as_torch_has_them():
    _, deferred, _ = pair()
    logits = deferred(input_ids=TOKENS, labels=LABELS).logits.view(-1, VOCABULARY)
    ignore_index = int(TOKENS[0, 0])
    given = TOKENS.view(-1), None, None, ignore_index
    found = functional.cross_entropy(logits, *given)
    with pytest.raises(ValueError, match=r"^Expected input batch_size \(18\) to match target batch_size \(17\)"):
        functional.cross_entropy(logits, TOKENS.view(-1)[1:])
    torch.testing.assert_close(found, functional.cross_entropy(logits.tensor(), *given))


def test_logits_without_padding_leave_a_layer_still_deferred_and_of_the_batch():
    hidden, weight = torch.randn(1, 5, 4), torch.randn(VOCABULARY, 4)
    index = torch.tensor([0, 1, 3, 4, 5])
    rows = Rows(2, 3, (2, 3), torch.tensor([0, 2, 5]), index)
    expected = torch.zeros(6, VOCABULARY).index_copy(0, index, (hidden @ weight.t())[0]).view(2, 3, -1)
    logits = loss.DeferredLogits(hidden, weight).padded(rows)
    cast = tree_map(lambda value: value.double() if isinstance(value, torch.Tensor) else value, logits)
    assert isinstance(cast, loss.DeferredLogits)
    assert (cast.shape, cast.dtype, len(cast)) == (expected.shape, torch.float64, 2)
    torch.testing.assert_close(cast.tensor(), expected.double())
    torch.testing.assert_close(logits.float().view(-1, VOCABULARY) + 0, expected.view(-1, VOCABULARY))
    labels = torch.tensor([[1, 2, -100], [3, 4, 5]])
    found = functional.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1))
    torch.testing.assert_close(found, functional.cross_entropy(expected.view(-1, VOCABULARY), labels.view(-1)))
    known = loss.DeferredLogits(hidden, weight)
    known.tensor()
    torch.testing.assert_close(known.padded(rows), expected)
