"""Router logits that transformers takes by hooks: which hooks those are, and whose list they go into."""

import pytest
import torch
from torch import nn
from transformers.utils import output_capturing

from moe_accel.graphs import captured
from moe_accel.graphs.calls import Watched, given


def hooked(key):
    inner = nn.Linear(3, 3)
    output_capturing.install_output_capuring_hook(inner, key, 0)
    (hook,) = inner._forward_hooks.values()
    return nn.Sequential(inner), hook


@pytest.mark.parametrize("key", ["router_logits", "hidden_states", "attentions"])
def test_hooks_of_router_logits_alone_may_be_inside(key):
    module, hook = hooked(key)
    is_routers = key == captured.KEY
    assert captured.is_of_router(hook) == is_routers
    problem = Watched(module).problem()
    assert problem is None if is_routers else problem == "hooks, or another forward, inside of it"
    assert not captured.is_of_router(lambda *_: None)


def test_a_recorded_call_has_a_list_of_its_own():
    module, _ = hooked("router_logits")
    x, outside = torch.ones(2, 3), []
    with captured.apart() as found:
        module(x)
    assert not found
    token = output_capturing._active_collector.set({"router_logits": outside, "hidden_states": []})
    try:
        assert captured.is_asked_for()
        with captured.apart() as found:
            module(x)
        assert len(found) == 1
        assert not outside
        captured.hand_on(found)
        assert outside[0] is found[0]
    finally:
        output_capturing._active_collector.reset(token)
    assert not captured.is_asked_for()
    captured.hand_on([])


def test_calls_that_are_asked_for_them_are_of_another_kind():
    plain = given("cpu", (torch.ones(1, 2, 3),), {}).kind
    token = output_capturing._active_collector.set({"router_logits": []})
    try:
        asked = given("cpu", (torch.ones(1, 2, 3),), {}).kind
    finally:
        output_capturing._active_collector.reset(token)
    assert asked != plain
    assert given("cpu", (torch.ones(1, 2, 3),), {}).kind == plain
