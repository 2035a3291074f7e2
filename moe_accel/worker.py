"""What happens in a training process: the script's `Accelerator()` gets its `MoEConfig`.

`activate()` is called by autoload when MOE_ACCEL_CONFIG is set. Where autoload is switched off, the launcher starts
`python -m moe_accel.worker train.py ...` instead of `python train.py ...`, and `main()` calls it.
Nothing is read or checked before the script builds its first `PartialState`, `Accelerator` or `TrainingArguments`, so a
wrong setting is an error of that line, not of `import torch`.
"""

import functools
import inspect
import os
import runpy
import sys
from typing import Any

from moe_accel.config import ENV_VAR, OPTION_NAMES, MoEOptions, is_path, parse_env
from moe_accel.errors import ConfigError
from moe_accel.hooks import lazily, when_defined, wrap


def activate() -> None:
    """Arrange, importing nothing, that accelerate's classes meet moe_config as soon as they exist."""
    when_defined("accelerate.state", "PartialState", lambda cls: wrap(cls, "__init__", _prepare_first))
    when_defined("accelerate.accelerator", "Accelerator", lambda cls: wrap(cls, "__init__", _supply_moe_config))
    when_defined("transformers.modeling_utils", "PreTrainedModel", _load_by_shards)
    if is_path(os.environ.get(ENV_VAR, "")):  # it reads ACCELERATE_MIXED_PRECISION before it builds a PartialState
        when_defined(
            "transformers.training_args",
            "TrainingArguments",
            lambda cls: wrap(cls, "__post_init__", _prepare_first),
        )


@functools.cache
def prepare_process() -> MoEOptions | None:
    """Make this process what `accelerate launch --config_file` would have made it; once, before accelerate's state.

    Returns the options, or None when MOE_ACCEL_CONFIG is not set.

    Raises:
        ConfigError: MOE_ACCEL_CONFIG is wrong, in whatever way.
    """
    value = os.environ.get(ENV_VAR, "")
    if not value:
        return None
    options = parse_env(value)
    if is_path(value):
        from moe_accel.environment import launch_environment

        for name, setting in launch_environment(value).items():
            os.environ.setdefault(name, setting)
        os.environ[ENV_VAR] = options.to_json()  # child processes may have another working directory

    from moe_accel.cpu import enable_fsdp_on_cpu

    enable_fsdp_on_cpu()
    return options


def _prepare_first(original: Any) -> Any:
    def prepared(self: Any, *args: Any, **kwargs: Any) -> None:
        prepare_process()
        original(self, *args, **kwargs)

    return prepared


def _load_by_shards(cls: Any) -> None:
    for name in ("_load_pretrained_model", "_finalize_model_loading"):
        wrap(cls, name, lazily("moe_accel.streaming.hook", "LOADING", name))


def _supply_moe_config(original: Any) -> Any:
    signature = inspect.signature(original)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        options = prepare_process()
        call = signature.bind(self, *args, **kwargs)
        if options is not None:
            if call.arguments.get("torch_tp_plugin") is not None:
                raise _not_a_moe_config("torch_tp_plugin", options)
            call.arguments["parallelism_config"] = choose_config(call.arguments.get("parallelism_config"), options)
        original(*call.args, **call.kwargs)

    return init


def choose_config(given: Any, options: MoEOptions) -> Any:
    """The `MoEConfig` for an `Accelerator`: the script's own, or else one made from `options`.

    Raises:
        ConfigError: the script gave an accelerate `ParallelismConfig` that is no `MoEConfig`.
    """
    from moe_accel.parallelism import MoEConfig

    if given is None:
        return MoEConfig.from_options(options)
    if not isinstance(given, MoEConfig):
        raise _not_a_moe_config(type(given).__name__, options)
    asked = {name: getattr(options, name) for name in OPTION_NAMES if getattr(options, name) is not None}
    differing = {name: value for name, value in asked.items() if getattr(given, name) != value}
    if differing and os.environ.get("RANK", "0") == "0":
        own = ", ".join(f"{name}={getattr(given, name)}" for name in differing)
        theirs = ", ".join(f"{name}={value}" for name, value in differing.items())
        print(f"moe-accel: the script's own MoEConfig counts ({own}), not moe_config ({theirs})", file=sys.stderr)
    return given


def _not_a_moe_config(what: str, options: MoEOptions) -> ConfigError:
    return ConfigError(
        f"the script gives Accelerator a {what}, which has no place for moe_config (ep_size={options.ep_size})",
        "leave it out of the script and write its sizes in the parallelism_config section of the accelerate config, "
        f"or give the script moe_accel.MoEConfig(ep_size={options.ep_size}, ...) with the same sizes",
    )


def main() -> None:
    """Run `script args...` or `-m module args...` as `__main__`, with moe_config active."""
    arguments = sys.argv[1:]
    if not arguments or arguments == ["-m"]:
        raise SystemExit("usage: python -m moe_accel.worker script.py [args] | -m module [args]")
    if os.environ.get(ENV_VAR):
        activate()
    if arguments[0] == "-m":
        sys.argv[:] = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return
    sys.argv[:] = arguments
    if not sys.flags.safe_path:
        sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
    runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    from moe_accel.worker import main as imported_main  # one copy of this module, whoever imports it next

    imported_main()
