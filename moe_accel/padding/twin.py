"""The proof: a small copy of a model gives the same loss, gradients and outputs with padding and without.

The copy has the model's own class and config, all its kinds of layers, and small sizes; random weights in fp64, on the
CPU, in some tenths of a second. Whatever mixes tokens in another way than attention under the mask of transformers
(convolutions, linear attention, a mask of a layer's own, tokens that are shifted) gives other numbers, or stops.
"""

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from moe_accel.errors import UnsupportedModelError
from moe_accel.padding import attention
from moe_accel.padding.batch import Flat, Proof, flatten
from moe_accel.padding.rows import IGNORED
from moe_accel.swap import own_class

SMALL: dict[str, int] = {
    "vocab_size": 96,
    "vocab_size_per_layer_input": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "dense_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_experts_intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "index_topk": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "attention_chunk_size": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
"""Sizes in the copy, of those that a config has and that are larger there. Any will do that fit together."""

SMALL_GROUP = 4
"""Tokens of a group in the copy, of layers that attend to groups: fewer than a sequence there has."""
LENGTHS = (13, 20, 6)
NUM_LAYERS = (2, 4, 8, 16, 32)
TOLERANCE = 1e-4
"""Relative. Routers, norms and rotary embeddings compute in fp32; a token that sees another one is off by far more."""

_proven: dict[Any, Proof | str] = {}


def prove(model: PreTrainedModel) -> Proof | str:
    """Which batches a model computes to the same numbers without padding; or why none."""
    written = json.dumps(model.config.to_dict(), default=str, sort_keys=True)
    key = own_class(model), implementation_of(model), written, frozenset(kinds(model))
    attention.install()
    if key not in _proven:
        with _aside():
            _proven[key] = _prove(model)
    return _proven[key]


@contextmanager
def _aside() -> Iterator[None]:
    """Nothing is seen of what happens here: no random number drawn, nothing said, no default changed."""
    verbosity, num_threads = logging.get_verbosity(), torch.get_num_threads()
    logging.set_verbosity(50)  # critical
    torch.set_num_threads(1)  # products this small are slower on more
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        torch.set_num_threads(num_threads)


def kinds(model: nn.Module) -> set[Any]:
    """The kinds of modules that a model is made of: their classes, and what tells layers of one class apart."""
    found = set()
    for module in model.modules():
        words = [getattr(module, name, None) for name in ("attention_type", "layer_type", "is_sliding", "is_causal")]
        told = tuple(each if isinstance(each, str | bool) else None for each in words)
        found.add((own_class(module), *told, bool(getattr(module, "sliding_window", None))))
    return found


def _prove(model: PreTrainedModel) -> Proof | str:
    try:
        twin = twin_of(model)
    except Exception as error:  # the sizes do not fit together, or whatever else a class of anybody's may do
        return f"a small copy to try it on cannot be made: {_said(error)}"
    if isinstance(twin, str):
        return twin
    beyond = _whole_beyond(model, twin)
    why_not = _compare(twin, _batch(twin, left=False)) or ""
    if why_not:
        return why_not if beyond is None else Proof(why_not, left=False, packed=False, whole_beyond=beyond)
    left, packed = (_compare(twin, batch) is None for batch in (_batch(twin, left=True), _packed(twin)))
    return Proof(left=left, packed=packed, whole_beyond=beyond)


def implementation_of(model: PreTrainedModel) -> str:
    """The attention that a model is proven with: sdpa, or `NO_SDPA` where it has none."""
    return "sdpa" if model.config.get_text_config()._attn_implementation == "sdpa" else attention.NO_SDPA


def _whole_beyond(model: PreTrainedModel, twin: PreTrainedModel) -> int | None:
    """See `Proof`: without sdpa transformers computes all scores [T,T], in windows shorter than T a mask of them."""
    has_sdpa = implementation_of(model) == "sdpa"
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    if has_sdpa and not (type(window) is int and window > 0):
        return None
    asked: set[int | None] = set()
    token = attention.windows.set(asked)
    try:
        differs = _compare(twin, _whole(twin)) is not None
    finally:
        attention.windows.reset(token)
    if differs or (has_sdpa and asked <= {None}):  # no layer has the window
        return None
    return window if has_sdpa else 0


def twin_of(model: PreTrainedModel) -> PreTrainedModel | str:
    """A small copy of a model with random weights; or what of the model is not in a copy."""
    asked = {kind for kind in kinds(model) if not _is_plain(kind[0])}
    missing, made = asked, cast(Any, None)
    for num_layers in NUM_LAYERS:
        config = copy.deepcopy(model.config)
        shrink(config, num_layers)
        made = own_class(model)._from_config(config, attn_implementation=implementation_of(model), dtype=torch.float64)
        made.set_experts_implementation("eager")
        missing = asked - kinds(made)
        if not missing or num_layers >= getattr(model.config.get_text_config(), "num_hidden_layers", 0):
            break
    if missing:
        return f"{sorted(kind[0].__name__ for kind in missing)[0]} is not in a model of this config as it is here"
    for name, parameter in made.named_parameters():
        noise = torch.randn(parameter.shape, dtype=torch.float64)
        values = noise * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1 * noise
        parameter.data.copy_(values + (1.0 if parameter.ndim == 1 and "norm" in name.lower() else 0.0))
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        rope = getattr(module, "rope_type", "")
        if any(
            "dynamic" in each or each == "longrope" for each in (rope.values() if isinstance(rope, dict) else [rope])
        ):
            return "its rotary embedding depends on the longest row of a batch"
    return made.train()


def _is_plain(kind: type) -> bool:
    """Whether a module computes token by token whatever its config: what PEFT puts around layers."""
    plain = (nn.Linear, nn.Identity, nn.Dropout, nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
    return kind in plain or kind.__module__.startswith(("peft.tuners.lora.", "peft.utils.", "peft.tuners.tuners_utils"))


def shrink(config: Any, num_layers: int) -> None:
    """Give a config, and those in it, the sizes of `SMALL` and at most so many layers."""
    for name in type(config).sub_configs:
        if getattr(config, name, None) is not None:
            shrink(getattr(config, name), num_layers)
    before = getattr(config, "num_hidden_layers", None)
    groups = before and getattr(config, "num_attention_heads", 1) == getattr(config, "num_key_value_heads", None)
    for name, small in SMALL.items():
        value = getattr(config, name, None)
        if type(value) is int and value > small:
            setattr(config, name, small if not (groups and name == "num_key_value_heads") else 4)
    if isinstance(before, int) and before > num_layers:
        for name, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == before:
                setattr(config, name, value[:num_layers])
        config.num_hidden_layers = num_layers
    if isinstance(getattr(config, "compress_rates", None), dict):  # layers that see groups of tokens: of so many
        config.compress_rates = {kind: min(rate, SMALL_GROUP) for kind, rate in config.compress_rates.items()}
    for name in ("quantization_config", "distributed_config"):
        if getattr(config, name, None) is not None:
            setattr(config, name, None)


def _ids(twin: PreTrainedModel, num_rows: int, length: int) -> Tensor:
    num_words = getattr(twin.config.get_text_config(), "vocab_size", None) or SMALL["vocab_size"]
    return torch.randint(1, max(2, min(SMALL["vocab_size"], num_words)), (num_rows, length))


def _batch(twin: PreTrainedModel, left: bool) -> dict[str, Any]:
    longest = max(LENGTHS) + 4  # a whole column of padding
    ids = _ids(twin, len(LENGTHS), longest)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, longest - length if left else 0 :][:length] = 1
    labels = ids.where((mask == 1) & (torch.rand(ids.shape) < 0.6), IGNORED)
    for row, length in enumerate(LENGTHS):
        labels[row, longest - length if left else 0] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _packed(twin: PreTrainedModel) -> dict[str, Any]:
    ids = _ids(twin, 1, sum(LENGTHS))
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).unsqueeze(0)
    return {"input_ids": ids, "position_ids": positions, "labels": ids.clone(), "use_cache": False}


