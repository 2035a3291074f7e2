"""The inputs of `make demo`, made without a network: real dialogues, a real tokenizer, a small MoE with random weights.

The text is the English part of the `chatterbot-corpus` package: questions and answers people wrote for chat bots.
"""

import json
import random
from importlib.resources import files
from pathlib import Path

HELD_OUT_PAIRS = 64
VOCAB_SIZE = 1024
NUM_EXPERTS = 8
ALTERNATIVES = ("computers.yml", "emotion.yml")  # here a conversation is one question and several answers to it
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def read_pairs() -> list[tuple[str, str]]:
    """All different (question, answer) pairs, in the order of the files."""
    import yaml

    pairs: dict[tuple[str, str], None] = {}
    for file in sorted((files("chatterbot_corpus") / "data" / "english").iterdir(), key=lambda file: file.name):
        for turns in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            if not isinstance(turns, list):  # one entry of trivia.yml is a plain sentence
                continue
            said = [str(turn).strip() for turn in turns]
            asked = [said[0]] * (len(said) - 1) if file.name in ALTERNATIVES else said
            pairs.update(dict.fromkeys(pair for pair in zip(asked, said[1:], strict=False) if all(pair)))
    return list(pairs)


def split_pairs(pairs: list[tuple[str, str]], seed: int = 0) -> tuple[list, list]:
    """(training pairs, held-out pairs). A question is on one side only, whatever its case and punctuation."""
    questions: dict[str, list[tuple[str, str]]] = {}
    for question, answer in pairs:
        questions.setdefault("".join(filter(str.isalnum, question.lower())), []).append((question, answer))
    groups = list(questions.values())
    random.Random(seed).shuffle(groups)
    held_out: list[tuple[str, str]] = []
    while len(held_out) < HELD_OUT_PAIRS:
        at = next(i for i, group in enumerate(groups) if len(held_out) + len(group) <= HELD_OUT_PAIRS)
        held_out += groups.pop(at)
    return [pair for group in groups for pair in group], held_out


def write_jsonl(path: Path, pairs: list[tuple[str, str]]) -> None:
    """One {"question", "answer"} object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"question": question, "answer": answer}) for question, answer in pairs)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def make_tokenizer(texts: list[str]):
    """A byte-level BPE tokenizer trained on `texts`, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer, seed: int = 0):
    """A Qwen3-MoE of 4 layers, 8 experts each, 2 chosen per token; weights random but always the same."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed

    set_seed(seed)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=32,  # pyright: ignore[reportCallIssue] it goes into **kwargs
            moe_intermediate_size=96,
            num_experts=NUM_EXPERTS,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            router_aux_loss_coef=0.01,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
