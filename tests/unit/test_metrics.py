"""Expert load: the counts of a brute-force tally, in one process and on ranks, and the numbers made of them."""

import contextlib
import io
import json
import statistics

import pytest
import torch
from torch import nn

from moe_accel import ExpertLoadCallback, expert_load, experts, track_expert_load
from moe_accel.errors import UnsupportedModelError
from moe_accel.metrics import layer_load, scalars, table
from tests.dist.conftest import _ranks_end_with_the_session  # noqa: F401
from tests.dist.ranks import run_alone, run_ranks, with_moe_config
from tests.families import build_tiny, experts_modules, model_class, tiny_inputs, tiny_loss

FAMILY = "qwen3_moe"
LAYERS = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
SEEDS = {0: (0, 1), 1: (2, 3)}
"""Of the two batches of each rank."""


def before_fork(**_):
    import transformers.trainer  # noqa: F401

    model_class(FAMILY)


def tally(seeds):
    """Tokens of each expert of each layer, counted one by one in stock transformers."""
    model, counts = build_tiny(FAMILY), {}
    for name, module in experts_modules(model):
        counts[name] = [0] * module.num_experts

        def count(module, arguments, name=name):
            for expert in arguments[1].flatten().tolist():
                counts[name][expert] += 1

        module.register_forward_pre_hook(count)
    for seed in seeds:
        tiny_loss(model, tiny_inputs(FAMILY, seed=seed))
    return counts


def load_of(tokens):
    """`LayerLoad` of counts, in plain Python."""
    total = sum(tokens)
    cv = statistics.pstdev(tokens) / statistics.fmean(tokens)
    return {
        "tokens": tokens,
        "share": pytest.approx([count / total for count in tokens]),
        "cv": pytest.approx(cv),
        "dead": len([count for count in tokens if count == 0]),
    }


def loads_of(counts):
    return {name: load_of(tokens) for name, tokens in counts.items()}


def swapped(kernels="fused"):
    """A model as prepare() leaves it in one process."""
    experts.register()
    model = build_tiny(FAMILY)
    for _, module in experts_modules(model):
        experts.install(module, experts.Settings(kernels))
    return model


def forward(model, *seeds):
    for seed in seeds:
        tiny_loss(model, tiny_inputs(FAMILY, seed=seed)).backward()


# ---- one process


@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_the_load_of_one_process_is_the_tally(kernels):
    model = swapped(kernels)
    track_expert_load(model)
    forward(model, 0, 1)
    assert expert_load(model) == loads_of(tally([0, 1]))


def test_a_reading_counts_from_zero_unless_told_otherwise_and_tracking_again_does():
    model = swapped()
    forward(model, 5)  # before anybody asked
    track_expert_load(model)
    forward(model, 0)
    assert expert_load(model, reset=False) == loads_of(tally([0]))
    forward(model, 1)
    assert expert_load(model) == loads_of(tally([0, 1]))
    forward(model, 2)
    assert expert_load(model) == loads_of(tally([2]))
    forward(model, 3)
    track_expert_load(model)
    forward(model, 4)
    assert expert_load(model) == loads_of(tally([4]))
    assert expert_load(model) == {name: layer_load([0] * 8) for name in LAYERS}


def test_evaluation_is_counted_also_in_inference_mode():
    model = swapped()
    track_expert_load(model)
    with torch.inference_mode():
        tiny_loss(model, tiny_inputs(FAMILY, seed=0))
    forward(model, 1)
    assert expert_load(model) == loads_of(tally([0, 1]))


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
def test_recompute_is_not_counted_in_one_process(how):
    model = swapped()
    model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
    model.enable_input_require_grads()  # else a reentrant checkpoint computes nothing again
    track_expert_load(model)
    forward(model, 0)
    assert expert_load(model) == loads_of(tally([0]))


# ---- on ranks


def load_on_rank(how):
    from accelerate import Accelerator

    accelerator = Accelerator()
    model = build_tiny(FAMILY)
    if how != "plain":
        model.gradient_checkpointing_enable({"use_reentrant": how == "reentrant"})
        model.enable_input_require_grads()
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    track_expert_load(model)
    loads = []
    for seed in SEEDS[accelerator.process_index]:
        accelerator.backward(tiny_loss(model, tiny_inputs(FAMILY, seed=seed)))
        loads.append(expert_load(model))
    return loads


