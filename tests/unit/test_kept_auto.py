"""`kept_layers: auto`: models that train while a made-up device says what there is memory for."""

import copy
import pickle
from types import SimpleNamespace

import accelerate.accelerator
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from moe_accel import MoEConfig, experts, kept, plugin
from moe_accel.errors import ConfigError
from moe_accel.kept import memory
from tests.fake_memory import FakeMemory
from tests.families import build_tiny, tiny_inputs, tiny_loss
from tests.unit.test_kept import fsdp

pytestmark = pytest.mark.usefixtures("new_accelerate_state")

NUM_LAYERS = 6
SEQUENCE = 12
TOKENS = 2 * SEQUENCE


@pytest.fixture
def device(monkeypatch):
    """Makes the device's memory what the test says."""
    made = []

    def make(*args, **kwargs):
        made.append(FakeMemory(*args, **kwargs))
        monkeypatch.setattr(memory, "memory_of", lambda device: made[-1])
        return made[-1]

    yield make
    for each in made:
        each.remove()


class Run:
    """A model in training, step by step."""

    def __init__(self, kept_layers="auto", **how):
        self.model = build_tiny("qwen3_moe", num_hidden_layers=NUM_LAYERS)
        if how.pop("checkpointing", True):
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        # the copy of the model that proves the other way of padding would be counted as well
        config = MoEConfig(kept_layers=kept_layers, padding_free="off")
        accelerator = Accelerator(cpu=True, parallelism_config=config)
        self.model, self.optimizer = accelerator.prepare(self.model, self.optimizer)
        self.notes = [note for note in plugin.reports(accelerator)[0].notes if "kept_layers" in note]
        self.losses, self.kept, self.seed = [], [], 0

    def forward(self, sequence=SEQUENCE):
        self.seed += 1
        loss = tiny_loss(self.model, tiny_inputs("qwen3_moe", 2, sequence, self.seed))
        self.losses.append(loss.item())
        self.kept.append(num_kept(self.model))
        return loss

    def step(self, *sequences, at_once=False):
        losses = []
        for sequence in sequences or (SEQUENCE,):
            losses.append(self.forward(sequence))
            if not at_once:
                losses.pop().backward()
        if losses:
            sum(losses).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.kept[-1]


def num_kept(model):
    """How many layers are kept, which are the last ones and lean, and no others are."""
    layers = model.model.layers
    kept_ones = [not layer.gradient_checkpointing for layer in layers]
    assert [experts.settings_of(layer.mlp.experts).lean for layer in layers] == kept_ones
    assert kept_ones == sorted(kept_ones)
    return sum(kept_ones)


def roomy(make, num, **more):
    """A device with room for `num` layers at `TOKENS`: 1000 units without any, a token of a kept layer takes 3 more."""
    total = round((1000 + NUM_LAYERS * TOKENS + TOKENS + num * 3 * TOKENS + 1) / (1 - memory.MARGIN))
    return make(total, 1000, lambda tokens: 4 * tokens, **more)


def test_it_measures_keeps_what_fits_and_says_so_once(device, capsys):
    made = roomy(device, 4)
    run = Run()
    assert run.notes == [
        "kept_layers: auto measures memory in the first steps where layers are checkpointed, then says how many"
    ]
    assert [run.step() for _ in range(7)] == [0, 0, 1, 4, 4, 4, 4]
    assert made.peaks[-1] < (1 - memory.MARGIN) * made.total
    assert made.peaks[-1] + 3 * TOKENS > (1 - memory.MARGIN) * made.total
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("moe-accel: kept_layers")]
    assert said == [
        "moe-accel: kept_layers: auto keeps 4 of 6 layers: 0.0 of 0.0 GiB at the peak, 0.00 GiB a layer",
    ]


