"""What a model is called with, without its padding: [B,T] becomes [1,N], and what comes out [B,T] again."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_accel.padding.rows import IGNORED, Rows, of_batch, of_mask, of_positions

BY_TOKEN = ("input_ids", "attention_mask", "position_ids", "labels")
PASSED = {"use_cache", "output_router_logits", "output_hidden_states", "output_attentions", "return_dict"}
PASSED |= {"num_items_in_batch", "logits_to_keep", "fused_lm_head"}
OF_FLASH = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
"""What collators add for other attention than sdpa, which does not look at it."""


@dataclass(frozen=True)
class Proof:
    """Which batches give the same numbers without padding.

    Attributes:
        why_not: why those with padding stay as they are; empty: they do not.
        left: those with padding on the left, too.
        packed: rows that hold several sequences.
        whole_beyond: those without padding whose rows are longer than so many tokens; None: they stay as they are.
    """

    why_not: str = ""
    left: bool = True
    packed: bool = True
    whole_beyond: int | None = None


@dataclass(frozen=True)
class Flat:
    """A batch without padding.

    Attributes:
        rows: its tokens.
        kwargs: what the model is called with.
    """

    rows: Rows
    kwargs: dict[str, Any]


def by_name(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a call of the model by name; None where a name is given twice, or there are too many."""
    if not args:
        return kwargs
    names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
    given = dict(zip(names, args, strict=False))
    return None if len(args) > len(names) or given.keys() & kwargs.keys() else given | kwargs


def flatten(model: Any, kwargs: dict[str, Any], proof: Proof) -> Flat | str | None:
    """A batch that has padding or several sequences in a row, as one row of its tokens.

    Args:
        model: of transformers. Padding is left out in training with labels only; a batch without any may be computed
            as one row wherever no cache is asked for, too.
        kwargs: what it is called with.
        proof: which batches may be.

    Returns:
        The batch; or why it stays as it is, where that is worth telling; None: there is nothing to leave out.
    """
    given = {name: value for name, value in kwargs.items() if value is not None}
    ids, mask, positions, labels = (given.get(name) for name in BY_TOKEN)
    if not given.keys() <= {*BY_TOKEN, *PASSED, *OF_FLASH} or not isinstance(ids, Tensor) or ids.ndim != 2:
        return None
    alike = all(
        isinstance(given[name], Tensor) and given[name].shape == ids.shape for name in BY_TOKEN if name in given
    )
    as_tuple = given.get("return_dict", getattr(model.config, "return_dict", True)) is False
    asks_more = given.get("use_cache") or given.get("output_attentions") or as_tuple
    keeps = given.get("logits_to_keep", 0)
    if not alike or asks_more or not isinstance(keeps, int) or keeps:
        return None
    trains = labels is not None and model.training
    cached = "use_cache" not in given and getattr(model.config.get_text_config(), "use_cache", False)
    whole = _whole(ids, proof) if trains or not cached else None
    if mask is not None and trains:
        return _without_padding(kwargs, proof, whole)
    if mask is not None:
        return _flat(kwargs, whole) if whole is not None and bool((mask != 0).all()) else None
    rows = whole
    # transformers heeds packed sequences without a cache only
    if positions is not None and not cached and ids.numel() and (proof.packed or whole is not None):
        packed = of_positions(positions)
        if packed is not None:
            rows = packed if proof.packed else None
    return None if rows is None else _flat(kwargs, rows)


def _without_padding(kwargs: dict[str, Any], proof: Proof, whole: Rows | None) -> Flat | str | None:
    mask, labels = kwargs["attention_mask"], kwargs["labels"]
    if proof.why_not and whole is None:
        return None
    found = of_mask(mask, labels)
    if proof.why_not and not found.is_whole:
        return None
    rows = whole if found.is_whole else found.rows
    if rows is None:
        return found.why_not
    if found.left and not proof.left:
        return "padding on the left"
    return _flat(kwargs, rows)


def _whole(ids: Tensor, proof: Proof) -> Rows | None:
    """The tokens of a batch without padding; None where such batches stay as they are."""
    batch, length = ids.shape
    if proof.whole_beyond is None or length <= proof.whole_beyond or not batch:
        return None
    return of_batch(batch, length, ids.device)


def _flat(kwargs: dict[str, Any], rows: Rows) -> Flat:
    ids, mask, positions, labels = (kwargs.get(name) for name in BY_TOKEN)
    assert ids is not None
    if positions is None:  # as models count: the padding too
        positions = torch.arange(rows.length, device=ids.device).expand(rows.batch, -1)
    flat = {"input_ids": rows.take(ids), "position_ids": rows.take(positions), "use_cache": False}
    flat["attention_mask"] = torch.ones_like(flat["input_ids"] if mask is None else rows.take(mask))
    if labels is not None:
        # the first label of a row is nobody's to predict; here the last token of the row before would
        flat["labels"] = rows.take(labels).masked_fill(_first(rows, mask is not None, labels), IGNORED)
    return Flat(rows, kwargs | flat)


def _first(rows: Rows, by_sequence: bool, labels: Tensor) -> Tensor:
    """[1,N] bool: the first token of each sequence, or of each row of the batch, which may hold several."""
    if by_sequence:
        marks = labels.new_zeros(rows.num_tokens + 1, dtype=torch.bool)
        marks.index_fill_(0, rows.bounds[:-1].long(), True)  # an empty sequence at the end begins at N
        return marks[:-1].unsqueeze(0)
    return (torch.arange(rows.num_tokens, device=labels.device) % rows.length == 0).unsqueeze(0)