@pytest.mark.parametrize("how", ["plain", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("ep_size", [1, 2], ids=["ep1", "ep2"])
def test_every_rank_reads_the_tally_over_all_ranks_without_recompute(ep_size, how):
    truth = [loads_of(tally(seeds)) for seeds in zip(*SEEDS.values(), strict=True)]
    assert run_ranks(load_on_rank, 2, with_moe_config(ep_size=ep_size), how=how) == [truth, truth]


def test_the_names_are_those_of_the_model_under_fsdp_activation_checkpointing():
    environment = {**with_moe_config(ep_size=2), "FSDP_ACTIVATION_CHECKPOINTING": "true"}
    truth = [loads_of(tally(seeds)) for seeds in zip(*SEEDS.values(), strict=True)]
    assert run_ranks(load_on_rank, 2, environment, how="plain") == [truth, truth]


# ---- the numbers


def test_numbers_of_a_layer():
    assert layer_load([6, 2, 0, 0]) == {
        "tokens": [6, 2, 0, 0],
        "share": [0.75, 0.25, 0.0, 0.0],
        "cv": pytest.approx(6**0.5 / 2),  # mean 2, variance (16 + 0 + 4 + 4) / 4
        "dead": 2,
    }
    assert layer_load([3, 3]) == {"tokens": [3, 3], "share": [0.5, 0.5], "cv": 0.0, "dead": 0}
    assert layer_load([0, 0]) == {"tokens": [0, 0], "share": [0.0, 0.0], "cv": 0.0, "dead": 2}


TWO_LAYERS = {"model.layers.0.mlp.experts": layer_load([6, 2, 0, 0]), "model.layers.3.mlp.experts": layer_load([1, 1])}


def test_scalars_are_a_number_a_line_and_their_extremes():
    cv = pytest.approx(6**0.5 / 2)
    assert scalars(TWO_LAYERS, "load") == {
        "load/model.layers.0.mlp.experts/cv": cv,
        "load/model.layers.0.mlp.experts/dead": 2,
        "load/model.layers.0.mlp.experts/max_share": 0.75,
        "load/model.layers.3.mlp.experts/cv": 0.0,
        "load/model.layers.3.mlp.experts/dead": 0,
        "load/model.layers.3.mlp.experts/max_share": 0.5,
        "load/max_cv": cv,
        "load/dead": 2,
    }


def test_the_table_has_a_row_a_layer_under_its_short_name():
    columns = {column.header: list(column.cells) for column in table(TWO_LAYERS).columns}
    assert columns == {
        "layer": ["model.layers.0", "model.layers.3"],
        "experts": ["4", "2"],
        "tokens": ["8", "2"],
        "least": ["0.00%", "50.00%"],
        "most": ["75.00%", "50.00%"],
        "cv": ["1.22", "0.00"],
        "dead": ["2", "0"],
    }


# ---- what is refused


def of_stock_experts():
    model = build_tiny(FAMILY)
    for _, module in experts_modules(model):
        module.config._experts_implementation = "grouped_mm"
    return model


def only_named_in_the_config():
    """As `from_pretrained(experts_implementation="moe_accel")` leaves it: computed by us, prepared by nobody."""
    experts.register()
    model = build_tiny(FAMILY)
    model.set_experts_implementation("moe_accel")
    return model


@pytest.mark.parametrize("call", [track_expert_load, expert_load])
@pytest.mark.parametrize("build", [lambda: nn.Linear(2, 2), of_stock_experts, only_named_in_the_config])
def test_a_model_that_was_not_prepared_is_refused(build, call):
    model = build()
    with pytest.raises(UnsupportedModelError) as error:
        call(model)
    assert str(error.value) == (
        f"{type(model).__name__} was not prepared by moe-accel: its expert load cannot be counted\n\n"
        "hint: call it after accelerator.prepare(model), under a moe_config"
    )


def test_reading_before_tracking_is_refused():
    with pytest.raises(UnsupportedModelError) as error:
        expert_load(swapped())
    assert str(error.value) == (
        "no expert load of Qwen3MoeForCausalLM is counted\n\nhint: call moe_accel.track_expert_load(model) first"
    )


# ---- with a Trainer


def fit(folder):
    """Two steps of a Trainer on this rank, a log after each: its history, what it printed, the callback's `last`."""
    from transformers import Trainer, TrainingArguments

    from moe_accel import MoEConfig

    inputs = tiny_inputs(FAMILY, batch=8)
    rows = [{name: tensor[row] for name, tensor in inputs.items()} for row in range(8)]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        parallelism_config=MoEConfig() if not torch.distributed.is_initialized() else None,
    )
    callback = ExpertLoadCallback(f"{folder}/new/load.json")
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(build_tiny(FAMILY), arguments, train_dataset=rows, eval_dataset=rows, callbacks=[callback])
        trainer.train()
    return trainer.state.log_history, printed.getvalue(), callback.last


@pytest.mark.parametrize("ep_size", [None, 1, 2], ids=["one-process", "2-ranks-ep1", "2-ranks-ep2"])
def test_the_callback_logs_scalars_writes_the_file_and_prints_one_table(tmp_path, ep_size):
    if ep_size is None:
        fits = [run_alone(fit, folder=str(tmp_path))]
    else:
        fits = run_ranks(fit, 2, with_moe_config(ep_size=ep_size), folder=str(tmp_path))
    written = json.loads((tmp_path / "new" / "load.json").read_text())
    assert [each["step"] for each in written] == [1, 2]
    batch, evaluated = 2 * len(fits), 8  # the evaluation after step 1 is counted at the log of step 2
    pairs_of_a_row = 13 * 2
    for layer in LAYERS:
        totals = [sum(each["load"][layer]["tokens"]) for each in written]
        assert totals == [batch * pairs_of_a_row, (batch + evaluated) * pairs_of_a_row]

    for history, _, last in fits:
        logs = [each for each in history if "loss" in each]
        numbers = [{name: value for name, value in log.items() if name.startswith("expert_load/")} for log in logs]
        assert numbers == [scalars(each["load"]) for each in written]
        assert last == written[-1]["load"]
        assert not any(name.startswith("expert_load/") for log in history if "loss" not in log for name in log)
    assert [printed.count("expert load") for _, printed, _ in fits] == [1] + [0] * (len(fits) - 1)
    assert f"{(batch + evaluated) * pairs_of_a_row:,}" in fits[0][1]
