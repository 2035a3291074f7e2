"""Attention with sinks, or windows shorter than a row, is ours in batches without padding, too: the same numbers."""

import copy
from typing import Any

import pytest
import torch
import transformers

from moe_accel import padding
from moe_accel.padding import attention
from tests.families import available_families, build_tiny
from tests.unit.test_padding import LENGTHS, SAME, WIDTH, assert_same, pair, ragged

pytestmark = pytest.mark.usefixtures("one_thread")

SINKS = [name for name in ("gpt_oss", "mimo_v2_flash", "deepseek_v4", "flint") if name in available_families()]
WINDOWS = ["mixtral", "afmoe", "gemma4"]
WHOLE = (1, len(LENGTHS) * WIDTH)


def full(masked: bool = True) -> dict[str, torch.Tensor]:
    """A batch without padding."""
    batch = ragged()
    batch["labels"] = batch["input_ids"].where(batch["input_ids"] % 3 > 0, -100)
    batch["attention_mask"][:] = 1
    return batch if masked else {name: batch[name] for name in ("input_ids", "labels")}


def assert_same_whole(model: Any, ours: Any) -> None:
    assert_same(model, ours, full())
    assert ours.num_computed == [WHOLE]
    losses = [each(**full(masked=False)).loss for each in (model, ours)]
    torch.testing.assert_close(losses[1], losses[0], **SAME)
    assert ours.num_computed == [WHOLE, WHOLE]


@pytest.mark.parametrize("family", [*SINKS, *WINDOWS])
def test_loss_gradients_and_logits_are_those_of_transformers(family):
    model, ours = pair(family)
    assert_same_whole(model, ours)
    assert_same(model, ours, ragged())
    assert ours.num_computed[2:] == [(1, sum(LENGTHS))]


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_has_sinks_too(reentrant):
    model, ours = pair("gpt_oss")
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(model, ours, full())


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_padding_free_off_is_of_padding(family):
    model = build_tiny(family, torch.float64)
    model.set_experts_implementation("eager")
    ours = copy.deepcopy(model)
    assert str(padding.install(ours, "off")) == "computed (asked for: padding_free: off)"
    ours.num_computed = []
    ours.get_input_embeddings().register_forward_hook(lambda _, args, __: ours.num_computed.append(args[0].shape))
    assert_same_whole(model, ours)
    torch.testing.assert_close(ours(**ragged()).loss, model(**ragged()).loss, **SAME)
    assert ours.num_computed[2:] == [(len(LENGTHS), WIDTH)]


def test_rows_within_the_window_stay_as_they_are():
    model, ours = pair("mixtral", sliding_window=WIDTH)
    torch.testing.assert_close(ours(**full()).loss, model(**full()).loss, **SAME)
    assert ours.num_computed == [(len(LENGTHS), WIDTH)]
    assert padding.told_of_attention(pair("mixtral", sliding_window=None)[1]) == []


def test_what_is_not_trained_is_computed_by_transformers():
    model, ours = pair("gpt_oss")
    ids = full()["input_ids"]
    for each in (model, ours):
        each.eval()
    assert torch.equal(ours(ids).logits, model(ids).logits)
    greedy = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **greedy), model.generate(ids, **greedy))
    ours.train(), model.train()
    for name in ("output_attentions", "use_cache"):
        expected, found = (each(**full(), **{name: True}) for each in (model, ours))
        torch.testing.assert_close(found.loss, expected.loss, **SAME)
        for one, other in zip(found.attentions or (), expected.attentions or (), strict=True):
            torch.testing.assert_close(one, other, **SAME)
        assert (found.attentions is None) == (expected.attentions is None) == (name != "output_attentions")
        assert found.past_key_values is not None
    assert ours.num_computed[-2:] == [(len(LENGTHS), WIDTH)] * 2


def test_the_config_that_is_saved_says_nothing_of_it(tmp_path):
    model, ours = pair("gpt_oss")
    assert ours.config._attn_implementation == attention.WITH_SINKS
    assert ours.config.to_dict() == model.config.to_dict()
    ours.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config._attn_implementation == "eager"


def test_the_report_says_so():
    notes = [padding.told_of_attention(pair(family)[1]) for family in ("gpt_oss", "mixtral", "qwen3_moe")]
    assert ["with sinks" in "".join(each) for each in notes] == [True, False, False]
    assert "attention in windows of 8 tokens in training with labels by flash attention" in notes[1][0]
    assert notes[2] == []


def dropping(model):
    model.config.attention_dropout = 0.1


def asked_for_weights(model):
    model.config.output_attentions = True


def flex(model):
    model.set_attn_implementation("flex_attention")


REFUSED = {
    dropping: "attention with dropout cannot be computed without padding",
    asked_for_weights: "attention weights are asked for",
    flex: "attn_implementation is flex_attention, and must be sdpa",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
@pytest.mark.parametrize("asked", ["auto", "off"])
def test_attention_that_cannot_be_ours_stays(change, asked):
    model = build_tiny("gpt_oss")
    change(model)
    before = model.config._attn_implementation
    reason = padding.install(model, asked).reason
    assert reason == ("asked for: padding_free: off" if asked == "off" else REFUSED[change])
    assert (model.config._attn_implementation, len(model._forward_pre_hooks)) == (before, 0)
    assert padding.told_of_attention(model) == []


@pytest.mark.parametrize("kind", ["heavily_compressed_attention", "compressed_sparse_attention"])
def test_layers_that_see_groups_of_tokens_are_seen_by_the_proof(kind):
    model = build_tiny("deepseek_v4", layer_types=["sliding_attention", kind])
    assert "a layer does more than attend with its mask" in padding.install(model).reason


def test_padding_that_gives_no_gradients_leaves_other_batches():
    model = build_tiny("granitemoe_swa", torch.float64)  # a row of padding alone has a gradient of nan in transformers
    model.set_experts_implementation("eager")
    ours = copy.deepcopy(model)
    assert padding.install(ours).value == "computed"
    ours.num_computed = []
    ours.get_input_embeddings().register_forward_hook(lambda _, args, __: ours.num_computed.append(args[0].shape))
    gradients = []
    for each in (model, ours):
        each(**full()).loss.backward()
        gradients.append(torch.cat([parameter.grad.view(-1) for parameter in each.parameters()]))
    assert ours.num_computed == [WHOLE]
    # its softmax is in fp32, whatever the dtype
    assert (gradients[1] - gradients[0]).norm() <= 1e-6 * gradients[0].norm()


def test_a_class_of_ones_own_attends_as_the_one_it_is_derived_from():
    model = build_tiny("gpt_oss")
    layer = model.model.layers[0].self_attn
    layer.__class__ = type("Mine", (type(layer),), {"__module__": __name__})
    assert attention.eager_of(layer) is transformers.models.gpt_oss.modeling_gpt_oss.eager_attention_forward
    assert attention.eager_of(torch.nn.Linear(1, 1)) is None
