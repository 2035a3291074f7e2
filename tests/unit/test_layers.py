"""Imports point one way, what must start fast imports no torch, and the public names and options are frozen."""

import ast
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate import ParallelismConfig

import moe_accel
from moe_accel.config import OPTION_NAMES, MoEOptions
from moe_accel.parallelism import MoEConfig

PACKAGE = Path(moe_accel.__file__).parent

LAYERS = [
    {"version", "errors", "choices"},
    {"backward", "config", "garbage", "hooks", "versions", "report", "swap"},
    {"mesh", "kernels", "cpu", "environment", "ranks", "siblings"},
    {"padding"},
    {"dispatch", "convert"},
    {"experts", "adapters"},
    {
        "block",
        "engine",
        "graphs",
        "kept",
        "lora",
        "loss",
        "optimizer",
        "shard",
        "prefetch",
        "checkpoint",
        "streaming",
        "metrics",
        "estimate",
    },
    {"told"},
    {"plugin"},
    {"parallelism"},
    {"worker"},
    {"launch", "bench", "doctor"},
    {"autoload", "quick_help", "streams"},
    {"cli"},
    {"__main__"},
]
"""Bottom first; a module may import what stands below it. A subpackage is one name here."""

WITHOUT_TORCH = [
    "cli",
    "choices",
    "config",
    "errors",
    "launch",
    "hooks",
    "autoload",
    "worker",
    "version",
    "versions",
    "report",
    "doctor",
    "quick_help",
    "streams",
]
WITHOUT_TORCH += [f"bench.{name}" for name in ("options", "shapes", "run", "table", "command")]
WITHOUT_TORCH += [
    name for name in ("convert.layout", "estimate") if (PACKAGE / f"{name.replace('.', '/')}.py").exists()
]


def modules() -> Iterator[tuple[str, Path]]:
    """Every module but the package itself, whose public names are lazy: its name in `LAYERS`, and its file."""
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            yield parts[0], file


def imported(file: Path) -> Iterator[str]:
    """Names in `LAYERS` that a file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            if node.module == "moe_accel":
                yield from (alias.name for alias in node.names)
            elif (node.module or "").startswith("moe_accel."):
                yield (node.module or "").split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("moe_accel."))


def height(name: str) -> int:
    return next(at for at, layer in enumerate(LAYERS) if name in layer)


def test_every_module_has_one_layer():
    listed = [name for layer in LAYERS for name in layer]
    assert len(listed) == len(set(listed))
    assert {name for name, _ in modules()} - set(listed) == set()


def test_imports_point_downwards():
    upwards = {
        (name, other)
        for name, file in modules()
        for other in imported(file)
        if other != name and height(other) >= height(name)
    }
    assert upwards == set()


def test_an_import_inside_a_function_is_seen_too():
    assert set(imported(PACKAGE / "parallelism.py")) == {"config", "errors", "mesh", "plugin"}


def test_the_experts_know_nothing_of_accelerate_and_the_kernels_nothing_of_transformers():
    forbidden = {"kernels": ("accelerate", "transformers"), "dispatch": ("accelerate", "transformers")}
    forbidden |= {"experts": ("accelerate",), "metrics": ("accelerate",)}
    for name, file in modules():
        for node in ast.walk(ast.parse(file.read_text())):
            found = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in found:
                assert module.split(".")[0] not in forbidden.get(name, ()), f"{file} imports {module}"


@pytest.mark.parametrize("name", ["", *WITHOUT_TORCH])
def test_it_imports_no_torch(name):
    module = f"moe_accel.{name}".rstrip(".")
    heavy = "{'torch', 'transformers', 'accelerate'}"
    code = f"import sys, {module}; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_public_names_are_these_and_each_one_is_there():
    expected = ["ExpertLoadCallback", "MoEConfig", "__version__", "expert_load", "expert_lora_config"]
    assert moe_accel.__all__ == [*expected, "shard_on_read", "track_expert_load"]
    for name in moe_accel.__all__:
        assert getattr(moe_accel, name) is not None
    with pytest.raises(AttributeError, match=r"^module 'moe_accel' has no attribute 'MoeConfig'$"):
        _ = moe_accel.MoeConfig


def test_the_options_are_these_and_adding_one_is_a_decision():
    saving = ("save_layout", "async_save")
    assert (
        "ep_size",
        "dispatcher",
        "kernels",
        "dp_replicate_size",
        "kept_layers",
        *saving,
        "padding_free",
        "te_parts",
        "cuda_graphs",
    ) == OPTION_NAMES
    assert len(OPTION_NAMES) <= 12


def test_moe_config_has_the_options_and_accelerates_own_fields_and_no_others():
    of_accelerate = {field.name: field.default for field in dataclasses.fields(ParallelismConfig)}
    own = {field.name: field.default for field in dataclasses.fields(MoEConfig)}
    options = {field.name: field.default for field in dataclasses.fields(MoEOptions)}
    assert own == of_accelerate | options


def test_pytest_does_not_walk_past_the_tests_on_ranks(pytestconfig):
    """`dist` is in pytest's own list of folders to leave out."""
    assert "dist" not in pytestconfig.getini("norecursedirs")
    assert (pytestconfig.rootpath / "tests" / "dist" / "test_parity_families.py").is_file()
