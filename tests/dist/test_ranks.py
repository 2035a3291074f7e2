"""The harness: what it gives a rank, and that a failure is seen at once and told in full."""

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.dist.ranks import STOCK_FSDP2, RankError, run_alone, run_ranks, with_moe_config


def facts():
    from accelerate import Accelerator

    accelerator = Accelerator()
    rank = torch.tensor([float(accelerator.process_index)])
    dist.all_reduce(rank)
    config = type(accelerator.parallelism_config).__name__
    return accelerator.process_index, accelerator.num_processes, accelerator.is_fsdp2, rank.item(), config


def test_ranks_are_an_fsdp2_job_on_gloo_and_moe_config_is_active_only_where_asked():
    assert run_ranks(facts, 3) == [(rank, 3, True, 3.0, "NoneType") for rank in range(3)]
    assert run_ranks(facts, 2, with_moe_config(ep_size=2)) == [(rank, 2, True, 1.0, "MoEConfig") for rank in range(2)]


def variables():
    return {name: value for name, value in os.environ.items() if name.startswith(("FSDP_", "ACCELERATE_", "RANK"))}


def test_nothing_is_left_of_a_case_for_the_next():
    assert [found["RANK"] for found in run_ranks(variables, 2)] == ["0", "1"]
    assert run_alone(variables) == {}


def fail_on_rank(rank, how):
    dist.init_process_group("gloo")
    if dist.get_rank() == rank:
        print("about to fail", file=sys.stderr)
        if how == "raises":
            raise ValueError("the reason")
        os.abort()
    dist.barrier()
    time.sleep(1000)


@pytest.mark.filterwarnings("ignore:a rank crashed")
@pytest.mark.parametrize(
    ("how", "told"), [("raises", "ValueError: the reason"), ("aborts", "rank 1 ended with SIGABRT")]
)
def test_one_failing_rank_fails_the_case_at_once_with_its_traceback_and_output(how, told):
    start = time.monotonic()
    with pytest.raises(RankError) as error:
        run_ranks(fail_on_rank, 3, STOCK_FSDP2, timeout_s=60, rank=1, how=how)
    assert time.monotonic() - start < 30
    assert told in str(error.value)
    assert "rank 1 printed\nabout to fail" in str(error.value)


def crash_once(folder):
    dist.init_process_group("gloo")
    here = folder / str(dist.get_rank())
    is_first = not here.exists()
    here.touch()
    if is_first and dist.get_rank() == 1:
        os.abort()
    dist.barrier()
    return is_first


def test_ranks_of_which_one_crashed_are_run_once_more_and_the_session_tells(tmp_path):
    with pytest.warns(RuntimeWarning, match="all are run again: rank 1 ended with SIGABRT") as told:
        assert run_ranks(crash_once, 2, folder=tmp_path) == [False, False]
    assert "Current thread" in str(told[0].message)  # where it was


def sleep(seconds):
    print("sleeping", flush=True)
    time.sleep(seconds)


def test_a_timeout_ends_all_ranks_and_the_next_case_runs():
    with pytest.raises(RankError, match=r"ranks \[0, 1\] were still running at the timeout") as error:
        run_ranks(sleep, 2, timeout_s=1, seconds=1000)
    assert "rank 1 printed\nsleeping" in str(error.value)
    assert run_ranks(sleep, 2, seconds=0) == [None, None]
