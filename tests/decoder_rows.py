"""Tiny decoders, a row for each adapter and for each variant of it that leaves other groups: see KIN in test_kin.py."""

SHARED = dict(vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA = dict(
    SHARED, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2, intermediate_size=32,
    max_position_embeddings=24,
)  # fmt: skip
WIDE = {**LLAMA, "hidden_size": 24, "head_dim": 8}  # heads together wider than the model
EXPERTS = {**LLAMA, "num_experts_per_tok": 2}
KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
GPT = dict(SHARED, n_embd=32, n_head=4, n_layer=2, n_positions=24)
MANY = {
    name: value for name, value in LLAMA.items() if name != "num_key_value_heads"
}  # as many keys as queries
BLOOM = dict(SHARED, hidden_size=32, n_head=4, n_layer=2)
MPT = dict(SHARED, d_model=32, n_heads=4, n_layers=2, max_seq_len=24)
GPT_NEO = dict(
    SHARED, hidden_size=32, num_heads=4, num_layers=2, attention_types=[[["global", "local"], 1]], window_size=4,
    max_position_embeddings=24, intermediate_size=32,
)  # fmt: skip
FALCON = {name: value for name, value in MANY.items() if name != "intermediate_size"}

VALUES = {"value_output": 64}
BIASES = {**VALUES, "value_bias": 8}
ALL = {**BIASES, "query_key": 64, "key_bias": 8}
SECOND = {**BIASES, "query_key": (0, 64), "key_bias": (0, 8)}  # nothing turns in the second layer
PRODUCTS = {**VALUES, "query_key": 64}

# name: (class, config class, sizes, what each key/value head has of each group, in every layer or layer by layer)
DECODERS = {
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", MANY, BIASES),
    "gpt_neox bare": (
        "GPTNeoXForCausalLM", "GPTNeoXConfig", {**MANY, "attention_bias": False, "use_parallel_residual": False}, VALUES
    ),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}, VALUES),
    "granite": (
        "GraniteForCausalLM", "GraniteConfig",
        {**LLAMA, "attention_multiplier": 0.3, "attention_bias": True, "residual_multiplier": 0.5}, BIASES,
    ),
    "smollm3": (
        "SmolLM3ForCausalLM", "SmolLM3Config", {**LLAMA, "no_rope_layers": [1, 0], "attention_bias": True}, SECOND
    ),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", WIDE, VALUES),
    "gemma2": (
        "Gemma2ForCausalLM", "Gemma2Config",
        {
            **WIDE, **KINDS, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "attention_bias": True,
            "sliding_window": 64,  # where all that a padding token would see is padding, float64 gives NaN
        }, BIASES,
    ),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", LLAMA, BIASES),
    "cohere": ("CohereForCausalLM", "CohereConfig", {**LLAMA, "attention_bias": True}, BIASES),
    "cohere with norms": ("CohereForCausalLM", "CohereConfig", {**LLAMA, "use_qk_norm": True}, VALUES),
    "cohere2": ("Cohere2ForCausalLM", "Cohere2Config", {**LLAMA, **KINDS, "attention_bias": True}, SECOND),
    "phi3": (
        "Phi3ForCausalLM", "Phi3Config",
        {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
        VALUES,
    ),
    "bloom": ("BloomForCausalLM", "BloomConfig", BLOOM, ALL),
    "gpt_neo": ("GPTNeoForCausalLM", "GPTNeoConfig", GPT_NEO, PRODUCTS),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", GPT, ALL),
    "gpt_bigcode of many keys": ("GPTBigCodeForCausalLM", "GPTBigCodeConfig", {**GPT, "multi_query": False}, ALL),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**FALCON, "bias": True}, BIASES),
    "falcon of few keys": (
        "FalconForCausalLM", "FalconConfig", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, VALUES
    ),
    "falcon with alibi": (
        "FalconForCausalLM", "FalconConfig", {**FALCON, "alibi": True, "multi_query": False, "bias": True}, ALL
    ),
    "mpt": ("MptForCausalLM", "MptConfig", MPT, PRODUCTS),
    "glm": ("GlmForCausalLM", "GlmConfig", WIDE, VALUES),
    "helium": ("HeliumForCausalLM", "HeliumConfig", {**LLAMA, "head_dim": 8, "attention_bias": True}, VALUES),
    "olmo": ("OlmoForCausalLM", "OlmoConfig", LLAMA, VALUES),
    "ministral": ("MinistralForCausalLM", "MinistralConfig", {**LLAMA, **KINDS, "head_dim": 8}, VALUES),
    "arcee": ("ArceeForCausalLM", "ArceeConfig", {**LLAMA, "attention_bias": True}, BIASES),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**EXPERTS, "num_local_experts": 4}, VALUES),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig",
        {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}, VALUES,
    ),
}  # fmt: skip
# Those whose queries and keys have norms.
DECODER = {**SHARED, **{name: value for name, value in WIDE.items() if name != "max_position_embeddings"}}
OLMO = {name: value for name, value in LLAMA.items() if name != "max_position_embeddings"}
STABLE = {**OLMO, "use_qkv_bias": True}
NORMED = {
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "attention_bias": True}, BIASES),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        {**DECODER, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}, {"value_output": 64},
    ),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", {**OLMO, "hidden_size": 32}, {"value_output": 64}),
    "olmo3": ("Olmo3ForCausalLM", "Olmo3Config", {**OLMO, "hidden_size": 32}, {"value_output": 64}),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", STABLE, {"value_output": 64}),
    "stablelm with norms": (
        "StableLmForCausalLM", "StableLmConfig", {**STABLE, "qk_layernorm": True}, {"value_output": 64}
    ),
    "gemma3": (
        "Gemma3ForCausalLM", "Gemma3TextConfig", {**DECODER, "query_pre_attn_scalar": 8}, {"value_output": 64}
    ),
}  # fmt: skip
# Classes that declare an attention interface and never ask it, or ask of it what ours does not cover.
OWN_ATTENTION = ("Falcon", "Gemma2")
