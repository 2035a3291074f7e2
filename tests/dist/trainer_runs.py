"""Fine-tuning with Hugging Face's Trainer on ranks, as a script does it: what `test_trainer` and `test_trl` compare."""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.parity import UPDATE_TOLERANCE, assert_all_small, largest_error
from tests.dist.ranks import STOCK_FSDP2, run_ranks, with_moe_config
from tests.dist.test_resume import Layout, whole
from tests.dist.training import MAX_NORM, OPTIMIZER
from tests.families import build_tiny, model_class, tiny_inputs

FAMILY = "qwen3_moe"
AUX_LOSS = {"output_router_logits": True, "router_aux_loss_coef": 0.01}
NUM_STEPS, SAVE_STEPS = 6, 3
NUM_EVAL = 7
"""Not a multiple of the ranks' batches: the last one is uneven."""

ARGUMENTS: dict[str, Any] = {
    "max_steps": NUM_STEPS,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": OPTIMIZER["lr"],
    "adam_epsilon": OPTIMIZER["eps"],
    "weight_decay": OPTIMIZER["weight_decay"],
    "max_grad_norm": MAX_NORM,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": SAVE_STEPS,
    "report_to": "none",
    "disable_tqdm": True,
}


@dataclasses.dataclass(frozen=True)
class Fit:
    """What came of a run; tensors are whole, and on rank 0 alone.

    Attributes:
        losses: as logged, one a step; of a resumed run, of the steps it did itself.
        norms: of the gradients before clipping, as logged, alike.
        saved: weights at each checkpoint, by step.
        last: weights after the last step, before the best model is loaded.
        weights: weights when `train` returned.
        best: folder of the best checkpoint.
        eval_loss: of `evaluate` afterwards.
        logits: of `predict` afterwards.
    """

    losses: list[float]
    norms: list[float]
    saved: dict[int, dict[str, torch.Tensor]]
    last: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    best: str | None = None
    eval_loss: float | None = None
    logits: torch.Tensor | None = None


