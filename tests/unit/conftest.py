"""Fixtures of several files: accelerate's singletons, and a checkpoint for the converter's safety tests."""

from pathlib import Path

import pytest

from moe_accel.convert.run import execute
from tests.unit.convert_job import contents, job_of, write_source


@pytest.fixture
def new_accelerate_state():
    """Accelerate's singletons are gone after the test."""
    from accelerate.state import AcceleratorState, GradientState  # not for the tests that need no accelerate

    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    write_source(folder)
    return folder


@pytest.fixture(scope="module")
def reference(source, tmp_path_factory) -> dict[str, bytes]:
    """What a conversion that nothing disturbs writes."""
    folder = tmp_path_factory.mktemp("reference") / "out"
    execute(job_of(source, folder))
    return contents(folder)


@pytest.fixture
def package(monkeypatch):
    """The fake of TransformerEngine, on a Hopper as far as anybody asks."""
    from moe_accel.kernels import te  # not for the tests that need no torch
    from tests import fake_transformer_engine

    fake_transformer_engine.install_as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(te, "capability", lambda device: (9, 0))
    return monkeypatch
