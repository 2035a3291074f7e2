"""Activation inside one process: autoload is invisible until asked, and exact when asked."""

import inspect
import sys

import pytest

from moe_accel import hooks, worker
from moe_accel.autoload import autoload, is_launcher
from moe_accel.config import ENV_VAR, MoEOptions
from moe_accel.errors import ConfigError, DependencyError
from tests.unit.fresh_python import python

# ---- not used: nothing happens


def test_nothing_set_leaves_the_process_as_it_was():
    done = python("""
        import sys
        before = list(sys.meta_path), list(sys.argv)
        import torch
        added = [finder for finder in sys.meta_path if finder not in before[0]]
        assert not [finder for finder in added if type(finder).__module__.startswith("moe_accel")], added
        assert sys.argv == before[1]
        print(sorted(name for name in sys.modules if name.split(".")[0] == "moe_accel"))
    """)
    assert done.stderr == ""
    assert done.stdout == "['moe_accel', 'moe_accel.autoload', 'moe_accel.version']\n"


@pytest.mark.parametrize("value", ['{"ep_size": ', "/no/such/moe.yaml", '{"ep_sze": 2}', "[1]"])
def test_a_broken_setting_is_an_error_of_accelerator_and_not_of_import_torch(value):
    done = python(
        """
        import torch
        print("torch imported", flush=True)
        from accelerate import Accelerator
        print("accelerate imported", flush=True)
        try:
            Accelerator()
        except ValueError as error:
            print(type(error).__name__, error)
        """,
        MOE_ACCEL_CONFIG=value,
    )
    first, second, error = done.stdout.splitlines()[:3]
    assert (first, second) == ("torch imported", "accelerate imported")
    assert error.startswith("ConfigError")
    assert done.stderr == ""


def test_a_failure_of_our_own_never_breaks_import_torch(monkeypatch, capsys):
    def fail():
        raise RuntimeError("broken on purpose")

    monkeypatch.setenv(ENV_VAR, "{}")
    monkeypatch.setattr(worker, "activate", fail)
    assert autoload() is None
    assert capsys.readouterr().err == "moe-accel: not active in this process: RuntimeError: broken on purpose\n"


# ---- who is the launcher


@pytest.mark.parametrize(
    ("argv", "orig_argv", "expected"),
    [
        (["/venv/bin/accelerate", "launch", "train.py"], ["python", "/venv/bin/accelerate", "launch"], True),
        (["/venv/bin/accelerate-launch", "train.py"], ["python", "/venv/bin/accelerate-launch", "train.py"], True),
        (["C:/venv/Scripts/accelerate.exe", "launch"], ["python.exe", "C:/venv/Scripts/accelerate.exe"], True),
        (["-m", "t.py"], ["python", "-m", "accelerate.commands.launch", "t.py"], True),
        (["-m", "launch", "t.py"], ["python", "-m", "accelerate.commands.accelerate_cli", "launch", "t.py"], True),
        (["-m", "t.py"], ["python", "-m", "debugpy", "--listen", "1", "-m", "accelerate.commands.launch"], True),
        (["/site-packages/accelerate/commands/launch.py", "t.py"], ["python", "launch.py"], True),
        (["/venv/bin/accelerate", "config"], ["python", "/venv/bin/accelerate", "config"], False),
        (["/venv/bin/accelerate", "env"], ["python", "/venv/bin/accelerate", "env"], False),
        (["-m", "config"], ["python", "-m", "accelerate.commands.accelerate_cli", "config"], False),
        (["train.py", "launch"], ["python", "train.py", "launch"], False),
        (["my/launch.py", "t.py"], ["python", "my/launch.py"], False),
        (["/venv/bin/torchrun", "train.py"], ["python", "/venv/bin/torchrun", "train.py"], False),
        (["-c"], ["python", "-c", "import torch"], False),
        ([""], ["python"], False),
        ([], ["python"], False),
    ],
)
def test_the_launcher_is_known_by_each_of_its_names(argv, orig_argv, expected):
    assert is_launcher(argv, orig_argv) is expected


