"""PyTorch's autoload entry point (group `torch.backends`): how an unmodified script meets moe-accel.

`import torch` calls `autoload()` as its last step, in every process of every environment that has moe-accel installed.
It asks two questions (is this accelerate's launcher? is MOE_ACCEL_CONFIG set?). When both answers are no it leaves no
trace, and has cost 0.8 ms, nearly all of it reading this file, of an `import torch` of 980 ms (medians of 40 processes
on 2 cores of a Xeon, torch 2.13, 2026-11; with and without it, whole imports differ by less than their noise of 2 ms).
`TORCH_DEVICE_BACKEND_AUTOLOAD=0` switches it off; `moe-accel launch` then does the same explicitly.
"""

import os
import sys

_LAUNCHER_MODULES = ("accelerate.commands.launch", "accelerate.commands.accelerate_cli")


def autoload() -> None:
    """Install the launcher's or the worker's hooks where they are wanted; never raises, imports nothing heavy."""
    try:
        if is_launcher(sys.argv, sys.orig_argv):
            from moe_accel.launch import install

            install()
        elif os.environ.get("MOE_ACCEL_CONFIG"):
            from moe_accel.worker import activate

            activate()
    except Exception as error:  # an exception here would break `import torch` for everybody
        print(f"moe-accel: not active in this process: {type(error).__name__}: {error}", file=sys.stderr)


def is_launcher(argv: list[str], orig_argv: list[str]) -> bool:
    """Whether this process is `accelerate launch`, by any of its names.

    Args:
        argv: `sys.argv`. While `python -m` still imports the parents of its module, `argv[0]` is "-m".
        orig_argv: `sys.orig_argv`, the command line as the interpreter got it.
    """
    program = os.path.basename(argv[0]).removesuffix(".exe") if argv else ""
    if program == "accelerate-launch":
        return True
    if program == "accelerate":
        return argv[1:2] == ["launch"]
    # `python -m accelerate.commands.launch`, also behind a debugger; or the file itself, as IDEs start it
    modules = [orig_argv[at + 1] for at, word in enumerate(orig_argv[:-1]) if word == "-m"]
    path = argv[0].replace(os.sep, "/").removesuffix(".py").replace("/", ".") if argv else ""
    modules += [name for name in _LAUNCHER_MODULES if path.endswith(f".{name}")]
    if _LAUNCHER_MODULES[0] in modules:
        return True
    return _LAUNCHER_MODULES[1] in modules and "launch" in argv[1:2]
