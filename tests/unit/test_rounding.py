"""`tests/gpu/rounding.py`, which says whose bf16 is nearer to fp32."""

import json

import pytest
import torch

from tests.gpu import rounding

pytestmark = pytest.mark.usefixtures("new_accelerate_state")


def test_errors_are_relative_and_by_kind():
    exact = {"layers.0.up": torch.tensor([3.0, 0.0]), "layers.1.up": torch.tensor([0.0, 4.0]), "out": torch.zeros(2)}
    found = exact | {"layers.1.up": torch.tensor([0.0, 4.5])}
    assert rounding.norm_of(exact) == 5
    assert rounding.errors(found, exact) == {"layers.*.up": 0.1, "out": 0.0}
    with pytest.raises(ValueError, match=r"not the same parameters have gradients: \['out'\]"):
        rounding.errors({name: found[name] for name in list(found)[:2]}, exact)


@pytest.mark.parametrize("routing", ["random", "balanced"])
def test_both_arms_are_off_by_the_rounding_of_bf16(monkeypatch, tmp_path, capsys, routing):
    file = tmp_path / "found.json"
    options = ["--shape", "tiny", "--layers", "1", "--sequence", "32", "--steps", "3", "--routing", routing]
    monkeypatch.setattr("sys.argv", ["rounding", *options, "--out", str(file)])
    rounding.main()
    found = json.loads(file.read_text())
    exact = found["losses"]["fp32"]
    assert exact[0] > exact[1] > exact[2]
    for arm in rounding.ARMS:
        errors = found["errors"][arm]
        if routing == "balanced":  # which of two weights goes to the first of the given experts is rounding
            errors.pop("model.layers.*.mlp.gate.weight")
        assert all(2e-3 < each < 3e-2 for each in errors.values())
        assert found["norms"][arm] == pytest.approx(found["norms"]["fp32"], rel=1e-2)
        assert found["losses"][arm] == pytest.approx(exact, rel=1e-3)
        assert found["losses"][arm] != exact
    lines = capsys.readouterr().out.splitlines()
    of_head = next(line for line in lines if line.startswith("| lm_head.weight |"))
    assert (
        of_head
        == "| lm_head.weight | "
        + " | ".join(f"{found['errors'][arm]['lm_head.weight']:.2e}" for arm in rounding.ARMS)
        + " |"
    )
    assert [line.split("|")[2].strip() for line in lines if line.startswith("| 3 |")] == [f"{exact[2]:.5f}"]
