"""What the families' configurations check and save alike."""

import math

from transformers import PreTrainedConfig

from exits import UserError


class ChatGLMConfigBase(PreTrainedConfig):
    """Settings of a released config.json; values that would mean another network are refused, not ignored."""

    model_type = "chatglm"
    keys_to_ignore_at_inference = ["past_key_values"]
    # The only values that released checkpoints use and this code computes: {name: value}.
    fixed_values = {}
    # Of other families and libraries: no release has these keys, and they ask for another network or quantised weights.
    absent_keys = ("rope_scaling", "rope_theta", "rope_parameters", "partial_rotary_factor", "quantization_config")

    pre_seq_len: int | None = None
    prefix_projection: bool = False
    use_cache: bool = True

    def __post_init__(self, **kwargs):
        for name in self.absent_keys:
            if kwargs.get(name) is not None:
                raise UserError(f"config.json: {name} = {kwargs[name]}: is in no release and not supported: remove it")
        super().__post_init__(**kwargs)
        for family in type(self).__mro__:
            if issubclass(family, ChatGLMConfigBase):
                for name in vars(family).get("__annotations__", {}):
                    self.check_value(name, getattr(type(self), name, None))
        if self.pre_seq_len is not None and (type(self.pre_seq_len) is not int or self.pre_seq_len < 0):
            raise UserError(f"config.json: pre_seq_len = {self.pre_seq_len!r}: must be a whole number of tokens")
        for name, value in self.fixed_values.items():
            if getattr(self, name, value) != value:
                raise UserError(f"config.json: {name} = {getattr(self, name)}: only {value} is supported, as released")
        if getattr(self, "quantization_bit", 0):
            raise UserError(
                f"config.json: quantization_bit = {self.quantization_bit}: a quantised checkpoint cannot be trained"
                " here: use the fp16 release"
            )

    @property
    def window(self):
        """Tokens of a text at most, question and answer: what the model was made for."""
        return getattr(self, "max_sequence_length", None) or self.seq_length

    @property
    def network_numbers(self):
        """{name: value} of the released numbers that decide what the network computes from its weights."""
        families = [family for family in type(self).__mro__ if issubclass(family, ChatGLMConfigBase)]
        names = {name for family in families for name in vars(family).get("__annotations__", {})}
        released = {name for name in names if type(getattr(type(self), name, None)) in (bool, int, float)}
        free = ("max_sequence_length", "seq_length", "use_cache", "prefix_projection")
        kept = [name for name in released if name not in free and not name.endswith("_token_id")]
        return {name: float(getattr(self, name)) for name in kept}

    def check_value(self, name, default):
        """UserError for a value of another kind than the release has: an id, a size, a share, or true and false."""
        value = getattr(self, name)
        if type(default) not in (int, float, bool):
            return
        if type(default) is bool:
            is_good, rule = value in (True, False), "true or false"
        elif name.endswith("_token_id"):
            ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
            is_good, rule = all(type(i) is int and i >= 0 for i in ids), "an id of the tokenizer"
        elif type(default) is int:
            is_good, rule = type(value) is int and value >= 1, "a whole number of at least 1"
        else:
            is_number = type(value) in (int, float) and math.isfinite(value)
            is_share = name.endswith("_dropout")
            is_good = is_number and (0 <= value < 1 if is_share else value > 0)
            rule = "a number from 0 to below 1" if is_share else "a number above 0"
        if not is_good:
            raise UserError(f"config.json: {name} = {value!r}: must be {rule}, {default} in the release")

    def to_dict(self):
        """The released key `torch_dtype` beside `dtype`, so that older code reads the right precision."""
        output = super().to_dict()
        if output.get("dtype") is not None:
            output["torch_dtype"] = output["dtype"]
        return output
