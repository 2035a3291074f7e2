"""Same training as one process, whatever is switched on beside expert parallelism: Qwen3-MoE on four ranks."""

import dataclasses

import pytest

from tests.dist.parity import assert_same_training, train_on_ranks
from tests.dist.training import LORA, Job, reference

BOTH = pytest.mark.parametrize("ep_size", [2, pytest.param(4, marks=pytest.mark.slow)], ids=["ep2", "ep4"])

FREE = Job()
ACCUMULATE = Job(accumulate=2)
UNEVEN = Job(lengths=(13, 9, 4, 2))
# one expert a rank, efsdp 2: fewer experts than ranks to shard them over
FEW_EXPERTS = Job(config=(("num_experts", 2), ("num_experts_per_tok", 1)))
ONE_TAKES_ALL = Job(routing="one-expert-takes-all", config=(("num_experts_per_tok", 1),))
EMPTY_EXPERTS = Job(routing="empty-experts")
# attention of transformers cannot reshape an empty batch; Nemotron-H can be built of experts alone
NO_TOKENS = Job("nemotron_h", lengths=(13, 13, 0, 13), config=(("layer_types", ("moe", "moe")), ("use_cache", False)))


AUX_LOSS = Job(config=(("output_router_logits", True), ("router_aux_loss_coef", 0.5)))
THREE_RANKS = Job(config=(("num_experts", 6),), lengths=(13, 13, 13))
TIED = Job(config=(("tie_word_embeddings", True),))
TWO_FORWARDS = Job(forwards=2)
TWO_FORWARDS_NO_TOKENS = dataclasses.replace(NO_TOKENS, forwards=2)


def assert_parity(job, ep_size, variables=None, **how):
    assert_same_training(train_on_ranks(job, ep_size, variables, **how), reference(job), job)


@BOTH
def test_with_gradient_accumulation(ep_size):
    assert_parity(ACCUMULATE, ep_size)


@BOTH
def test_with_fewer_tokens_on_some_ranks(ep_size):
    assert_parity(UNEVEN, ep_size)


@BOTH
def test_with_a_rank_that_has_no_tokens(ep_size):
    assert_parity(NO_TOKENS, ep_size)


def test_on_three_ranks():
    """Where 1/ep is no power of two, and so rounds."""
    assert_parity(THREE_RANKS, 3)


@pytest.mark.parametrize(
    "trainable",
    ["experts", "self_attn", *(pytest.param(each, marks=pytest.mark.slow) for each in ("layers.1", "lm_head"))],
)
@pytest.mark.parametrize(
    "recompute", ["true", pytest.param("false", marks=pytest.mark.slow)], ids=["checkpointing", "plain"]
)
def test_with_everything_else_frozen(trainable, recompute):
    assert_parity(Job(trainable=trainable), 2, {"FSDP_ACTIVATION_CHECKPOINTING": recompute})


def test_with_the_routers_auxiliary_loss():
    with_aux, without = reference(AUX_LOSS), reference(FREE)
    assert with_aux.losses[0] > 1.1 * without.losses[0], "the auxiliary loss must count for this to say something"
    assert_parity(AUX_LOSS, 2)


@BOTH
def test_with_one_expert_taking_all_tokens(ep_size):
    """All other experts, and at ep 4 three of four ranks, compute nothing and still take part."""
    taken = reference(ONE_TAKES_ALL).num_tokens
    assert taken[0] == sum(taken) > 0
    assert_parity(ONE_TAKES_ALL, ep_size)


@BOTH
def test_with_experts_that_no_token_chooses(ep_size):
    assert reference(EMPTY_EXPERTS).num_tokens[:4] == [0, 0, 0, 0]
    assert_parity(EMPTY_EXPERTS, ep_size)


@pytest.mark.parametrize(
    "job", [FEW_EXPERTS, pytest.param(ACCUMULATE, marks=pytest.mark.slow)], ids=["plain", "accumulate2"]
)
def test_with_two_replicas(job):
    """HSDP: dp_replicate 2 x efsdp 1 x ep 2."""
    trained = train_on_ranks(job, 2, moe_config={"dp_replicate_size": 2})
    assert trained.experts_mesh == ("dp_replicate", "efsdp", "ep")
    assert_same_training(trained, reference(job), job)


def test_stock_fsdp2_with_two_replicas_passes_the_same_comparison():
    assert_parity(FREE, None, replicas=2)


def test_with_fewer_experts_on_a_rank_than_ranks_that_share_them():
    assert_parity(FEW_EXPERTS, 2)


@BOTH
def test_with_fsdp_activation_checkpointing(ep_size):
    assert_parity(FREE, ep_size, {"FSDP_ACTIVATION_CHECKPOINTING": "true"})


