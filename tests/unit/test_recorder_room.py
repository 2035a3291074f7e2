"""Memory that torch holds unused when a graph is recorded."""

import pytest
import torch

from moe_accel.graphs import recorder

GIB = 1 << 30


@pytest.mark.parametrize(
    ("held", "used", "free", "gives_back"), [(50, 30, 10, True), (50, 30, 25, False), (5, 5, 0, False)]
)
def test_it_is_given_back_where_it_is_more_than_is_free(monkeypatch, held, used, free, gives_back):
    called = []
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: held * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: used * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append(True))
    recorder._make_room()
    assert bool(called) is gives_back
