"""`moe_accel_manifest.json`: what a directory holds, in words that do not depend on its layout.

    {"schema": 1, "plan_id": ..., "digest": "xxh3-128",
     "experts": {"model.layers.0.mlp.experts": {"gate": {"dtype": "BF16", "shape": [768, 2048], "digests": [...]}}},
     "tensors": {"lm_head.weight": {"dtype": "BF16", "shape": [151936, 2048], "digest": ...}},
     "files": {"model.safetensors": 3087467144}}

`digests` go by expert; an expert of another dtype or shape than the first stands in a role of its own, `gate@17`. A
tensor that is renamed with the experts stands among their roles, with one digest. Equal entries mean equal matrices,
whether they lie in one tensor or in a thousand.
"""

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from moe_accel.convert.digest import ALGORITHM
from moe_accel.convert.regions import BESIDE, Part, Region, Tensor, whole

SCHEMA = 1
PartKey = tuple[str, int, str]


def part_key(part: Part) -> PartKey:
    """What a part is called in every layout."""
    return part.layer, part.expert, part.role


def other_tensors(tensors: Mapping[str, Tensor], parts: Iterable[Part]) -> list[Tensor]:
    """The tensors that parts do not cover to the last element."""
    covered: dict[str, int] = {}
    for part in parts:
        covered[part.region.tensor] = covered.get(part.region.tensor, 0) + part.region.rows * part.region.cols
    return [tensor for name, tensor in tensors.items() if covered.get(name) != math.prod(tensor.shape)]


def make_manifest(
    plan_id: str,
    target: str,
    files: Mapping[str, int],
    tensors: Mapping[str, Tensor],
    parts: list[Part],
    digests: Mapping[Region, str],
    dequantized: Mapping[str, Any] | None = None,
) -> bytes:
    """The manifest as JSON. Without digests (`--verify none`, `header`) it names the files alone."""
    manifest: dict[str, Any] = {"schema": SCHEMA, "plan_id": plan_id, "layout": target, "files": dict(files)}
    if dequantized:
        manifest["dequantized"] = dict(dequantized)
    if digests:
        experts: dict[str, dict[str, Any]] = {}
        for part in sorted(parts, key=part_key):
            roles = experts.setdefault(part.layer, {})
            dtype, shape = tensors[part.region.tensor].dtype, [part.region.rows, part.region.cols]
            entry = roles.setdefault(part.role, {"dtype": dtype, "shape": shape, "digests": []})
            alike = (entry["dtype"], entry["shape"], len(entry["digests"])) == (dtype, shape, part.expert)
            if not alike and part.expert != BESIDE:
                entry = roles[f"{part.role}@{part.expert}"] = {"dtype": dtype, "shape": shape, "digests": []}
            entry["digests"].append(digests[part.region])
        manifest |= {
            "digest": ALGORITHM,
            "experts": experts,
            "tensors": {
                tensor.name: {"dtype": tensor.dtype, "shape": list(tensor.shape), "digest": digests[whole(tensor)]}
                for tensor in sorted(other_tensors(tensors, parts), key=lambda each: each.name)
            },
        }
    return (json.dumps(manifest, indent=1) + "\n").encode()
