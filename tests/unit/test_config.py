"""moe_config: what is accepted, and what the user reads when it is not."""

import json

import pytest

from moe_accel.config import MoEOptions, check_launch, is_path, parse_env, parse_section, read_config_file
from moe_accel.errors import ConfigError

FSDP2 = {"distributed_type": "FSDP", "num_processes": 8, "fsdp_config": {"fsdp_version": 2}}


def message_of(call, *args) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args)
    return str(caught.value)


@pytest.mark.parametrize("section", [None, {}])
def test_an_empty_section_means_the_defaults(section):
    assert parse_section(section) == MoEOptions(ep_size=1, dispatcher="auto", kernels="auto", dp_replicate_size=None)


def test_the_section_survives_the_way_through_the_environment():
    options = parse_section({"ep_size": 8, "dispatcher": "alltoall", "kernels": "fused", "dp_replicate_size": 2})
    assert parse_env(options.to_json()) == options
    assert "\n" not in options.to_json()


def test_every_mistake_is_reported_at_once_with_what_was_probably_meant():
    section = {"ep_sze": 4, "dispatchr": "auto", "kernels": "fussed", "dp_replicate_size": 0, "zebra": 1}
    assert message_of(parse_section, section) == (
        "moe_config: 5 problems\n"
        "  - unknown key 'ep_sze' (did you mean 'ep_size'?)\n"
        "  - unknown key 'dispatchr' (did you mean 'dispatcher'?)\n"
        "  - unknown key 'zebra'\n"
        "  - dp_replicate_size=0 must be at least 1\n"
        "  - kernels='fussed' must be one of auto, reference, fused, te (did you mean 'fused'?)\n"
        "\n"
        "hint: the keys are ep_size, dispatcher, kernels, dp_replicate_size, kept_layers, save_layout, async_save, "
        "padding_free, te_parts, cuda_graphs"
    )


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"ep_size": 0}, "moe_config: ep_size=0 must be at least 1"),
        ({"ep_size": -2}, "moe_config: ep_size=-2 must be at least 1"),
        ({"ep_size": "8"}, "moe_config: ep_size='8' must be a whole number"),
        ({"ep_size": 2.0}, "moe_config: ep_size=2.0 must be a whole number"),
        ({"ep_size": True}, "moe_config: ep_size=True must be a whole number"),
        ({"ep_size": None}, "moe_config: ep_size=None must be a whole number"),
        (
            {"dispatcher": "deep_ep"},
            "dispatcher='deep_ep' must be one of auto, alltoall, deepep (did you mean 'deepep'?)",
        ),
        ({"async_save": "yes"}, "async_save='yes' must be true or false"),
        ({"cuda_graphs": 1}, "cuda_graphs=1 must be true, false or attention"),
        (
            {"cuda_graphs": "atention"},
            "cuda_graphs='atention' must be true, false or attention (did you mean 'attention'?)",
        ),
        ({"dispatcher": None}, "dispatcher=None must be one of auto, alltoall, deepep"),
        ({2: 3}, "moe_config: unknown key 2"),
        (8, "moe_config must be a section of key: value lines, not int 8"),
        (["ep_size"], "moe_config must be a section of key: value lines, not list ['ep_size']"),
        ("ep_size: 8", "moe_config must be a section of key: value lines, not str 'ep_size: 8'"),
    ],
)
def test_a_bad_section_says_what_is_wrong(section, told):
    assert told in message_of(parse_section, section)


@pytest.mark.parametrize(
    ("changed", "told", "remedy"),
    [
        (
            {"fsdp_config": {"fsdp_version": 1}},
            "ep_size=4 needs FSDP version 2, not 1",
            "in the config file write\nfsdp_config: {fsdp_version: 2}",
        ),
        ({"fsdp_config": {}}, "not 1, accelerate's default", "fsdp_config: {fsdp_version: 2}"),
        ({"fsdp_config": None}, "not 1, accelerate's default", "fsdp_config: {fsdp_version: 2}"),
        (
            {"distributed_type": "MULTI_GPU"},
            "ep_size=4 needs distributed_type FSDP, not MULTI_GPU",
            "in the config file write\ndistributed_type: FSDP",
        ),
        (
            {"num_processes": 6},
            "ep_size=4 must divide num_processes=6",
            "in the config file write\nep_size: 3  # any of [1, 2, 3, 6]",
        ),
    ],
)
def test_a_launch_that_cannot_run_expert_parallel_is_refused_with_the_lines_to_write(changed, told, remedy):
    message = message_of(check_launch, MoEOptions(ep_size=4), FSDP2 | changed, "moe_config")
    assert message.startswith("moe_config: ep_size=4 ")
    assert told in message
    assert message.endswith(remedy)


