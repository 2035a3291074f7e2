"""`moe-accel doctor`: what is installed here, what of it can be used, why not, and the command that mends it.

Every part is looked at as training would look at it, by the same functions; nothing is allocated on a GPU. Exit 1 where
something that is needed or asked for cannot be had; a part that is merely not there is no fault.
"""

import itertools
import json
import os
import platform
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moe_accel.config import SECTION, MoEOptions, check_launch, parse_section, read_config_file
from moe_accel.errors import ConfigError, MoEAccelError
from moe_accel.version import VERSION
from moe_accel.versions import SUPPORTED

SCHEMA = 1
EXIT_FAULTY = 1


@dataclass(frozen=True)
class Part:
    """One thing that was looked at.

    Attributes:
        name: of the package or setting.
        version: or another short value; empty where it is not there.
        usable: whether moe-accel can use it.
        needed: whether it is a fault that it cannot.
        what: what it is used for, or why it cannot be used.
        fix: the command or setting that changes that; empty where nothing need be done.
    """

    name: str
    version: str
    usable: bool
    needed: bool
    what: str
    fix: str = ""


def doctor(as_json: bool) -> int:
    """Print what was found; returns the exit status."""
    parts = examine()
    ok = not any(part.needed and not part.usable for part in parts)
    if as_json:
        record = {"schema": SCHEMA, "ok": ok, "moe_accel": VERSION, "parts": [asdict(part) for part in parts]}
        print(json.dumps(record, indent=2))
    else:
        _render(parts)
    return 0 if ok else EXIT_FAULTY


def examine() -> list[Part]:
    """Everything that is looked at, in the order in which one thing needs another."""
    parts = [Part("python", platform.python_version(), True, True, "3.11 or newer")]
    for look in (_packages, _torch, _gpus, _triton, _deep_ep, _transformer_engine, _liger, _autoload, _config):
        parts += _looked_at(look)
    return parts


def _looked_at(look: Callable[[], Iterator[Part]]) -> list[Part]:
    """What a look finds; where it breaks, that is what was found: a broken installation must not stop the rest."""
    try:
        return list(look())
    except Exception as error:
        name = look.__name__.removeprefix("_")
        return [Part(name, "", False, name == "torch", f"cannot be looked at: {type(error).__name__}: {error}")]


def _packages() -> Iterator[Part]:
    from packaging.specifiers import SpecifierSet

    for name, limits in {**SUPPORTED, "peft": (">=0.21",)}.items():
        wanted, version = ",".join(limits), _version(name)
        fits = bool(version) and SpecifierSet(wanted).contains(version, prereleases=True)
        yield Part(name, version, fits, True, f"{wanted} is supported", "" if fits else f"pip install '{name}{wanted}'")


def _torch() -> Iterator[Part]:
    import torch

    cuda = torch.version.cuda
    if torch.cuda.is_available():
        yield Part("CUDA", cuda or "", True, False, f"{torch.cuda.device_count()} GPUs")
    elif cuda is None:
        what, fix = "this torch is built for CPUs: kernels run as plain torch", "pip install torch, from pytorch.org"
        yield Part("CUDA", "", False, False, what, fix)
    else:
        yield Part("CUDA", cuda, False, False, "torch sees no GPU", "nvidia-smi; CUDA_VISIBLE_DEVICES")


def _gpus() -> Iterator[Part]:
    import torch

    from moe_accel.dispatch import topology

    if not torch.cuda.is_available():
        return
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found.append(topology.Place(socket.gethostname(), f"GPU-{gpu.uuid}", index))
        size, bf16 = f"{gpu.total_memory / 2**30:.0f} GiB", gpu.major >= 8
        speed = "grouped GEMMs in bf16" if bf16 else "no bf16"
        yield Part(
            f"GPU {index}", gpu.name, bf16, False, f"{size}, compute capability {gpu.major}.{gpu.minor}: {speed}"
        )
    pairs = {(one.index, other.index): topology.link(one, other) for one, other in itertools.combinations(found, 2)}
    for kind in sorted(set(pairs.values())):
        joined = ", ".join(f"{one}-{other}" for (one, other), link in pairs.items() if link == kind)
        usable = kind in ("NVLink", "peer access")
        yield Part("between GPUs", kind, usable, False, "all pairs" if len(set(pairs.values())) == 1 else joined)


def _triton() -> Iterator[Part]:
    import torch

    from moe_accel.kernels.device import HAS_TRITON

    on_gpu = torch.cuda.is_available()
    what = "kernels around the grouped GEMMs, norms, rotary embeddings, routers, loss"
    if not HAS_TRITON:
        yield Part("triton", "", False, on_gpu, f"not there: {what} run as plain torch", "pip install triton")
    else:
        yield Part("triton", _version("triton"), on_gpu, False, what if on_gpu else "needs a GPU")


