"""The whole way on a small mixture of experts, without a GPU or a network: `make demo`.

needs              pip install -e '.[examples]', 2 CPU cores, 3 GB of memory
run                make demo
tested on          2 CPU cores: 133 s
tokens per second  1,500 to 3,500 in training, on these shared cores
peak memory        0.9 GB a process

1. real dialogues, a tokenizer trained on them, a small Qwen3-MoE with random weights
2. `accelerate launch --config examples/demo.yaml examples/finetune.py`: two processes, half of the experts on each
3. what training did: losses, the load of the experts, the saved checkpoint
4. the checkpoint in plain transformers, in a fresh process: the same held-out loss, and replies

Everything is written to demo-output/. A check that fails ends the demo with status 1 and says what it found.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import demo_inputs

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = Path("demo-output")
DATA, START, TRAINED = OUTPUT / "data", OUTPUT / "start", OUTPUT / "model"
MAX_LENGTH = 128
TRAINING = {
    "model": START,
    "dataset": DATA,
    "prompt_column": "question",
    "completion_column": "answer",
    "completion_only_loss": "false",
    "output_dir": TRAINED,
    "max_length": MAX_LENGTH,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 1,  # the loss is then the mean over rows, whatever their order
    "train_sampling_strategy": "group_by_length",
    "num_train_epochs": 5,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 20,
    "weight_decay": 0.1,
    "bf16": "false",
    "gradient_checkpointing": "false",
    "dataloader_pin_memory": "false",
    "logging_strategy": "epoch",
    "eval_strategy": "epoch",
    "eval_on_start": "true",
    "save_strategy": "no",
    "callbacks": "moe_accel.ExpertLoadCallback",
}
QUESTIONS = ("You are jealous", "can a robot get drunk?", "What are your favorite subjects")  # all of them held out
MUST_FALL_TO = 0.8
"""Both losses have to end below this share of where they started."""


class DemoError(Exception):
    """A check failed; the message says which, with what was found."""


def main() -> int:
    """Run the steps."""
    os.chdir(ROOT)
    started = time.perf_counter()
    try:
        make_inputs()
        train()
        history = json.loads((TRAINED / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
        held_out = check_losses(history)
        check_expert_load(history)
        check_files()
        check_in_plain_transformers(held_out)
    except DemoError as error:
        print(f"\nFAILED: {error}", file=sys.stderr)
        return 1
    headline(f"Everything checked, in {time.perf_counter() - started:.0f} s")
    print(f"The checkpoint is in {TRAINED}/, an ordinary Hugging Face model directory.")
    print("For your own model: the same script, another --model and --dataset, and examples/moe_8gpu.yaml")
    return 0


def headline(text: str) -> None:
    """Print the title of a step."""
    print(f"\n\033[1m== {text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def make_inputs() -> None:
    """Step 1."""
    headline("1/4  Real dialogues, a tokenizer trained on them, a small mixture of experts")
    from transformers.utils import logging

    logging.disable_progress_bar()
    training, held_out = demo_inputs.split_pairs(demo_inputs.read_pairs())
    demo_inputs.write_jsonl(DATA / "train.jsonl", training)
    demo_inputs.write_jsonl(DATA / "test.jsonl", held_out)
    tokenizer = demo_inputs.make_tokenizer([text for pair in training for text in pair])
    model = demo_inputs.make_model(tokenizer)
    tokenizer.save_pretrained(START)
    model.save_pretrained(START)
    count = sum(parameter.numel() for parameter in model.parameters())
    config = model.config
    print(
        f"text       {len(training):,} questions with answers to train on, {len(held_out)} held out (chatterbot-corpus)"
    )
    print(f"tokenizer  byte-level BPE of {len(tokenizer):,} tokens")
    print(
        f"model      {type(model).__name__}, {config.num_hidden_layers} layers, {config.num_experts} experts in each, "
        f"{config.num_experts_per_tok} chosen per token; {count / 1e6:.1f} M random weights"
    )


def train() -> None:
    """Step 2."""
    headline("2/4  Train in two processes, half of the experts on each; the script does not know moe-accel")
    for old in TRAINED.glob("*"):
        if old.is_file():
            old.unlink()
    options = [word for name, value in TRAINING.items() for word in (f"--{name}", str(value))]
    command = ["accelerate", "launch", "--config", "examples/demo.yaml", "examples/finetune.py", *options]
    print(f"$ {shlex.join(command[:5])} \\\n      " + wrapped(options))
    print("\nexamples/demo.yaml is an ordinary FSDP2 config with one more section:")
    section = (ROOT / "examples" / "demo.yaml").read_text(encoding="utf-8").split("moe_config:")[1]
    print(f"    moe_config:{section}".replace("\n  ", "\n      ").rstrip())
    print("\nstarting two processes ...", flush=True)
    if subprocess.run([Path(sys.executable).parent / command[0], *command[1:]], env=environment()).returncode:
        raise DemoError("training ended with an error, printed above")
    if not (TRAINED / "trainer_state.json").is_file():
        raise DemoError(f"training wrote no {TRAINED / 'trainer_state.json'}")


def wrapped(options: list[str], width: int = 110) -> str:
    """A long list of --name value pairs, on several lines of a shell command."""
    lines = [""]
    for name, value in zip(options[::2], options[1::2], strict=True):
        word = f"{name} {shlex.quote(value)}"
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n      ".join(lines)


def environment(**variables: str) -> dict[str, str]:
    """The environment of a step: nothing of another launch, one thread a process, no network, upstream's noise off."""
    launch = ("ACCELERATE_", "FSDP_", "MOE_ACCEL_", "PARALLELISM_CONFIG_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(launch)}
    ours = {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(OUTPUT / "cache"),
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # those of transformers, too
        "PYTHONWARNINGS": "ignore:Slicing a flattened dim:UserWarning",  # torch on accelerate's own mesh
        "TORCH_LOGS": "-dtensor",  # torch on its own redistribute
    }
    return clean | ours | variables


def check_losses(history: list[dict[str, Any]]) -> float:
    """Step 3, the losses; returns the last held-out loss."""
    headline("3/4  What training did")
    trained = {entry["epoch"]: entry["loss"] for entry in history if "loss" in entry}
    held_out = {entry.get("epoch", 0): entry["eval_loss"] for entry in history if "eval_loss" in entry}
    print("epoch   train loss   held-out loss")
    for epoch, loss in sorted(held_out.items()):
        shown = f"{trained[epoch]:10.3f}" if epoch in trained else " " * 10
        print(f"{epoch:5.0f}   {shown}   {loss:13.3f}   {'█' * round(6 * loss)}")
    for name, losses in (("train", trained), ("held-out", held_out)):
        first, last = losses[min(losses)], losses[max(losses)]
        if not last < MUST_FALL_TO * first:
            raise DemoError(f"the {name} loss went from {first:.3f} to {last:.3f}: not below {MUST_FALL_TO} of it")
    return held_out[max(held_out)]


def check_expert_load(history: list[dict[str, Any]]) -> None:
    """Step 3, the experts: what the callback put into the Trainer's log."""
    loads = [entry for entry in history if "expert_load/max_cv" in entry]
    if not loads:
        raise DemoError("ExpertLoadCallback logged nothing")
    last = loads[-1]
    shares = [value for key, value in last.items() if key.endswith("/max_share")]
    busiest = f"{min(shares):.0%} to {max(shares):.0%} of its tokens (an even share: {1 / demo_inputs.NUM_EXPERTS:.1%})"
    print(f"\nexperts     the busiest one of a layer got {busiest};")
    none = f"{last['expert_load/dead']:.0f} got none"
    print(f"            {none}. The table is above, and {TRAINED}/trainer_state.json has every log's")


def check_files() -> None:
    """Step 3, the checkpoint: the same tensors as plain transformers wrote for the untrained model."""
    before, after = tensor_shapes(START), tensor_shapes(TRAINED)
    if before != after:
        names = sorted(before.items() ^ after.items())
        raise DemoError(f"{TRAINED} has not the tensors that plain transformers writes: {names[:4]} ...")
    files = [file for file in sorted(TRAINED.iterdir()) if file.is_file()]
    print(f"\ncheckpoint  {TRAINED}/")
    for file in files:
        print(f"    {file.stat().st_size / 1e3:10,.1f} kB  {file.name}")
    print(f"{len(after)} tensors, names and shapes as plain transformers writes them, every expert on its own:")
    name = next(name for name in after if ".experts.0." in name)
    print(f"    {name} {after[name]}")


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the safetensors files of a directory."""
    from safetensors import safe_open

    shapes = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as opened:
            shapes.update({name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()})  # noqa: SIM118
    return shapes


def check_in_plain_transformers(held_out: float) -> None:
    """Step 4."""
    headline("4/4  The checkpoint in plain transformers, in a fresh process where moe-accel is not active")
    command: list[Any] = [sys.executable, "examples/demo_check.py", TRAINED, DATA / "test.jsonl"]
    command += ["--expect", repr(held_out), "--max_length", MAX_LENGTH, "--ask", *QUESTIONS]
    without: Mapping[str, str] = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    if subprocess.run([str(word) for word in command], env=environment(**without)).returncode:
        raise DemoError("plain transformers does not get what was trained, see above")


if __name__ == "__main__":
    sys.exit(main())
