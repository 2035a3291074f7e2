"""Experts with room for more pairs than there are, on a GPU: the numbers of those without, of nothing else in memory.

run: python3 -m pytest -q -m gpu tests/gpu/test_room.py -c /dev/null --rootdir .
"""

import pytest
import torch

from moe_accel.experts import gathered
from moe_accel.experts.adapters import Factors
from moe_accel.experts.gated import gated_experts
from moe_accel.experts.routing import pick, sort_by_expert, sort_with_room
from moe_accel.kernels.glu import SWIGLU, Gate
from tests.gradients import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

NUM_ROWS, TOP_K, NUM_EXPERTS, HIDDEN, INNER, RANK = 2048, 8, 32, 1024, 768, 16
GPT_OSS = Gate(1.702, 0.0, 7.0, 1.0, True)
CASES = {  # gate, with biases, with adapters, whether GEMMs gather their rows
    "gathering": (SWIGLU, False, False, True),
    "apart": (SWIGLU, False, False, False),
    "squared relu": (None, False, False, False),
    "biases": (GPT_OSS, True, False, False),
    "adapters": (SWIGLU, False, True, False),
}
OF_CHOICES = {"some": 0.6, "all": 0.0, "none": 1.0}
"""Share of the choices that is not of this rank's experts."""


def spoil_memory():
    """Let memory that nobody has hold NaN."""
    filled = [torch.full((size,), torch.nan, device="cuda") for size in (2**28, 2**22, 2**16, 2**12, 2**8)]
    del filled


@pytest.mark.parametrize("share", OF_CHOICES.values(), ids=OF_CHOICES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_the_same(case, share, monkeypatch):
    gate, has_bias, adapted, gathers = CASES[case]
    monkeypatch.setattr(gathered, "IS_ON", gathers)
    torch.manual_seed(0)
    generator, twice = torch.Generator("cuda").manual_seed(0), 1 if gate is None else 2

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, device="cuda") * scale).bfloat16()

    choices = torch.rand(NUM_ROWS, NUM_EXPERTS, generator=generator, device="cuda").topk(TOP_K).indices.int()
    choices = choices.masked_fill(torch.rand(choices.shape, generator=generator, device="cuda") < share, -1)
    x, upstream = random(NUM_ROWS, HIDDEN), random(NUM_ROWS, HIDDEN)
    weights = torch.rand(NUM_ROWS, TOP_K, generator=generator, device="cuda")
    stacks = [random(NUM_EXPERTS, twice * INNER, HIDDEN, scale=0.03), random(NUM_EXPERTS, HIDDEN, INNER, scale=0.03)]
    shapes = (HIDDEN, RANK), (RANK, twice * INNER), (INNER, RANK), (RANK, HIDDEN)
    factors = [random(NUM_EXPERTS, *shape, scale=0.03) for shape in shapes] if adapted else []
    biases = [random(NUM_EXPERTS, each.shape[1]) for each in stacks] if has_bias else []
    leaves = [each.requires_grad_() for each in (x, weights, *stacks, *factors, *biases)]
    of_up, of_down = (Factors(*factors[:2]), Factors(*factors[2:])) if adapted else (None, None)
    found = []
    for routing in (
        sort_by_expert(choices, NUM_EXPERTS, int((choices >= 0).sum())),
        sort_with_room(choices, NUM_EXPERTS),
    ):
        spoil_memory()
        both = tuple(biases) if has_bias else (None, None)
        given = x, *(each.transpose(1, 2) for each in stacks), pick(weights, routing), routing
        y = gated_experts(*given, of_up, of_down, gate, both, lean=True)
        spoil_memory()
        found.append([y, *torch.autograd.grad(y, leaves, upstream)])
    exact, roomy = found
    if case != "gathering":  # few pairs are computed apart without room
        assert torch.equal(roomy[0], exact[0])
    for one, other in zip(roomy, exact, strict=True):
        assert one.isfinite().all()
        assert one.stride() == other.stride()
        # gathering rounds the gate's gradient at another place: once to bf16
        assert relative_error(one, other) <= 2**-7 if other.any() else not one.any()
