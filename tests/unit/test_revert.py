"""Converted group by group, expert by expert, weights are what `save_pretrained` makes of the whole model."""

import pytest
import torch
from transformers.core_model_loading import revert_weight_conversion

from moe_accel.checkpoint.load import default_conversions
from moe_accel.checkpoint.revert import group_weights
from tests.families import EXPERTS, available_families, build_tiny


@pytest.mark.parametrize("family", available_families())
@torch.no_grad()
def test_groups_and_slices_give_the_names_and_bits_of_the_whole(family):
    model = build_tiny(family)
    model.__dict__["_weight_conversions"] = default_conversions(model)
    state = dict(model.state_dict())
    truth = revert_weight_conversion(model, state)
    groups = group_weights(model, {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}, stacked=False)
    assert sorted(name for group in groups for name in group.targets) == sorted(truth)
    for group in groups:
        sources = {name: state[name] for name, _ in group.sources}
        cuts = [(0, 0)]  # all at once
        if group.num_rows is not None:
            cuts = [(start, min(start + 3, group.num_rows)) for start in range(0, group.num_rows, 3)]
        made: dict[str, list[torch.Tensor]] = {}
        for start, stop in cuts:
            rows = sources if group.num_rows is None else {name: each[start:stop] for name, each in sources.items()}
            for name, tensor in group.convert(model, rows, start).items():
                made.setdefault(name, []).append(tensor)
        assert made.keys() == group.targets.keys()
        for name, parts in made.items():
            tensor = parts[0] if group.num_rows is None or group.templates else torch.cat(parts)
            assert (tensor.shape, tensor.dtype) == group.targets[name]
            assert torch.equal(tensor, truth[name]), name


@pytest.mark.parametrize(
    "family", ["qwen3_moe", "mixtral", "deepseek_v3", "nemotron_h", "jamba", "gpt_oss", "qwen3_vl_moe"]
)
def test_experts_are_cut_by_expert_so_that_no_rank_needs_a_whole_layer(family):
    model = build_tiny(family)
    model.__dict__["_weight_conversions"] = default_conversions(model)
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    groups = [
        group
        for group in group_weights(model, shapes, stacked=False)
        if any(".experts." in name and "shared" not in name for name, _ in group.sources)
    ]
    assert groups
    assert {group.num_rows for group in groups} == {EXPERTS}


def test_stacked_keeps_every_name_and_shape():
    model = build_tiny("mixtral")
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
    groups = group_weights(model, shapes, stacked=True)
    assert {name: each for group in groups for name, each in group.targets.items()} == shapes