def _whole(twin: PreTrainedModel) -> dict[str, Any]:
    ids = _ids(twin, len(LENGTHS), max(LENGTHS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _compare(twin: PreTrainedModel, batch: dict[str, Any]) -> str | None:
    """What is not the same of a batch without its padding; None: all is."""
    flat = flatten(twin, batch, Proof(whole_beyond=0))
    assert isinstance(flat, Flat)
    more: dict[str, Any] = {"use_cache": False}
    text = twin.config.get_text_config()
    ours = text._attn_implementation
    text._attn_implementation = "sdpa" if ours == "sdpa" else "eager"
    try:
        try:
            expected = _run(twin, batch | more | {"output_router_logits": True})
            more["output_router_logits"] = True
        except Exception:  # it has no such loss, or cannot compute it
            expected = _run(twin, batch | more)
    except Exception as error:
        return f"a small copy of the model does not compute a padded batch: {_said(error)}"
    finally:
        text._attn_implementation = ours
    token = attention.current.set(flat.rows)
    try:
        found = _run(twin, flat.kwargs | more, recomputed=True)
    except UnsupportedModelError as error:
        return error.message
    except Exception as error:
        return f"a layer does more than attend with its mask: {_said(error)}"
    finally:
        attention.current.reset(token)
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])) != 0
    logits = flat.rows.as_padded(found.pop("logits"))
    pairs = {"logits": (expected.pop("logits")[real], logits[real])}
    pairs |= {name: (value, found[name]) for name, value in expected.items()}
    for name, (one, other) in pairs.items():
        if not _near(one, other):
            again = _run(twin, batch | more)
            if not (_near(expected["loss"], again["loss"]) and _near(pairs["logits"][0], again["logits"][real])):
                return "it draws random numbers beyond dropout, which would fall otherwise"
            return f"tokens meet elsewhere than in its attention: {name} differs without padding, in a small copy"
    return None


def _near(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).norm() <= TOLERANCE * one.norm() + 1e-12)


def _run(twin: PreTrainedModel, batch: dict[str, Any], recomputed: bool = False) -> dict[str, Tensor]:
    """Loss, logits, and the gradients of all parameters by name."""
    if recomputed and twin.supports_gradient_checkpointing:
        twin.gradient_checkpointing_enable({"use_reentrant": False})
    twin.zero_grad(set_to_none=True)
    outputs = twin(**batch)
    outputs.loss.backward()
    if recomputed and twin.supports_gradient_checkpointing:
        twin.gradient_checkpointing_disable()
    gradients = {name: each.grad for name, each in twin.named_parameters() if each.grad is not None}
    return {"loss": outputs.loss.detach(), "logits": outputs.logits.detach(), **gradients}


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]