def examples(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Sequences of the same length, with labels on 1 to 12 of their tokens."""
    inputs = tiny_inputs(FAMILY, batch=count, seed=seed)
    num_ignored = torch.randint(0, 12, (count,), generator=torch.Generator().manual_seed(seed))
    for row, ignored in zip(inputs["labels"], num_ignored.tolist(), strict=True):
        row[:ignored] = -100
    return [{name: tensor[row] for name, tensor in inputs.items()} for row in range(count)]


def before_fork(run: Any = None, **_: Any) -> None:
    import transformers.trainer  # noqa: F401

    model_class(FAMILY)
    if run is not None:
        sys.modules[run.__module__].before_fork()


def fit(
    folder: Path,
    seed: int = 0,
    resume_from: Path | None = None,
    ep_size_argument: int | None = None,
    spoil_from: int | None = None,
    save_as: Path | None = None,
    evaluate: bool = False,
    dropout: float = 0.0,
    arguments: Mapping[str, Any] = {},
) -> Fit:
    """Train a tiny Qwen3-MoE with Trainer on this rank.

    Args:
        folder: output_dir.
        seed: of the model's weights.
        resume_from: checkpoint folder.
        ep_size_argument: give TrainingArguments a MoEConfig.
        spoil_from: step from which the learning rate is far too high.
        save_as: folder of a final `save_model`.
        evaluate: `evaluate` and `predict` after training, on uneven batches.
        dropout: of attention.
        arguments: of TrainingArguments, on top of ARGUMENTS.
    """
    from transformers import Trainer, TrainingArguments

    if ep_size_argument is not None:
        from moe_accel import MoEConfig

        arguments = {**arguments, "parallelism_config": MoEConfig(ep_size=ep_size_argument)}
    trainer = Trainer(
        model=build_tiny(FAMILY, seed=seed, attention_dropout=dropout, **AUX_LOSS),
        args=TrainingArguments(str(folder), **{**ARGUMENTS, **arguments}),
        train_dataset=examples(64, seed=0),
        eval_dataset=examples(NUM_EVAL, seed=1),
    )
    watch = watch_training(trainer, spoil_from)
    trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    result = watch()
    if save_as is not None:
        trainer.save_model(str(save_as))
    if evaluate:
        ignored = ["aux_loss", "router_logits"]
        predicted = trainer.predict(examples(NUM_EVAL, seed=2), ignore_keys=ignored)
        logits = torch.from_numpy(predicted.predictions)
        result = dataclasses.replace(result, eval_loss=trainer.evaluate()["eval_loss"], logits=logits)
    return result


def watch_training(trainer: Any, spoil_from: int | None = None) -> Any:
    """Take down what happens to the weights; call the result after training to get a `Fit`."""
    from transformers import TrainerCallback

    first, saved, last = [], {}, {}

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            first.append(state.global_step)

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if spoil_from is not None and state.global_step >= spoil_from:
                for group in kwargs["optimizer"].param_groups:
                    group["lr"] = 30.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == args.max_steps:
                last.update(whole(kwargs["model"].state_dict()))

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            saved[state.global_step] = whole(kwargs["model"].state_dict())

    trainer.add_callback(Watch)

    def finish() -> Fit:
        state = trainer.state
        logs = [entry for entry in state.log_history if "grad_norm" in entry and entry["step"] > first[0]]
        losses, norms = [entry["loss"] for entry in logs], [entry["grad_norm"] for entry in logs]
        weights = whole(trainer.model.state_dict())
        if trainer.accelerator.process_index:
            return Fit(losses, norms, {}, {}, {}, state.best_model_checkpoint)
        return Fit(losses, norms, saved, last, weights, state.best_model_checkpoint)

    return finish


def environment_of(layout: Layout, kind: str) -> dict[str, str]:
    """The variables of a launch in a layout; `kind` is the state dict type, FULL or SHARDED."""
    environment = (
        STOCK_FSDP2 if layout.ep_size is None else with_moe_config(ep_size=layout.ep_size, padding_free="auto")
    )
    if not layout.fsdp:
        return {name: value for name, value in environment.items() if name == "MOE_ACCEL_CONFIG"}
    return {**environment, "FSDP_STATE_DICT_TYPE": f"{kind}_STATE_DICT"}


def fit_on_ranks(layout: Layout, kind: str, function: Any = fit, **how: Any) -> Fit:
    """What rank 0 has of a run in a layout, after a check that the ranks logged the same norms."""
    fits = run_ranks(function, layout.num_ranks, environment_of(layout, kind), **how)
    for each in fits:
        assert each.norms == pytest.approx(fits[0].norms, rel=1e-6)
        assert each.losses == fits[0].losses, "Trainer logs the mean over ranks"
        assert each.best == fits[0].best
    return fits[0]


def assert_same_fit(tried: Fit, truth: Fit, resumed: bool = False) -> None:
    """Same losses, norms and weights; of a run that was resumed in the middle, in the other half."""
    first = SAVE_STEPS if resumed else 0
    assert len(truth.losses) == NUM_STEPS
    assert min(truth.norms) > MAX_NORM, "or clipping would change nothing"
    assert tried.losses == pytest.approx(truth.losses[first:], rel=UPDATE_TOLERANCE)
    assert tried.norms == pytest.approx(truth.norms[first:], rel=UPDATE_TOLERANCE)
    assert_all_small(weight_errors(tried.weights, truth), UPDATE_TOLERANCE, "weights")


def weight_errors(weights: dict[str, torch.Tensor], truth: Fit) -> dict[str, float]:
    """Errors as shares of each tensor's largest change between the checkpoints."""
    assert weights.keys() == truth.weights.keys()
    middle = truth.saved[SAVE_STEPS]
    return {
        name: largest_error(weights[name], weight, (weight - middle[name]).abs().max())
        for name, weight in truth.weights.items()
    }


def different(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not the same bits."""
    assert some.keys() == others.keys()
    return [name for name in some if not torch.equal(some[name], others[name])]


def failure_of(run: Any, **how: Any) -> tuple[str, str]:
    """The error that `run(**how)` ends with on this rank: its class and message."""
    try:
        run(**how)
    except Exception as error:
        return type(error).__name__, str(error)
    return "none", "no error"


def failures(layout: Layout, kind: str, run: Any = fit, **how: Any) -> list[tuple[str, str]]:
    """The errors of all ranks of a run in a layout."""
    return run_ranks(failure_of, layout.num_ranks, environment_of(layout, kind), run=run, **how)


def cached(factory: Any, function: Any = fit) -> Any:
    """`run(layout, kind, **how)`: (Fit, output folder) with a checkpoint every third step, each run once a module."""

    @functools.cache
    def run(layout: Layout, kind: str, **how: Any) -> tuple[Fit, Path]:
        folder = factory.mktemp("trainer")
        return fit_on_ranks(layout, kind, function, folder=folder, save_as=folder / "final", **how), folder

    return run
