"""Attention with sinks, or windows shorter than a row, is ours in batches without padding, too: the same numbers."""

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_utils import AttentionInterface

from moe_accel import padding
from moe_accel.padding import attention
from tests.families import available_families, build_tiny
from tests.unit.fresh_python import python
from tests.unit.test_padding import LENGTHS, SAME, WIDTH, assert_same, pair, ragged

SINKS = ["gpt_oss", "mimo_v2_flash", "deepseek_v4"]
IN_FP32 = {"granitemoe_swa": "computed", "flint": "left out"}
"""Families whose softmax with sinks is in fp32 whatever the dtype, and what becomes of padding: in a row of nothing
else, granitemoe_swa of transformers has a gradient of nan."""
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
def test_padding_free_off_leaves_all_to_transformers(family):
    model = build_tiny(family)
    before = model.config._attn_implementation
    assert str(padding.install(model, "off")) == "computed (asked for: padding_free: off)"
    assert (model.config._attn_implementation, len(model._forward_pre_hooks)) == (before, 0)
    assert padding.told_of_attention(model) == []


@pytest.mark.parametrize(("family", "batch"), [("gpt_oss", full), ("gpt_oss", ragged), ("mixtral", full)])
def test_another_attention_chosen_later_gets_the_batch_as_it_is(family, batch):
    model, ours = pair(family)
    for each in (model, ours):
        each.set_attn_implementation("eager")
    torch.testing.assert_close(ours(**batch()).loss, model(**batch()).loss, **SAME)
    assert ours.num_computed == [(len(LENGTHS), WIDTH)]


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # that the compiler looks at
def test_a_decoder_that_is_compiled_later_gets_the_batch_as_it_is(family, wrapped):
    model, ours = pair(family)
    ours.get_input_embeddings()._forward_hooks.clear()  # no list for the compiler to look at
    if wrapped:
        ours.model = torch.compile(ours.model, backend="eager")
    else:
        ours.model.compile(backend="eager")
    for batch in (full(), ragged()):
        torch.testing.assert_close(ours(**batch).loss, model(**batch).loss, **SAME)


def test_generation_in_batches_finds_an_attention():
    _, ours = pair("gpt_oss")
    if "paged|sdpa" not in AttentionInterface._global_mapping:  # later ones take it from eager alone, and say so
        ours.set_attn_implementation("eager")
    ours.set_attn_implementation(f"paged|{ours.config._attn_implementation}")
    of_ours = AttentionInterface._global_mapping[ours.config._attn_implementation]
    assert of_ours is AttentionInterface._global_mapping["paged|eager"]


def test_rows_within_the_window_stay_as_they_are():
    model, ours = pair("mixtral", sliding_window=WIDTH)
    torch.testing.assert_close(ours(**full()).loss, model(**full()).loss, **SAME)
    assert ours.num_computed == [(len(LENGTHS), WIDTH)]


@pytest.mark.parametrize(
    ("family", "config"), [("mixtral", {"sliding_window": None}), ("qwen2_moe", {}), ("dots1", {})]
)
def test_a_window_that_no_layer_has_is_none(family, config):
    model, ours = pair(family, **config)
    torch.testing.assert_close(ours(**full()).loss, model(**full()).loss, **SAME)
    assert ours.num_computed == [(len(LENGTHS), WIDTH)]
    assert padding.told_of_attention(ours) == []


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


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_without_a_cache_evaluation_and_losses_of_ones_own_are_ours_too(masked, training):
    model, ours = pair("gpt_oss")
    batch = full(masked)
    for each in (model, ours):
        each.train(training)
        each.config.use_cache = False  # as Trainer does
    labels = None if training else batch["labels"]
    more = {"attention_mask": batch.get("attention_mask"), "labels": labels}
    found, expected = (each(batch["input_ids"], **more) for each in (ours, model))
    torch.testing.assert_close(found.logits, expected.logits, **SAME)
    if not training:
        torch.testing.assert_close(found.loss, expected.loss, **SAME)
    assert found.past_key_values is None
    padded = ragged()["attention_mask"]
    found, expected = (each(batch["input_ids"], attention_mask=padded).logits for each in (ours, model))
    assert torch.equal(found, expected)
    assert ours.num_computed == [WHOLE, (len(LENGTHS), WIDTH)]


