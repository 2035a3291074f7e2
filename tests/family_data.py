"""The mixture-of-experts families of transformers, as data: what a tiny model of each needs.

The key is the family's folder in `transformers/models`. A family is the model class that holds the experts and what
its config needs beyond the sizes of `SIZES`, which go to every config (and nested config) with a field of that name.
`families.py` builds the models.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

VOCAB = 96
EXPERTS = 8

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 8,
    "max_position_embeddings": 64,
    "sliding_window": 8,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    # experts, under each of the names in use
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "mlp_layer_types": ["sparse", "sparse"],
    # latent attention and its index
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_topk": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    # linear attention and state space layers
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    # vision and audio towers: present, as small as they get, not run
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    # nothing random, and clamps within reach of the activations
    "router_jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
    "swiglu_limit": 1.0,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """Where a family's tiny model comes from.

    Attributes:
        model: class name in the family's modeling file.
        config: overrides of `SIZES`; a nested config (`text_config`, ...) is a dict of its own overrides.
        folder: folder in transformers/models, where it is not the family's name.
        inputs: integer inputs [B,S] beyond input_ids, with the number of values they take.
        embeds: the model takes inputs_embeds [B,S,H] only.
    """

    model: str
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    folder: str | None = None
    inputs: Mapping[str, int] = dataclasses.field(default_factory=dict)
    embeds: bool = False


def _family(model: str, **given: Any) -> Family:
    own = {name: given.pop(name) for name in ("folder", "inputs", "embeds") if name in given}
    return Family(model, given, **own)


def _mrope(*sections: int) -> dict[str, Any]:
    """Rotary settings of a text tower whose positions are (time, height, width)."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}