# ---- reaching classes of packages that are not, half or wholly imported


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package whose module `inner` runs `during()` before it defines its class, as accelerate imports torch."""
    (tmp_path / "waited").mkdir()
    (tmp_path / "waited" / "__init__.py").write_text("from .inner import Late\n")
    (tmp_path / "waited" / "inner.py").write_text("import builtins\nbuiltins.during()\nclass Late: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield
    for name in ("waited", "waited.inner"):
        sys.modules.pop(name, None)
    assert sys.meta_path == finders, "a finder was left behind"


@pytest.mark.parametrize("moment", ["before", "during", "after"])
def test_the_action_runs_once_whenever_the_waiting_begins(package, monkeypatch, moment):
    met = []

    def wait():
        hooks.when_defined("waited.inner", "Late", met.append)

    monkeypatch.setattr("builtins.during", wait if moment == "during" else lambda: None, raising=False)
    if moment == "before":
        wait()
        assert met == []
    import waited  # pyright: ignore[reportMissingImports]

    if moment == "after":
        wait()
    assert met == [waited.Late]
    assert type(sys.modules["waited.inner"]) is type(sys), "the module's class was not given back"
    assert waited.inner.Late is waited.Late
    assert met == [waited.Late]


def test_a_class_that_upstream_moved_is_an_error_of_the_import(package, monkeypatch):
    monkeypatch.setattr("builtins.during", lambda: None, raising=False)
    hooks.when_defined("waited.inner", "Gone", lambda cls: None)
    with pytest.raises(DependencyError, match=r"moe-accel extends waited\.inner\.Gone, which the installed version"):
        import waited  # noqa: F401  # pyright: ignore[reportMissingImports]


def test_wrapping_keeps_signature_and_staticmethod_and_happens_once():
    class Owner:
        def method(self, a, b=2):
            return a + b

        @staticmethod
        def static(a):
            return a

    def doubled(original):
        return lambda *args, **kwargs: 2 * original(*args, **kwargs)

    for _ in range(2):
        hooks.wrap(Owner, "method", doubled)
        hooks.wrap(Owner, "static", doubled)
    assert Owner().method(1) == 6
    assert Owner.static(5) == Owner().static(5) == 10
    assert list(inspect.signature(Owner.method).parameters) == ["self", "a", "b"]
    with pytest.raises(DependencyError, match=r"Owner\.gone"):
        hooks.wrap(Owner, "gone", doubled)


@pytest.mark.parametrize("first", ["torch", "accelerate", "transformers.training_args", "peft"])
def test_the_classes_are_reached_whatever_the_script_imports_first(first, tmp_path):
    file = tmp_path / "moe.yaml"
    file.write_text("ep_size: 1\n")
    done = python(
        f"""
        import importlib, sys
        importlib.import_module({first!r})
        from accelerate import Accelerator, PartialState
        from transformers import TrainingArguments
        patched = Accelerator.__init__, PartialState.__init__, TrainingArguments.__post_init__
        print(*(hasattr(method, "__moe_accel__") for method in patched))
        print([finder for finder in sys.meta_path if type(finder).__module__ == "moe_accel.hooks"])
        print(type(sys.modules["accelerate.accelerator"]), type(sys.modules["transformers.training_args"]))
        """,
        MOE_ACCEL_CONFIG=str(file),
    )
    assert done.stdout == "True True True\n[]\n<class 'module'> <class 'module'>\n", done.stderr


# ---- what accelerate has to keep for this to work


def test_accelerate_still_has_what_is_patched():
    from accelerate import Accelerator, PartialState
    from accelerate.commands.config.config_args import BaseConfig, ClusterConfig
    from accelerate.commands.utils import CustomArgumentParser
    from transformers import TrainingArguments

    def parameters(method):
        return list(inspect.signature(method).parameters)

    assert isinstance(inspect.getattr_static(BaseConfig, "process_config"), staticmethod)
    assert parameters(BaseConfig.process_config) == ["config_dict"]
    assert ClusterConfig.process_config is BaseConfig.process_config
    assert "moe_config" not in ClusterConfig.__dataclass_fields__
    assert {"parallelism_config", "torch_tp_plugin", "fsdp_plugin"} <= set(parameters(Accelerator.__init__))
    assert parameters(PartialState._prepare_backend)[:2] == ["self", "cpu"]
    assert parameters(PartialState.set_device) == ["self"]
    assert parameters(CustomArgumentParser.add_argument)[0] == "self"
    assert callable(TrainingArguments.__post_init__)


def test_accelerate_itself_still_rejects_what_only_we_understand(tmp_path):
    """Without moe-accel a moe_config must fail loudly, not train something else."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    file = tmp_path / "moe.yaml"
    file.write_text("distributed_type: FSDP\nmoe_config: {ep_size: 2}\n")
    with pytest.raises(ValueError, match=r"unknown keys \(\['moe_config'\]\)"):
        load_config_from_file(str(file))
    with pytest.raises(SystemExit):
        launch_command_parser().parse_args(["--config", str(file), "train.py"])


