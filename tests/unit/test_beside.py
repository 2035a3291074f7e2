"""Shared experts beside dispatch: when they are computed, in both directions, and that no number and no hook sees it.

Blocks that do otherwise than those of transformers are in `test_beside_blocks`.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from moe_accel import garbage
from moe_accel.dispatch.halves import travel
from moe_accel.experts import find_experts, settings_of
from tests.families import available_families, build_tiny, tiny_inputs, tiny_loss
from tests.gpu.beside import hidden
from tests.gpu.timeline import Span
from tests.unit.recorded_transport import EARLY, LATE, Carried, assert_same, built, shared_of, trained, transported

both = pytest.mark.parametrize("family", [LATE, EARLY])
MOVED = ["launch", "shared", "arrive", "combine", "back: launch", "back: shared", "back: arrive"]
IN_PLACE = {
    LATE: ["launch", "arrive", "combine", "shared", "back: shared", "back: launch", "back: arrive"],
    EARLY: ["shared", "launch", "arrive", "combine", "back: launch", "back: arrive", "back: shared"],
}
"""What happens in one layer, moved and not."""


# ---- when


@both
def test_it_is_computed_while_tokens_travel_in_both_directions_and_no_number_changes(family):
    still, events, _ = built(family, moved=False, num_hidden_layers=1)
    truth = trained(family, still)
    assert events == IN_PLACE[family]
    model, events, said = built(family, num_hidden_layers=1)
    assert_same(trained(family, model), truth)
    assert events == MOVED
    assert said == ["shared experts of 1 of 1 layers computed while tokens travel"]


@both
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_recompute_goes_the_way_of_forward(family, reentrant):
    truth = trained(family, built(family, moved=False)[0])
    model, events, _ = built(family)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(trained(family, model), truth)
    assert events[:8] == MOVED[:4] * 2
    recomputed = MOVED if reentrant or family == EARLY else [each for each in MOVED if each != "combine"]
    assert events[8:] == recomputed * 2, "without combine, where nothing that comes after it is kept"


@both
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_too(family, mode, context):
    model, events, _ = built(family)
    still = built(family, moved=False)[0]
    with context():
        losses = [tiny_loss(getattr(each, mode)(), tiny_inputs(family)).item() for each in (model, still)]
    assert losses[0] == losses[1]
    assert events == MOVED[:4] * 2


@both
def test_under_autocast_it_is_computed_in_the_same_dtype(family):
    model, still = (built(family, moved)[0] for moved in (True, False))
    with torch.autocast("cpu", torch.bfloat16):
        losses = [tiny_loss(each.float(), tiny_inputs(family)).item() for each in (model, still)]
    assert losses[0] == losses[1]


# ---- what a user puts on it


@both
def test_hooks_on_the_shared_expert_run_once_with_its_own_tensors(family):
    model, events, _ = built(family, num_hidden_layers=1)
    (shared,) = shared_of(model)
    seen = []
    shared.register_forward_pre_hook(lambda module, args: seen.append(("before", type(args[0]))))
    shared.register_forward_hook(lambda module, args, output: seen.append(("after", type(output))))
    shared.register_full_backward_hook(lambda module, of_inputs, of_outputs: seen.append(("back", type(of_outputs[0]))))
    still, _, _ = built(family, moved=False, num_hidden_layers=1)
    assert_same(trained(family, model), trained(family, still))
    assert seen == [(what, torch.Tensor) for what in ("before", "after", "back")]
    assert events == MOVED


@both
def test_a_hook_that_changes_its_output_is_obeyed(family):
    results = []
    for moved in (True, False):
        model = built(family, moved)[0]
        for shared in shared_of(model):
            shared.register_forward_hook(lambda module, args, output: 3 * output)
        results.append(trained(family, model))
    assert_same(*results)


@pytest.mark.parametrize("family", ["hy_v3", EARLY])
def test_lora_on_its_layers_trains_as_ever(family):
    from peft import LoraConfig, get_peft_model

    results = []
    for moved in (True, False):
        torch.manual_seed(0)
        config = LoraConfig(r=2, target_modules=r".*shared_experts?\.down_proj", init_lora_weights=False)
        model = get_peft_model(build_tiny(family, torch.float64), config)
        _, said = transported(model, moved)
        results.append(trained(family, model))
        assert len(said) == moved
        assert all("shared" in name and each.any() for name, each in results[-1][1].items())
    assert_same(*results)


@both
def test_where_something_was_put_around_it_since_it_is_computed_there(family):
    model, events, _ = built(family, num_hidden_layers=1)
    (name,) = (name for name, each in model.named_modules() if each in shared_of(model))
    model.set_submodule(name, checkpoint_wrapper(model.get_submodule(name)))
    truth = trained(family, built(family, moved=False, num_hidden_layers=1)[0])
    loss, gradients = trained(family, model)
    assert_same(
        (loss, {name.replace("_checkpoint_wrapped_module.", ""): each for name, each in gradients.items()}), truth
    )
    assert [each for each in events if "back" not in each][:4] == [
        each for each in IN_PLACE[family] if "back" not in each
    ]


@both
def test_a_call_from_outside_of_its_block_is_an_ordinary_one(family):
    model, _, _ = built(family)
    shared = shared_of(model)[0]
    x = torch.randn(3, shared.down_proj.out_features, dtype=torch.float64)
    assert type(shared(x)) is torch.Tensor


@both
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_under_torch_compile_it_stays_where_it_is(family):
    model, events, _ = built(family, num_hidden_layers=1)
    truth = trained(family, built(family, moved=False, num_hidden_layers=1)[0])
    model.model.layers[0].mlp.compile(backend="eager")
    assert_same(trained(family, model), truth)
    assert [each for each in events if "back" not in each] == IN_PLACE[family][:4]


# ---- the model around it


@both
def test_a_copied_model_moves_its_own(family):
    model, events, _ = built(family, num_hidden_layers=1)
    copied = copy.deepcopy(model)
    beside = [settings_of(module).beside for each in (model, copied) for _, module in find_experts(each)]
    assert [each.shared for each in beside] == [*shared_of(model), *shared_of(copied)]
    assert beside[0].slot is not beside[1].slot
    assert beside[1].slot is beside[1].shared._moe_accel_slot
    truth = trained(family, model)
    del events[:]
    assert_same(trained(family, copied), truth)
    assert events == MOVED


@both
def test_a_pickled_block_computes_as_ever(family):
    model, _, _ = built(family, num_hidden_layers=1)
    (shared,) = shared_of(model)
    for part in (shared.down_proj, shared.gate_proj):  # the test's own
        part._forward_hooks.clear(), part._backward_pre_hooks.clear()
    loaded = pickle.loads(pickle.dumps(shared))
    x = torch.randn(3, shared.down_proj.out_features, dtype=torch.float64)
    assert torch.equal(loaded(x), shared(x))


@both
def test_a_deleted_model_is_gone_at_once(family):
    model, _, _ = built(family)
    trained(family, model)
    gc.collect()
    alive = [weakref.ref(each) for each in shared_of(model)]
    with garbage.left_alone():
        del model
        assert [each() for each in alive] == [None, None]


@both
def test_nothing_is_held_between_forwards(family):
    model, _, _ = built(family)
    trained(family, model)
    slots = [settings_of(module).beside.slot for _, module in find_experts(model)]
    assert [(each.is_open, each.seen, each.made, each.awaited) for each in slots] == [(False, None, None, None)] * 2


ALL_BUT = {
    "afmoe": "used before the experts: looked at in another shape",
    "deepseek_v4": "in layers that route by token ids, without which the block does not run",
    "ernie4_5_vl_moe": "another block that routes text and images apart",
    "granitemoe_swa": "in the layer, not in the block",
    "granitemoehybrid": "in the layer, not in the block",
    "granitemoeshared": "in the layer, not in the block",
    "inkling": "takes routing weights",
}
"""Families with shared experts that stay where they are, and why."""


@pytest.mark.slow
@pytest.mark.parametrize("family", available_families())
def test_of_every_family_the_shared_experts_are_moved_and_no_number_changes(family):
    models = [build_tiny(family, torch.float64) for _ in range(2)]
    said = [transported(model, moved)[1] for model, moved in zip(models, (False, True), strict=True)][1]
    has_shared = any("shared" in name and "gate" not in name for name, _ in models[0].named_parameters())
    assert any("while tokens travel" in each for each in said) == (
        (has_shared and ALL_BUT.keys().isdisjoint({family})) or family == "deepseek_v4"
    )
    truth, found = (trained(family, model) for model in models)
    assert_same(found, truth)


def test_families_without_a_shared_expert_are_not_spoken_of():
    assert built("qwen3_moe")[2] == []


def test_rows_under_way_are_waited_for_when_what_is_beside_them_fails():
    events = []

    def fail():
        raise KeyError("beside")

    with pytest.raises(KeyError, match="beside"):
        travel(torch.ones(2, 3), torch.ones(2, 1), Carried(events), fail)
    assert events == ["launch", "arrive"]


def test_the_measurement_counts_communication_that_another_kernel_runs_beside():
    talks = [Span(0, 10, "ncclDevKernel_SendRecv"), Span(20, 10, "void deep_ep::intranode::combine")]
    talks += [Span(0, 40, "ncclDevKernel_AllGather")]
    others = [Span(5, 3, "gemm"), Span(6, 4, "gemm"), Span(29, 9, "gemm"), Span(20, 10, "Memcpy DtoD")]
    assert hidden(talks + others) == (5 + 1) / 20
    assert hidden(others) == 0
