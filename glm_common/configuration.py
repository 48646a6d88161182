"""What the families' configurations check and save alike."""

import dataclasses

from transformers import PreTrainedConfig


class ChatGLMConfigBase(PreTrainedConfig):
    """Settings of a released config.json; values that would mean another network are refused, not ignored."""

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]
    # The only values that released checkpoints use and this code computes: {name: value}.
    fixed_values = {}

    pre_seq_len: int | None = None
    prefix_projection: bool = False
    use_cache: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(field.default) in (int, float) and not isinstance(value, (int, float, list)):
                raise ValueError(
                    f"config.json: {field.name} = {value!r}: must be a number, {field.default} in the release"
                )
        for name, value in self.fixed_values.items():
            if getattr(self, name, value) != value:
                raise ValueError(f"config.json: {name} = {getattr(self, name)}: only {value} is supported, as released")
        if getattr(self, "quantization_bit", 0):
            raise ValueError(
                f"config.json: quantization_bit = {self.quantization_bit}: a quantised checkpoint cannot be trained"
                " here: use the fp16 release"
            )

    def to_dict(self):
        """The released key `torch_dtype` beside `dtype`, so that older code reads the right precision."""
        output = super().to_dict()
        if output.get("dtype") is not None:
            output["torch_dtype"] = output["dtype"]
        return output
