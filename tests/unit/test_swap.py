"""A prepared model is still a plain object: it pickles, copies, and is freed as soon as nobody refers to it."""

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model

from moe_accel import MoEConfig, block, expert_lora_config, garbage
from moe_accel.swap import become, own_class
from tests.families import build_tiny, randomise, tiny_inputs
from tests.unit.expert_adapters import TOLERANCE

pytestmark = pytest.mark.usefixtures("new_accelerate_state")


def prepared(adapters):
    """A model with all that prepare() puts on one, what it puts there on a GPU only too."""
    model = build_tiny("qwen3_moe")
    if adapters:
        model = get_peft_model(model, expert_lora_config(model, r=2))
        randomise(model, seed=7, only="lora_")
    accelerator = Accelerator(parallelism_config=MoEConfig(kept_layers=1))
    model = accelerator.prepare(model)
    accelerator.free_memory()
    inner = model.get_base_model() if adapters else model
    norms = [each for each in model.modules() if type(each).__name__.endswith("RMSNorm")]
    assert all(map(block.fuse_norm, norms))
    block.fuse_rotations(inner)
    assert block.fuse_routers(inner, None) == (2, "2 of 2 routers")
    return model


def train_step(model):
    """Loss, logits and gradients."""
    outputs = model(**tiny_inputs("qwen3_moe"))
    outputs.loss.backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return {"loss": outputs.loss.detach(), "logits": outputs.logits.detach() + 0.0, **gradients}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        assert torch.equal(found[name], each), name


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, each in expected.items():
        torch.testing.assert_close(found[name], each, rtol=0, atol=4 * TOLERANCE * each.abs().max().item(), msg=name)


def saved(model, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


BOTH = pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])


@BOTH
@pytest.mark.parametrize("how", [saved, lambda model, _folder: copy.deepcopy(model)], ids=["saved", "copied"])
def test_a_copy_trains_with_the_same_numbers_and_with_weights_of_its_own(adapters, how, tmp_path):
    model = prepared(adapters)
    expected = train_step(model)
    other = how(model, tmp_path)
    classes = [[own_class(each) for each in one.modules()] for one in (other, model)]
    assert classes[0] == classes[1]
    assert [type(each) for each in other.modules()] == [type(each) for each in model.modules()]
    if adapters:  # a copy computes q, k and v apart: sums in another order
        assert_close(train_step(other), expected)
    else:
        assert_same(train_step(other), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_same(train_step(model), expected)
    assert not train_step(other)["logits"].any()


@BOTH
def test_a_process_that_has_prepared_nothing_loads_it(adapters, tmp_path):
    model = prepared(adapters).eval()
    inputs = tiny_inputs("qwen3_moe")
    with torch.no_grad():
        torch.save((inputs, model(**inputs).logits, model), tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "inputs, logits, model = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad():\n"
        "    torch.testing.assert_close(model(**inputs).logits, logits)\n"
        "print(type(model.get_output_embeddings()).__name__)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "Linear\n", done.stderr


def test_a_deleted_model_is_freed_without_the_garbage_collector():
    model = prepared(adapters=False)
    train_step(model)
    parameters = [weakref.ref(each) for each in model.parameters()]
    gc.collect()
    with garbage.left_alone():
        del model
        assert [each() for each in parameters] == [None] * len(parameters)


def test_the_class_is_one_for_all_modules_and_looks_like_the_one_before():
    class Twice(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    x = torch.ones(2)
    expected = one(x)
    for _ in range(2):
        become(one, Twice)
        become(other, Twice)
    assert type(one) is type(other) is not torch.nn.Linear
    assert torch.equal(one(x), 2 * expected)
    assert isinstance(one, torch.nn.Linear)
    assert (type(one).__name__, type(one).__module__, repr(one)) == ("Linear", torch.nn.Linear.__module__,
            "Linear(in_features=2, out_features=2, bias=True)")  # fmt: skip
    assert own_class(one) is own_class(torch.nn.Linear(1, 1)) is torch.nn.Linear

    class Negated(torch.nn.Linear):
        def forward(self, input):
            return -super().forward(input)

    become(one, Negated)
    assert torch.equal(one(x), -2 * expected)
    assert own_class(one) is torch.nn.Linear
