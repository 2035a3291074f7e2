"""`tests/gpu/rounding.py`, which says whose bf16 is nearer to fp32."""

import json

import pytest
import torch

from tests.gpu import rounding


def test_errors_are_relative_and_by_kind():
    exact = {"layers.0.up": torch.tensor([3.0, 0.0]), "layers.1.up": torch.tensor([0.0, 4.0]), "out": torch.zeros(2)}
    found = exact | {"layers.1.up": torch.tensor([0.0, 4.5])}
    assert rounding.errors(found, exact) == {"layers.*.up": 0.1, "out": 0.0}
    with pytest.raises(ValueError, match=r"not the same parameters have gradients: \['out'\]"):
        rounding.errors({name: found[name] for name in list(found)[:2]}, exact)


def test_both_arms_are_as_near_to_fp32_as_bf16_can_be(monkeypatch, tmp_path, capsys):
    file = tmp_path / "found.json"
    options = ["--shape", "tiny", "--layers", "1", "--sequence", "32", "--steps", "3"]
    monkeypatch.setattr("sys.argv", ["rounding", *options, "--out", str(file)])
    rounding.main()
    found = json.loads(file.read_text())
    exact = found["losses"]["fp32"]
    assert exact[0] > exact[1] > exact[2]
    for arm in rounding.ARMS:
        assert all(1e-4 < each < 5e-2 for each in found["errors"][arm].values())
        assert found["losses"][arm] == pytest.approx(exact, rel=1e-3)
        assert found["losses"][arm] != exact
    assert capsys.readouterr().out.count("|") > 60
