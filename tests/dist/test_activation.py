"""The ways to start a job, each with the same unmodified script: two gloo ranks, FSDP2, a tiny Qwen3-MoE."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent

MOE_YAML = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: 'no'
num_machines: 1
num_processes: 2
use_cpu: false
main_process_port: 0
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_cpu_ram_efficient_loading: false
moe_config:
  ep_size: 2
"""

# What a user writes: nothing in it knows moe-accel. It reports what it found, a file a rank.
TRAIN_PY = '''
import json, os, pickle, sys
import torch
from accelerate import Accelerator
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

class Settings:
    """Pickled by name: needs `__main__` to be this script, however it was started."""

accelerator = Accelerator()
torch.manual_seed(0)
model = Qwen3MoeForCausalLM(Qwen3MoeConfig(
    vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
))
tokens = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(accelerator.process_index))
with torch.no_grad():
    expected = model(input_ids=tokens, labels=tokens).loss.item()
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
losses = []
for _ in range(3):
    loss = model(input_ids=tokens, labels=tokens).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
names = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
facts = dict(
    argv=sys.argv[1:],
    folder=sys.path[0],
    main=type(pickle.loads(pickle.dumps(Settings()))).__module__,
    ranks=accelerator.num_processes,
    fsdp2=accelerator.is_fsdp2,
    device=str(accelerator.device),
    backend=torch.distributed.get_backend(),
    config=type(accelerator.parallelism_config).__name__,
    ep_size=accelerator.parallelism_config.ep_size,
    dtensors=sorted({type(p).__name__ for p in model.parameters()}),
    variables={k: v for k, v in os.environ.items() if k.startswith(names)},
    section=json.loads(os.environ["MOE_ACCEL_CONFIG"]),
    expected=expected,
    losses=losses,
)
with open(os.path.join(os.environ["FACTS"], f"{accelerator.process_index}.json"), "w") as file:
    json.dump(facts, file)
accelerator.wait_for_everyone()
accelerator.end_training()
'''

CHECK_PY = """
import json, os, sys
from accelerate import Accelerator
accelerator = Accelerator()
config = accelerator.parallelism_config
facts = dict(argv=sys.argv[1:], config=type(config).__name__, ep_size=config.ep_size,
             kind=accelerator.distributed_type.value, precision=accelerator.mixed_precision)
json.dump(facts, open(os.path.join(os.environ["FACTS"], "0.json"), "w"))
"""


@pytest.fixture
def job(tmp_path):
    """A folder with moe.yaml and train.py; call it with a command to get what each rank reported."""
    (tmp_path / "moe.yaml").write_text(MOE_YAML)
    (tmp_path / "train.py").write_text(TRAIN_PY)
    (tmp_path / "check.py").write_text(CHECK_PY)

    def start(*command, ranks=2, **variables):
        facts = Path(tempfile.mkdtemp(dir=tmp_path))
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_", "MOE_ACCEL"))}
        done = subprocess.run(
            [str(word) for word in command],
            cwd=tmp_path,
            env=clean | {"OMP_NUM_THREADS": "1", "FACTS": str(facts)} | variables,
            capture_output=True,
            text=True,
            timeout=300,
        )
        files = sorted(facts.glob("*.json"))
        # judged by what the ranks wrote: gloo sometimes aborts a process that has finished its work
        assert len(files) == ranks, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return [json.loads(file.read_text()) for file in files]

    start.folder = tmp_path
    return start


def assert_trained_with_experts_in_parallel(reports, folder, argv):
    for report in reports:
        assert report["argv"] == argv, "the script's own arguments are its own"
        assert Path(report["folder"]).resolve() == folder.resolve()
        assert report["main"] == "__main__"
        assert (report["ranks"], report["fsdp2"]) == (2, True)
        assert (report["device"], report["backend"]) == ("cpu", "gloo")
        assert (report["config"], report["ep_size"]) == ("MoEConfig", 2)
        assert report["section"]["ep_size"] == 2
        assert report["dtensors"] == ["DTensor"]
        assert report["losses"][0] == pytest.approx(report["expected"], rel=1e-5)
        assert report["losses"][2] < report["losses"][0]
    assert reports[0]["expected"] != reports[1]["expected"], "each rank has its own batch"


def test_accelerate_launch_and_torchrun_run_the_same_job_from_the_same_file(job):
    launched = job(BIN / "accelerate", "launch", "--config", "moe.yaml", "train.py", "--config", "own.yaml")
    assert_trained_with_experts_in_parallel(launched, job.folder, ["--config", "own.yaml"])

    run_by_torch = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", "train.py"]
    by_torchrun = job(*run_by_torch, MOE_ACCEL_CONFIG="moe.yaml")
    assert_trained_with_experts_in_parallel(by_torchrun, job.folder, [])
    for launched_rank, torchrun_rank in zip(launched, by_torchrun, strict=True):
        assert torchrun_rank["variables"] == launched_rank["variables"]
        assert torchrun_rank["section"] == launched_rank["section"]
        assert torchrun_rank["losses"] == launched_rank["losses"]


@pytest.mark.parametrize(
    ("launcher", "script"),
    [
        ([BIN / "moe-accel", "launch"], ["train.py", "--config", "own.yaml"]),
        pytest.param(
            [sys.executable, "-m", "moe_accel.launch"], ["-m", "train", "--config", "own.yaml"], marks=pytest.mark.slow
        ),
    ],
    ids=["command", "module"],
)
def test_the_explicit_launchers_need_no_autoload(job, launcher, script):
    reports = job(*launcher, "--config=moe.yaml", *script, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert_trained_with_experts_in_parallel(reports, job.folder, ["--config", "own.yaml"])


def test_one_process_without_fsdp_is_a_case_of_its_own(job):
    """`ep_size: 1`, no FSDP: kernels and adapters apply here too. Also the module name of accelerate's launcher."""
    (job.folder / "moe.yaml").write_text(
        "distributed_type: 'NO'\nnum_processes: 1\nmixed_precision: bf16\nmoe_config: {ep_size: 1}\n"
    )
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    (report,) = job(*launcher, "--config=moe.yaml", "check.py", "--config_file", "own.yaml", ranks=1)
    assert report == {
        "argv": ["--config_file", "own.yaml"],
        "config": "MoEConfig",
        "ep_size": 1,
        "kind": "NO",
        "precision": "bf16",
    }
