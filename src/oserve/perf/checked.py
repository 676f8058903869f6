"""The configurations that were checked: their ``model_type``s, and the keys that are read."""

# Language models whose sizes were compared with transformers' and vLLM's; multimodal models nest
# one of them.
_TEXT_TYPES = """
afmoe apertus arcee aria_text axk1 bloom chatglm cohere cohere2 cohere2_moe cwm dbrx deepseek_v2
deepseek_v3 deepseek_v32 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba
flex_olmo gemma gemma2 gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe glm4_moe_lite
glm4v_moe_text glm4v_text glm_moe_dsa gpt2 gpt_bigcode gpt_neox gpt_oss gptj granite granite_swa
granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_dense hunyuan_v1_moe
hy_v3 hyperclovax jais2 jamba kimi_k2 kimi_linear laguna lfm2 lfm2_moe llama llama4_text mamba
mamba2 mimo_v2_flash minicpm3 minimax_m2 ministral3 mistral mixtral nemotron nemotron-nas
nemotron_h olmo olmo2 olmo3 olmoe opt paddleocr_vl_text persimmon phi phi3 phimoe qwen2
qwen2_5_vl_text qwen2_moe qwen2_vl_text qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next
qwen3_vl_moe_text qwen3_vl_text seed_oss smollm3 stablelm starcoder2 step3p5 vaultgemma zamba2
"""
TEXT_TYPES = frozenset(_TEXT_TYPES.split())
# Models with a language model inside, and other inputs besides.
_OUTER_TYPES = """
aria cohere2_vision exaone4_5 gemma3 gemma4 glm4v glm4v_moe lfm2_vl llama4 llava llava_next
llava_onevision minicpmv4_6 mistral3 paddleocr_vl paligemma qianfan_ocr qwen2_5_vl qwen2_vl
qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe step3p7
"""
OUTER_TYPES = frozenset(_OUTER_TYPES.split())
CHECKED = TEXT_TYPES | OUTER_TYPES

# Families that the rules for other models would read, but wrongly or without any comparison; by the
# start of the type.
REFUSED = {
    "deepseek_v4": "its caches are compressed at several rates",
    "longcat_flash": "each of its layers has two attentions with a cache each",
    "minicpm": "they were compared with nothing",
    "olmo_hybrid": "they were compared with nothing",
    "qwen2_5_omni": "its language model is one of several in thinker_config",
    "qwen3_omni": "its language model is one of several in thinker_config",
}
# What to do with a model whose sizes are not known: only planning needs them.
WITHOUT_FACTS = "write a plan yourself, and serve that: oserve serve --plan plan.yaml MODEL"


def why_refused(kind: str) -> str | None:
    """Why models of that ``model_type`` are not read; ``None`` if nothing is known against it."""
    if kind in CHECKED:
        return None
    return next((why for start, why in REFUSED.items() if kind.startswith(start)), None)


_KEYS = """
adapter_rank attention_chunk_size attention_head_dim attention_k_eq_v attention_other_setting
attn_config attn_layer_offset attn_layer_period block_auto_adjust_ff_dim block_configs
block_ffn_dim_multiplier block_multiple_of conv_L_cache conv_kernel d_model decoder_sparse_step
enable_moe_block expand expert_ffn_hidden_size expert_layer_offset expert_layer_period
ffn_config ffn_dim ffn_hidden_size first_k_dense_replace full_attention_interval full_attn_idxs
global_attn_every_n_layers global_head_dim head_dim hidden_size hidden_size_per_layer_input
hybrid_layer_pattern hybrid_override_pattern index_head_dim index_n_heads index_topk inner_dim
interleave_moe_layer_step intermediate_size intermediate_size_mlp kv_channels kv_lora_rank
laurel_rank layer_types layers_block_type linear_attn_config linear_conv_kernel_dim
linear_head_dim linear_key_head_dim linear_num_heads linear_num_key_heads linear_num_value_heads
linear_value_head_dim mamba_d_conv mamba_d_head mamba_d_ssm mamba_d_state mamba_dt_rank
mamba_expand mamba_head_dim mamba_n_groups mamba_n_heads mamba_ngroups mamba_num_heads
mamba_ssm_cache_dtype mamba_ssm_dtype max_position_embeddings max_seq_len max_seq_length
max_sequence_length max_window_layers mlp_layer_types mlp_only_layers model_max_length
moe_ffn_hidden_size moe_intermediate_size moe_k moe_latent_size moe_layer_end_index
moe_layer_freq moe_layer_interval moe_layer_start_index moe_layers moe_layers_enum
moe_num_experts moe_num_shared_experts moe_shared_expert_intermediate_size moe_top_k moe_topk
multi_query multi_query_attention multi_query_group_num n_embd n_groups n_head n_head_kv n_heads
n_inner n_layer n_layers n_mamba_heads n_positions n_routed_experts n_shared_experts
new_decoder_architecture no_rope_layers num_attention_groups num_attention_heads
num_dense_layers num_experts num_experts_per_tok num_experts_per_token
num_global_key_value_heads num_heads num_hidden_layers num_key_value_heads num_kv_heads
num_kv_shared_layers num_layers num_local_experts num_mem_blocks num_shared_expert
num_shared_experts num_sliding_attention_heads original_max_position_embeddings
padded_vocab_size q_lora_rank qk_nope_head_dim qk_rope_head_dim rope_parameters rope_scaling
seq_len seq_length share_expert_dim shared_expert_intermediate_size shared_intermediate_size
sliding_window sliding_window_pattern ssm_state_size state_size swa_head_dim
swa_num_attention_heads swa_num_key_value_heads swa_v_head_dim tie_word_embeddings
time_step_rank top_k_experts use_double_wide_mlp use_shared_attention_adapter use_sliding_window
v_head_dim vocab_size vocab_size_per_layer_input word_embed_proj_dim
"""
KEYS = frozenset(_KEYS.split())
