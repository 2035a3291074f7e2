"""What does not fit ends every rank with the same sentence: rule, numbers, remedy. None hangs."""

import pytest

from tests.dist.ranks import STOCK_FSDP2, run_ranks, with_moe_config
from tests.dist.training import NUM_RANKS, Job, failure_of

SIX_EXPERTS = Job(config=(("num_experts", 6),))
DENSE = Job(config=(("mlp_only_layers", (0, 1)),))

CASES = {
    "ep_size-3-of-4-ranks": (
        Job(),
        with_moe_config(ep_size=3),
        "ConfigError",
        "ep_size=3 must divide num_processes=4\n\nhint: ep_size: any of [1, 2, 4]",
    ),
    "ep_size-over-the-ranks-of-a-replica": (
        Job(),
        with_moe_config(ep_size=4, dp_replicate_size=2),
        "ConfigError",
        "ep_size=4 must divide the 2 ranks that FSDP shards over (num_processes=4 / 2)\n\nhint: ep_size: any of [1, 2]",
    ),
    "six-experts-over-4-ranks": (
        SIX_EXPERTS,
        with_moe_config(ep_size=4),
        "ConfigError",
        "ep_size=4 must divide num_experts=6\n\nhint: ep_size: any of [1, 2] fits this model on these ranks",
    ),
    "fsdp-version-1": (
        Job(),
        {**with_moe_config(ep_size=2), "FSDP_VERSION": "1", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"},
        "ConfigError",
        "ep_size=2 needs FSDP version 2, not 1\n\nhint: in the accelerate config write\nfsdp_config: {fsdp_version: 2}",
    ),
    "no-fsdp": (
        Job(),
        {**with_moe_config(ep_size=2), "ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_CPU": "true"},
        "ConfigError",
        "ep_size=2 needs distributed_type FSDP, not MULTI_CPU (num_processes=4)",
    ),
    "a-dense-model": (
        DENSE,
        with_moe_config(ep_size=2),
        "UnsupportedModelError",
        "Qwen3MoeForCausalLM has no mixture of experts that transformers lets an experts function replace\n\n"
        "hint: remove moe_config to train a dense model",
    ),
}


@pytest.mark.parametrize(("job", "environment", "error", "message"), CASES.values(), ids=CASES)
def test_every_rank_ends_with_the_same_sentence(job, environment, error, message):
    failures = run_ranks(failure_of, NUM_RANKS, environment, job=job)
    assert failures == [failures[0]] * NUM_RANKS
    kind, told = failures[0]
    assert (kind, message in told) == (error, True), f"{kind}: {told}"


def test_accelerates_own_parallelism_config_in_the_script_is_refused():
    """It has no place for ep_size, which would otherwise be dropped silently."""
    failures = run_ranks(failure_of, NUM_RANKS, with_moe_config(ep_size=2), job=Job(), replicas=2)
    for kind, told in failures:
        assert kind == "ConfigError"
        assert "the script gives Accelerator a ParallelismConfig, which has no place for moe_config (ep_size=2)" in told


def test_the_same_dense_model_trains_where_moe_accel_was_not_asked_for():
    """So the refusal above is about the request, not the model."""
    for kind, told in run_ranks(failure_of, NUM_RANKS, STOCK_FSDP2, job=DENSE):
        assert kind == "none", told
