"""`kept_layers`: the last layers compute once in forward, whoever checkpoints activations, and whenever."""

from types import SimpleNamespace

import accelerate.accelerator
import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from transformers import Qwen3Config, Qwen3ForCausalLM

from moe_accel import MoEConfig, kept, plugin
from moe_accel.errors import ConfigError
from tests.families import build_tiny, tiny_inputs, tiny_loss

pytestmark = pytest.mark.usefixtures("new_accelerate_state")


def prepared(model, num_kept):
    accelerator = Accelerator(parallelism_config=MoEConfig(kept_layers=num_kept))
    model = accelerator.prepare(model)
    return model, [note for note in plugin.reports(accelerator)[0].notes if "kept_layers" in note]


def times_computed(model):
    """How often each layer's attention computes in one step, first layer first."""
    counts = [0] * len(model.model.layers)
    for at, layer in enumerate(model.model.layers):

        def count(*_args, at=at):
            counts[at] += 1

        layer.self_attn.register_forward_pre_hook(count)
    tiny_loss(model, tiny_inputs("qwen3_moe")).backward()
    return counts


def three_layers():
    return build_tiny("qwen3_moe", num_hidden_layers=3)


def test_checkpointing_that_is_on_before_prepare_leaves_them_out():
    model = three_layers()
    model.gradient_checkpointing_enable()
    model, notes = prepared(model, 1)
    assert notes == ["kept_layers: the last layer of 3 will not be recomputed, but for a projection"]
    assert times_computed(model) == [2, 2, 1]


def test_checkpointing_that_is_switched_on_after_prepare_leaves_them_out_each_time():
    model, notes = prepared(three_layers(), 2)
    said = "kept_layers: nothing is checkpointed so far; if it is later, the last 2 layers of 3 will be left out"
    assert notes == [said]
    for _ in range(2):
        model.gradient_checkpointing_enable()
        assert [each.gradient_checkpointing for each in model.model.layers] == [True, False, False]
        model.gradient_checkpointing_disable()
    model.gradient_checkpointing_enable()
    assert times_computed(model) == [2, 1, 1]


def test_a_model_that_keeps_none_is_checkpointed_whole():
    model, notes = prepared(three_layers(), 0)
    model.gradient_checkpointing_enable()
    assert (notes, times_computed(model)) == ([], [2, 2, 2])


def fsdp(monkeypatch, version=2, **options):
    """An accelerator, as far as checkpointing by FSDP reads it, and its plugin."""
    monkeypatch.setattr(accelerate.accelerator, "fsdp2_apply_ac", accelerate.accelerator.fsdp2_apply_ac)
    kept.install()
    options = {"auto_wrap_policy": "transformer_based_wrap"} | options
    made = FullyShardedDataParallelPlugin(fsdp_version=version, activation_checkpointing=True, **options)
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=made)), made


