"""prepare() in one process: the numbers of stock transformers, what is refused, and what accelerate has to keep."""

import inspect
from types import SimpleNamespace

import accelerate.accelerator
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from moe_accel import MoEConfig, plugin
from moe_accel.dispatch import choose, deepep
from moe_accel.errors import ConfigError, DependencyError, UnsupportedModelError
from moe_accel.mesh import build_sparse_mesh
from moe_accel.report import Choice
from moe_accel.version import VERSION
from tests.dist.parity import TOLERANCE, UPDATE_TOLERANCE, largest_error
from tests.dist.training import OPTIMIZER
from tests.families import build_tiny, experts_modules, tiny_inputs, tiny_loss

PATCHED = [
    *((Accelerator, name) for name in ("prepare", "prepare_model", "prepare_optimizer", "free_memory")),
    (accelerate.accelerator, "fsdp2_prepare_model"),
]


@pytest.fixture(autouse=True)
def _accelerate_as_it_was(monkeypatch):
    """Accelerate's singletons are new in the test and gone after it, and so are the plugin's hooks."""
    for owner, name in PATCHED:
        monkeypatch.setattr(owner, name, getattr(owner, name))

    def reset():
        AcceleratorState._reset_state(True)
        GradientState._reset_state()

    reset()
    yield
    reset()


@pytest.fixture
def dense():
    return nn.Linear(2, 2)


def told(error):
    return error.value.message, error.value.hint


def settings_of(model):
    return [module.__dict__.get("_moe_accel") for _, module in experts_modules(model)]


# ---- one process without FSDP


def train(model, accelerator=None, family="qwen3_moe"):
    """Losses and first gradients of three AdamW steps; the model keeps the weights."""
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], **OPTIMIZER)
    if accelerator is not None:
        model, optimizer = accelerator.prepare(model, optimizer)
    losses, gradients = [], {}
    for step in range(3):
        loss = tiny_loss(model, tiny_inputs(family, seed=step))
        loss.backward() if accelerator is None else accelerator.backward(loss)
        losses.append(loss.item())
        gradients = gradients or {
            name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None
        }
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


def assert_same_training(model, accelerator, stock):
    start = {name: each.clone() for name, each in stock.state_dict().items()}
    losses, gradients = train(stock)
    our_losses, our_gradients = train(model, accelerator)
    assert our_losses[0] == pytest.approx(losses[0], rel=TOLERANCE)
    assert our_losses == pytest.approx(losses, rel=UPDATE_TOLERANCE)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert largest_error(our_gradients[name], gradient, gradient.abs().max()) <= TOLERANCE, name
    trained = model.state_dict()
    for name, weight in stock.state_dict().items():
        assert largest_error(trained[name], weight, (weight - start[name]).abs().max()) <= UPDATE_TOLERANCE, name


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_one_process_trains_with_the_numbers_of_stock_transformers(kernels):
    model, stock = build_tiny("qwen3_moe"), build_tiny("qwen3_moe")
    accelerator = Accelerator(parallelism_config=MoEConfig(kernels=kernels))
    assert_same_training(model, accelerator, stock)
    assert {each.config._experts_implementation for _, each in experts_modules(model)} == {"moe_accel"}
    assert "moe_accel" not in {each.config._experts_implementation for _, each in experts_modules(stock)}
    assert [each.kernels for each in settings_of(model)] == ["reference" if kernels == "reference" else "fused"] * 2


