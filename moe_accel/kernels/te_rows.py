"""TransformerEngine's permutation of tokens behind the contracts of `rows.py`: rows to their experts, and back.

Taken under `kernels: te` with `permutation` among `te_parts`. Its Triton kernels are called and not `moe_permute`,
which would sort once more: the map that they read is made of the sort that is there. In its layout
(`triton/permutation.py`, 2.20.2) a token of at most K copies has 2K + 1 numbers: where the copies are, from the left;
what only probabilities and padding ask for; and how many there are. Routing weights are multiplied elsewhere here, so
nothing asks.

Sizes: N source rows, P copies, K copies of a row at most, H columns.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from moe_accel.kernels import rows as ours
from moe_accel.kernels import te
from moe_accel.kernels.device import on_device_of
from moe_accel.kernels.grouped import GroupedGemm
from moe_accel.kernels.rows import RowMap

_OF_BOTH = {"inp", "row_id_map", "pad_offsets", "num_tokens", "num_experts", "hidden_size"}
_PERMUTES = _OF_BOTH | {"probs", "scale", "num_out_tokens", "scale_hidden_dim"}
_UNPERMUTES = _OF_BOTH | {"merging_probs", "permuted_probs"}


def moving(gemm: GroupedGemm) -> GroupedGemm:
    """Grouped GEMMs whose rows TransformerEngine brings, where their maps are `with_places`."""
    return gemm._replace(gather=gather, sum_copies=sum_copies)


def with_places(rows: RowMap, top_k: int) -> RowMap:
    """The map with [N,2K+1] int32 for TransformerEngine's kernels, see above; a row has `top_k` copies at most."""
    num_rows, num_copies = len(rows.starts), len(rows.copies)
    places = rows.starts.new_zeros(num_rows, 2 * top_k + 1, dtype=torch.int32)
    if num_copies:
        at = rows.starts[:, None] + torch.arange(top_k, device=rows.starts.device)
        places[:, :top_k] = rows.copies[at.clamp_(max=num_copies - 1)]
        places[:-1, -1] = rows.starts.diff()
        places[-1, -1] = num_copies - rows.starts[-1]
    return rows._replace(places=places)


def gather(values: Tensor, rows: RowMap, tail: int = 0) -> Tensor:
    """`rows.gather`: values [N,H] -> [P,H]; with room for more it is ours."""
    if tail or rows.places is None or not _takes(values) or not len(rows.sources):
        return ours.gather(values, rows, tail)
    permute, _ = _functions()
    return _moved(
        permute, values, rows, probs=None, scale=None, num_out_tokens=len(rows.sources), scale_hidden_dim=None
    )


def sum_copies(values: Tensor, rows: RowMap, more: Tensor | None = None) -> Tensor:
    """`rows.sum_copies`: values [P,H] -> [N,H]; with more to add it is ours."""
    if more is not None or rows.places is None or not _takes(values):
        return ours.sum_copies(values, rows, more)
    _, unpermute = _functions()
    return _moved(unpermute, values, rows, merging_probs=None, permuted_probs=None)


def _moved(function: Any, values: Tensor, rows: RowMap, **own: Any) -> Tensor:
    """What one of the two makes of values; `own`: the arguments that the other does not have."""
    places: Any = rows.places
    with on_device_of(values):  # its results come on the current GPU
        return function(
            inp=values,
            row_id_map=places,
            pad_offsets=None,
            num_tokens=len(rows.starts),
            num_experts=places.shape[1] // 2,
            hidden_size=values.shape[1],
            **own,
        )[0]


def _takes(values: Tensor) -> bool:
    return values.dtype in te.DTYPES and len(values) > 0 and te.on_gpu(values)


def lookup() -> str | None:
    """What the functions of this version do not take; None where they take all that they are given here."""
    permute, unpermute = _functions()
    return te.missing("permute_with_mask_map", permute, _PERMUTES) or te.missing(
        "unpermute_with_mask_map", unpermute, _UNPERMUTES
    )


def tried(device: torch.device) -> str | None:
    """What is wrong with rows of which one has two copies and one has none, there and back; None if nothing is."""
    values = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    of_two = RowMap(*(torch.tensor(each, device=device) for each in ([1, 0, 1], [1, 0, 2], [0, 1, 3])))
    given = with_places(of_two, 2)

    def compute() -> list[Tensor]:
        copied = gather(values, given)
        return [copied, sum_copies(copied, given)]

    sums = values * values.new_tensor([[1], [2], [0]])
    return te.off("permute_with_mask_map", compute, [values[given.sources], sums])


@functools.cache
def _functions() -> tuple[Any, Any]:
    """Those that copy rows, and sum them."""
    found = te.load("transformer_engine.pytorch.triton.permutation")
    return found.permute_with_mask_map, found.unpermute_with_mask_map