def test_a_launch_with_three_faults_names_all_three():
    config = {"distributed_type": "DEEPSPEED", "num_processes": 6}
    message = message_of(check_launch, MoEOptions(ep_size=4), config, "moe_config")
    assert "3 problems" in message
    assert "DEEPSPEED" in message
    assert "FSDP version 2" in message
    assert "num_processes=6" in message


@pytest.mark.parametrize(
    ("options", "config", "arguments"),
    [
        (MoEOptions(ep_size=4), FSDP2, []),
        (MoEOptions(ep_size=4), FSDP2 | {"fsdp_config": {"fsdp_version": "2"}}, []),
        (MoEOptions(ep_size=4), FSDP2 | {"fsdp_config": {"version": 2}}, []),
        (MoEOptions(ep_size=4), {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}, []),
        (MoEOptions(ep_size=1), {"distributed_type": "NO", "num_processes": 1}, []),
        (MoEOptions(ep_size=4), FSDP2 | {"fsdp_config": {}}, ["--fsdp-version=2", "train.py"]),
        (MoEOptions(ep_size=4), FSDP2 | {"num_processes": 6}, ["--num_processes", "8", "train.py"]),
        (MoEOptions(ep_size=4), FSDP2 | {"distributed_type": "NO"}, ["--use_fsdp", "train.py"]),
    ],
    ids=["plain", "text", "short-name", "ranks-open", "one-rank", "cli-version", "cli-ranks", "cli-fsdp"],
)
def test_a_launch_that_can_run_or_whose_command_line_decides_passes(options, config, arguments):
    assert check_launch(options, config, "moe_config", arguments) is None


def test_the_variable_may_name_an_accelerate_config_or_the_section_alone(tmp_path):
    whole, alone, as_json = (tmp_path / name for name in ("whole.yaml", "alone.yaml", "whole.json"))
    whole.write_text("distributed_type: FSDP\nmoe_config: {ep_size: 4}\n")
    alone.write_text("ep_size: 4\n")
    as_json.write_text(json.dumps({"distributed_type": "FSDP", "moe_config": {"ep_size": 4}}))
    for file in (whole, alone, as_json):
        assert is_path(str(file))
        assert parse_env(str(file)) == MoEOptions(ep_size=4)
    assert not is_path(' {"ep_size": 4}')
    assert not is_path("")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- ep_size\n- 8\n", "must hold a mapping of sections, not list"),
        ("", "must hold a mapping of sections, not NoneType"),
        ("moe_config: {ep_size: 8", "is not valid yaml or JSON"),
        ("distributed_type: FSDP\n", "has no moe_config section"),
        ("moe_config: {ep_siz: 8}\n", "moe_config: unknown key 'ep_siz' (did you mean 'ep_size'?)"),
    ],
    ids=["list", "empty", "cut", "no-section", "misspelt"],
)
def test_a_bad_file_is_named_in_the_message(tmp_path, text, told):
    file = tmp_path / "moe.yaml"
    file.write_text(text)
    message = message_of(parse_env, str(file))
    assert str(file) in message
    assert told in message


def test_a_missing_file_is_named_in_the_message(tmp_path):
    file = tmp_path / "nowhere.yaml"
    assert message_of(read_config_file, file) == f"cannot read the config file {file}: No such file or directory"
    assert str(file) in message_of(parse_env, str(file))


def test_broken_json_in_the_variable_says_so():
    assert message_of(parse_env, '{"ep_size": ').startswith("MOE_ACCEL_CONFIG is not valid JSON: Expecting value")
    assert message_of(parse_env, '{"ep_sise": 2}').startswith(
        "MOE_ACCEL_CONFIG: unknown key 'ep_sise' (did you mean 'ep_size'?)"
    )


def test_the_options_are_frozen():
    """Few options, on purpose: adding one is a decision, so it has to be made here too."""
    assert {name: value for name, value in vars(MoEOptions()).items()} == {
        "ep_size": 1,
        "dispatcher": "auto",
        "kernels": "auto",
        "dp_replicate_size": None,
        "kept_layers": 0,
        "save_layout": "per-expert",
        "async_save": False,
        "padding_free": "auto",
        "te_parts": ("experts",),
        "cuda_graphs": False,
    }