@pytest.mark.slow
def test_the_line_has_the_numbers(device, capsys):
    gib = 2**30
    device(80 * gib, 40 * gib, lambda tokens: tokens * gib // 4, lambda tokens: tokens * gib // 64, others=gib)
    run = Run()
    for _ in range(5):
        run.step(8)  # 16 tokens: 4 GiB a kept layer, a quarter a checkpointed one, 16 bytes the loss
    said = "kept_layers: auto keeps 6 of 6 layers: 64.0 of 80.0 GiB at the peak, 3.75 GiB a layer"
    assert said in capsys.readouterr().err


def test_losses_are_the_same_whatever_is_kept(device):
    lengths = [SEQUENCE] * 4 + [2 * SEQUENCE, SEQUENCE, 3]
    found = []
    for kept_layers in (0, "auto"):
        AcceleratorState._reset_state(True)  # which holds the config of the first Accelerator
        roomy(device, 4)
        run = Run(kept_layers)
        for length in lengths:
            run.step(length)
        found.append((run.losses, [each.detach() for each in run.model.parameters()], run.kept))
    assert found[0][2] == [0] * 7
    assert found[1][2] == [0, 0, 1, 4, 0, 4, 6]
    assert found[0][0] == found[1][0]
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))


def test_a_longer_batch_keeps_fewer_before_it_could_run_out(device):
    """With what the short batches kept, the long one would not fit the device."""
    made = roomy(device, 6)
    run = Run()
    assert [run.step() for _ in range(5)][-1] == 6
    with_six = 1000 + 6 * 4 * 3 * TOKENS + 3 * TOKENS
    assert with_six > made.total
    assert run.step(3 * SEQUENCE) < 6
    assert run.step() == 6


