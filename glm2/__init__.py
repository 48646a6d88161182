"""ChatGLM2-6B (`--mode glm2`)."""

from modeling.family import Family

FAMILY = Family(
    name="glm2",
    title="ChatGLM2-6B",
    package="glm2",
    config="configuration_chatglm.ChatGLMConfig",
    network="modeling_chatglm.ChatGLMForConditionalGeneration",
    tokenizer="tokenization_chatglm.ChatGLMTokenizer",
    required_keys=("padded_vocab_size", "multi_query_group_num"),
    model_types=(),
    released_name="chatglm2",
    layers="transformer.encoder.layers",
    norms=("layernorm",),
    lora_targets=("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    special_ids=("bos_token_id", "eos_token_id", "gmask_token_id", "mask_token_id", "pad_token_id"),
    batch_fields=("input_ids", "labels", "label_positions", "row_lengths"),
    prefix_encoder="transformer.prefix_encoder",
    vllm_values={"rope_ratio": 1},
)
