"""Batches without their padding: the numbers of the padded batch of stock transformers, and who is left alone."""

import copy
import functools
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers.models.qwen3_moe import modeling_qwen3_moe

from moe_accel import loss, padding
from moe_accel.padding import attention, twin
from tests.families import build_tiny
from tests.family_data import VOCAB

LENGTHS = (9, 17, 4)
WIDTH = 19
"""More than the longest, and more than twice the sliding window of the tiny configs."""
SAME = {"rtol": 2e-5, "atol": 1e-7, "check_dtype": False}
"""fp64, but for routers, norms and rotary embeddings that compute in fp32."""


def ragged(left: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), WIDTH)
    ids = torch.randint(VOCAB, shape, generator=generator)
    mask = torch.zeros(shape, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        mask[row, WIDTH - length if left else 0 :][:length] = 1
    labels = ids.where((mask == 1) & (torch.rand(shape, generator=generator) < 0.6), -100)
    if left:
        labels[(mask.cumsum(1) == 1) & (mask == 1)] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed() -> dict[str, Any]:
    ids = torch.randint(VOCAB, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    return {"input_ids": ids, "position_ids": positions, "labels": ids.clone(), "use_cache": False}


def pair(family: str = "qwen3_moe", padded: str = "left out", **config: Any) -> tuple[Any, Any]:
    """A model of stock transformers, and the same one with the fused loss, and what becomes of its padding."""
    model = build_tiny(family, torch.float64, **config)
    model.set_experts_implementation("eager")  # takes fp64
    ours = copy.deepcopy(model)
    loss.install(ours)
    assert padding.install(ours).value == padded
    ours.num_computed = []
    ours.get_input_embeddings().register_forward_hook(lambda _, args, __: ours.num_computed.append(args[0].shape))
    return model, ours


def assert_same(model: Any, ours: Any, batch: dict[str, Any], **more: Any) -> None:
    outputs = []
    for each in (model, ours):
        each.zero_grad()
        outputs.append(each(**batch, **more))
        outputs[-1].loss.backward()
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss, **SAME)
    found = dict(ours.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert found[name].grad is None
        else:
            torch.testing.assert_close(
                found[name].grad, parameter.grad, **SAME, msg=lambda m, name=name: f"{name}: {m}"
            )
    real = batch["attention_mask"] == 1
    logits = outputs[1].logits[...]
    assert logits.shape == outputs[0].logits.shape
    torch.testing.assert_close(logits[real], outputs[0].logits[real], **SAME)
    assert not logits[~real].any()


FAMILIES = ["qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "glm4_moe", "granitemoe", "cohere2_moe"]


RIGHT = [pytest.param(family, False, id=f"{family}-right") for family in FAMILIES]
LEFT = [
    pytest.param(family, True, id=f"{family}-left", marks=[] if family == "mixtral" else [pytest.mark.slow])
    for family in FAMILIES
]


@pytest.mark.parametrize(("family", "left"), [*RIGHT, *LEFT])
def test_loss_gradients_and_logits_are_those_of_the_padded_batch(family, left):
    model, ours = pair(family)
    assert_same(model, ours, ragged(left))
    assert ours.num_computed == [(1, sum(LENGTHS))]


def test_a_vocabulary_of_few_letters_is_enough():
    model, ours = pair(vocab_size=50)
    batch = ragged()
    batch["input_ids"] %= 50
    batch["labels"] = batch["labels"].where(batch["labels"] < 0, batch["labels"] % 50)
    assert_same(model, ours, batch)


@pytest.mark.parametrize("config", [{}, {"sliding_window": 4, "use_sliding_window": True}], ids=["full", "sliding"])
@pytest.mark.parametrize("reentrant", [False, True, None], ids=["checkpointed", "reentrant", "kept"])
def test_recompute_attends_within_sequences_too(reentrant, config):
    model, ours = pair(num_key_value_heads=2, **config)
    if reentrant is not None:
        ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(model, ours, ragged())


@pytest.mark.parametrize("more", [{"output_router_logits": True}, {"num_items_in_batch": torch.tensor(77)}], ids=str)
def test_the_losses_of_router_and_trainer_are_the_same(more):
    model, ours = pair(router_aux_loss_coef=0.5)
    assert_same(model, ours, ragged(), **more)
    assert_same(model, ours, ragged(seed=1), **more)


def test_positions_that_are_given_are_kept_and_arguments_may_come_by_their_place():
    model, ours = pair()
    batch = ragged(left=True)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0) * 3
    expected, found = (each(*list(batch.values())[:2], positions, labels=batch["labels"]) for each in (model, ours))
    torch.testing.assert_close(found.loss, expected.loss, **SAME)
    assert ours.num_computed == [(1, sum(LENGTHS))]


def test_whatever_comes_out_has_the_shape_of_the_batch():
    model, ours = pair()
    batch = ragged()
    asked = {"output_hidden_states": True, "output_router_logits": True}
    expected, found = (each(**batch, **asked) for each in (model, ours))
    real = batch["attention_mask"] == 1
    assert expected.keys() - found.keys() in ({"past_key_values"}, {"cache"})  # of 5.17, of 5.24
    for one, other in zip(expected.hidden_states, found.hidden_states, strict=True):
        torch.testing.assert_close(other[real], one[real], **SAME)
    for one, other in zip(expected.router_logits, found.router_logits, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(other[real.view(-1)], one[real.view(-1)], **SAME)


def test_the_fused_head_of_trl_gives_each_tokens_numbers():
    from trl.trainer.utils import add_fused_lm_head

    model = build_tiny("qwen3_moe", torch.float64)
    model.set_experts_implementation("eager")
    ours = copy.deepcopy(model)
    for each in (model, ours):
        add_fused_lm_head(each, outputs=("log_probs", "entropy", "is_top1"))
    assert padding.install(ours).value == "left out"
    batch = ragged()
    expected, found = (
        each(**batch, fused_lm_head=True, output_router_logits=True, use_cache=False) for each in (model, ours)
    )
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **SAME, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_packed_rows_need_no_mask(training, monkeypatch):
    model, ours = pair()
    batch = packed()
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", without_masks())
    for each in (model, ours):
        each.train(training)
    found = ours(**batch).loss
    monkeypatch.undo()
    torch.testing.assert_close(found, model(**batch).loss, **SAME)


def without_masks():
    attend = functional.scaled_dot_product_attention

    def unmasked(*args, attn_mask=None, **kwargs):
        assert attn_mask is None
        return attend(*args, attn_mask=attn_mask, **kwargs)

    return unmasked


def test_several_packed_rows_do_not_predict_each_others_first_token():
    model, ours = pair()
    batch = packed()
    batch = {name: torch.cat([each, each.flip(1)]) if name != "use_cache" else each for name, each in batch.items()}
    batch["position_ids"] = batch["position_ids"][:1].expand(2, -1)
    expected, found = (each(**batch) for each in (model, ours))
    torch.testing.assert_close(found.loss, expected.loss, **SAME)
    torch.testing.assert_close(found.logits[...], expected.logits, **SAME)
    assert ours.num_computed == [(1, 2 * sum(LENGTHS))]


def without_padding(batch):
    batch["attention_mask"][:] = 1
    return batch


def labels_on_padding(batch):
    batch["labels"][0, LENGTHS[0]] = 5
    return batch


def a_hole(batch):
    batch["attention_mask"][1, 3] = 0
    batch["labels"][1, 3:5] = -100
    return batch


def all_padding(batch):
    batch["attention_mask"][:] = 0
    return batch


def with_cache(batch):
    return batch | {"use_cache": True}


def few_logits(batch):
    return batch | {"logits_to_keep": WIDTH}


def shifted(batch):
    return batch | {"shift_labels": functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)}


@pytest.mark.parametrize(
    "change", [without_padding, labels_on_padding, a_hole, all_padding, with_cache, few_logits, shifted]
)
def test_other_batches_stay_as_they_are(change, capsys):
    _, ours = pair()
    for _ in range(2):
        ours(**change(ragged()))
    assert ours.num_computed == [(len(LENGTHS), WIDTH)] * 2
    told = capsys.readouterr().err.splitlines()
    why = {labels_on_padding: "labels of padding, or of a token behind padding, are not -100", a_hole: "padding inside"}
    assert len(told) == (change in why)
    assert why.get(change, "") in "".join(told)


@pytest.mark.parametrize("case", ["eval", "no-labels"])
def test_padding_is_computed_where_nothing_is_trained(case):
    model, ours = pair()
    batch = ragged()
    if case == "no-labels":
        del batch["labels"]
    for each in (model, ours):
        each.train(case != "eval")
    assert torch.equal(ours(**batch).logits, model(**batch).logits)
    assert ours.num_computed == [(len(LENGTHS), WIDTH)]


def test_an_error_in_a_forward_leaves_the_next_one_untouched():
    model, ours = pair()
    with pytest.raises(IndexError):
        ours(**(ragged() | {"input_ids": torch.full((len(LENGTHS), WIDTH), VOCAB)}))
    assert attention.current.get() is None
    assert torch.equal(model(input_ids=ragged()["input_ids"]).logits, ours(input_ids=ragged()["input_ids"]).logits)


def test_an_empty_row_is_nothing():
    model, ours = pair()
    batch = ragged()
    for name, value in {"attention_mask": 0, "labels": -100}.items():
        batch[name][2] = value
    expected, found = (each(**batch).loss for each in (model, ours))
    torch.testing.assert_close(found, expected, **SAME)
    assert ours.num_computed == [(1, sum(LENGTHS[:2]))]


REFUSED = {
    "qwen3_next": "tokens meet elsewhere than in its attention",
    "jamba": "tokens meet elsewhere than in its attention",
    "nemotron_h": "tokens meet elsewhere than in its attention",
    "lfm2_moe": "tokens meet elsewhere than in its attention",
    "minimax": "tokens meet elsewhere than in its attention",
    "deepseek_v32": "a layer does more than attend with its mask",
}


def slow(family: str) -> Any:
    return pytest.param(family, marks=pytest.mark.slow) if family in ("nemotron_h", "lfm2_moe", "minimax") else family


@pytest.mark.parametrize("family", map(slow, REFUSED))
def test_a_model_that_mixes_tokens_otherwise_keeps_its_padding(family):
    choice = padding.install(build_tiny(family))
    assert choice.value == "computed"
    assert REFUSED[family] in choice.reason


def rolled(layer):
    original = layer.forward

    @functools.wraps(original)
    def forward(self, hidden_states, *args, **kwargs):
        return original(self, hidden_states, *args, **kwargs) + 0.1 * hidden_states.roll(1, 1)

    return forward


def test_the_proof_sees_what_the_class_does(monkeypatch):
    layer = modeling_qwen3_moe.Qwen3MoeDecoderLayer
    monkeypatch.setattr(layer, "forward", rolled(layer))
    monkeypatch.setattr(twin, "_proven", {})
    assert "tokens meet elsewhere" in padding.install(build_tiny("qwen3_moe")).reason


def replaced(model):
    own = model.model.norm.forward
    model.model.norm.forward = lambda x: own(x)


def another_class(model):
    model.model.layers[0].mlp = torch.nn.Conv1d(1, 1, 1)


def dropping(model):
    model.config.attention_dropout = 0.1


def jittering(model):
    model.config.router_jitter_noise = 0.1


def eager(model):
    model.set_attn_implementation("eager")


def growing(model):
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


CHANGED = {
    replaced: "somebody else replaced the forward of model.norm",
    another_class: "Conv1d is not in a model of this config",
    dropping: "attention with dropout cannot be computed without padding",
    jittering: "it draws random numbers beyond dropout",
    eager: "attn_implementation is eager, and must be sdpa",
    growing: "its rotary embedding depends on the longest row of a batch",
}


@pytest.mark.parametrize("change", CHANGED, ids=lambda change: change.__name__)
def test_a_model_that_was_changed_is_not_taken_for_its_class(change):
    model = build_tiny("mixtral", sliding_window=None)
    change(model)
    assert CHANGED[change] in padding.install(model).reason


def test_the_proof_draws_no_random_number_and_leaves_defaults_alone():
    model = build_tiny("olmoe", norm_topk_prob=True, rms_norm_eps=1.5e-5)
    before = torch.get_rng_state(), torch.get_num_threads(), torch.get_default_dtype()
    padding.install(model)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (torch.get_num_threads(), torch.get_default_dtype())


def test_installing_twice_hooks_once_and_off_is_off():
    model = build_tiny("qwen3_moe")
    assert [padding.install(model).value for _ in range(2)] == ["left out", "left out"]
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == (1, 1)
    for off in ("off", False):
        assert padding.install(build_tiny("qwen3_moe"), off).value == "computed"
    assert "torch.compile" in padding.install(build_tiny("qwen3_moe"), compiled=True).reason
