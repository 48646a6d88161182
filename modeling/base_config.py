"""What the families' configurations check and save alike."""

import re
from typing import Any

from transformers import PreTrainedConfig

from runtime.exits import UserError
from runtime.plain_files import shown

MOST = 1 << 24  # of a size in config.json; that of a released network's vocabulary is 2**18 at most
DTYPES = ("float16", "bfloat16", "float32")
# Keys of releases that decide nothing here.
FREE_KEYS = (
    *("_name_or_path", "architectures", "auto_map", "model_type", "transformers_version", "torch_dtype", "dtype"),
    *("apply_query_key_layer_scaling", "attention_softmax_in_fp32", "bias_dropout_fusion", "classifier_dropout"),
    *("quantization_embeddings", "_attn_implementation_autoset"),
)
CODE_KEYS = tuple(  # the library fetches and runs code that these name
    f"{start}{what}_implementation{end}"
    for what in ("attn", "experts")
    for start, end in (("", ""), ("_", ""), ("_", "_internal"))
)


class ReleasedConfig(PreTrainedConfig):
    """Settings of a released config.json; values that would mean another network are refused, not ignored."""

    keys_to_ignore_at_inference = ["past_key_values"]
    # The only values that released checkpoints use and this code computes: {name: value}.
    fixed_values = dict[str, Any]()
    # Of other families and libraries: no release has these keys, and they ask for another network or quantised weights.
    absent_keys = tuple[str, ...](("quantization_config",))
    window_key = "max_position_embeddings"  # its value: tokens of a text at most

    use_cache: bool = True

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs: Any) -> "ReleasedConfig":
        """The configuration of a config.json. Only keys that mean something here reach the library."""
        for name in CODE_KEYS:
            value = config_dict.get(name)
            if value is not None and not (isinstance(value, str) and re.fullmatch(r"\w+", value)):
                raise UserError(
                    f"config.json: {name} = {shown(value)}: names code of others, which is never fetched or run here:"
                    " remove it"
                )
        for name in ("torch_dtype", "dtype"):
            if config_dict.get(name) not in (None, *DTYPES):
                raise UserError(f"config.json: {name} = {shown(config_dict[name])}: must be one of {', '.join(DTYPES)}")
        for name, other in cls.attribute_map.items():
            if name in config_dict and config_dict[name] != config_dict.get(other, config_dict[name]):
                raise UserError(
                    f"config.json: {name} = {shown(config_dict[name])}, but {other} = {shown(config_dict[other])}:"
                    " they mean the same: remove one of them"
                )
        known = {name: value for name, value in config_dict.items() if name in cls.known_keys()}
        return super().from_dict(known, **kwargs)

    @classmethod
    def declared(cls) -> list[str]:
        """Names of the families' own settings."""
        families = [c for c in cls.__mro__ if issubclass(c, PreTrainedConfig) and c is not PreTrainedConfig]
        return [name for family in families for name in vars(family).get("__annotations__", {})]

    @classmethod
    def known_keys(cls) -> set[str]:
        """Keys of a config.json that are obeyed, or refused where their value is not the released one."""
        ids = [f"{name}_token_id" for name in ("bos", "eos", "pad", "mask", "gmask")]
        others = (*cls.attribute_map, *cls.fixed_values, *cls.absent_keys, "quantization_bit", "torch_dtype", "dtype")
        return {*cls.declared(), *ids, *others}

    @classmethod
    def unused_keys(cls, config_dict: dict) -> list[str]:
        """Keys of a config.json that say something, and not to this code."""
        known = {*cls.known_keys(), *FREE_KEYS}
        return [name for name, value in config_dict.items() if name not in known and value is not None]

    def __post_init__(self, **kwargs: Any) -> None:
        for name in self.absent_keys:
            if kwargs.get(name) is not None:
                value = shown(kwargs[name])
                raise UserError(f"config.json: {name} = {value}: is in no release and not supported: remove it")
        super().__post_init__(**kwargs)
        for name in self.declared():
            self.check_value(name, getattr(type(self), name, None))
        for name, value in self.fixed_values.items():
            if getattr(self, name, value) != value:
                found = shown(getattr(self, name))
                raise UserError(f"config.json: {name} = {found}: only {value} is supported, as released")
        if getattr(self, "quantization_bit", 0):
            raise UserError(
                f"config.json: quantization_bit = {shown(self.quantization_bit)}: a quantised checkpoint cannot be"
                " trained here: use the fp16 release"
            )

    @property
    def window(self) -> int:
        """Tokens of a text at most, question and answer: what the model was made for."""
        return getattr(self, self.window_key)

    @property
    def network_numbers(self) -> dict[str, float]:
        """{name: value} of the released numbers that decide what the network computes from its weights."""
        released = {name for name in self.declared() if type(getattr(type(self), name, None)) in (bool, int, float)}
        free = (self.window_key, "use_cache", "prefix_projection")
        kept = [name for name in released if name not in free and not name.endswith("_token_id")]
        return {name: float(getattr(self, name)) for name in kept}

    def check_value(self, name: str, default: Any) -> None:
        """UserError for a value of another kind than the release has: an id, a size, a share, or true and false."""
        value = getattr(self, name)
        if type(default) not in (int, float, bool):
            return
        if type(default) is bool:
            is_good, rule = type(value) in (bool, int) and value in (True, False), "true or false"
        elif name.endswith("_token_id"):
            ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
            is_good, rule = all(type(i) is int and 0 <= i <= MOST for i in ids), "an id of the tokenizer"
        elif type(default) is int:
            is_good = type(value) is int and 1 <= value <= MOST
            rule = f"a whole number of at least 1 and at most {MOST}"
        else:
            is_number = type(value) in (int, float)
            is_share = name.endswith("_dropout")
            is_good = is_number and (0 <= value < 1 if is_share else 0 < value <= MOST)
            rule = "a number from 0 to below 1" if is_share else f"a number above 0 and at most {MOST}"
        if not is_good:
            raise UserError(f"config.json: {name} = {shown(value)}: must be {rule}, {default} in the release")

    def to_dict(self) -> dict:
        """The released key `torch_dtype` beside `dtype`, so that older code reads the right precision."""
        output = super().to_dict()
        if output.get("dtype") is not None:
            output["torch_dtype"] = output["dtype"]
        return output


class ChatGLMConfigBase(ReleasedConfig):
    """Settings that the three ChatGLMs have alike. `pre_seq_len` (tokens; None is off) and `prefix_projection` add a
    prefix encoder."""

    model_type = "chatglm"
    absent_keys = ("rope_scaling", "rope_theta", "rope_parameters", "partial_rotary_factor", "quantization_config")

    pre_seq_len: int | None = None
    prefix_projection: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        length = self.pre_seq_len
        if length is not None and (type(length) is not int or not 0 <= length <= MOST):
            raise UserError(f"config.json: pre_seq_len = {shown(length)}: must be a whole number of tokens")
