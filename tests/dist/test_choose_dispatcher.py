"""`dispatcher: auto` on ranks: one answer for all, whatever each of them sees; GPUs and times are made up."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests import fake_deep_ep
from tests.dist.ranks import RankError, run_ranks

GPU = torch.device("cuda")
HOSTS = ("first", "first")


def chosen(
    asked="auto",
    kind="Buffer",
    links=("NVLink", "NVLink"),
    hosts=HOSTS,
    problems=(None, None),
    times=((2.0, 1.0), (2.0, 1.0)),
    hidden=2048,
    num_experts=128,
    fails=None,
):
    """The choice of a rank, and how many buffers are left. `times`: of each rank, all-to-all and DeepEP."""
    from moe_accel.dispatch import choose, deepep, topology

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    fake_deep_ep.install(kind)
    mock.patch.object(deepep, "problem", return_value=problems[rank]).start()
    found = [topology.Place(host, f"GPU-{at}", at) for at, host in enumerate(hosts)]
    mock.patch.object(topology, "places", return_value=found).start()
    mock.patch.object(topology, "link", return_value=links[rank]).start()
    measured = dict(zip(("alltoall", "deepep"), times[rank], strict=True))
    mock.patch.object(choose, "round_trip_ms", lambda dispatcher, *_: measured[dispatcher.name]).start()
    if fails == rank:
        mock.patch.object(deepep.DeepEP, "open", side_effect=RuntimeError("cudaIpcOpenMemHandle\nat line 7")).start()
    elif fails is not None:
        mock.patch.object(deepep.DeepEP, "open").start()
    choice = choose.choose(asked, dist.group.WORLD, choose.Traffic(num_experts, hidden, 8), GPU)
    return choice.value, choice.reason, len(fake_deep_ep.ALIVE)


def answer(**case):
    first, second = run_ranks(chosen, 2, **case)
    assert first == second, "ranks disagree"
    return first


WHERE = "an ep group is on one host, GPUs linked by NVLink"
WHAT = "auto: 4096 tokens 2048 wide, top-8 of 128, there and back and their gradients:"


def test_the_faster_one_of_a_measurement_is_taken_and_the_numbers_are_told():
    said = f"{WHAT} deepep 1.00 ms, alltoall 2.00 ms on the slowest rank; {WHERE}"
    assert answer() == ("deepep", said, 1)


def test_the_slowest_rank_counts_for_both_and_a_buffer_that_is_not_used_is_destroyed():
    said = f"{WHAT} deepep 3.00 ms, alltoall 2.50 ms on the slowest rank; {WHERE}"
    assert answer(times=((2.0, 1.0), (2.5, 3.0))) == ("alltoall", said, 0)


def test_faster_by_no_more_than_noise_is_not_faster():
    assert answer(times=((2.0, 1.95),) * 2)[0] == "alltoall"


def test_between_hosts_it_is_deepep_without_a_measurement():
    value, reason, _ = answer(kind="ElasticBuffer", hosts=("first", "second"))
    assert (value, reason) == ("deepep", "auto: an ep group is on 2 hosts, GPUs linked by NVLink")


OBJECTIONS = {
    "not-there-on-one-rank": (
        {"problems": (None, "the package deep_ep is not installed")},
        "the package deep_ep is not",
    ),
    "pcie-seen-by-one": (
        {"links": ("NVLink", "PCIe")},
        "its kernels need NVLink between the GPUs of an ep group, and th",
    ),
    "no-peer-access": (
        {"links": ("no peer access",) * 2},
        "its kernels need NVLink between the GPUs of an ep group, an",
    ),
    "one-gpu": ({"links": ("one GPU",) * 2}, "ranks of an ep group share a GPU, where times say nothing"),
    "hidden": ({"hidden": 2056}, "hidden_size=2056 must be a multiple of 16"),
    "experts": ({"num_experts": 512}, "num_experts / ep_size = 256 must be at most 128"),
    "buffer-between-hosts": (
        {"hosts": ("a", "b")},
        "ep_size=2 must be one of 16, 24, 32, 48, 64, 96, 128, 144, 160 on",
    ),
    "no-buffer-on-one-rank": ({"fails": 1}, "its buffer cannot be made: cudaIpcOpenMemHandle"),
}


@pytest.mark.parametrize("name", OBJECTIONS)
def test_auto_is_all_to_all_where_one_rank_objects_and_says_why(name):
    case, said = OBJECTIONS[name]
    value, reason, alive = answer(**case)
    assert (value, reason[: len(f"auto: {said}")], alive) == ("alltoall", f"auto: {said}", 0)


@pytest.mark.parametrize("name", sorted(OBJECTIONS.keys() - {"one-gpu"}))
def test_deepep_asked_for_is_an_error_for_the_same_reasons(name):
    case, said = OBJECTIONS[name]
    with pytest.raises(RankError) as error:
        run_ranks(chosen, 2, asked="deepep", **case)
    assert str(error.value).count(f"ConfigError: dispatcher=deepep cannot be used: {said}") == 2  # on both ranks


def test_deepep_asked_for_runs_on_a_shared_gpu_and_says_with_what():
    value, reason, alive = answer(asked="deepep", links=("one GPU",) * 2)
    said = "asked for: deep_ep.Buffer, an ep group is on one host, its ranks share a GPU"
    assert (value, reason, alive) == ("deepep", said, 1)


def measured():
    from moe_accel.dispatch import AllToAll, DeepEP, choose

    dist.init_process_group("gloo")
    fake_deep_ep.install("Buffer")
    traffic = choose.Traffic(8, 32, 2)
    cpu = torch.device("cpu")
    both = AllToAll(dist.group.WORLD, 4), DeepEP(dist.group.WORLD, 4)
    times = [choose.round_trip_ms(each, traffic, cpu, num_tokens=16) for each in both]
    return min(times) > 0, fake_deep_ep.CALLS["dispatch"], fake_deep_ep.CALLS["combine"], len(fake_deep_ep.PENDING)


def test_a_measurement_is_13_round_trips_with_their_backward():
    assert run_ranks(measured, 2) == [(True, 13, 26, 0)] * 2
