"""What `accelerate launch --config_file` would export, for processes that torchrun, srun or plain python started.

Computed by accelerate's own launcher code from MOE_ACCEL_CONFIG=path, so two ways to start a job cannot drift apart.
"""

import logging
import os
import tempfile

from moe_accel.config import SECTION, check_launch, parse_section, read_config_file
from moe_accel.errors import ConfigError

_EXPORTED = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


def launch_environment(path: str) -> dict[str, str]:
    """The ACCELERATE_*, FSDP_* and PARALLELISM_CONFIG_* variables that `accelerate launch --config_file path` exports.

    For processes that something else started (torchrun, srun, python): they have their ranks already. A file that
    holds the `moe_config` section alone gives none.

    Raises:
        ConfigError: accelerate does not accept the file, or it needs accelerate's own launcher.
    """
    config = read_config_file(path)
    if config.keys() <= {SECTION} or SECTION not in config:
        return {}
    check_launch(parse_section(config.pop(SECTION)), config | {"num_processes": None}, path)
    import yaml
    from accelerate.utils import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

    handlers = logging.root.handlers[:]
    from accelerate.commands import launch

    logging.root.handlers[:] = handlers  # that import calls logging.basicConfig, which is the script's to call
    with tempfile.TemporaryDirectory() as folder:
        cleaned = os.path.join(folder, "accelerate.yaml")
        with open(cleaned, "w", encoding="utf-8") as file:
            yaml.safe_dump(config, file)
        ranks = os.environ.get("WORLD_SIZE", "1")
        arguments = ["--num_processes", ranks, "--num_machines", "1", "--machine_rank", "0", "--main_process_port", "0"]
        try:
            args = launch.launch_command_parser().parse_args(["--config_file", cleaned, *arguments, "train.py"])
            args, _, _ = launch._validate_launch_command(args)
            if args.use_deepspeed or args.use_megatron_lm or args.tpu:
                raise ValueError(f"distributed_type {config.get('distributed_type')} needs accelerate's own launcher")
            distributed = args.use_fsdp or args.multi_gpu
            exported = prepare_multi_gpu_env(args) if distributed else prepare_simple_launcher_cmd_env(args)[1]
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{path}: {str(error).replace(cleaned, path)}",
                f"try the file with: accelerate launch --config_file {path} your_script.py",
            ) from error
    return {name: value for name, value in exported.items() if name.startswith(_EXPORTED)}
