"""The smallest useful script: supervised fine-tuning with a plain Accelerate loop, no Trainer, no line knows moe-accel.

needs              pip install -e '.[examples]'
run, no GPU        accelerate launch --config examples/demo.yaml examples/train_loop.py \\
                       --model demo-output/start --data demo-output/data/train.jsonl --out demo-output/loop --lr 2e-3
                   (`make demo` writes its model and data)
run, 8 GPUs        accelerate launch --config examples/moe_8gpu.yaml examples/train_loop.py \\
                       --model Qwen/Qwen3-30B-A3B --data chats.jsonl --out out
tested on          2 CPU cores, which other programs used, too; 8 GPUs: not measured
tokens per second  2 CPU cores: 750, on these shared cores; 8 GPUs: not measured
peak memory        2 CPU cores: 0.9 GB a process; 8 GPUs: not measured

Rows of the data, a .jsonl file, have a `question` and an `answer`.
"""

import argparse
from typing import Any

import torch
from accelerate import Accelerator
from datasets import load_dataset
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup, set_seed


def main() -> None:
    """Load, train, save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="name on the Hugging Face hub, or a directory")
    parser.add_argument("--data", required=True, help=".jsonl file with question and answer")
    parser.add_argument("--out", required=True, help="directory to save the model to")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16, help="rows a step and rank")
    parser.add_argument("--max_length", type=int, default=128, help="tokens a row")
    parser.add_argument("--lr", type=float, default=1e-5)
    args = parser.parse_args()

    set_seed(0)
    accelerator = Accelerator()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    rows: Any = load_dataset("json", data_files=args.data, split="train")

    def collate(batch: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        roles = ("user", "question"), ("assistant", "answer")
        chats = [[{"role": role, "content": row[column]} for role, column in roles] for row in batch]
        options = {"padding": True, "truncation": True, "max_length": args.max_length, "return_tensors": "pt"}
        inputs = tokenizer.apply_chat_template(chats, return_dict=True, **options)
        return inputs | {"labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}

    loader = DataLoader(rows, args.batch, shuffle=True, collate_fn=collate, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    schedule = get_cosine_schedule_with_warmup(optimizer, 10, args.epochs * len(loader))

    for epoch in range(args.epochs):
        bar = tqdm(loader, desc=f"epoch {epoch + 1}/{args.epochs}", disable=not accelerator.is_main_process)
        for batch in bar:
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}")

    accelerator.save_model(model, args.out)
    if accelerator.is_main_process:
        tokenizer.save_pretrained(args.out)
    accelerator.end_training()


if __name__ == "__main__":
    main()
