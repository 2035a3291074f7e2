"""Where accelerate and transformers are extended, so that their own calls save and resume a mixture of experts.

    accelerator.save_model(model, folder)     hub layout, every rank its part             save.py
    model.save_pretrained(folder)             the same, on all ranks                      save.py
    accelerator.save_state(folder)            beside, then renamed                        periodic.py
    accelerator.load_state(folder)            a damaged folder is found first             here
      without FSDP, of an FSDP2 folder        read all the same                           unsharded.py
    Trainer: resume, load_best_model          the experts too; a damaged folder first     load.py, here
    Trainer.save_model                        hub layout, every rank its part             here
      of a periodic checkpoint                beside, then renamed                        periodic.py
    both with async_save                      while training goes on                      background.py

What `save_state` writes, and `load_state` of a whole folder, are accelerate's own: the experts are DTensors under the
model's names, which torch.distributed.checkpoint reads at any `ep_size`. The extensions act for accelerators that they
were installed on, and leave all others alone.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, is_peft_model
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME, RNG_STATE_NAME
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import StateDictType
from transformers import PreTrainedModel

from moe_accel.checkpoint.background import wait_for_save, waiting
from moe_accel.checkpoint.files import (
    INDEX_FILES,
    RESUME_HINT,
    SINGLE_FILES,
    check_sharded,
    fsdp_path,
    has_fsdp_model,
    open_file,
    shorten,
)
from moe_accel.checkpoint.load import default_conversions, load_hub_checkpoint
from moe_accel.checkpoint.periodic import (
    TRAINER_STAGING,
    around_save_checkpoint,
    around_save_state,
    numbered_states,
    tell_of_unfinished,
)
from moe_accel.checkpoint.publish import recover_folder, staging_name
from moe_accel.checkpoint.save import (
    Deferred,
    Saving,
    full_state_dict_type,
    gather_adapters,
    guard_save_adapters,
    guard_save_pretrained,
    is_sharded,
    save_hub,
    saving_of,
)
from moe_accel.checkpoint.unsharded import load_unsharded
from moe_accel.errors import CheckpointError
from moe_accel.hooks import when_defined, wrap
from moe_accel.ranks import gather, tell

_installed: WeakSet[Accelerator] = WeakSet()


def install(accelerator: Accelerator) -> None:
    """Make saving and resuming through `accelerator`, and through a Trainer that holds it, complete and checked."""
    _installed.add(accelerator)
    wrap(Accelerator, "save_model", _save_model)
    wrap(Accelerator, "save_state", lambda original: around_save_state(original, _installed))
    wrap(Accelerator, "load_state", _load_state)
    wrap(Accelerator, "end_training", waiting)
    wrap(PreTrainedModel, "save_pretrained", guard_save_pretrained)
    when_defined("peft.peft_model", "PeftModel", lambda peft: wrap(peft, "save_pretrained", guard_save_adapters))
    when_defined("transformers.trainer", "Trainer", _install_on_trainer)


def install_on_model(accelerator: Accelerator, model: nn.Module) -> None:
    """Remember the hub layout of a model before its class is replaced by `fully_shard`; call it at prepare().

    `from_pretrained` leaves it on the model. A model built from a config has to be looked up by its class later, which
    fails for the class that `fully_shard` makes: nemotron_h and deepseek_v4 would be saved under wrong names.
    """
    config: Any = accelerator.parallelism_config
    saving_of[model] = Saving(config.save_layout == "stacked", accelerator.device)
    if isinstance(model, PreTrainedModel) and getattr(model, "_weight_conversions", None) is None:
        model.__dict__["_weight_conversions"] = default_conversions(model)


def _install_on_trainer(trainer: type) -> None:
    wrap(trainer, "_load_from_checkpoint", _load_from_checkpoint)
    wrap(trainer, "_load_best_model", _load_best_model)
    wrap(trainer, "save_model", _trainer_save_model)
    wrap(trainer, "_save_checkpoint", lambda original: around_save_checkpoint(original, _installed))


def _save_model(original: Callable) -> Callable:
    """Around `Accelerator.save_model`."""

    def save_model(
        self: Accelerator,
        model: nn.Module,
        save_directory: Any,
        max_shard_size: int | str = "10GB",
        safe_serialization: bool = True,
    ) -> None:
        if self not in _installed or not _is_transformers_model(self, model):
            return original(self, model, save_directory, max_shard_size, safe_serialization)
        if not safe_serialization:
            raise CheckpointError(
                "accelerator.save_model(safe_serialization=False): the hub layout is written as safetensors only",
                "leave safe_serialization out",
            )
        save_hub(self, model, save_directory, max_shard_size)

    return save_model


def _load_state(original: Callable) -> Callable:
    """Around `Accelerator.load_state`."""

    def load_state(self: Accelerator, input_dir: Any = None, *args: Any, **kwargs: Any) -> Any:
        if self not in _installed:
            return original(self, input_dir, *args, **kwargs)
        wait_for_save(self)
        if input_dir is None:
            folder = _latest_state(self)
            input_dir = None if folder is None else str(folder)
        else:
            folder = Path(input_dir).expanduser().resolve()
            _recover(self, folder)
            if folder.is_dir():
                check_state(self, folder, self._models, len(self._optimizers))
                tell_of_unfinished(folder, [staging_name(folder)])
        if folder is not None and folder.is_dir():
            _tell_of_random_states(self, folder)
        if folder is not None and folder.is_dir() and not self.is_fsdp2 and has_fsdp_model(folder):
            return load_unsharded(self, folder, lambda: original(self, input_dir, *args, **kwargs))
        return original(self, input_dir, *args, **kwargs)

    return load_state


def _load_from_checkpoint(original: Callable) -> Callable:
    """Around `Trainer._load_from_checkpoint`."""

    def load_from_checkpoint(self: Any, resume_from_checkpoint: Any, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        wait_for_save(self.accelerator)
        if self.accelerator in _installed:
            tell_of_unfinished(folder, [folder.parent / TRAINER_STAGING])
        # Trainer loads the optimizer next, if there is one: `save_only_model` leaves it out.
        num_optimizers = int(any(fsdp_path(folder, OPTIMIZER_NAME, 0, full).exists() for full in (True, False)))
        if not _load_into(self, self.model if model is None else model, folder, num_optimizers):
            original(self, resume_from_checkpoint, model)

    return load_from_checkpoint


def _load_best_model(original: Callable) -> Callable:
    """Around `Trainer._load_best_model`."""

    def load_best_model(self: Any) -> None:
        wait_for_save(self.accelerator)
        if not _load_into(self, self.model, Path(self.state.best_model_checkpoint)):
            original(self)

    return load_best_model


def _load_into(trainer: Any, model: nn.Module, folder: Path, num_optimizers: int = 0) -> bool:
    """Load the model of a Trainer checkpoint, where the Trainer itself would lose experts.

    Args:
        trainer: a Trainer.
        model: its model, as wrapped as it is.
        folder: the checkpoint.
        num_optimizers: how many of its optimizers are to be checked under FSDP2: those that will be loaded.

    Returns:
        False where the Trainer's own loading is right: under FSDP2 (after a check of the files), for adapters, and
        for folders that hold no model, which it refuses.
    """
    accelerator = trainer.accelerator
    if accelerator not in _installed or not folder.is_dir():
        return False
    if trainer.is_fsdp_enabled and has_fsdp_model(folder):
        check_state(accelerator, folder, [model], num_optimizers)
        return False
    unwrapped = accelerator.unwrap_model(model, keep_torch_compile=False)
    adapted = not isinstance(unwrapped, PreTrainedModel) or getattr(unwrapped, "_hf_peft_config_loaded", False)
    if adapted or trainer.is_deepspeed_enabled or has_fsdp_model(folder):
        return False
    if not any((folder / name).is_file() for name in SINGLE_FILES + INDEX_FILES):
        return False
    load_hub_checkpoint(unwrapped, folder)
    return True


def _trainer_save_model(original: Callable) -> Callable:
    """Around `Trainer.save_model`."""

    def save_model(self: Any, output_dir: Any = None, _internal_call: bool = False) -> Any:
        accelerator = self.accelerator
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        if accelerator not in _installed or plugin is None:
            return original(self, output_dir, _internal_call)
        sharded = plugin.state_dict_type == StateDictType.SHARDED_STATE_DICT
        if sharded and _internal_call and output_dir is not None and not self.args.push_to_hub:
            # A periodic checkpoint has the model in torch.distributed.checkpoint's files, next to the optimizer. They
            # are written after this call; before that, each rank notes it as the best one, if it finds the folder.
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            return original(self, output_dir, _internal_call)
        with full_state_dict_type(plugin), _without_gathering(self) as deferred:
            result = original(self, output_dir, _internal_call)
        if broadcast_object_list([deferred.taken])[0]:  # by `_save` on rank 0
            unwrapped: Any = accelerator.unwrap_model(self.model, keep_torch_compile=False)
            unwrapped.save_pretrained(self.args.output_dir if output_dir is None else output_dir)
        return result

    return save_model


@contextmanager
def _without_gathering(trainer: Any) -> Iterator[Deferred]:
    """While `Trainer.save_model` runs, let `get_state_dict` gather no more than it has to.

    Nothing where all ranks write afterwards; of a PEFT model, what PEFT puts into its files. Everything as before where
    the model is uploaded in the same call, or a subclass saves in its own way.
    """
    accelerator, deferred = trainer.accelerator, Deferred()
    model = accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    own = type(trainer)._save is not sys.modules["transformers.trainer"].Trainer._save
    if is_peft_model(model) and is_sharded(model) and not own:
        accelerator.get_state_dict = lambda *_args, **_kwargs: gather_adapters(model)
    elif isinstance(model, PreTrainedModel) and is_sharded(model) and not own and not trainer.args.push_to_hub:
        accelerator.get_state_dict = lambda *_args, **_kwargs: deferred
    try:
        yield deferred
    finally:
        accelerator.__dict__.pop("get_state_dict", None)


def check_state(accelerator: Accelerator, folder: Path, models: Iterable[nn.Module], num_optimizers: int) -> None:
    """Check the files of a `save_state` folder or of a Trainer's FSDP checkpoint, on rank 0, for every rank.

    Without it a rank whose file is damaged stops, and the others wait for it.

    Raises:
        CheckpointError: on all ranks; a file is missing, cut short, of the other state dict type, or lacks weights.
    """
    names = [None if is_peft_model(model) else set(get_model_state_dict(model)) for model in models]
    found: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            _check_files(accelerator, folder, names, num_optimizers)
        except CheckpointError as error:
            found = [(error.message, error.hint)]
    message_and_hint = broadcast_object_list(found)[0]
    if message_and_hint is not None:
        raise CheckpointError(*message_and_hint)


def _check_files(accelerator: Accelerator, folder: Path, names: list[set[str] | None], num_optimizers: int) -> None:
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None and not has_fsdp_model(folder):
        for file in sorted(folder.glob("*.safetensors")):
            open_file(file)
        return
    if plugin is None:
        full = fsdp_path(folder, FSDP_MODEL_NAME, 0, full=True).is_file()
    else:
        full = plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    for index, expected in enumerate(names):
        saved = _check_fsdp(folder, FSDP_MODEL_NAME, index, full)
        if not full:  # accelerate saves {"model": state dict}
            saved = {name.removeprefix("model.") for name in saved}
        missing = (expected or set()) - saved
        if missing:
            raise CheckpointError(
                f"{fsdp_path(folder, FSDP_MODEL_NAME, index, full)} lacks {len(missing)} of {len(expected or ())} "
                f"weights of the model: {shorten(missing)}",
                RESUME_HINT,
            )
    for index in range(num_optimizers):
        _check_fsdp(folder, OPTIMIZER_NAME, index, full)


def _check_fsdp(folder: Path, stem: str, index: int, full: bool) -> set[str]:
    path, other = fsdp_path(folder, stem, index, full), fsdp_path(folder, stem, index, not full)
    if not path.exists():
        if other.exists():
            has, needed = ("SHARDED", "FULL") if full else ("FULL", "SHARDED")
            raise CheckpointError(
                f"{other} was written with {has}_STATE_DICT, this run is configured for {needed}_STATE_DICT",
                f"in the config file write\nfsdp_config: {{fsdp_state_dict_type: {has}_STATE_DICT}}",
            )
        raise CheckpointError(f"{path} is missing", RESUME_HINT)
    return set(open_file(path)) if full else check_sharded(path)


def _latest_state(accelerator: Accelerator) -> Path | None:
    """The folder that `load_state()` without a folder takes: the last whole one of automatic checkpoint naming.

    Raises:
        CheckpointError: there are some, and none is whole.
    """
    if not accelerator.project_configuration.automatic_checkpoint_naming or not accelerator.project_dir:
        return None
    project_dir = Path(accelerator.project_dir)
    problem = None
    for folder in numbered_states(project_dir / "checkpoints"):
        try:
            check_state(accelerator, folder, accelerator._models, len(accelerator._optimizers))
        except CheckpointError as error:
            tell(f"{folder} is left out: {error.message}")
            problem = problem or error
            continue
        tell_of_unfinished(folder, sorted(project_dir.glob(".checkpoint_*.saving")))
        return folder
    if problem is not None:
        raise problem
    return None


def _tell_of_random_states(accelerator: Accelerator, folder: Path) -> None:
    """Say which ranks find no random state, as where there are more of them than saved: accelerate says nothing."""
    mine = (folder / f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl").is_file()
    found = gather(mine) if dist.is_initialized() else [mine]
    without = [str(rank) for rank, there in enumerate(found) if not there]
    if without:
        ranks = f"rank{'s' * (len(without) > 1)} {', '.join(without)}"
        tell(f"{folder} has no random state of {ranks}: there, what is drawn from now on is drawn anew")


def _recover(accelerator: Accelerator, folder: Path) -> None:
    if accelerator.is_local_main_process:
        recover_folder(folder)
    accelerator.wait_for_everyone()


def _is_transformers_model(accelerator: Accelerator, model: nn.Module) -> bool:
    return isinstance(accelerator.unwrap_model(model, keep_torch_compile=False), PreTrainedModel)
