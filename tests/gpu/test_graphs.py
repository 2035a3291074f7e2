"""Attention as CUDA graphs trains as it does without, on a GPU.

run: python3 -m pytest -q -m gpu tests/gpu/test_graphs.py -c /dev/null --rootdir .
"""

import copy

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from moe_accel import MoEConfig, graphs
from moe_accel.experts import later
from moe_accel.graphs import record
from tests import graphs as cases
from tests.families import build_tiny
from tests.graphs import EXACT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "glm4_moe", "olmoe", "qwen3_next", "granitemoe"]
MODES = {"fp32": (torch.float32, "no"), "bf16": (torch.bfloat16, "no"), "mixed": (torch.float32, "bf16")}
"""Dtypes of weights, and mixed precision."""
TOLERANCES = {"fp32": EXACT, "bf16": 2e-2, "mixed": 2e-2}


def prepared(model, precision="no", **options):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(mixed_precision=precision, parallelism_config=MoEConfig(**options))
    return accelerator.prepare(model)


def pair(family="qwen3_moe", mode="fp32", lora=None):
    dtype, precision = MODES[mode]
    model = build_tiny(family, dtype)
    if lora is not None:
        model = peft.get_peft_model(model, peft.LoraConfig(**lora))
    return prepared(copy.deepcopy(model), precision, cuda_graphs=True), prepared(model, precision)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_trains_as_without(family, mode):
    cases.trains_as_without(pair, family, TOLERANCES[mode], mode=mode)


@pytest.mark.parametrize("targets", [("q_proj", "k_proj", "v_proj", "o_proj"), ("v_proj",), ("o_proj",)], ids="-".join)
@pytest.mark.parametrize("mode", MODES)
def test_adapters_train_as_without(mode, targets):
    lora = {"r": 4, "target_modules": list(targets), "init_lora_weights": False}
    model, twin = pair("qwen3_moe", mode, lora)
    for step in range(6):
        cases.change_both(model, twin, step)
        given = cases.batch(model, step)
        cases.assert_same(cases.trained(model, given), cases.trained(twin, given), TOLERANCES[mode])
    assert cases.turns(model) == [4, 4]


@pytest.mark.parametrize("case", cases.ALL, ids=lambda case: case.__name__)
def test_that(case):
    case(pair)


@pytest.mark.parametrize("family", cases.RAGGED_FAMILIES)
@pytest.mark.parametrize("mode", ["bf16", "mixed"])
def test_ragged_batches_train_as_without(family, mode):
    cases.trains_with_other_sizes(pair, cases.ragged, family, TOLERANCES[mode], mode=mode)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "glm4_moe"])
def test_packed_rows_train_as_without(family):
    cases.trains_with_other_sizes(pair, cases.packed, family, TOLERANCES["bf16"], mode="bf16")


@pytest.mark.parametrize("case", cases.OTHER_SIZES, ids=lambda case: case.__name__)
def test_other_sizes(case):
    case(pair, TOLERANCES["bf16"], mode="bf16")


@pytest.mark.filterwarnings("ignore:.*without a CUDA graph. sequences of other lengths")
def test_attention_in_fp32_is_computed_as_ever_for_ragged_batches():
    model, twin = pair()
    for step in range(cases.UNTIL + 3):
        given = cases.ragged(model, step)
        cases.assert_same(cases.trained(model, given), cases.trained(twin, given))
    assert cases.turns(model) == [None, None]


@pytest.mark.parametrize("change", cases.CHANGES)
def test_a_change_is_seen(change):
    cases.a_change_is_seen(pair, change)


def test_what_layers_do_to_the_memory_of_each_other_is_seen(monkeypatch):
    monkeypatch.setattr(record, "get_gradient_edge", lambda each: None)  # nothing keeps what backward needs
    model, twin = pair()
    with cases.told() as said:
        for step in range(6):
            cases.change_both(model, twin, step)
            cases.assert_same(*(cases.trained(each, cases.batch(model, step)) for each in (model, twin)))
    name = "Qwen3MoeAttention is computed without a CUDA graph"
    assert f"{name}: what was recorded is not what the module computes" in said


class Waits(nn.Module):
    """Attention that waits for the GPU, with a number in return or without."""

    is_causal = True

    def __init__(self, reads):
        super().__init__()
        self.inner, self.reads = nn.Linear(8, 8), reads

    def forward(self, x):
        if self.reads:
            return self.inner(x) * (1 if x.sum().item() > 0 else 2)
        torch.cuda.synchronize()
        return self.inner(x)


@pytest.mark.parametrize("reads", [True, False])
def test_what_waits_for_the_gpu_is_not_recorded_and_nothing_else_suffers(reads):
    layers = nn.Sequential(Waits(reads), Waits(reads)).cuda()
    recorder = graphs.Recorder()
    assert len(graphs.record_attention(layers, recorder)) == 2
    with cases.told() as said:
        for _ in range(5):
            layers(torch.ones(4, 8, device="cuda", requires_grad=True)).sum().backward()
    assert recorder.has_failed is not reads
    assert sum(each.startswith("Waits is computed without a CUDA graph: ") for each in said) == 1 + reads
    assert torch.cuda.get_sync_debug_mode() == 0
    first, second = torch.rand(2, 4, device="cuda")
    assert not torch.equal(first, second)
    stream, allocated = torch.cuda.Stream(), torch.cuda.memory_allocated()
    for _ in range(3):
        block = torch.ones(1 << 20, device="cuda")
        block.record_stream(stream)
        del block
    torch.cuda.synchronize()
    torch.ones(1, device="cuda")
    assert torch.cuda.memory_allocated() < allocated + (1 << 20)
    model, twin = pair()
    for step in range(4):
        cases.assert_same(*(cases.trained(each, cases.batch(model, step)) for each in (model, twin)))
    assert cases.turns(model) == [2, 2]


def negated(values, out=None):
    return torch.neg(values, out=out)


@pytest.mark.parametrize("may_be_beside", [True, False])
def test_what_a_graph_leaves_is_computed_with_what_it_made_and_where_it_can_while_that_goes_on(may_be_beside):
    recorder, x = graphs.Recorder(), torch.zeros(1 << 20, device="cuda")
    products, first, last = later.Products(recorder.mark), *torch.zeros(2, 1 << 20, device="cuda")

    def work():
        torch.cuda._sleep(20_000_000)
        first.copy_(x)
        later.gradient(products, x, negated, first, may_be_beside=may_be_beside)
        torch.cuda._sleep(500_000_000)
        last.copy_(x)

    with recorder.beside():
        play, _ = recorder.record(work)
    beside = []
    for value in (1.0, 2.0, 3.0):
        x.fill_(value)
        play()
        computed, graph_ended = torch.cuda.Event(), torch.cuda.Event()
        graph_ended.record()
        (found,) = recorder.compute_beside(products)
        computed.record(recorder._stream_beside)
        computed.synchronize()
        beside.append(not graph_ended.query())
        assert (found + value).abs().max().item() == 0  # by the current stream, which waits for both
        assert (last == value).all()
    assert not may_be_beside or beside[1:] == [True] * 2  # at first, the kernel is loaded, which waits for the device
