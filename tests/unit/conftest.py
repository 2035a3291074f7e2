"""Fixtures of the converter's safety tests."""

from pathlib import Path

import pytest

from moe_accel.convert.run import execute
from tests.unit.convert_job import contents, job_of, write_source


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
