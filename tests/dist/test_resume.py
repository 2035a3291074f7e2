"""Training goes on after `save_state` and `load_state` as if it had never stopped, whatever `ep_size` each part has.

An uninterrupted run of five steps saves its state after the second. Another run, of other weights, loads it and does
the last three steps: same losses, norms and weights; with dropout too, for which every rank has to get its random
state back.
"""

import dataclasses
import functools
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from tests.dist.parity import UPDATE_TOLERANCE, assert_all_small, largest_error
from tests.dist.ranks import STOCK_FSDP2, run_ranks, with_moe_config
from tests.dist.training import MAX_NORM, OPTIMIZER
from tests.families import build_tiny, model_class, randomise, tiny_inputs, tiny_loss

NUM_STEPS = 5
SAVED_AFTER = 2
NUM_SEQUENCES, SEQUENCE = 4, 13


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a run is spread: its ranks, `ep_size` (None: stock FSDP2 without moe-accel), and whether FSDP2 is on."""

    num_ranks: int
    ep_size: int | None
    fsdp: bool = True

    def __str__(self) -> str:
        how = "stock" if self.ep_size is None else f"ep{self.ep_size}"
        return how + (f"on{self.num_ranks}" if self.fsdp else "alone")


STOCK, EP1, EP2, EP4 = Layout(4, None), Layout(4, 1), Layout(4, 2), Layout(4, 4)
TWO_RANKS, ALONE = Layout(2, 2), Layout(1, 1, fsdp=False)


@dataclasses.dataclass(frozen=True)
class Part:
    """What a run, or a part of one, went through: a loss and a norm per step, and the whole weights at its end."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    loaded: dict[str, torch.Tensor]


def before_fork(family: str, **_: Any) -> None:
    model_class(family)


def train(
    family: str,
    steps: range,
    seed: int = 0,
    load_from: Path | None = None,
    save_to: Path | None = None,
    forget_optimizer: bool = False,
    forget_random_state: bool = False,
    dropout: str = "",
    written_after_s: float | None = None,
) -> Part:
    """The steps of one run on this rank; losses are this rank's share of that of the global batch.

    Args:
        family: of the model.
        steps: numbers of the steps to do; they choose the data.
        seed: of the weights.
        load_from: folder to resume from.
        save_to: folder to save to after step SAVED_AFTER.
        forget_optimizer: as if the folder held no optimizer state.
        forget_random_state: as if it held no random states.
        dropout: "attention", or "lora": the model is in PEFT's hands then, and only its adapters are trained.
        written_after_s: seconds that each writing of a checkpoint waits before it begins.
    """
    from accelerate import Accelerator

    if written_after_s is not None:
        dcp: Any = torch.distributed.checkpoint
        dcp.save = functools.partial(write_late, dcp.save, written_after_s)
    accelerator = Accelerator()
    rank, num_ranks = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(rank if load_from is None else 100 + rank)
    model = build_tiny(family, seed=seed, **({"attention_dropout": 0.3} if dropout == "attention" else {}))
    model = with_lora_dropout(model, seed) if dropout == "lora" else model
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIMIZER)
    model, optimizer = accelerator.prepare(model, optimizer)
    loaded = {}
    if load_from is not None:
        random_state = torch.get_rng_state()
        accelerator.load_state(load_from)
        if forget_random_state:
            torch.set_rng_state(random_state)
        loaded = whole(model.state_dict())
    if forget_optimizer:
        optimizer.optimizer.state.clear()
    losses, norms = [], []
    for step in steps:
        inputs = tiny_inputs(family, NUM_SEQUENCES, SEQUENCE, seed=step)
        mine = {name: tensor[rank::num_ranks] for name, tensor in inputs.items()}
        loss = tiny_loss(model, {**mine, "num_items_in_batch": torch.tensor(NUM_SEQUENCES * (SEQUENCE - 1))})
        losses.append(loss.item())
        accelerator.backward(loss * num_ranks)
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        if save_to is not None and step + 1 == SAVED_AFTER:
            accelerator.save_state(save_to)
            assert save_to.exists() == (written_after_s is None)
            loaded = whole(model.state_dict())
    weights = whole(model.state_dict())
    if written_after_s is not None:
        accelerator.end_training()
    return Part(losses, norms, weights, loaded) if rank == 0 else Part(losses, norms, {}, {})


