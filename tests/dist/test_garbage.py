"""What is there after prepare() is set aside from garbage collection on ranks, and comes back when memory is freed."""

import gc
import weakref
from typing import Any

import torch

from tests.dist import training
from tests.dist.ranks import STOCK_FSDP2, run_alone, run_ranks, with_moe_config
from tests.dist.training import Job

JOB = Job(lengths=(training.SEQUENCE,) * 2)


def before_fork(**_: Any) -> None:
    """Import the job's modeling file once for all ranks."""
    training.before_fork(JOB)


class Knot:
    """Refers to itself: only a collection frees it."""

    def __init__(self) -> None:
        self.itself = self


def prepared(alone: bool = False) -> tuple[bool, int, bool, bool]:
    """Whether objects are set aside and how many are left; whether a knot from before prepare() is freed by a
    collection, and by `free_memory`."""
    from accelerate import Accelerator

    from moe_accel import MoEConfig

    gc.unfreeze()  # what those that made this process may have set aside
    accelerator = Accelerator(parallelism_config=MoEConfig()) if alone else Accelerator()
    assert (accelerator.num_processes == 1) == alone
    model = training.initial_model(JOB)
    knot = Knot()
    freed = weakref.ref(knot)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    is_set_aside, left = gc.get_freeze_count() > 0, len(gc.get_objects())
    del knot
    gc.collect()
    by_collecting = freed() is None
    accelerator.free_memory()
    return is_set_aside, left, by_collecting, freed() is None


def test_on_ranks_what_is_there_after_prepare_is_set_aside_until_memory_is_freed():
    for is_set_aside, left, by_collecting, at_last in run_ranks(prepared, 2, with_moe_config(ep_size=2)):
        assert is_set_aside
        assert left < 2000  # of some 300,000
        assert not by_collecting
        assert at_last


def again() -> list[bool]:
    """Whether objects of an earlier prepare() that refer to each other are gone after the next, which `free_memory`
    did not come before; and whether one without a model, as at evaluations, sets nothing aside."""
    from accelerate import Accelerator

    accelerator = Accelerator()
    knot, freed = Knot(), []
    for _ in range(2):
        model = training.initial_model(JOB)
        accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        freed.append(weakref.ref(knot))
        knot = Knot()
    gc.unfreeze()
    accelerator.prepare(torch.utils.data.DataLoader([0, 1]))  # pyright: ignore[reportArgumentType]
    return [freed[0]() is None, gc.get_freeze_count() == 0]


def test_what_an_earlier_prepare_set_aside_is_looked_at_again():
    assert run_ranks(again, 2, with_moe_config(ep_size=2)) == [[True, True]] * 2


def test_alone_and_without_moe_accel_nothing_is_set_aside():
    found = [*run_ranks(prepared, 2, STOCK_FSDP2), run_alone(prepared, alone=True)]
    assert [(is_set_aside, by_collecting) for is_set_aside, _, by_collecting, _ in found] == [(False, True)] * 3