@pytest.mark.parametrize(
    "job",
    [TWO_FORWARDS, NO_TOKENS, TWO_FORWARDS_NO_TOKENS],
    ids=["two-forwards", "no-tokens", "two-forwards-no-tokens"],
)
def test_recompute_repeats_the_dispatch_of_its_own_forward(job):
    """Two forwards before a backward, as preference losses do: which of them is recomputed must be clear on all ranks.

    Only without reentrant checkpointing, with which stock FSDP2 trains wrongly on two forwards.
    """
    assert_parity(job, 4, {"FSDP_ACTIVATION_CHECKPOINTING": "true"})


@pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
def test_with_gradient_checkpointing_of_transformers(how):
    assert_parity(FREE, 2, gradient_checkpointing=how)


def test_with_fsdp_activation_checkpointing_of_all_layers_but_the_last():
    assert_parity(FREE, 2, {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, moe_config={"kept_layers": 1})


def test_with_fsdp_activation_checkpointing_and_accumulation():
    assert_parity(ACCUMULATE, 2, {"FSDP_ACTIVATION_CHECKPOINTING": "true"})


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize(
    "ep_size", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_ram_efficient_loading_takes_weights_and_buffers_from_rank_0_alone(family, ep_size):
    """Every other rank holds NaN everywhere, in DeepSeek-V3's correction bias too."""
    assert_parity(Job(family), ep_size, {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, garbage=True)


def test_ram_efficient_loading_with_tied_embeddings():
    assert_parity(TIED, 2, {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, garbage=True)


def test_ram_efficient_loading_with_two_replicas():
    ram_efficient = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    assert_parity(FREE, 2, ram_efficient, garbage=True, moe_config={"dp_replicate_size": 2})


@BOTH
def test_with_the_fused_optimizer(ep_size):
    assert_parity(FREE, ep_size, fused_optimizer=True)


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_with_regional_compilation(backend):
    assert_parity(FREE, 2, compile_backend=backend)


def test_without_resharding_after_forward():
    assert_parity(FREE, 2, {"FSDP_RESHARD_AFTER_FORWARD": "false"})


@pytest.mark.parametrize("kernels", ["reference", "fused"])
def test_with_kernels_asked_for(kernels):
    assert_parity(FREE, 2, moe_config={"kernels": kernels})


WITH_LORA = Job(lora=LORA)
LORA_EMPTY_EXPERTS = dataclasses.replace(EMPTY_EXPERTS, lora=LORA)


@pytest.mark.parametrize("ep_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)], ids=["ep1", "ep2", "ep4"])
@pytest.mark.parametrize("recompute", ["false", "true"], ids=["plain", "checkpointing"])
def test_with_peft_adapters_on_the_experts(ep_size, recompute):
    """Against PEFT's own computation in one process."""
    assert_parity(WITH_LORA, ep_size, {"FSDP_ACTIVATION_CHECKPOINTING": recompute})


@pytest.mark.parametrize(
    "job",
    [
        dataclasses.replace(UNEVEN, lora=LORA),
        dataclasses.replace(ACCUMULATE, lora=LORA),
        LORA_EMPTY_EXPERTS,
        Job("gpt_oss", lora=LORA),
    ],
    ids=["uneven", "accumulate2", "empty-experts", "gpt-oss"],
)
def test_with_peft_adapters_on_the_experts_and_more(job):
    assert_parity(job, 2)


def test_with_peft_adapters_and_the_reference_kernels():
    assert_parity(WITH_LORA, 2, moe_config={"kernels": "reference"})


def test_with_peft_adapters_and_two_replicas():
    assert_parity(WITH_LORA, 2, moe_config={"dp_replicate_size": 2})


ONE_GROUP = {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}


@pytest.mark.parametrize(
    ("job", "how"),
    [
        (FREE, {}),
        (ACCUMULATE, {}),
        (TIED, {}),
        (WITH_LORA, {}),
        (FREE, {"gradient_checkpointing": "non-reentrant"}),
        (FREE, {"gradient_checkpointing": "non-reentrant", "moe_config": {"kept_layers": 1}}),
        (FREE, {"variables": {"FSDP_ACTIVATION_CHECKPOINTING": "true"}}),
        (WITH_LORA, {"variables": {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "moe_config": {"kept_layers": 1}}),
    ],
    ids=["plain", "accumulate2", "tied", "lora", "checkpointing", "kept-layers", "by-accelerate", "lora-by-accelerate"],
)
@BOTH
def test_with_all_but_the_experts_in_one_group(job, how, ep_size):
    """Without an auto-wrap policy, FSDP2 gathers all that it shards at once, but experts that ranks share."""
    how = dict(how)
    assert_parity(job, ep_size, ONE_GROUP | how.pop("variables", {}), **how)


def test_with_all_but_the_experts_in_one_group_read_by_rank_0_alone():
    assert_parity(FREE, 4, {**ONE_GROUP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, garbage=True)


def test_with_all_but_the_experts_in_one_group_and_two_replicas():
    assert_parity(FREE, 2, ONE_GROUP, moe_config={"dp_replicate_size": 2})
