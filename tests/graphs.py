"""What training with attention as CUDA graphs must show, with graphs on a GPU and with what stands for them elsewhere.

A `Pair` makes the same model twice: recorded, and as it is.
"""

import warnings
from collections.abc import Callable
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from moe_accel.graphs import RECORDINGS
from moe_accel.graphs.sizes import RAGGED, STEP
from tests.families import tiny_inputs, tiny_loss

EXACT = 1e-5
Pair = Callable[..., tuple[Any, Any]]


@contextmanager
def told():
    """What is warned of, as text."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    said += [str(each.message) for each in caught]


def batch(model, seed, length=48, family="qwen3_moe"):
    return {name: each.to(model.device) for name, each in tiny_inputs(family, 2, length, seed).items()}


def ragged(model, seed, family="qwen3_moe", length=48):
    """A batch [2,T] with padding, which is left out: N tokens, in every step others."""
    inputs = tiny_inputs(family, 2, length, seed)
    lengths = torch.randint(1, length, (2, 1), generator=torch.Generator().manual_seed(seed))
    inputs["attention_mask"] = (torch.arange(length) < lengths).long()
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    return {name: each.to(model.device) for name, each in inputs.items()}


def packed(model, seed, family="qwen3_moe", length=96):
    """A row [1,T] of several sequences, in every step of other lengths."""
    inputs = tiny_inputs(family, 1, length, seed)
    order = torch.randperm(length - 1, generator=torch.Generator().manual_seed(seed))
    begins = sorted((1 + order[: 1 + seed % 4]).tolist())
    inputs["position_ids"] = torch.cat([torch.arange(end - start) for start, end in pairwise([0, *begins, length])])[
        None
    ]
    return {name: each.to(model.device) for name, each in inputs.items()} | {"use_cache": False}


def loss_of(model, inputs):
    return model(**inputs).loss if hasattr(model, "peft_config") else tiny_loss(model, inputs)


def trained(model, *batches, together=False):
    """Losses and gradients, in fp32, of one backward a batch, or of one of them all."""
    model.zero_grad()
    losses = []
    for each in batches:
        losses.append(loss_of(model, each))
        if not together:
            losses[-1].backward()
    if together:
        torch.stack(losses).sum().backward()
    found = {name: each.grad.float() for name, each in model.named_parameters() if each.grad is not None}
    return found | {f"loss {at}": each.detach().float() for at, each in enumerate(losses)}


def assert_same(found, expected, tolerance=EXACT):
    assert found.keys() == expected.keys()
    for name, each in found.items():
        difference, norm = (each - expected[name]).norm(), expected[name].norm()
        assert difference <= tolerance * norm + 1e-6, f"{name}: {difference:.2e} of {norm:.2e}"


def change_both(model, twin, seed):
    """Other values in the same place, as an optimizer makes them."""
    for at, (one, other) in enumerate(zip(model.parameters(), twin.parameters(), strict=True)):
        generator = torch.Generator().manual_seed(1000 * seed + at)
        noise = (torch.randn(one.shape, generator=generator) * 1e-3).to(one)
        with torch.no_grad():
            one.add_(noise)
            other.add_(noise)


def graphs_of(model):
    """What is seen, and recorded, of each layer."""
    return [vars(each)["_moe_accel_graphs"] for each in model.modules() if "_moe_accel_graphs" in vars(each)]


def turns(model):
    """How often what is recorded of each layer was played; None: it never will be."""
    found = graphs_of(model)
    unplayed = [None if each.recorded > RECORDINGS else 0 for each in found]
    return [each.recording.num_played if each.recording else none for each, none in zip(found, unplayed, strict=True)]


def trains_as_without(pair: Pair, family, tolerance=EXACT, **how):
    model, twin = pair(family, **how)
    for step in range(6):
        change_both(model, twin, step)
        given = batch(model, step, family=family)
        assert_same(trained(model, given), trained(twin, given), tolerance)
    assert turns(model) == [4] * len(turns(model)) != []
    assert not any(each.recording.trial.is_due for each in graphs_of(model))


UNTIL = RAGGED + 1
"""Steps of other sizes before one is recorded for all."""


def trains_with_other_sizes(pair: Pair, batch_of, family, tolerance=EXACT, **how):
    model, twin = pair(family, **how)
    with told() as said:
        for step in range(UNTIL + 4):
            change_both(model, twin, step)
            given = batch_of(model, step, family)
            assert_same(trained(model, given), trained(twin, given), tolerance)
    assert turns(model) == [4] * len(turns(model)) != []
    assert not any(each.recording.trial.is_due for each in graphs_of(model))
    assert not [each for each in said if "without a CUDA graph" in each or "recorded, and" in each]


def more_tokens_than_there_is_room_for_are_computed_as_ever(pair: Pair, tolerance=EXACT, **how):
    model, twin = pair(**how)
    for step in range(UNTIL + 2):
        trained(model, ragged(model, step))
    assert set(turns(model)) == {2}
    many = ragged(model, 51, length=400)
    assert int(many["attention_mask"].sum()) > STEP
    for given in (ragged(model, 50), many, ragged(model, 52)):
        assert_same(trained(model, given), trained(twin, given), tolerance)
    assert set(turns(model)) == {4}


def a_ragged_batch_before_the_backward_of_another_is_computed_as_ever(pair: Pair, tolerance=EXACT, **how):
    model, twin = pair(**how)
    for step in range(UNTIL + 2):
        trained(model, ragged(model, step))
    two = ragged(model, 60), ragged(model, 61)
    assert_same(trained(model, *two, together=True), trained(twin, *two, together=True), tolerance)
    assert set(turns(model)) == {3}
    assert_same(trained(model, two[1]), trained(twin, two[1]), tolerance)


def gradients_of_two_batches_add_up(pair: Pair):
    model, twin = pair()
    for step in range(4):
        batches = batch(model, 2 * step), batch(model, 2 * step + 1)
        assert_same(trained(model, *batches), trained(twin, *batches))
    assert set(turns(model)) == {6}


def what_is_unlike_the_recorded_is_computed_as_ever(pair: Pair):
    model, twin = pair()
    for step in range(3):
        assert_same(trained(model, batch(model, step)), trained(twin, batch(model, step)))
    assert set(turns(model)) == {1}
    padded = batch(model, 7)
    padded["attention_mask"] = torch.ones_like(padded["input_ids"])
    padded["attention_mask"][0, -9:] = 0
    for other in (batch(model, 8, 32), padded):
        assert_same(trained(model, other), trained(twin, other))
    model.eval(), twin.eval()
    assert torch.equal(tiny_loss(model, batch(model, 9)), tiny_loss(twin, batch(model, 9)))
    model.train(), twin.train()
    with torch.no_grad():
        assert torch.equal(tiny_loss(model, batch(model, 9)), tiny_loss(twin, batch(model, 9)))
    assert set(turns(model)) == {1}
    two = batch(model, 10), batch(model, 11)
    assert_same(trained(model, *two, together=True), trained(twin, *two, together=True))
    assert set(turns(model)) == {2}, "the second before the first one's backward is not played"
    tiny_loss(model, batch(model, 12))  # and dropped
    assert_same(trained(model, batch(model, 13)), trained(twin, batch(model, 13)))
    assert set(turns(model)) == {4}


def checkpointing_computes_as_ever(pair: Pair):
    model, twin = pair()
    with told() as said:
        for step in range(12):
            model.gradient_checkpointing_enable({"use_reentrant": step % 2 == 1})
            assert_same(trained(model, batch(model, step)), trained(twin, batch(model, step)))
    assert [each.partition(", because of ")[2] for each in said if "CUDA" in each] == [
        "checkpointing, or other hooks on what is saved for backward"
    ]
    assert set(turns(model)) == {0}


def parameters_that_moved_are_recorded_anew(pair: Pair):
    model, twin = pair()
    for step in range(3):
        trained(model, batch(model, step))
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.clone()
    for step in range(3, 8):
        change_both(model, twin, step)
        assert_same(trained(model, batch(model, step)), trained(twin, batch(model, step)))
    assert set(turns(model)) == {2}, "all of them, in their order: once seen, twice as ever, twice played"


def a_backward_whose_values_are_gone_is_an_error(pair: Pair):
    model, _ = pair()
    for step in range(3):
        trained(model, batch(model, step))
    loss = tiny_loss(model, batch(model, 3))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"^cuda_graphs: the values that this backward needs are gone"):
        loss.backward()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a hook": lambda part: part.q_proj.register_forward_hook(lambda module, args, output: output * 2),
    "a forward": lambda part: setattr(part.o_proj, "forward", lambda x: 2 * x @ part.o_proj.weight.t()),
    "a part": lambda part: setattr(part, "o_proj", nn.Sequential(part.o_proj, nn.ReLU())),
    "a class": lambda part: setattr(part.v_proj, "__class__", Doubled),
    "a number": lambda part: setattr(part, "scaling", 2 * part.scaling),
    "frozen": lambda part: part.k_proj.weight.requires_grad_(False),
    "trained": lambda part: part.q_norm.weight.requires_grad_(),
    "no bias": lambda part: setattr(part.v_proj, "bias", None),
    "attention": lambda part: setattr(part.config, "_attn_implementation", "eager"),
}
"""Of an attention module, between steps."""


class Doubled(nn.Linear):
    """A linear layer that is something else."""

    def forward(self, input):
        return 2 * super().forward(input)


def a_change_is_seen(pair: Pair, change):
    models = pair()
    for model in models:
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.requires_grad_(False)
            layer.self_attn.v_proj.bias = nn.Parameter(torch.ones_like(layer.self_attn.v_proj.weight[:, 0]))
    for step in range(9):
        assert_same(*(trained(model, batch(model, step)) for model in models))
        if step == 3:
            assert set(turns(models[0])) == {2}
            for model in models:
                CHANGES[change](model.model.layers[1].self_attn)
        if step == 4:
            assert turns(models[0])[1] <= 2, "it was not played"


ALL = [
    gradients_of_two_batches_add_up,
    what_is_unlike_the_recorded_is_computed_as_ever,
    checkpointing_computes_as_ever,
    parameters_that_moved_are_recorded_anew,
    a_backward_whose_values_are_gone_is_an_error,
]


RAGGED_FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "glm4_moe", "granitemoe"]
OTHER_SIZES = [
    more_tokens_than_there_is_room_for_are_computed_as_ever,
    a_ragged_batch_before_the_backward_of_another_is_computed_as_ever,
]
