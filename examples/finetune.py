"""Supervised fine-tuning of a Hugging Face causal language model with TRL: an ordinary script, no line knows moe-accel.

needs              pip install -e '.[examples]'
run, no GPU        make demo
run, 8 GPUs        accelerate launch --config examples/moe_8gpu.yaml examples/finetune.py \\
                       --model Qwen/Qwen3-30B-A3B --dataset chats.jsonl --holdout 500 --output_dir out \\
                       --learning_rate 1e-5 --per_device_train_batch_size 2 --max_length 4096 \\
                       --eval_strategy steps --eval_steps 100 --callbacks moe_accel.ExpertLoadCallback
                   (with flash-attn installed, also: --packing --attn_implementation flash_attention_2)
tested on          2 CPU cores, as `make demo` runs it; 8 GPUs: not measured
tokens per second  2 CPU cores: see examples/demo.py; 8 GPUs: not measured
peak memory        2 CPU cores: see examples/demo.py; 8 GPUs: not measured

Rows of the dataset may be what TRL takes (`messages`, `prompt` + `completion`, `text`), or two text columns named by
--prompt_column and --completion_column. Every option of TRL's SFTConfig is an option here: --max_length, --packing,
--chat_template_path, --learning_rate, --num_train_epochs, --gradient_checkpointing, --bf16, --seed; --help lists them.
"""

import pkgutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import transformers
from datasets import DatasetDict, load_dataset
from tqdm import tqdm
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer, TrlParser  # pyright: ignore[reportPrivateImportUsage]


@dataclass
class ScriptArguments:
    """What SFTConfig does not cover: the model, the data and callbacks."""

    model: str = field(metadata={"help": "name on the Hugging Face hub, or a directory"})
    dataset: str = field(metadata={"help": "name on the hub, a .jsonl file, or a directory with one .jsonl per split"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration of a dataset on the hub"})
    train_split: str = field(default="train", metadata={"help": "split to train on"})
    test_split: str = field(default="test", metadata={"help": "split to measure the held-out loss on"})
    holdout: int = field(default=0, metadata={"help": "rows to take off the train split where there is no test split"})
    prompt_column: str | None = field(default=None, metadata={"help": "text column with what the user says"})
    completion_column: str | None = field(default=None, metadata={"help": "text column with the reply to learn"})
    dtype: str = field(default="auto", metadata={"help": "dtype of the loaded weights; auto is the checkpoint's own"})
    attn_implementation: str | None = field(default=None, metadata={"help": "for example flash_attention_2"})
    callbacks: list[str] = field(
        default_factory=list, metadata={"help": "more TrainerCallback classes, as package.name, made without arguments"}
    )


def load_rows(args: ScriptArguments, seed: int) -> DatasetDict:
    """The splits of the dataset, as chats where two text columns were named.

    Raises:
        ValueError: only one of the two columns was named.
    """
    if bool(args.prompt_column) != bool(args.completion_column):
        raise ValueError("--prompt_column and --completion_column go together")
    path = Path(args.dataset)
    if path.is_dir() and list(path.glob("*.jsonl")):
        rows = load_dataset("json", data_files={file.stem: str(file) for file in sorted(path.glob("*.jsonl"))})
    elif path.suffix in (".json", ".jsonl"):
        rows = load_dataset("json", data_files={args.train_split: args.dataset})
    else:
        rows = load_dataset(args.dataset, args.dataset_config)
    if args.test_split not in rows and args.holdout:
        parts = rows[args.train_split].train_test_split(test_size=args.holdout, seed=seed)
        rows[args.train_split], rows[args.test_split] = parts["train"], parts["test"]
    if not args.prompt_column:
        return rows
    return rows.map(
        _as_chat, fn_kwargs={"prompt_column": args.prompt_column, "completion_column": args.completion_column}
    )


def _as_chat(row: dict[str, Any], prompt_column: str, completion_column: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": row[prompt_column]}],
        "completion": [{"role": "assistant", "content": row[completion_column]}],
    }


class OneLinePerLog(TrainerCallback):
    """A bar on a terminal, and a line a log. tok/s counts the tokens of all ranks, without padding and evaluation."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Draw the bar."""
        self.bar = tqdm(total=state.max_steps, unit="step", disable=None if state.is_world_process_zero else True)
        self.seconds, self.tokens = 0.0, None

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self.step_started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock, move the bar."""
        self.seconds += time.perf_counter() - self.step_started
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args, state, control, **kwargs):
        """Leave the bar as it is."""
        self.bar.close()

    def on_log(self, args, state, control, logs, **kwargs):
        """Print the line."""
        if not state.is_world_process_zero:
            return
        place = f"step {state.global_step:>5}/{state.max_steps}  epoch {state.epoch or 0:5.2f}"
        if "eval_loss" in logs:
            tqdm.write(f"{place}  held-out loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            speed = (logs["num_tokens"] - (self.tokens or 0)) / self.seconds
            self.seconds, self.tokens = 0.0, logs["num_tokens"]
            rest = f"grad norm {logs['grad_norm']:.2f}  lr {logs['learning_rate']:.1e}  {speed:,.0f} tok/s"
            tqdm.write(f"{place}  loss {logs['loss']:.4f}  {rest}")


def main() -> None:
    """Load, train, measure, save."""
    parser = TrlParser((ScriptArguments, SFTConfig))  # pyright: ignore[reportArgumentType]
    args, config = parser.parse_args_and_config()
    if config.process_index:  # one voice
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    model_options = {"dtype": args.dtype, "attn_implementation": args.attn_implementation}
    config.model_init_kwargs = model_options | (config.model_init_kwargs or {})
    with config.main_process_first():
        rows = load_rows(args, config.seed)
    trainer = SFTTrainer(
        model=args.model,
        args=config,
        train_dataset=rows[args.train_split],
        eval_dataset=rows.get(args.test_split),
        callbacks=[OneLinePerLog(), *(pkgutil.resolve_name(name)() for name in args.callbacks)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_state()
    trainer.save_model()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
