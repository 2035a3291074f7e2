"""The script that measures what recorded blocks gain by computing while rows travel."""

import json
import os
import subprocess
import sys

import pytest

from tests.gpu.overlap import WAYS
from tests.gpu.processes import ROOT


@pytest.mark.slow
def test_every_way_is_played_and_has_the_same_numbers(tmp_path):
    out = tmp_path / "ways.json"
    command = [sys.executable, "-m", "tests.gpu.overlap", "--gpus", "2", "--device", "cpu", "--out", str(out)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    ways = json.loads(out.read_text())["ways"]
    assert list(ways) == list(WAYS)
    assert all(len(each["losses"]) == len(each["all_ms"]) + 8 and each["ms"] > 0 for each in ways.values())