def with_adapters(target_modules=None, target_parameters=None):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=target_modules, target_parameters=target_parameters)
    torch.manual_seed(0)
    model = get_peft_model(build_tiny("qwen3_moe"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, where lora_A has no gradient
            nn.init.normal_(parameter, std=0.1)
    return model


ON_ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
ON_EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.mark.parametrize("where", [ON_ATTENTION, ON_EXPERTS], ids=["attention", "experts"])
def test_one_process_trains_peft_adapters_with_the_numbers_of_stock_transformers(where):
    model, accelerator = with_adapters(**where), Accelerator(parallelism_config=MoEConfig())
    assert_same_training(model, accelerator, with_adapters(**where))
    assert [report.model for report in plugin.reports(accelerator)] == ["Qwen3MoeForCausalLM"]


def test_rank_0_says_what_was_done_once(capsys):
    accelerator = Accelerator(parallelism_config=MoEConfig())
    accelerator.prepare(build_tiny("qwen3_moe"))
    parameters = "36.9 K of 36.9 K expert parameters"  # 2 layers x 8 experts x (32 x 48 + 24 x 32)
    assert capsys.readouterr().err == (
        f"moe-accel {VERSION}: Qwen3MoeForCausalLM\n"
        "  mesh        1 rank (not distributed, ep_size 1)\n"
        "  experts     2 of 2 layers of Qwen3MoeExperts: 8 experts, 8 on each rank\n"
        "  dispatcher  none (ep_size 1: every rank has all experts)\n"
        "  kernels     fused (auto: one product per expert on this device)\n"
        "  block       native (kernels need a GPU)\n"
        "  loss        fused (output layer and cross-entropy together, never all logits, where labels are given)\n"
        "  padding     left out (in training with labels, the same numbers in a small copy of the model)\n"
        f"  trainable   {parameters}\n"
    )


# ---- several Accelerators, several models


def test_preparing_twice_changes_nothing_and_says_nothing(capsys):
    accelerator = Accelerator(parallelism_config=MoEConfig())
    model = accelerator.prepare(build_tiny("qwen3_moe"))
    installed = settings_of(model)
    capsys.readouterr()
    assert accelerator.prepare(model) is model
    assert accelerator.prepare_model(model) is model
    assert [id(each) for each in settings_of(model)] == [id(each) for each in installed]
    assert (len(plugin.reports(accelerator)), capsys.readouterr().err) == (1, "")


def test_a_second_accelerator_of_the_process_has_the_config_and_reports_of_its_own():
    first = Accelerator(parallelism_config=MoEConfig(kernels="reference"))
    first.prepare(build_tiny("qwen3_moe"))
    second = Accelerator()
    model = second.prepare(build_tiny("mixtral"))
    assert second.parallelism_config is first.parallelism_config
    assert [each.kernels for each in settings_of(model)] == ["reference"] * 2
    assert [report.model for report in plugin.reports(first)] == ["Qwen3MoeForCausalLM"]
    assert [report.model for report in plugin.reports(second)] == ["MixtralForCausalLM"]


def test_an_accelerator_without_moe_config_leaves_models_alone(capsys, dense):
    Accelerator(parallelism_config=MoEConfig())  # the hooks are in place
    AcceleratorState._reset_state(True)
    plain = Accelerator()
    model, _ = plain.prepare(build_tiny("qwen3_moe"), dense)
    assert settings_of(model) == [None, None]
    assert {each.config._experts_implementation for _, each in experts_modules(model)} != {"moe_accel"}
    assert (plugin.reports(plain), capsys.readouterr().err) == ((), "")


def test_a_dense_model_beside_or_after_a_moe_is_left_to_accelerate(dense):
    accelerator = Accelerator(parallelism_config=MoEConfig())
    forward = type(dense).forward
    moe, beside = accelerator.prepare(build_tiny("qwen3_moe"), dense)
    after = accelerator.prepare(nn.Linear(2, 2))
    assert None not in settings_of(moe)
    assert type(beside).forward is type(after).forward is forward
    assert len(plugin.reports(accelerator)) == 1


def test_two_moes_are_both_swapped():
    accelerator = Accelerator(parallelism_config=MoEConfig())
    models = accelerator.prepare(build_tiny("qwen3_moe"), build_tiny("mixtral"))
    assert [None in settings_of(model) for model in models] == [False, False]
    assert [report.model for report in plugin.reports(accelerator)] == ["Qwen3MoeForCausalLM", "MixtralForCausalLM"]


def test_a_model_that_is_only_evaluated_is_swapped_as_trainer_prepares_it():
    accelerator = Accelerator(parallelism_config=MoEConfig(kernels="reference"))
    model = accelerator.prepare_model(build_tiny("qwen3_moe"), evaluation_mode=True)
    assert [each.kernels for each in settings_of(model)] == ["reference"] * 2


# ---- models that are refused


def test_a_dense_model_alone_is_refused(dense):
    accelerator = Accelerator(parallelism_config=MoEConfig())
    with pytest.raises(UnsupportedModelError) as error:
        accelerator.prepare(dense)
    assert told(error) == (
        "Linear has no mixture of experts that transformers lets an experts function replace",
        "remove moe_config to train a dense model; a class of your own needs transformers' "
        "@use_experts_implementation on its experts",
    )


@pytest.mark.parametrize("beside", [[], ["qwen3_moe"]], ids=["alone", "beside-one-that-is-not"])
def test_an_undecorated_family_is_refused_with_its_reason_and_the_way_on(beside):
    model = nn.ModuleList([build_tiny(family) for family in [*beside, "dbrx"]])
    model = model if beside else model[0]
    accelerator = Accelerator(parallelism_config=MoEConfig())
    with pytest.raises(UnsupportedModelError) as error:
        accelerator.prepare(model)
    assert told(error) == (
        f"{type(model).__name__}: the experts of dbrx (DbrxExperts) cannot be replaced: its weights are three flat "
        "[num_experts * intermediate, hidden] matrices in a nested module, not one stack per projection",
        "remove moe_config and train it with accelerate's FSDP2 as it is",
    )


DISTRIBUTED = "load it without distributed_config, tp_plan and device_map; or remove moe_config"


def test_a_model_that_transformers_distributed_is_refused():
    model = build_tiny("qwen3_moe")
    model.config.distributed_config = SimpleNamespace(enable_expert_parallel=True)
    with pytest.raises(UnsupportedModelError) as error:
        Accelerator(parallelism_config=MoEConfig()).prepare(model)
    assert told(error) == ("Qwen3MoeForCausalLM is distributed already (distributed_config)", DISTRIBUTED)
    assert settings_of(model) == [None, None]


def test_a_model_of_dtensors_is_refused():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = build_tiny("qwen3_moe")
        mesh = build_sparse_mesh("cpu", 1, 1, 1)["ep"]
        head = DTensor.from_local(model.lm_head.weight.data, mesh, [Replicate()])
        model.lm_head.weight = nn.Parameter(head)
        with pytest.raises(UnsupportedModelError) as error:
            plugin.refuse_distributed(model)
    finally:
        dist.destroy_process_group()
    assert told(error) == ("Qwen3MoeForCausalLM is distributed already (its parameters are DTensors)", DISTRIBUTED)


def expert_parallel(ep_size):
    """What `swap_experts` asks of an Accelerator on two ranks before it touches a model."""
    config = MoEConfig(ep_size=ep_size)
    config._set_size("dp_shard", 4)
    return SimpleNamespace(parallelism_config=config, device=torch.device("cpu"))


def test_experts_that_do_not_split_over_the_ep_ranks_are_refused():
    model = build_tiny("qwen3_moe", num_experts=6)
    with pytest.raises(ConfigError) as error:
        plugin.swap_experts(expert_parallel(4), model)
    assert told(error) == (
        "ep_size=4 must divide num_experts=6",
        "ep_size: any of [1, 2] fits this model on these ranks",
    )
    assert settings_of(model) == [None, None]


# ---- kernels and dispatcher (tests/unit/test_deepep.py, tests/dist/test_choose_dispatcher.py: with DeepEP)


CPU, GPU = torch.device("cpu"), torch.device("cuda")
KERNELS = {
    ("auto", CPU): Choice("fused", "auto: one product per expert on this device"),
    ("auto", GPU): Choice("fused", "auto: grouped GEMMs for bf16 on this GPU"),
    ("fused", CPU): Choice("fused", "asked for: one product per expert on this device"),
    ("reference", GPU): Choice("reference", "asked for: one expert after the other, slow and true"),
}


@pytest.mark.parametrize(("asked", "choice"), KERNELS.items(), ids=str)
def test_kernels_are_chosen_with_a_reason(asked, choice):
    assert plugin.choose_kernels(*asked) == choice


def test_kernels_te_are_refused_when_the_accelerator_is_made():
    with pytest.raises(ConfigError) as error:
        Accelerator(parallelism_config=MoEConfig(kernels="te"))
    why = "kernels=te cannot be used: it needs a CUDA GPU, and this process computes on cpu"
    assert told(error) == (why, "kernels: auto")


def test_deepep_that_is_not_installed_is_refused_when_the_accelerator_is_made(monkeypatch):
    monkeypatch.setattr(deepep, "is_installed", lambda: False)
    with pytest.raises(DependencyError) as error:
        choose.check("deepep", 2, CPU)
    assert told(error) == (
        "dispatcher=deepep needs the package deep_ep, which is not installed",
        "dispatcher: auto, or pip install 'moe-accel[deepep]'",
    )


def test_deepep_at_ep_size_1_is_not_looked_for(monkeypatch):
    monkeypatch.setattr(deepep, "is_installed", lambda: 1 / 0)
    choose.check("deepep", 1, CPU)
    assert choose.choose("deepep", None, choose.Traffic(8, 16, 2), CPU) == Choice(
        "none", "ep_size 1: every rank has all experts"
    )


@pytest.mark.parametrize(
    ("asked", "reason"), {"auto": "auto: it needs nothing but torch.distributed", "alltoall": "asked for"}.items()
)
def test_without_a_gpu_it_is_all_to_all_and_nothing_is_gathered(asked, reason):
    choose.check(asked, 2, CPU)
    assert choose.choose(asked, object(), choose.Traffic(8, 16, 2), CPU) == Choice("alltoall", reason)


def test_versions_are_checked_when_the_accelerator_is_made(monkeypatch):
    def refuse():
        raise DependencyError("torch 2.8.0 is installed")

    monkeypatch.setattr(plugin, "check_versions", refuse)
    with pytest.raises(DependencyError, match=r"^torch 2\.8\.0 is installed$"):
        Accelerator(parallelism_config=MoEConfig())


# ---- what accelerate has to keep for this to work


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_accelerate_still_has_what_is_patched_with_the_arguments_we_pass_on():
    assert parameters(accelerate.accelerator.fsdp2_prepare_model) == ["accelerator", "model"]
    assert parameters(Accelerator.prepare) == ["self", "args", "device_placement"]
    assert parameters(Accelerator.prepare_model) == ["self", "model", "device_placement", "evaluation_mode"]
    assert parameters(Accelerator.free_memory) == ["self", "objects"]


def test_accelerates_prepare_still_calls_the_binding_that_is_patched(monkeypatch, dense):
    """With its own FSDP2 path in one process: accelerate 1.15 enters it on ranks only."""
    called = []
    monkeypatch.setattr(
        accelerate.accelerator, "fsdp2_prepare_model", lambda accelerator, model: called.append(accelerator) or model
    )
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    accelerator = Accelerator()
    accelerator.state.fsdp_plugin = SimpleNamespace(
        set_auto_wrap_policy=lambda model: None, activation_checkpointing=False
    )
    model, _ = accelerator.prepare(dense, torch.optim.SGD(dense.parameters()))
    assert (called, model) == ([accelerator], dense)


def test_installing_patches_each_binding_once():
    before = [getattr(owner, name) for owner, name in PATCHED]
    Accelerator(parallelism_config=MoEConfig())
    patched = [getattr(owner, name) for owner, name in PATCHED]
    Accelerator()
    assert [getattr(owner, name) for owner, name in PATCHED] == patched
    assert [inspect.unwrap(each) for each in patched] == [inspect.unwrap(each) for each in before]
    assert all(hasattr(each, "__moe_accel__") for each in patched)
