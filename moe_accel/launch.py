"""`accelerate launch` with a `moe_config` section: what is added to accelerate's launcher, and its explicit twin.

Two seams. The launcher's parser learns `--config` beside `--config_file`; it goes on deciding where its own arguments
end and the script's begin. And `BaseConfig.process_config`, which each config
file passes before accelerate rejects unknown keys, hands the section over; it reaches the workers as MOE_ACCEL_CONFIG.

`install()` puts them into whatever process is the launcher: autoload calls it inside `accelerate launch`, and `main()`
(`moe-accel launch`, `python -m moe_accel.launch`) calls it before it runs accelerate's launcher itself.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from moe_accel.config import ENV_VAR, SECTION, check_launch, parse_section, read_config_file
from moe_accel.errors import ConfigError, MoEAccelError
from moe_accel.hooks import when_defined, wrap


def install() -> None:
    """Teach accelerate's launcher `--config` and `moe_config`, now or when its modules are imported."""
    when_defined("accelerate.commands.utils", "CustomArgumentParser", lambda cls: wrap(cls, "add_argument", _alias))
    when_defined(
        "accelerate.commands.config.config_args", "BaseConfig", lambda cls: wrap(cls, "process_config", _take_section)
    )


def _alias(original: Any) -> Any:
    def add_argument(self: Any, *names: str, **kwargs: Any) -> Any:
        return original(self, *names, *(["--config"] if names == ("--config_file",) else []), **kwargs)

    return add_argument


def _take_section(original: Any) -> Any:
    def process_config(config_dict: dict[str, Any]) -> Any:
        if SECTION in config_dict:
            try:
                export_section(config_dict.pop(SECTION), config_dict)
            except MoEAccelError as error:
                exit_with(error)
        return original(config_dict)

    return process_config


def export_section(section: Any, config: Mapping[str, Any]) -> None:
    """Check a `moe_config` section against the rest of its config file, then set MOE_ACCEL_CONFIG to it.

    Raises:
        ConfigError: the section is wrong, or the launch it sits in cannot do what it asks.
    """
    options = parse_section(section)
    check_launch(options, config, SECTION, sys.argv[1:])
    already = os.environ.get(ENV_VAR)
    if already and already != options.to_json():
        print(f"moe-accel: {SECTION} of the config file counts, not {ENV_VAR}={already}", file=sys.stderr)
    os.environ[ENV_VAR] = options.to_json()


def main(argv: Sequence[str] | None = None) -> None:
    """Run accelerate's launcher on `argv` (default: this command line) with `moe_config` understood.

    Exits with status 2 and the error on stderr when the config is wrong.
    """
    install()
    from accelerate.commands.launch import launch_command, launch_command_parser

    try:
        args = launch_command_parser().parse_args(sys.argv[1:] if argv is None else list(argv))
        if args.config_file is not None:
            read_config_file(args.config_file)
        if not _workers_autoload():
            _start_through_worker(args)
        launch_command(args)
    except MoEAccelError as error:
        exit_with(error)


def _workers_autoload() -> bool:
    """Whether `import torch` will call our entry point in the processes started from here."""
    from importlib.metadata import entry_points

    registered = any(entry.value == "moe_accel.autoload:autoload" for entry in entry_points(group="torch.backends"))
    return registered and os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1"


def _start_through_worker(args: Namespace) -> None:
    """Change the launch from `train.py ...` to `-m moe_accel.worker train.py ...`."""
    if args.no_python:
        raise ConfigError(
            f"--no_python starts {args.training_script} directly, where only autoload could activate {SECTION}",
            "unset TORCH_DEVICE_BACKEND_AUTOLOAD, or launch a python script",
        )
    script = ["-m", args.training_script] if args.module else [args.training_script]
    args.training_script_args = [*script, *args.training_script_args]
    args.training_script, args.module = "moe_accel.worker", True


def exit_with(error: MoEAccelError) -> NoReturn:
    """Print `error: ...` and, if there is one, `hint: ...` to stderr, and exit with status 2."""
    print(f"error: {error.message}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    from moe_accel.launch import main as imported_main  # one copy of this module, whoever imports it next

    imported_main()
