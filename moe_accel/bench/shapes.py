"""The models that are measured: numbers of the released checkpoints, random weights, as many layers as asked for.

Numbers are those of each model's config.json on the hub; what a transformers config class has as its default is that of
another size of the family, so every number is written down here.
"""

from dataclasses import dataclass, field
from typing import Any

NEMOTRON_PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
"""`hybrid_override_pattern` of Nemotron-3-Nano-30B-A3B: M Mamba, E experts, * attention."""


@dataclass(frozen=True)
class Shape:
    """One model's shape.

    Attributes:
        model_type: of transformers.
        values: of its config class, all but the depth.
        released_layers: depth of the released model.
        released: the checkpoint that the numbers are of.
        note: how it differs from that checkpoint, but for depth; empty where it does not.
        pattern: kinds of the layers in order, where they differ; `layers` counts its letters.
    """

    model_type: str
    values: dict[str, Any] = field(default_factory=dict)
    released_layers: int = 1
    released: str = ""
    note: str = ""
    pattern: str = ""

    def config(self, layers: int, **more: Any) -> Any:
        """A transformers config of `layers` layers, with sdpa and grouped_mm where `values` say nothing else."""
        from transformers import CONFIG_MAPPING

        depth = {"hybrid_override_pattern": self.pattern[:layers]} if self.pattern else {"num_hidden_layers": layers}
        how: dict[str, Any] = {
            "use_cache": False,
            "experts_implementation": "grouped_mm",
            "attn_implementation": "sdpa",
        }
        config_class: Any = CONFIG_MAPPING[self.model_type]
        return config_class(**(how | self.values | depth | more))

    def block_config(self) -> Any:
        """The smallest config that holds one MoE block of the shape: one layer and hardly any vocabulary."""
        return self.config(1, vocab_size=64, **({"hybrid_override_pattern": "E"} if self.pattern else {}))


SHAPES = {
    "qwen3-30b-a3b": Shape(
        "qwen3_moe",
        {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "max_position_embeddings": 40_960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
        48,
        "Qwen/Qwen3-30B-A3B",
    ),
    "mixtral-8x7b": Shape(
        "mixtral",
        {
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32_768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
        32,
        "mistralai/Mixtral-8x7B-v0.1",
    ),
    "gpt-oss-20b": Shape(
        "gpt_oss",
        {
            "vocab_size": 201_088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "sliding_window": 128,
            "max_position_embeddings": 131_072,
            "attn_implementation": "eager",
        },
        24,
        "openai/gpt-oss-20b",
        "weights in bf16, not mxfp4; transformers attends eagerly (it has no sdpa with sinks)",
    ),
    "nemotron-3-nano": Shape(
        "nemotron_h",
        {
            "vocab_size": 131_072,
            "hidden_size": 2688,
            "intermediate_size": 1856,
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "num_experts_per_tok": 6,
            "routed_scaling_factor": 2.5,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "mamba_num_heads": 64,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
            "conv_kernel": 4,
            "chunk_size": 128,
            "max_position_embeddings": 262_144,
        },
        len(NEMOTRON_PATTERN),
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        "the first layers of its pattern of Mamba, experts and attention",
        NEMOTRON_PATTERN,
    ),
    "deepseek-v3": Shape(
        "deepseek_v3",
        {
            "vocab_size": 129_280,
            "hidden_size": 7168,
            "intermediate_size": 18_432,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 64,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 0,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "max_position_embeddings": 4096,
        },
        58,
        "deepseek-ai/DeepSeek-V3",
        "64 of 256 experts, so that one GPU holds a layer; no dense layers in front; no multi-token prediction",
    ),
    "tiny": Shape(
        "qwen3_moe",
        {
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 128,
            "moe_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
        8,
        "",
        "no released model: seconds on a CPU",
    ),
}
