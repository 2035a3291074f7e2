"""Training on two ranks with blocks of experts as graphs, which are pretended, and what all ranks decided."""

import contextlib
import warnings

import pytest
import torch
from accelerate import Accelerator
from torch import distributed as dist

from moe_accel.graphs import CALLS, agreement, record
from tests import pretended_graphs
from tests.dist.parity import UPDATE_TOLERANCE
from tests.dist.ranks import run_ranks, with_moe_config
from tests.families import build_tiny, tiny_inputs, tiny_loss

PLAIN, TRIED, PLAYED = "COMPUTE", "TRY", "PLAY"
BEGUN = [PLAIN] * CALLS + ["RECORD", TRIED]
"""Of the first steps: as ever, recorded, tried."""
GRAPHS = with_moe_config(ep_size=2, cuda_graphs=True) | {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
WITHOUT = with_moe_config(ep_size=2) | {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
ELSEWHERE = "Qwen3MoeSparseMoeBlock is computed without a CUDA graph, because of what a block, or another rank, says"
FAMILIES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "qwen2_moe", "nemotron_h", "glm4_moe"]


@contextlib.contextmanager
def seen():
    """What all ranks decided in each forward, and what was warned of, in a block with graphs that are pretended."""
    patch, decided, said = pytest.MonkeyPatch(), [], []
    pretended_graphs.pretend(patch)
    decide = agreement.Agreement._decide

    def noted(self, ranks):
        decided.append(decide(self, ranks))
        return decided[-1]

    patch.setattr(agreement.Agreement, "_decide", noted)
    result = {"decided": [], "said": [], "attention": 0}
    play = record.Recording.play

    def counted(self, *given, **how):
        result["attention"] += self.number == 1 and self._around is None
        return play(self, *given, **how)

    patch.setattr(record.Recording, "play", counted)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield result
    finally:
        patch.undo()
        said += [str(each.message) for each in caught]
        result["decided"] = [each.name for each in decided]
        result["said"] = [each for each in said if "CUDA graph" in each or "recorded" in each]


def prepared(family="qwen3_moe", **config):
    accelerator = Accelerator()
    model = build_tiny(family, **config)
    return accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-2))


def step_of(model, optimizer, number, family="qwen3_moe", rows=2, length=9, masked=False):
    inputs = tiny_inputs(family, rows, length, 10 * number + dist.get_rank())
    if masked:
        inputs["attention_mask"] = (torch.arange(length) < length - 2).long().expand(rows, length).contiguous()
    loss = tiny_loss(model, inputs)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def two(number, rank):
    return 2


def trained(family, steps, before=None, rows=two, masked=(), **config):
    """Losses of some steps, and what was seen."""
    with seen() as found:
        model, optimizer = prepared(family, **config)
        losses = []
        for number in range(steps):
            if before is not None:
                before(model, number)
            how = {"rows": rows(number, dist.get_rank()), "masked": number in masked}
            losses.append(step_of(model, optimizer, number, family, **how))
    dist.destroy_process_group()
    return {"losses": losses, **found}


def both(steps, **how):
    """What ranks trained with graphs and without, and that it is the same."""
    ours = run_ranks(trained, 2, GRAPHS, steps=steps, **how)
    theirs = run_ranks(trained, 2, WITHOUT, steps=steps, **how)
    for one, other in zip(ours, theirs, strict=True):
        assert one["losses"] == pytest.approx(other["losses"], rel=UPDATE_TOLERANCE)
        assert not other["decided"]
    assert ours[0]["decided"] == ours[1]["decided"]
    return ours