def test_costs_that_grow_faster_than_the_tokens_lower_it_for_good(device, capsys):
    """As attention that keeps its scores: the bound was too low, the margin takes it once, then it is known."""
    room = 1000 + (NUM_LAYERS + 1) * TOKENS + 5 * 3 * TOKENS + 40
    made = device(round(room / (1 - memory.MARGIN)), 1000, lambda tokens: tokens + 3 * tokens * tokens // TOKENS)
    run = Run()
    short = [run.step() for _ in range(5)][-1]
    long = [run.step(SEQUENCE + 2) for _ in range(3)]
    assert (short, long[0] > long[1], long[1] == long[2]) == (5, True, True)
    limit = (1 - memory.MARGIN) * made.total
    assert limit < max(made.peaks) < made.total
    assert made.peaks[-1] <= limit
    said = [line for line in capsys.readouterr().err.splitlines() if "from now on" in line]
    assert len(said) == 1
    assert f"auto keeps {long[1]} of 6 layers from now on: " in said[0]


def test_with_accumulation_a_step_is_all_its_forwards_and_nothing_is_added_within_it(device):
    roomy(device, 4)
    run = Run()
    for _ in range(4):
        run.step(SEQUENCE, SEQUENCE)
    assert run.kept == [0, 0, 0, 0, 1, 1, 4, 4]
    run.step(4, 2 * SEQUENCE, 4)
    assert run.kept[-3:] == [6, 0, 0]


@pytest.mark.slow
def test_forwards_that_wait_for_one_backward_share_the_memory(device):
    made = roomy(device, 6)
    run = Run()
    for _ in range(5):
        run.step(SEQUENCE, SEQUENCE, at_once=True)
    fits = [num for num in range(7) if 1000 + 2 * (6 * TOKENS + num * 3 * TOKENS) + TOKENS <= 0.94 * made.total]
    assert run.kept[-2:] == [fits[-1]] * 2
    assert 0 < fits[-1] < 6


@pytest.mark.slow
def test_forwards_that_are_not_trained_and_other_optimizers_change_nothing(device):
    roomy(device, 4)
    run = Run()
    other = torch.nn.Linear(2, 2)
    others = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(3):
        other(torch.ones(1, 2)).sum().backward()
        others.step()
        with torch.no_grad():
            run.forward(50)
        run.model.eval()
        run.forward(50)
        run.model.train()
        run.forward().backward()
        others.step()
        run.forward().backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert run.kept[::4] == [0, 0, 0]
    assert run.kept[2::4] == [0, 0, 1]
    assert run.step() == 4


@pytest.mark.slow
def test_an_evaluation_that_needs_more_does_not_lower_it(device):
    made = roomy(device, 4)
    run = Run()
    for _ in range(5):
        run.step()
        made.highest = made.total  # as a large batch of an evaluation would
    assert [run.step() for _ in range(3)] == [4, 4, 4]


@pytest.mark.slow
def test_a_peak_that_the_script_resets_misleads_nobody(device):
    made = roomy(device, 4)
    run = Run()
    for _ in range(8):
        loss = run.forward()
        made.highest = 0
        loss.backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert set(run.kept) <= {0, 1, 4}


@pytest.mark.slow
def test_an_allocator_under_pressure_lowers_it(device):
    made = roomy(device, 6)
    run = Run()
    assert [run.step() for _ in range(4)][-1] == 6
    for _ in range(2):
        run.forward().backward()
        made.retries += 1
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert run.step() == 5


@pytest.mark.slow
def test_without_checkpointing_there_is_nothing_to_choose_until_it_is_switched_on_and_off_again(device):
    roomy(device, 4)
    run = Run(checkpointing=False)
    for _ in range(4):
        tiny_loss(run.model, tiny_inputs("qwen3_moe", 2, 3)).backward()
        run.optimizer.step()
    assert not [layer for layer in run.model.model.layers if kept.layers.is_kept(layer)]
    run.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert [run.step() for _ in range(4)] == [0, 0, 1, 4]
    run.model.gradient_checkpointing_enable({"use_reentrant": False})  # as every Trainer.train() does
    assert run.step() == 4
    run.model.gradient_checkpointing_disable()
    tiny_loss(run.model, tiny_inputs("qwen3_moe", 2, 3)).backward()
    run.optimizer.step()
    assert not any(layer.gradient_checkpointing for layer in run.model.model.layers)
    run.model.gradient_checkpointing_enable({"use_reentrant": False})
    assert run.step() == 4


@pytest.mark.slow
def test_a_copy_and_a_pickled_model_are_left_alone(device):
    roomy(device, 4)
    run = Run()
    for _ in range(4):
        run.step()
    other = copy.deepcopy(run.model)
    flags = [layer.gradient_checkpointing for layer in other.model.layers]
    tiny_loss(other, tiny_inputs("qwen3_moe", 2, 3)).backward()
    assert [layer.gradient_checkpointing for layer in other.model.layers] == flags == [True] * 2 + [False] * 4
    for hooks in (run.model.model._forward_pre_hooks, run.model.model._forward_hooks):
        assert all(callable(pickle.loads(pickle.dumps(hook))) for hook in hooks.values())
    assert run.step() == 4


def test_nothing_is_kept_where_memory_cannot_be_read():
    run = Run()
    assert run.notes == ["kept_layers: auto keeps none: the memory of cpu can't be read"]
    assert [run.step() for _ in range(4)] == [0] * 4


def test_checkpointing_by_fsdp_becomes_that_of_transformers_which_can_be_switched(device, monkeypatch):
    roomy(device, 4)
    run = Run(checkpointing=False)
    accelerator, made = fsdp(monkeypatch)
    made.set_auto_wrap_policy(run.model)
    accelerate.accelerator.fsdp2_apply_ac(accelerator, run.model)
    assert not [name for name, _ in run.model.named_modules() if "wrapped" in name]
    assert [run.step() for _ in range(4)] == [0, 0, 1, 4]


@pytest.mark.parametrize(
    ("kind", "plugin_given", "backend", "message"),
    [
        (DistributedType.DEEPSPEED, None, "NO", "kept_layers=auto needs one GPU, DDP or FSDP2, not DEEPSPEED"),
        (DistributedType.FSDP, {"fsdp_version": 1}, "NO", "kept_layers=auto needs FSDP version 2, not 1"),
        (
            DistributedType.FSDP,
            {"fsdp_version": 2, "activation_checkpointing_offload": True},
            "NO",
            "kept_layers=auto can't be combined with activation_checkpointing_offload",
        ),
        (DistributedType.NO, None, "INDUCTOR", "torch.compile would compile them anew"),
    ],
)
def test_what_cannot_switch_layers_is_refused(kind, plugin_given, backend, message):
    state = SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=SimpleNamespace(value=backend)))
    if plugin_given:
        state.fsdp_plugin = SimpleNamespace(**plugin_given)
    accelerator = SimpleNamespace(state=state, distributed_type=kind, device=torch.device("cpu"), num_processes=1)
    with pytest.raises(ConfigError, match=message):
        kept.keep(build_tiny("qwen3_moe"), "auto", accelerator)


def test_another_word_than_auto_is_refused():
    with pytest.raises(ConfigError, match="kept_layers='all' must be a whole number or auto"):
        MoEConfig(kept_layers="all")
