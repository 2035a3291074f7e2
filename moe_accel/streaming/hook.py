"""`from_pretrained` of a mixture of experts reads no weights: its parameters become pending.

transformers itself does the loading, with its own conversions, dtypes, renamings, ties, initialisation and report; it
is only handed tensors that have sources instead of values. So there is nothing here to keep in step with it.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakSet

from torch import nn
from transformers import PreTrainedModel

from moe_accel.config import ENV_VAR
from moe_accel.errors import CheckpointError
from moe_accel.experts.find import has_experts
from moe_accel.hooks import lazily, wrap
from moe_accel.ranks import tell, telling_others
from moe_accel.streaming.pending import Pending, materialise, pending_parameters
from moe_accel.streaming.source import Leaf, open_sources

RAM_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"

_accelerators: WeakSet[Any] = WeakSet()
_asked: ContextVar[bool] = ContextVar("shard_on_read", default=False)


def install(accelerator: Any = None) -> None:
    """Extend `PreTrainedModel`; mixtures of experts loaded while `accelerator` is alive stay pending."""
    if accelerator is not None:
        _accelerators.add(accelerator)
    for name in LOADING:
        wrap(PreTrainedModel, name, lazily("moe_accel.streaming.hook", "LOADING", name))


def is_wanted() -> bool:
    """Whether models are to be loaded by shards: a `moe_config` launch, an Accelerator with a `MoEConfig`, or asked."""
    return bool(os.environ.get(ENV_VAR)) or _asked.get() or len(_accelerators) > 0


@contextmanager
def shard_on_read() -> Iterator[None]:
    """Let `from_pretrained` inside this block leave weights in their files until `accelerator.prepare`.

    For scripts that load the model before they make their `Accelerator` or `TrainingArguments`, without a `moe_config`
    launch; everywhere else it is so already.
    """
    install()
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def why_stock(model: Any, state_dict: Any, files: Any, load_config: Any) -> str | None:
    """Why transformers has to load the weights itself; None where they can stay in their files."""
    if load_config.hf_quantizer is not None:
        return "the checkpoint is quantised, or is to be"
    if state_dict is not None:
        return "state_dict was given"
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return "the checkpoint has no safetensors files"
    if load_config.device_map is not None:
        return "device_map was given, or a default device is set"
    if getattr(load_config, "device_mesh", None) is not None or getattr(model, "_pp_stage", None) is not None:
        return "transformers distributes the model itself (distributed_config, tp_plan)"
    if model.is_custom_code():
        return "the model's code is not transformers' own"
    if not any(parameter.is_meta for parameter in model.parameters()):
        return "its parameters have been made already (DeepSpeed ZeRO-3)"
    return None


def load(
    original: Callable, model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
) -> tuple[Any, Any]:
    """In place of `PreTrainedModel._load_pretrained_model`, which fills a model on the meta device."""
    given = (model, state_dict, checkpoint_files, load_config)
    if not is_wanted() or expected_keys is not None or not has_experts(model):
        return original(*given, expected_keys)
    with telling_others():  # who fails here ends before prepare(), where the others would wait for it
        reason = why_stock(*given)
        if reason is None:
            sources = open_sources(checkpoint_files)
            check_index(sources, checkpoint_files, load_config.sharded_metadata)
            loaded, reason = _traced(original, model, sources, load_config)
            if reason is None:
                _read_buffers(model)
                return loaded
        tell(f"{type(model).__name__} is loaded whole on every rank: {reason}")
        return original(*given, expected_keys)


def finalize(original: Callable, model: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of `PreTrainedModel._finalize_model_loading`, which zeroes what rank 0 is to broadcast: nothing here."""
    if next(pending_parameters(model), None) is None or RAM_EFFICIENT not in os.environ:
        return original(model, *args, **kwargs)
    setting = os.environ[RAM_EFFICIENT]
    os.environ[RAM_EFFICIENT] = "false"
    try:
        return original(model, *args, **kwargs)
    finally:
        os.environ[RAM_EFFICIENT] = setting


LOADING = {"_load_pretrained_model": load, "_finalize_model_loading": finalize}
"""The two steps of `from_pretrained` that are replaced; the same in transformers 5.17 and 5.24."""


def check_index(sources: dict[str, Leaf], files: list[Any], metadata: Any) -> None:
    """Compare the index of a checkpoint with the files that it names.

    Raises:
        CheckpointError: a file lacks tensors that the index says it has.
    """
    weight_map = (metadata or {}).get("weight_map") or {}
    by_name = {os.path.basename(str(file)): file for file in files}
    for name, file in weight_map.items():
        found = sources.get(name)
        if found is None or os.path.basename(found.file.path) != os.path.basename(file):
            lacking = sorted(each for each, home in weight_map.items() if home == file and each not in sources)
            raise CheckpointError(
                f"{by_name.get(os.path.basename(file), file)} lacks {len(lacking) or 1} tensors that the index says it "
                f"has, the first is {(lacking or [name])[0]}",
                "the index and the files are not of one checkpoint: copy it again",
            )


def _traced(original: Callable, model: Any, sources: dict[str, Leaf], load_config: Any) -> tuple[Any, str | None]:
    """What `original` gives for pending tensors, and why that does not count, if it does not."""
    tensors = {name: Pending.of(leaf) for name, leaf in sources.items()}
    try:
        loaded = original(model, tensors, None, load_config, None)
    except CheckpointError:
        raise
    except Exception as error:  # whatever it is: transformers then does what it does without us
        return None, f"its conversion needs values ({type(error).__name__}: {str(error).splitlines()[:1]})"
    if getattr(loaded[0], "conversion_errors", None):
        return None, "its conversion failed, which transformers reports better by itself"
    return loaded, None


def _read_buffers(model: nn.Module) -> None:
    """Buffers are small and every rank has them whole."""
    for module in model.modules():
        for buffer in module._buffers.values():
            if isinstance(buffer, Pending):
                materialise(buffer)
