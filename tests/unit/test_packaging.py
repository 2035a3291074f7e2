"""What an installation that is no checkout has."""

import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def folder_of(package):
    return ROOT / SETUPTOOLS["package-dir"].get(package, package.replace(".", "/"))


def test_all_packages_are_in_it():
    found = {str(file.parent.relative_to(ROOT)).replace("/", ".") for file in (ROOT / "moe_accel").rglob("__init__.py")}
    assert set(SETUPTOOLS["packages"]) == found | {"moe_accel.converters"}
    assert all((folder_of(package) / "__init__.py").is_file() for package in SETUPTOOLS["packages"])


def test_all_files_of_packages_are_in_it():
    left = [
        file
        for package in SETUPTOOLS["packages"]
        for file in folder_of(package).iterdir()
        if file.is_file() and file.suffix not in (".py", ".pyc", ".md")
        and not any(fnmatchcase(file.name, each) for each in SETUPTOOLS["package-data"].get(package, ()))
    ]  # fmt: skip
    assert left == []
