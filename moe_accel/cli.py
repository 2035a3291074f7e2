"""The command line: parse, call, render. Imports neither torch nor accelerate before a command needs them."""

from typing import Annotated

import typer

from moe_accel.errors import MoEAccelError
from moe_accel.version import VERSION

app = typer.Typer(
    help="Fine-tune Hugging Face mixture-of-experts models with expert parallelism, training script unmodified.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moe-accel {VERSION}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that stand before the command."""


@app.command(
    # what stands before the first positional argument is kept, what stands after it is not even looked at
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    options_metavar="[ACCELERATE LAUNCH ARGUMENTS] SCRIPT [SCRIPT ARGUMENTS]",
)
def launch(context: typer.Context) -> None:
    """Run [bold]accelerate launch[/bold] with the moe_config section of its config file understood.

    Every argument goes to accelerate launch; --config is short for --config_file. It does what accelerate launch itself
    does where moe-accel is installed, and also where TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps moe-accel out of it.

    [bold]Examples[/bold]

    moe-accel launch --config moe.yaml train.py --learning_rate 1e-5

    moe-accel launch --config moe.yaml --num_processes 4 -m my_project.train
    """
    from moe_accel.launch import main as run_launcher

    run_launcher(context.args)


def main() -> None:
    """Entry point of `moe-accel`: exit 2 with `error:` and `hint:` on stderr for what the user can mend."""
    try:
        app()
    except MoEAccelError as error:
        from moe_accel.launch import exit_with

        exit_with(error)
