"""What the README promises is there: files, keys, families, public names."""

import re
from pathlib import Path

import pytest

import moe_accel
from moe_accel.config import DISPATCHERS, KERNELS, OPTION_NAMES, parse_section, read_config_file
from moe_accel.experts.gated import why_not_gated
from tests.families import available_families, build_tiny, decorated_classes, experts_modules
from tests.family_data import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_every_link_leads_to_a_file():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_table_names_every_family_with_decorated_experts_and_no_other():
    table = README.split("<!-- families -->")[1].split("<!-- /families -->")[0]
    named = set(re.findall(r"[a-z0-9_]+", " ".join(line.split("|")[2] for line in table.strip().splitlines()[2:])))
    named -= {"transformers", "5", "23"}
    assert set(decorated_classes()) <= named
    assert named <= {family.folder or name for name, family in FAMILIES.items()}


@pytest.mark.parametrize("family", available_families())
def test_every_family_is_one_function_but_those_that_are_named(family):
    expected = {
        "inkling2": {"a gate of its own"},
        "inkling2_loop": {"a gate of its own"},
        "muse_spark": {"a norm after each expert"},
    }.get(family, {None})
    assert {why_not_gated(module) for _, module in experts_modules(build_tiny(family))} == expected


def test_the_first_config_is_one_that_launches(tmp_path):
    text = README.split("```yaml\n")[1].split("```")[0]
    file = tmp_path / "moe.yaml"
    file.write_text(text)
    config = read_config_file(file)
    assert parse_section(config["moe_config"]).ep_size == config["num_processes"] == 8
    assert config["fsdp_config"]["fsdp_version"] == 2


def test_every_key_and_value_of_moe_config_is_explained():
    rows = {row.split("`")[1]: row for row in README.splitlines() if row.startswith("| `")}
    assert set(OPTION_NAMES) <= set(rows)
    for key, values in (("dispatcher", DISPATCHERS), ("kernels", KERNELS)):
        assert set(values) <= set(re.findall(r"`(\w+)`", rows[key]))


@pytest.mark.parametrize("name", [name for name in moe_accel.__all__ if not name.startswith("_")])
def test_every_public_name_is_in_the_readme(name):
    assert re.search(rf"\b{name}\b", README)