def _deep_ep() -> Iterator[Part]:
    import torch

    from moe_accel.dispatch import deepep

    names = ("sgl-deep-ep", "tokenspeed-deepep", "deepinfer-ep", "deep-ep", "deep_ep")
    version = next((f"{name} {found}" for name in names if (found := _version(name))), "")
    on_gpu = torch.cuda.is_available()
    problem = deepep.problem(_device())
    if problem is None:
        what = f"dispatcher: deepep, by {deepep.implementation()}, for ep_size 2, 4, 8 on one host"
        yield Part("deep_ep", version, True, False, what)
        return
    yield Part("deep_ep", version, False, False, problem, deep_ep_for(_version("torch")) if on_gpu else "")


def deep_ep_for(torch_version: str) -> str:
    """The command that installs a `deep_ep` built for this torch."""
    if torch_version.startswith("2.11."):
        return "pip install --no-deps tokenspeed-deepep==1.2.1.post20251110"
    if torch_version.startswith("2.13."):
        return "pip install sgl-deep-ep==0.1.0"
    return "pip install 'moe-accel[deepep]'  # brings torch 2.14.1"


def _transformer_engine() -> Iterator[Part]:
    from moe_accel.kernels import te, te_parts

    problems = {name: te_parts.problem(_device(), name) for name in te_parts.PARTS}
    usable = [name for name, problem in problems.items() if problem is None]
    unusable = [f"not {name}: {problem}" for name, problem in problems.items() if problem is not None]
    if usable:
        of_these = f"kernels: te, te_parts: [{', '.join(usable)}]; and its FusedAdam with any Trainer or loop"
        what = "; ".join([of_these, *unusable])
    else:
        what = problems["experts"] or ""
    fix = te.INSTALL if _device().type == "cuda" and not te.is_installed() else ""
    yield Part("transformer_engine", te.version(), bool(usable), False, what, fix)


def _liger() -> Iterator[Part]:
    version = _version("liger-kernel")
    there = find_spec("liger_kernel") is not None
    yield Part("liger_kernel", version, there, False, "only to compare with: moe-accel bench --arms liger")


def _autoload() -> Iterator[Part]:
    found = [each.value for each in metadata.entry_points(group="torch.backends") if each.name == "moe_accel"]
    instead = "moe-accel launch --config moe.yaml train.py"
    if not found:
        yield Part("autoload", "", False, False, "its entry point is not installed: accelerate launch", "pip install .")
    elif os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0":
        yield Part("autoload", "off", False, False, "TORCH_DEVICE_BACKEND_AUTOLOAD=0 forbids it", instead)
    else:
        yield Part("autoload", "on", True, False, "accelerate launch understands moe_config")


def _config() -> Iterator[Part]:
    from accelerate.commands.config import config_args

    path = Path(config_args.default_config_file)
    name = "accelerate config"
    if not path.is_file():
        yield Part(name, "", True, False, f"no default file {path}: --config names one")
        return
    try:
        config = read_config_file(path)
        if SECTION not in config:
            yield Part(name, str(path), True, False, f"no {SECTION} section")
            return
        options = parse_section(config.pop(SECTION), f"{path}: {SECTION}")
        check_launch(options, config, str(path))
        _check_choices(options)
    except MoEAccelError as error:
        yield Part(name, str(path), False, True, error.message, error.hint or "")
        return
    yield Part(name, str(path), True, False, f"{SECTION}: {options.to_json()}")


def _check_choices(options: MoEOptions) -> None:
    from moe_accel.dispatch import choose
    from moe_accel.kernels import te_parts

    choose.check(options.dispatcher, options.ep_size, _device())
    for name in options.te_parts if options.kernels == "te" else ():
        problem = te_parts.problem(_device(), name)
        if problem is not None:
            raise ConfigError(
                f"{te_parts.asked_for(name, options.te_parts)} cannot be used: {problem}", "kernels: auto"
            )


def _device() -> Any:
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _render(parts: list[Part]) -> None:
    width = max(len(part.name) for part in parts)
    for part in parts:
        mark = "ok" if part.usable else "FAULT" if part.needed else "no"
        print(f"{mark:<6} {part.name:<{width}}  {f'{part.version}  ' if part.version else ''}({part.what})")
        if part.fix:
            print("\n".join(f"{'':<6} {'':<{width}}  {line}" for line in f"fix: {part.fix}".splitlines()))
