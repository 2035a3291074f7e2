"""What no experts function can reach is listed by class, and refused with a reason and a way on."""

import re
import tomllib
from importlib import resources
from pathlib import Path

import pytest
import transformers

from moe_accel.errors import UnsupportedModelError
from moe_accel.experts import find_experts
from tests.families import build_tiny, decorated_classes, experts_modules

LISTED = tomllib.loads((resources.files("moe_accel.experts") / "families.toml").read_text())["undecorated"]
EXPERTS_CLASS = re.compile(r"^class (\w*Experts|\w+CDMoE)\(nn\.\w+\)", re.MULTILINE)
SHARED = {"InklingSharedExperts"}  # computed for every token: nothing to route


def sources():
    """The modeling files of the installed transformers, by folder."""
    return {
        file.parent.name: file.read_text() for file in Path(transformers.__path__[0]).glob("models/*/modeling_*.py")
    }


def is_decorated(entry):
    return entry["experts_class"] in decorated_classes().get(entry["family"], ())


def by_class(entry):
    return entry["experts_class"]


@pytest.mark.parametrize("entry", LISTED, ids=by_class)
def test_a_listed_class_exists_and_its_entry_is_complete(entry):
    assert set(entry) == {"experts_class", "family", "reason", "possible"}
    assert all(entry.values())
    assert re.search(rf"^class {entry['experts_class']}\(", sources()[entry["family"]], re.MULTILINE)


def test_every_experts_class_of_transformers_is_decorated_or_listed():
    decorated = {name for names in decorated_classes().values() for name in names}
    found = {name for source in sources().values() for name in EXPERTS_CLASS.findall(source)}
    listed = {entry["experts_class"] for entry in LISTED}
    assert found - decorated - SHARED == listed - decorated


@pytest.mark.parametrize("entry", LISTED, ids=by_class)
def test_a_model_of_a_listed_class_is_refused_until_transformers_decorates_it(entry):
    model = build_tiny(entry["family"])
    assert entry["experts_class"] in {type(module).__name__ for module in model.modules()}
    if is_decorated(entry):
        assert [name for name, _ in experts_modules(model)] == [name for name, _ in find_experts(model)]
        return
    with pytest.raises(UnsupportedModelError) as raised:
        find_experts(model)
    for part in ("experts_class", "family", "reason", "possible"):
        assert entry[part] in str(raised.value)


def test_only_aria_waits_for_a_newer_transformers():
    newer = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 23)
    assert [entry["family"] for entry in LISTED if is_decorated(entry)] == (["aria"] if newer else [])