@pytest.mark.parametrize("num_kept", [0, 2])
def test_fsdps_checkpointing_leaves_them_out(monkeypatch, num_kept):
    model = three_layers()
    accelerator, made = fsdp(monkeypatch)
    notes = kept.keep_layers(model, num_kept, made)
    made.set_auto_wrap_policy(model)
    names = list(model.state_dict())
    accelerate.accelerator.fsdp2_apply_ac(accelerator, model)
    assert (
        notes == ["kept_layers: the last 2 layers of 3 will not be recomputed, but for a projection"][: num_kept // 2]
    )
    assert list(model.state_dict()) == names
    assert times_computed(model) == ([2, 1, 1] if num_kept else [2, 2, 2])


def test_of_wrappers_in_wrappers_and_parts_of_layers_nothing_is_left(monkeypatch):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper, offload_wrapper

    model = three_layers()
    kept.keep_layers(model, 1)
    for layer in model.model.layers:
        layer.mlp = checkpoint_wrapper(layer.mlp)
    for at, layer in enumerate(model.model.layers):
        model.model.layers[at] = offload_wrapper(checkpoint_wrapper(layer))
    kept.unwrap_kept(model)
    assert not [name for name, _ in model.model.layers[2].named_modules() if "wrapped" in name]
    wrapped = "_checkpoint_wrapped_module"
    inside = {name for name, _ in model.model.layers[0].named_modules()}
    assert {f"{wrapped}.{wrapped}", f"{wrapped}.{wrapped}.mlp.{wrapped}"} <= inside


def test_fsdps_checkpointing_of_more_than_a_layer_is_refused(monkeypatch):
    model = three_layers()
    accelerator, made = fsdp(monkeypatch, auto_wrap_policy="size_based_wrap", min_num_params=1000)
    kept.keep_layers(model, 1, made)
    made.set_auto_wrap_policy(model)
    with pytest.raises(ConfigError, match=r"^kept_layers=1: activation_checkpointing recomputes model.layers as one"):
        accelerate.accelerator.fsdp2_apply_ac(accelerator, model)


@pytest.mark.parametrize("num_kept", [0, 1])
def test_without_an_auto_wrap_policy_transformers_checkpoints(monkeypatch, num_kept):
    """accelerate, which asks the policy for each module, fails there."""
    model = three_layers()
    accelerator, made = fsdp(monkeypatch, auto_wrap_policy="no_wrap")
    kept.keep_layers(model, num_kept, made)
    names = list(model.state_dict())
    assert accelerate.accelerator.fsdp2_apply_ac(accelerator, model) is model
    assert list(model.state_dict()) == names
    assert times_computed(model) == ([2, 2, 1] if num_kept else [2, 2, 2])


def test_without_an_auto_wrap_policy_frozen_layers_are_computed_once(monkeypatch):
    """transformers lets the embeddings' output require a gradient, which only reentrant checkpointing needs."""
    model = three_layers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.2" in name)
    accelerator, _ = fsdp(monkeypatch, auto_wrap_policy="no_wrap")
    accelerate.accelerator.fsdp2_apply_ac(accelerator, model)
    assert times_computed(model) == [1, 1, 2]


def test_without_an_auto_wrap_policy_the_mixture_is_checkpointed_wherever_it_is(monkeypatch):
    accelerator, made = fsdp(monkeypatch, auto_wrap_policy="no_wrap")
    dense = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=1, hidden_size=8, intermediate_size=8, vocab_size=8))
    both = torch.nn.ModuleDict({"dense": dense, "mixture": three_layers()})
    accelerate.accelerator.fsdp2_apply_ac(accelerator, both)
    assert not dense.is_gradient_checkpointing
    assert both["mixture"].is_gradient_checkpointing
    made.auto_wrap_policy = lambda **_: False  # of somebody's own: accelerate takes it for none
    model = three_layers()
    accelerate.accelerator.fsdp2_apply_ac(accelerator, model)
    assert model.is_gradient_checkpointing


def test_without_an_auto_wrap_policy_what_is_offloaded_is_refused_and_a_dense_model_is_accelerates(monkeypatch):
    accelerator, _ = fsdp(monkeypatch, auto_wrap_policy="no_wrap", activation_checkpointing_offload=True)
    with pytest.raises(ConfigError, match=r"^activation_checkpointing_offload needs an auto-wrap policy of layers"):
        accelerate.accelerator.fsdp2_apply_ac(accelerator, three_layers())
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        accelerate.accelerator.fsdp2_apply_ac(accelerator, torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_fsdp_1_is_refused_and_so_are_more_layers_than_there_are(monkeypatch):
    _, made = fsdp(monkeypatch, 1)
    with pytest.raises(ConfigError, match=r"^kept_layers=1 needs FSDP version 2 beside activation_checkpointing"):
        kept.keep_layers(three_layers(), 1, made)
    with pytest.raises(ConfigError, match="kept_layers=4 must be at most 3, the layers that Qwen3MoeForCausalLM"):
        kept.keep_layers(three_layers(), 4)
    with pytest.raises(ConfigError, match="kept_layers=-1 must be at least 0"):
        MoEConfig(kept_layers=-1)


def test_gradients_are_the_same():
    found = []
    for num_kept in (0, 1):
        AcceleratorState._reset_state(True)  # which holds the config of the first Accelerator
        model, _ = prepared(three_layers(), num_kept)
        model.gradient_checkpointing_enable()
        tiny_loss(model, tiny_inputs("qwen3_moe")).backward()
        assert model.model.layers[-1].gradient_checkpointing == (num_kept == 0)
        found.append({name: each.grad for name, each in model.named_parameters()})
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_the_last_layers_are_those_of_the_language_model_where_a_vision_tower_comes_after_it():
    model = build_tiny("ernie4_5_vl_moe")
    kept.keep_layers(model, 1)
    model.gradient_checkpointing_enable()
    on = [
        each.gradient_checkpointing for each in (*model.model.language_model.layers, *model.model.vision_tower.blocks)
    ]
    assert on == [True, False, True]