# ---- which configuration an Accelerator gets


def test_a_script_without_parallelism_gets_moe_config_and_accelerates_own_sizes(monkeypatch):
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_REPLICATE_SIZE", "2")
    config = worker.choose_config(None, MoEOptions(ep_size=2, dispatcher="alltoall", kernels="reference"))
    assert type(config).__name__ == "MoEConfig"
    assert (config.ep_size, config.dispatcher, config.kernels) == (2, "alltoall", "reference")
    assert config.dp_replicate_size == 2


@pytest.mark.parametrize(
    ("rank", "options", "said"),
    [
        (
            "0",
            MoEOptions(ep_size=4, kernels="fused"),
            "moe-accel: the script's own MoEConfig counts (ep_size=2, kernels=auto), "
            "not moe_config (ep_size=4, kernels=fused)\n",
        ),
        ("1", MoEOptions(ep_size=4), ""),
        ("0", MoEOptions(ep_size=2), ""),
    ],
    ids=["differs", "other-rank", "agrees"],
)
def test_the_scripts_own_moe_config_counts_and_a_difference_is_said_once(monkeypatch, capsys, rank, options, said):
    from moe_accel import MoEConfig

    monkeypatch.setenv("RANK", rank)
    own = MoEConfig(ep_size=2)
    assert worker.choose_config(own, options) is own
    assert capsys.readouterr().err == said


def test_a_plain_parallelism_config_from_the_script_is_refused_with_the_remedy():
    from accelerate import ParallelismConfig

    with pytest.raises(ConfigError) as caught:
        worker.choose_config(ParallelismConfig(dp_shard_size=2), MoEOptions(ep_size=2))
    assert caught.value.message == (
        "the script gives Accelerator a ParallelismConfig, which has no place for moe_config (ep_size=2)"
    )
    assert caught.value.hint is not None
    assert "parallelism_config section of the accelerate config" in caught.value.hint
    assert "moe_accel.MoEConfig(ep_size=2, ...)" in caught.value.hint


@pytest.mark.parametrize("how", ["positional", "keyword", "none", "absent"])
def test_parallelism_config_is_found_however_it_is_passed(monkeypatch, how):
    seen = []

    class Accelerator:
        def __init__(self, device=None, parallelism_config=None, torch_tp_plugin=None):
            seen.append((device, parallelism_config))

    monkeypatch.setattr(worker, "prepare_process", lambda: MoEOptions(ep_size=2))
    monkeypatch.setattr(worker, "choose_config", lambda given, options: (given, options.ep_size))
    hooks.wrap(Accelerator, "__init__", worker._supply_moe_config)
    calls = {
        "positional": lambda: Accelerator("cpu", "own"),
        "keyword": lambda: Accelerator("cpu", parallelism_config="own"),
        "none": lambda: Accelerator("cpu", parallelism_config=None),
        "absent": lambda: Accelerator("cpu"),
    }
    calls[how]()
    assert seen == [("cpu", ("own" if how in ("positional", "keyword") else None, 2))]
    with pytest.raises(ConfigError, match="gives Accelerator a torch_tp_plugin"):
        Accelerator(torch_tp_plugin=object())
    monkeypatch.setattr(worker, "prepare_process", lambda: None)
    Accelerator("cpu", "own")
    assert seen[-1] == ("cpu", "own"), "with MOE_ACCEL_CONFIG gone, the call passes through untouched"