def test_packed_rows_that_transformers_keeps_apart_are_not_taken_for_whole_ones():
    model, ours = pair("gpt_oss")
    ours._moe_accel_padding = dataclasses.replace(ours._moe_accel_padding, packed=False)
    batch = full(masked=False) | {"use_cache": False}
    batch["position_ids"] = torch.arange(WIDTH).remainder(7).expand(len(LENGTHS), -1)
    torch.testing.assert_close(ours(**batch).loss, model(**batch).loss, **SAME)
    assert ours.num_computed == [(len(LENGTHS), WIDTH)]


def test_the_config_that_is_saved_says_nothing_of_it(tmp_path):
    model, ours = pair("gpt_oss")
    assert ours.config._attn_implementation == attention.NO_SDPA
    assert ours.config.to_dict() == model.config.to_dict()
    ours.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_a_model_that_was_written_whole_computes_in_another_process(family, tmp_path):
    _, ours = pair(family)
    ours.get_input_embeddings()._forward_hooks.clear()  # a function of this file
    batches = full(), ragged(), full() | {"use_cache": True}
    torch.save((ours, batches, [ours(**batch).loss for batch in batches]), tmp_path / "model.pt")
    done = python(
        f"""
        import torch
        model, batches, expected = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        for batch, loss in zip(batches, expected):
            torch.testing.assert_close(model(**batch).loss, loss)
        print("the same")
        """
    )
    assert done.stdout == "the same\n", done.stderr


def test_the_report_says_so():
    notes = [padding.told_of_attention(pair(family)[1]) for family in ("gpt_oss", "mixtral", "qwen3_moe")]
    assert "attention for which transformers has no sdpa by flash attention" in notes[0][0]
    assert "attention in windows of 8 tokens by flash attention" in notes[1][0]
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
def test_attention_that_cannot_be_ours_stays(change):
    model = build_tiny("gpt_oss")
    change(model)
    before = model.config._attn_implementation
    assert padding.install(model).reason == REFUSED[change]
    assert (model.config._attn_implementation, len(model._forward_pre_hooks)) == (before, 0)
    assert padding.told_of_attention(model) == []


@pytest.mark.parametrize("kind", ["heavily_compressed_attention", "compressed_sparse_attention"])
def test_layers_that_see_groups_of_tokens_are_seen_by_the_proof(kind):
    model = build_tiny("deepseek_v4", layer_types=["sliding_attention", kind])
    assert "a layer does more than attend with its mask" in padding.install(model).reason


@pytest.mark.parametrize("family", [name for name in IN_FP32 if name in available_families()])
def test_a_softmax_in_fp32_is_as_near_as_fp32(family):
    model, ours = pair(family, IN_FP32[family])
    gradients = []
    for each in (model, ours):
        each(**full()).loss.backward()
        gradients.append(torch.cat([parameter.grad.view(-1) for parameter in each.parameters()]))
    assert ours.num_computed == [WHOLE]
    assert (gradients[1] - gradients[0]).norm() <= 1e-6 * gradients[0].norm()


def test_a_class_of_ones_own_attends_as_the_one_it_is_derived_from():
    model = build_tiny("gpt_oss")
    layer = model.model.layers[0].self_attn
    layer.__class__ = type("Mine", (type(layer),), {"__module__": __name__})
    assert attention.eager_of(layer) is transformers.models.gpt_oss.modeling_gpt_oss.eager_attention_forward
    assert attention.eager_of(torch.nn.Linear(1, 1)) is None