def write_late(save: Any, after_s: float, *args: Any, **kwargs: Any) -> Any:
    time.sleep(after_s)
    return save(*args, **kwargs)


def with_lora_dropout(model: Any, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "v_proj"]))
    randomise(adapted, seed=seed, only="lora_")
    return adapted


def whole(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Copies of the tensors, gathered from all ranks."""
    tensors = {name: each.full_tensor() if isinstance(each, DTensor) else each for name, each in tensors.items()}
    return {name: each.detach().clone() for name, each in tensors.items()}


def spread(layout: Layout, kind: str, options: dict[str, Any] | None = None, **how: Any) -> Part:
    """`train` in a layout, seen as a whole; `kind` is the state dict type, FULL or SHARDED."""
    own = {"ep_size": layout.ep_size, **(options or {})}
    environment = STOCK_FSDP2 if layout.ep_size is None else with_moe_config(**own)
    environment = {**environment, "FSDP_STATE_DICT_TYPE": f"{kind}_STATE_DICT"}
    if not layout.fsdp:
        environment = {"MOE_ACCEL_CONFIG": environment["MOE_ACCEL_CONFIG"]}
    parts = run_ranks(train, layout.num_ranks, environment, **how)
    for part in parts:
        assert part.norms == pytest.approx(parts[0].norms, rel=1e-6)
    losses = [sum(losses) for losses in zip(*(part.losses for part in parts), strict=True)]
    return dataclasses.replace(parts[0], losses=losses)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(what the whole run went through, the folder saved after its second step) of a layout; each is run once."""

    @functools.cache
    def run(layout: Layout, kind: str, family: str, dropout: str = "") -> tuple[Part, Path]:
        folder = tmp_path_factory.mktemp("state")
        steps = range(NUM_STEPS)
        return spread(layout, kind, family=family, steps=steps, save_to=folder, dropout=dropout), folder

    return run


def assert_goes_on(resumed: Part, run: Part) -> None:
    assert_loaded(resumed, run)
    assert min(run.norms) > MAX_NORM, "or clipping would change nothing"
    assert resumed.losses == pytest.approx(run.losses[SAVED_AFTER:], rel=UPDATE_TOLERANCE)
    assert resumed.norms == pytest.approx(run.norms[SAVED_AFTER:], rel=UPDATE_TOLERANCE)
    assert_all_small(weight_errors(resumed, run), UPDATE_TOLERANCE, "weights")


def assert_loaded(resumed: Part, run: Part) -> None:
    """What was loaded is what was saved, bit for bit."""
    assert resumed.loaded.keys() == run.loaded.keys()
    assert not [name for name, weight in run.loaded.items() if not torch.equal(resumed.loaded[name], weight)]


def weight_errors(resumed: Part, run: Part) -> dict[str, float]:
    """Errors at the end as shares of each tensor's largest change since the state was saved."""
    return {
        name: largest_error(resumed.weights[name], weight, (weight - run.loaded[name]).abs().max())
        for name, weight in run.weights.items()
    }


def resume(layout: Layout, kind: str, family: str, folder: Path, **how: Any) -> Part:
    return spread(layout, kind, family=family, steps=range(SAVED_AFTER, NUM_STEPS), seed=1, load_from=folder, **how)


LAYOUTS = [STOCK, EP1, EP2, EP4, TWO_RANKS]
QUICK = {
    ("FULL", EP2, EP4),
    ("FULL", EP2, ALONE),
    ("SHARDED", EP2, EP1),
    ("SHARDED", EP2, ALONE),
    ("SHARDED", TWO_RANKS, STOCK),
    ("SHARDED", TWO_RANKS, EP4),
}
MATRIX = [
    pytest.param(kind, saved, loaded, id=f"{kind}-{saved}-{loaded}", marks=() if quick else pytest.mark.slow)
    for kind in ("FULL", "SHARDED")
    for saved in LAYOUTS
    for loaded in [*LAYOUTS, ALONE]
    for quick in [(kind, saved, loaded) in QUICK]
    if not saved == loaded == STOCK
]


@pytest.mark.parametrize(("kind", "saved", "loaded"), MATRIX)
def test_training_goes_on_in_another_layout(uninterrupted, kind, saved, loaded):
    run, folder = uninterrupted(saved, kind, "qwen3_moe")
    assert_goes_on(resume(loaded, kind, "qwen3_moe", folder), run)


OTHERS = [
    ("deepseek_v3", "FULL", TWO_RANKS, ALONE),
    ("deepseek_v3", "SHARDED", EP2, EP4),
    ("deepseek_v3", "SHARDED", EP4, ALONE),
    ("deepseek_v3", "FULL", EP4, EP1),
    ("gpt_oss", "SHARDED", EP2, EP4),
    ("nemotron_h", "FULL", EP2, EP4),
    ("granitemoe", "SHARDED", EP2, ALONE),
]


@pytest.mark.parametrize(
    ("family", "kind", "saved", "loaded"),
    [
        pytest.param(*case, id="-".join(map(str, case)), marks=() if case == OTHERS[0] else pytest.mark.slow)
        for case in OTHERS
    ],
)
def test_training_of_other_families_goes_on(uninterrupted, family, kind, saved, loaded):
    """DeepSeek-V3 has a persistent buffer, the correction bias; gpt-oss biases; Nemotron-H no gate."""
    run, folder = uninterrupted(saved, kind, family)
    assert_goes_on(resume(loaded, kind, family, folder), run)


@pytest.mark.parametrize("kind", [pytest.param("FULL", marks=pytest.mark.slow), "SHARDED"])
def test_in_the_same_layout_it_goes_on_bit_for_bit(uninterrupted, kind):
    run, folder = uninterrupted(TWO_RANKS, kind, "qwen3_moe")
    resumed = resume(TWO_RANKS, kind, "qwen3_moe", folder)
    assert_loaded(resumed, run)
    assert (resumed.losses, resumed.norms) == (run.losses[SAVED_AFTER:], run.norms[SAVED_AFTER:])
    assert not [name for name, weight in run.weights.items() if not torch.equal(resumed.weights[name], weight)]


WITH_DROPOUT = {
    "attention": (TWO_RANKS, TWO_RANKS),
    "lora": (TWO_RANKS, TWO_RANKS),
    "attention-ep1": (TWO_RANKS, Layout(2, 1)),
    "attention-ep4": (EP2, EP4),
}


@pytest.mark.parametrize(
    ("dropout", "saved", "loaded"),
    [
        pytest.param(name.split("-")[0], *layouts, id=name, marks=() if name == "attention" else pytest.mark.slow)
        for name, layouts in WITH_DROPOUT.items()
    ],
)
def test_with_dropout_every_rank_goes_on_with_its_random_state(uninterrupted, dropout, saved, loaded):
    """Whatever the `ep_size`: rank by rank the data, and so the dropout, is the same."""
    run, folder = uninterrupted(saved, "SHARDED", "qwen3_moe", dropout)
    resumed = resume(loaded, "SHARDED", "qwen3_moe", folder, dropout=dropout)
    assert len(resumed.losses) == 3
    if saved == loaded:
        assert (resumed.losses, resumed.norms) == (run.losses[SAVED_AFTER:], run.norms[SAVED_AFTER:])
    else:
        assert_goes_on(resumed, run)
    lost = resume(loaded, "SHARDED", "qwen3_moe", folder, dropout=dropout, forget_random_state=True)
    assert_loaded(lost, run)
    off = [abs(one / other - 1) for one, other in zip(lost.losses, run.losses[SAVED_AFTER:], strict=True)]
    assert min(off) > 10 * UPDATE_TOLERANCE, "or the losses would say nothing about the random state"


def test_the_comparison_sees_a_lost_optimizer_state(uninterrupted):
    run, folder = uninterrupted(EP2, "SHARDED", "qwen3_moe")
    resumed = resume(ALONE, "SHARDED", "qwen3_moe", folder, forget_optimizer=True)
    assert_loaded(resumed, run)
    assert min(weight_errors(resumed, run).values()) > 100 * UPDATE_TOLERANCE


def failed_loads(family: str, folders: list[Path]) -> tuple[list[tuple[str, str]], list[str]]:
    """What `load_state` of each folder fails with on this rank, and the weights that changed meanwhile."""
    from accelerate import Accelerator

    accelerator = Accelerator()
    model = build_tiny(family)
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    before = whole(model.state_dict())
    told = []
    for folder in folders:
        try:
            accelerator.load_state(folder)
            told.append(("none", "loaded"))
        except Exception as error:
            told.append((type(error).__name__, str(error)))
    after = whole(model.state_dict())
    return told, [name for name, weight in before.items() if not torch.equal(weight, after[name])]


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


DAMAGES = {
    "FULL": [
        ("pytorch_model_fsdp.bin", cut, "{path} is damaged or cut short: "),
        ("pytorch_model_fsdp.bin", Path.unlink, "{path} is missing"),
        ("optimizer.bin", cut, "{path} is damaged or cut short: "),
        ("optimizer.bin", Path.unlink, "{path} is missing"),
    ],
    "SHARDED": [
        ("pytorch_model_fsdp_0/__1_0.distcp", cut, r"{path} has \d+ of \d+ bytes"),
        ("pytorch_model_fsdp_0/__0_0.distcp", Path.unlink, "{path} is missing, its metadata names 2 files"),
        ("pytorch_model_fsdp_0/.metadata", cut, "{path} cannot be read: "),
        ("pytorch_model_fsdp_0", shutil.rmtree, "{path} is missing"),
        ("optimizer_0/__1_0.distcp", cut, r"{path} has \d+ of \d+ bytes"),
        ("optimizer_0", shutil.rmtree, "{path} is missing"),
    ],
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_state_cut_short_is_named_on_all_ranks_and_nothing_is_loaded(uninterrupted, tmp_path, kind):
    _, folder = uninterrupted(TWO_RANKS, kind, "qwen3_moe")
    damaged = [tmp_path / str(number) for number in range(len(DAMAGES[kind]))]
    for copy, (file, damage, _) in zip(damaged, DAMAGES[kind], strict=True):
        damage(shutil.copytree(folder, copy) / file)
    environment = {**with_moe_config(ep_size=2), "FSDP_STATE_DICT_TYPE": f"{kind}_STATE_DICT"}
    for told, changed in run_ranks(failed_loads, 2, environment, family="qwen3_moe", folders=damaged):
        assert not changed
        for (name, message), copy, (file, _, expected) in zip(told, damaged, DAMAGES[kind], strict=True):
            assert name == "CheckpointError", (file, message)
            assert re.match(expected.format(path=re.escape(str(copy / file))), message), message


def test_a_state_of_the_other_kind_is_refused_with_the_setting_that_reads_it(uninterrupted):
    for kind, other in (("FULL", "SHARDED"), ("SHARDED", "FULL")):
        _, folder = uninterrupted(TWO_RANKS, kind, "qwen3_moe")
        environment = {**with_moe_config(ep_size=2), "FSDP_STATE_DICT_TYPE": f"{other}_STATE_DICT"}
        for told, _ in run_ranks(failed_loads, 2, environment, family="qwen3_moe", folders=[folder]):
            assert told[0][0] == "CheckpointError"
            assert f"was written with {kind}_STATE_DICT, this run is configured for {other}_STATE_DICT" in told[0][1]
            assert f"fsdp_state_dict_type: {kind}_STATE_DICT" in told[0][1]


@pytest.mark.parametrize(
    ("kind", "file"), [("FULL", "pytorch_model_fsdp.bin"), ("SHARDED", "optimizer_0/__1_0.distcp")]
)
def test_one_process_names_the_file_that_is_cut_short_too(uninterrupted, tmp_path, kind, file):
    _, folder = uninterrupted(TWO_RANKS, kind, "qwen3_moe")
    damaged = shutil.copytree(folder, tmp_path / "state")
    cut(damaged / file)
    environment = {"MOE_ACCEL_CONFIG": with_moe_config(ep_size=1)["MOE_ACCEL_CONFIG"]}
    ((told, changed),) = run_ranks(failed_loads, 1, environment, family="qwen3_moe", folders=[damaged])
    assert told[0][0] == "CheckpointError"
    assert str(damaged / file) in told[0][1]
    assert not changed
