"""Step 4 of `make demo`: what plain transformers makes of the saved checkpoint, in a process of its own.

needs              a model directory and a .jsonl file of {"question", "answer"} rows
run                python examples/demo_check.py demo-output/model demo-output/data/test.jsonl --expect 4.2
                       --ask "You are jealous"
tested on          2 CPU cores
tokens per second  not measured
peak memory        not measured

Exits with status 1 when moe-accel is active, when weights are missing or left over, or when the held-out loss differs
from --expect by more than 1e-4 of it.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TOLERANCE = 1e-4
"""Relative. Both sides compute in fp32, in another order: differences of 1e-6 are usual."""


def held_out_loss(model, tokenizer, rows: list[dict[str, str]], max_length: int) -> float:
    """The mean over the rows of the loss as the trainer measures it: with the router's balancing term."""
    total = 0.0
    for row in rows:
        chat = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        tokens = tokenizer.apply_chat_template(chat, return_dict=True, return_tensors="pt")["input_ids"][:, :max_length]
        with torch.no_grad():
            total += model(input_ids=tokens, labels=tokens, output_router_logits=True).loss.item()
    return total / len(rows)


def reply(model, tokenizer, question: str) -> str:
    """The most likely answer, token after token."""
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    tokens = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> int:
    """Load, compare, answer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("rows")
    parser.add_argument("--expect", type=float, required=True, help="held-out loss measured at the end of training")
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--ask", nargs="*", default=[])
    args = parser.parse_args()

    active = sorted(name for name in sys.modules if name.partition(".")[0] == "moe_accel")
    if active:
        print(f"moe-accel is active in this process: {', '.join(active)}")
        return 1
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(args.model, output_loading_info=True)
    model, info = loaded
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        print(f"{args.model} does not load completely: {wrong}")
        return 1
    model.eval()
    print(f"{type(model).__name__}.from_pretrained: no weight missing, none left over; moe-accel is not imported here")

    rows = [json.loads(line) for line in Path(args.rows).read_text(encoding="utf-8").splitlines()]
    loss = held_out_loss(model, tokenizer, rows, args.max_length)
    off = abs(loss - args.expect) / args.expect
    print(f"held-out loss here {loss:.6f}, during training {args.expect:.6f}: relative difference {off:.1e}")
    if not off <= TOLERANCE:
        print(f"the difference is above {TOLERANCE:.0e}")
        return 1
    if args.ask:
        print("\nreplies to held-out questions; from so little text it learns the tone, no facts:")
    for question in args.ask:
        print(f"  you    {question}\n  model  {reply(model, tokenizer, question)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
