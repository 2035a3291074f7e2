"""The help of the command line at once: typer 0.29 imports pydantic to parse a flag, which takes half of the time."""

from typing import Any

import typer


def show_help(app: typer.Typer, arguments: list[str]) -> bool:
    """Print the help that `[COMMAND] --help` asks for, without parsing; False for all else: nothing is printed."""
    settings: Any = app.info.context_settings
    *names, last = arguments or [""]
    if last not in settings["help_option_names"] or len(names) > 1:
        return False
    group: Any = typer.main.get_command(app)
    context = typer.Context(group, info_name="moe-accel", **settings)
    for name in names:
        if name not in group.commands:
            return False
        context = typer.Context(group.commands[name], parent=context, info_name=name)
    typer.echo(context.get_help())
    return True
