"""What is installed is compared with what is supported, and what pyproject.toml promises is what is checked."""

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from moe_accel.errors import DependencyError
from moe_accel.versions import SUPPORTED, check_versions

NEEDED = {"torch": "torch>=2.11", "transformers": "transformers>=5.17,<6", "accelerate": "accelerate>=1.15,<2"}


@pytest.fixture
def installed(monkeypatch):
    """Versions that the packages seem to have; change them in the test."""
    versions = {"torch": "2.13.0+cpu", "transformers": "5.17.0", "accelerate": "1.15.0"}
    monkeypatch.setattr(metadata, "version", versions.__getitem__)
    return versions


REFUSED = {
    "old-torch": ("torch", "2.10.2"),
    "old-torch-of-cuda": ("torch", "2.10.0+cu128"),
    "nightly-before-the-release": ("torch", "2.11.0.dev20260101"),
    "old-transformers": ("transformers", "5.16.4"),
    "new-transformers": ("transformers", "6.0.0"),
    "old-accelerate": ("accelerate", "1.14.9"),
    "new-accelerate": ("accelerate", "2.0"),
}


@pytest.mark.parametrize(("package", "version"), REFUSED.values(), ids=REFUSED)
def test_a_version_out_of_range_is_refused_with_the_command_that_mends_it(installed, package, version):
    installed[package] = version
    with pytest.raises(DependencyError) as error:
        check_versions()
    assert error.value.message == f"moe-accel: {package} {version} is installed, {NEEDED[package]} is needed"
    assert error.value.hint == f"pip install '{NEEDED[package]}'"
    assert isinstance(error.value, ImportError)


def test_all_wrong_versions_are_told_at_once(installed):
    installed.update(torch="2.8.0", accelerate="2.1.0")
    with pytest.raises(DependencyError) as error:
        check_versions()
    assert str(error.value) == (
        "moe-accel: torch 2.8.0 is installed, torch>=2.11 is needed; "
        "accelerate 2.1.0 is installed, accelerate>=1.15,<2 is needed\n\n"
        "hint: pip install 'torch>=2.11' 'accelerate>=1.15,<2'"
    )


@pytest.mark.parametrize(
    ("package", "version"),
    [("torch", "2.11.0"), ("torch", "3.0.0"), ("transformers", "5.99.1"), ("transformers", "5.25.0.dev0")],
)
def test_a_version_in_range_passes_also_when_it_is_a_development_version(installed, package, version):
    installed[package] = version
    check_versions()


def test_what_is_installed_here_passes():
    check_versions()


def test_pyproject_asks_for_what_is_checked():
    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())["project"]
    wanted = {each.name: each.specifier for each in map(Requirement, project["dependencies"])}
    for package, limits in SUPPORTED.items():
        assert wanted[package] == SpecifierSet(",".join(limits)), package
