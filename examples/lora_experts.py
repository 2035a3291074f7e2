"""LoRA on all experts of a mixture of experts, from ordinary PEFT code to a plain checkpoint that answers differently.

needs              pip install -e '.[examples]'
run, no GPU        python examples/lora_experts.py --out lora-output     (after `make demo`: it starts from its model)
run, one GPU       python examples/lora_experts.py --out lora-output --model Qwen/Qwen3-30B-A3B --lr 2e-4
tested on          2 CPU cores; of a 30B model on a GPU only the training step was measured (README)
tokens per second  2 CPU cores, which other programs used, too: 720; one GPU: see README
peak memory        2 CPU cores: 0.5 GB; one GPU: see README

Learns a few real answers by heart (`--pairs` of the chatterbot-corpus), saves the adapter as PEFT does, merges it with
`moe-accel merge`, and lets plain transformers answer with the merged directory. Ends with status 1 where it does not
give most of the answers.
"""

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from demo_inputs import read_pairs
from peft import get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from moe_accel import MoEConfig, expert_lora_config


def answers(model: Any, tokenizer: Any, questions: list[str]) -> list[str]:
    """What the model says, greedily."""
    found = []
    for question in questions:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        with torch.no_grad():
            said = model.generate(**inputs, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        text = tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found.append(text.removesuffix("<|end|>").strip())
    return found


def batch_of(tokenizer: Any, pairs: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """The chats as one padded batch, labels on the answers only."""
    rows = []
    for question, answer in pairs:
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        whole = tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
        asked = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        rows.append((whole, [-100] * len(asked) + whole[len(asked) :]))
    width = max(len(tokens) for tokens, _ in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return {
        "input_ids": torch.tensor([tokens + [pad] * (width - len(tokens)) for tokens, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(tokens) + [0] * (width - len(tokens)) for tokens, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows]),
    }


def main() -> int:
    """Train, save, merge, ask."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo-output/model", help="name on the Hugging Face hub, or a directory")
    parser.add_argument("--out", required=True, type=Path, help="directory for adapter/ and merged/")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=8, help="answers to learn")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lr", type=float, default=1e-2)
    args = parser.parse_args()

    set_seed(0)
    pairs = dict(pair for pair in read_pairs() if 10 < len(pair[1]) < 60)
    pairs = list(pairs.items())[:: max(1, len(pairs) // args.pairs)][: args.pairs]
    questions = [question for question, _ in pairs]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    before = answers(base.eval(), tokenizer, questions)

    model: Any = get_peft_model(base, expert_lora_config(base, r=args.rank), autocast_adapter_dtype=False)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=args.lr)
    accelerator = Accelerator(parallelism_config=MoEConfig())
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    batch = {name: values.to(accelerator.device) for name, values in batch_of(tokenizer, pairs).items()}
    start = time.perf_counter()
    bar = tqdm(range(args.steps), desc="LoRA on experts")
    for _ in bar:
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    rate = args.steps * batch["attention_mask"].sum().item() / (time.perf_counter() - start)
    model.save_pretrained(args.out / "adapter")

    base_folder = args.model
    if not Path(base_folder).is_dir():
        from huggingface_hub import snapshot_download

        base_folder = snapshot_download(args.model)
    command = [sys.executable, "-m", "moe_accel", "merge", args.out / "adapter"]
    command += ["--base", base_folder, "--out", args.out / "merged"]
    subprocess.run(command, check=True)

    plain = AutoModelForCausalLM.from_pretrained(args.out / "merged", dtype=args.dtype).eval()
    after = answers(plain, tokenizer, questions)
    learnt = 0
    for (question, answer), old, new in zip(pairs, before, after, strict=True):
        learnt += new == answer
        print(f"\n{question}\n  before: {old}\n  after:  {new}{'' if new == answer else f'   (to learn: {answer})'}")
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"\n{learnt} of {len(pairs)} answers learnt; {rate:.0f} tokens per second, peak {peak_gb:.1f} GB")
    return 0 if 2 * learnt > len(pairs) else 1


if __name__ == "__main__":
    sys.exit(main())
