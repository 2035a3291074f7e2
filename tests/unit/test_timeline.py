"""`tests/gpu/timeline.py`: what the kernels of a step say about it."""

import pytest

from tests.gpu.timeline import Span, Standing, standing


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], Standing(0, 0, 0, 0, 0)),
        ([Span(5, 2, "gemm")], Standing(2, 2, 0, 0, 1)),
        ([Span(0, 4, "gemm"), Span(6, 1, "add")], Standing(7, 5, 0, 2, 2)),
        ([Span(0, 10, "ncclDevKernel_SendRecv"), Span(2, 3, "gemm")], Standing(10, 3, 7, 0, 2)),
        ([Span(2, 6, "gemm"), Span(3, 2, "add"), Span(0, 4, "ncclDevKernel_AllGather")], Standing(8, 6, 2, 0, 3)),
        ([Span(12, 3, "gemm"), Span(0, 4, "nccl"), Span(1, 5, "nccl")], Standing(15, 3, 6, 6, 3)),
    ],
)
def test_overlapping_kernels_count_once_and_nccl_only_where_nothing_else_runs(spans, expected):
    assert standing(spans) == expected
    assert standing(spans[::-1]) == expected


def test_a_line_has_milliseconds():
    said = str(Standing(118_669.0, 36_778.0, 51_095.0, 30_796.0, 1170))
    assert said == "118.7 ms: kernels 36.8, NCCL's alone 51.1, idle 30.8; 1170 kernels"
