"""Expert load: how a training run's tokens are spread over the experts of each layer.

Counting costs one addition of [e] integers a layer on the device; nothing is copied to the host or sent between ranks
before somebody asks. Plain loops:

    track_expert_load(model)              # after prepare()
    ...
    accelerator.log(scalars(expert_load(model)), step=step)     # on every rank

With a Trainer: `callbacks=[ExpertLoadCallback()]`.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback

from moe_accel.errors import UnsupportedModelError
from moe_accel.experts import NAME, Settings, is_decorated, settings_of


class LayerLoad(TypedDict):
    """The load of one layer's experts.

    Attributes:
        tokens: tokens that each expert computed, over all ranks.
        share: the same as a share of all, summing to 1; zeros where the layer computed nothing.
        cv: coefficient of variation of `tokens`: standard deviation over mean, 0 for a perfect balance.
        dead: experts that computed nothing.
    """

    tokens: list[int]
    share: list[float]
    cv: float
    dead: int


def track_expert_load(model: nn.Module) -> None:
    """Count from now on; a second call starts over.

    Raises:
        UnsupportedModelError: the experts of the model do not compute with moe-accel, so nothing could be counted.
    """
    for _, _, settings in _experts(model):
        settings.counting, settings.load = True, None


def expert_load(model: nn.Module, reset: bool = True) -> dict[str, LayerLoad]:
    """The load of each layer since `track_expert_load`, by the name of its experts module.

    A collective call: every rank makes it, and gets the same answer. Recompute is not counted; evaluation is.

    Args:
        model: the model, wrapped or not.
        reset: count from zero again.

    Raises:
        UnsupportedModelError: nothing is counted: `track_expert_load` was not called.
    """
    found = _experts(model)
    if not any(settings.counting for _, _, settings in found):
        raise UnsupportedModelError(
            f"no expert load of {type(model).__name__} is counted", "call moe_accel.track_expert_load(model) first"
        )
    tokens = _over_all_ranks([_of_all_experts(module, settings) for _, module, settings in found])
    if reset:
        for _, _, settings in found:
            settings.load = None
    return {name: layer_load(each) for (name, _, _), each in zip(found, tokens, strict=True)}


def layer_load(tokens: list[int]) -> LayerLoad:
    """The load that token counts of one layer make."""
    counts = torch.tensor(tokens, dtype=torch.float64)
    total = float(counts.sum())
    share = (counts / total if total else counts).tolist()
    cv = float(counts.std(correction=0) / counts.mean()) if total else 0.0
    return LayerLoad(tokens=tokens, share=share, cv=cv, dead=tokens.count(0))


def scalars(load: Mapping[str, LayerLoad], prefix: str = "expert_load") -> dict[str, float]:
    """One number a line, as trackers want them: each layer's cv, dead experts and largest share, and their extremes."""
    flat = {}
    for name, layer in load.items():
        flat[f"{prefix}/{name}/cv"] = layer["cv"]
        flat[f"{prefix}/{name}/dead"] = layer["dead"]
        flat[f"{prefix}/{name}/max_share"] = max(layer["share"])
    flat[f"{prefix}/max_cv"] = max(layer["cv"] for layer in load.values())
    flat[f"{prefix}/dead"] = sum(layer["dead"] for layer in load.values())
    return flat


def table(load: Mapping[str, LayerLoad]) -> Any:
    """The load as a rich table, a row a layer."""
    from rich.table import Table

    made = Table(title="expert load", title_justify="left")
    for heading in ("layer", "experts", "tokens", "least", "most", "cv", "dead"):
        made.add_column(heading, justify="left" if heading == "layer" else "right")
    for name, layer in zip(_short_names(list(load)), load.values(), strict=True):
        share = layer["share"]
        row = [name, str(len(share)), f"{sum(layer['tokens']):,}", f"{min(share):.2%}", f"{max(share):.2%}"]
        made.add_row(*row, f"{layer['cv']:.2f}", str(layer["dead"]))
    return made


class ExpertLoadCallback(TrainerCallback):
    """Counts expert load while a Trainer trains; evaluation in between is counted too.

    At every log of the Trainer the numbers of `scalars` since the log before go into `state.log_history` and into the
    `logs` that callbacks after this one see; `last` keeps the full `expert_load`. At the end rank 0 prints a table of
    the last interval to stderr. Trackers (`report_to`) are callbacks before this one; for them put it first:
    `trainer.callback_handler.callbacks.insert(0, ExpertLoadCallback())`.

    Args:
        path: JSON file that rank 0 writes at the end, with the load of every log: [{"step", "load"}, ...].
    """

    def __init__(self, path: str | Path | None = None):
        self.path = None if path is None else Path(path)
        self.last: dict[str, LayerLoad] = {}
        self._history: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start counting."""
        track_expert_load(kwargs["model"])
        self._history = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Read the counts at the logs of the training loss."""
        if logs is None or "loss" not in logs:
            return
        self.last = expert_load(kwargs["model"])
        self._history.append({"step": state.global_step, "load": self.last})
        logs.update(scalars(self.last))
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(scalars(self.last))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print the table and write the file."""
        if not state.is_world_process_zero or not self.last:
            return
        from rich.console import Console

        Console(file=sys.stderr).print(table(self.last))
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self._history), encoding="utf-8")


def _experts(model: nn.Module) -> list[tuple[str, Any, Settings]]:
    named = ((_plain(name), module) for name, module in model.named_modules())
    modules: list[tuple[str, Any]] = [(name, module) for name, module in named if is_decorated(module)]
    computing = [module for _, module in modules if module.config._experts_implementation == NAME]
    if not modules or len(computing) < len(modules) or not all(hasattr(module, "_moe_accel") for module in computing):
        raise UnsupportedModelError(
            f"{type(model).__name__} was not prepared by moe-accel: its expert load cannot be counted",
            "call it after accelerator.prepare(model), under a moe_config",
        )
    return [(name, module, settings_of(module)) for name, module in modules]


def _plain(name: str) -> str:
    """A module's name without what checkpointing and torch.compile add to it."""
    return name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def _short_names(names: list[str]) -> list[str]:
    """Module names without the parts that all of them end in: model.layers.0 for model.layers.0.mlp.experts."""
    parts = [name.split(".") for name in names]
    while len(parts) > 1 and all(len(each) > 1 for each in parts) and len({each[-1] for each in parts}) == 1:
        parts = [each[:-1] for each in parts]
    return [".".join(each) for each in parts]


def _of_all_experts(module: Any, settings: Settings) -> torch.Tensor:
    """[E] int64: what this rank computed, zeros for the experts of other ranks."""
    device = next(module.parameters()).device
    counts = torch.zeros(module.num_experts, dtype=torch.int64, device=device)
    if settings.load is not None:
        num_local_experts = settings.load.numel()
        first = 0 if settings.dispatcher is None else settings.dispatcher.rank * num_local_experts
        counts[first : first + num_local_experts] = settings.load.to(device)
    return counts


def _over_all_ranks(counts: list[torch.Tensor]) -> list[list[int]]:
    together = torch.cat(counts)
    if dist.is_available() and dist.is_initialized():
        if dist.get_backend() == "nccl":
            together = together.cuda()
        dist.all_reduce(together)
    return [each.tolist() for each in together.cpu().split([each.numel() for each in counts])]