FAMILIES: dict[str, Family] = {
    "afmoe": _family("AfmoeForCausalLM"),
    "aria": _family("AriaTextForCausalLM"),
    "axk1": _family("AXK1ForCausalLM"),
    "axk2": _family("AXK2ForCausalLM"),
    "bailing_hybrid": _family("BailingHybridForCausalLM", layer_types=["linear_attention", "full_attention"]),
    "beam": _family("BeamForCausalLM"),
    "cohere2_moe": _family("Cohere2MoeForCausalLM"),
    "deepseek_ocr2": _family("DeepseekOcr2TextModel"),
    "deepseek_v2": _family("DeepseekV2ForCausalLM"),
    "deepseek_v3": _family("DeepseekV3ForCausalLM"),
    "deepseek_v32": _family("DeepseekV32ForCausalLM"),
    "deepseek_v4": _family(
        "DeepseekV4ForCausalLM",
        mlp_layer_types=["hash_moe", "moe"],
        layer_types=["sliding_attention", "sliding_attention"],
        num_key_value_heads=1,
        hc_sinkhorn_iters=3,
        o_groups=2,
        o_lora_rank=16,
        head_dim=16,
    ),
    "diffusion_gemma": _family(
        "DiffusionGemmaForBlockDiffusion",
        inputs={"decoder_input_ids": VOCAB},
        text_config={"global_head_dim": 8, "pad_token_id": 0},
        vision_config={"model_type": "gemma4_vision", "position_embedding_size": 16},
    ),
    "dots1": _family("Dots1ForCausalLM"),
    "dots3_note": _family("Dots3NoteForCausalLM", shared_experts_intermediate_size=24),
    "ernie4_5_moe": _family("Ernie4_5_MoeForCausalLM", moe_layer_start_index=0),
    "ernie4_5_vl_moe": _family(
        "Ernie4_5_VLMoeForConditionalGeneration",
        inputs={"moe_mm_token_type_ids": 2},
        text_config={"moe_intermediate_size": [24, 16], "rope_parameters": _mrope(1, 1, 2)},
    ),
    "exaone_moe": _family("ExaoneMoeForCausalLM"),
    "flex_olmo": _family("FlexOlmoForCausalLM"),
    "flint": _family("FlintForCausalLM", mlp_only_layers=[]),
    "gemma4": _family(
        "Gemma4ForCausalLM",
        enable_moe_block=True,
        global_head_dim=8,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=0,
    ),
    "glm4_moe": _family("Glm4MoeForCausalLM"),
    "glm4_moe_lite": _family("Glm4MoeLiteForCausalLM"),
    "glm4v_moe": _family("Glm4vMoeForConditionalGeneration", text_config={"rope_parameters": _mrope(1, 1, 0)}),
    "glm5_next": _family(
        "Glm5NextForConditionalGeneration",
        text_config={
            "layer_types": ["linear_attention", "deepseek_sparse_attention"],
            "qk_rope_head_dim": 0,
            "index_kpool": 4,
            "hc_sinkhorn_iters": 3,
        },
        vision_config={"projection_intermediate_size": 32},
    ),
    "glm_moe_dsa": _family("GlmMoeDsaForCausalLM"),
    # its own limit: at 1, one value that rounding moves across a clamp is most of the error in bf16
    "gpt_oss": _family("GptOssForCausalLM", swiglu_limit=7.0),
    "granitemoe": _family("GraniteMoeForCausalLM"),
    "granitemoe_swa": _family("GraniteMoeSWAForCausalLM"),
    "granitemoehybrid": _family(
        "GraniteMoeHybridForCausalLM",
        layer_types=["mamba", "attention"],
        mamba_n_heads=4,
        mamba_d_state=8,
        mamba_chunk_size=8,
    ),
    "granitemoeshared": _family("GraniteMoeSharedForCausalLM"),
    "hunyuan_v1_moe": _family("HunYuanMoEV1ForCausalLM"),
    "hy_v3": _family("HYV3ForCausalLM"),
    "hy_v4": _family("HYV4ForCausalLM"),
    "hy_v4_vl": _family("HYV4VLForConditionalGeneration", text_config={"rope_parameters": _mrope(2, 1, 1)}),
    "inkling": _family("InklingForCausalLM", rel_extent=16),
    "inkling2": _family("Inkling2ForCausalLM", rel_extent=16, unpadded_vocab_size=VOCAB),
    "inkling2_loop": _family(  # runs its middle layers, and so their experts, several times in a forward
        "Inkling2LoopForCausalLM",
        rel_extent=16,
        unpadded_vocab_size=VOCAB,
        num_hidden_layers=3,
        n_layers_per_attn_res_block=1,
        loop_layer_index_start=1,
        loop_layer_index_end=2,
        loop_num_passes=2,
        loop_gate_rank=8,
    ),
    "jamba": _family(
        "JambaForCausalLM",
        expert_layer_period=1,
        expert_layer_offset=0,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
        use_mamba_kernels=False,
    ),
    "kimi_linear": _family("KimiLinearForCausalLM", layer_types=["linear_attention", "full_attention"]),
    "kolibri1": _family("Kolibri1ForCausalLM"),
    "laguna": _family("LagunaForCausalLM"),
    "lara_mini": _family("LaraMiniForCausalLM", layer_types=["linear_attention", "full_attention"]),
    "lfm2_moe": _family("Lfm2MoeForCausalLM", layer_types=["conv", "full_attention"]),
    "mellum": _family("MellumForCausalLM"),
    "mimo_v2_flash": _family("MiMoV2FlashForCausalLM", num_key_value_heads=2),
    "minimax": _family("MiniMaxForCausalLM"),
    "minimax_m2": _family("MiniMaxM2ForCausalLM"),
    "minimax_m3_vl": _family("MiniMaxM3VLForCausalLM", dense_intermediate_size=24),
    "mistral4": _family("Mistral4ForCausalLM"),
    "mistral_large4": _family("MistralLarge4ForConditionalGeneration", vision_config={"model_type": "pixtral"}),
    "mixtral": _family("MixtralForCausalLM"),
    "muse_spark": _family("MuseSparkTextModel", moe_hidden_size=16),
    "nemotron_h": _family(
        "NemotronHForCausalLM",
        layer_types=["linear_attention", "moe", "full_attention", "moe"],
        moe_latent_size=16,
        ssm_state_size=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=2,
        chunk_size=8,
        use_mamba_kernels=False,
    ),
    "olmoe": _family("OlmoeForCausalLM"),
    "openai_privacy_filter": _family("OpenAIPrivacyFilterForTokenClassification", num_labels=VOCAB),
    "phimoe": _family("PhimoeForCausalLM"),
    "qwen2_moe": _family("Qwen2MoeForCausalLM"),
    "qwen3_5_moe": _family("Qwen3_5MoeForCausalLM", layer_types=["linear_attention", "full_attention"]),
    "qwen3_moe": _family("Qwen3MoeForCausalLM"),
    "qwen3_next": _family("Qwen3NextForCausalLM", layer_types=["linear_attention", "full_attention"]),
    "qwen3_omni_moe": _family("Qwen3OmniMoeThinkerTextModel"),
    "qwen3_omni_moe_talker": _family(
        "Qwen3OmniMoeTalkerModel", folder="qwen3_omni_moe", embeds=True, shared_expert_intermediate_size=24
    ),
    "qwen3_vl_moe": _family(
        "Qwen3VLMoeForConditionalGeneration",
        text_config={"rope_parameters": _mrope(2, 1, 1)},
        vision_config={"deepstack_visual_indexes": [0], "num_position_embeddings": 16},
    ),
    "qwen4_exp": _family("Qwen4ExpForCausalLM", hc_lowrank=8, layer_types=["linear_attention", "full_attention"]),
    "solar_open": _family("SolarOpenForCausalLM"),
    "unlimited_ocr": _family("UnlimitedOcrTextModel"),
    "zaya": _family("ZayaForCausalLM", num_experts_per_tok=1, router_hidden_size=64),
    # experts that no experts function can replace
    "dbrx": _family(
        "DbrxForCausalLM",
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 48, "moe_top_k": 2},
    ),
    "doge": _family("DogeForCausalLM", is_moe=True, num_experts=16),
    "jetmoe": _family("JetMoeForCausalLM", kv_channels=8),
    "llama4": _family("Llama4ForCausalLM", intermediate_size_mlp=48),
    "longcat_flash": _family(
        "LongcatFlashForCausalLM", num_layers=2, ffn_hidden_size=48, expert_ffn_hidden_size=24, zero_expert_num=4
    ),
    "nllb_moe": _family(
        "NllbMoeForConditionalGeneration",
        inputs={"decoder_input_ids": VOCAB},
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_sparse_step=1,
        decoder_sparse_step=1,
        dropout=0.0,
        attention_dropout=0.0,
        moe_token_dropout=0.0,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        pad_token_id=1,
    ),
    "step3p7": _family("Step3p7TextModel", pad_token_id=1, share_expert_dim=24),
    "switch_transformers": _family(
        "SwitchTransformersForConditionalGeneration",
        inputs={"decoder_input_ids": VOCAB},
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_heads=4,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        dropout_rate=0.0,
        pad_token_id=0,
        decoder_start_token_id=0,
    ),
}
