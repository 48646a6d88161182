"""A family that is no GLM, for the tests: transformers' own LLaMA network with a sentencepiece vocabulary."""

from modeling.family import Family

FAMILY = Family(
    name="tinylm",
    title="TinyLM",
    package="tinylm",
    config="configuration_tinylm.TinyLMConfig",
    network="modeling_tinylm.TinyLMForCausalLM",
    tokenizer="tokenization_tinylm.TinyLMTokenizer",
    required_keys=("intermediate_size", "rms_norm_eps"),
    model_types=("llama",),
    released_name="tinylm",
    layers="model.layers",
    norms=("norm",),
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    special_ids=("bos_token_id", "eos_token_id", "pad_token_id"),
    batch_fields=("input_ids", "labels", "label_positions"),
)
