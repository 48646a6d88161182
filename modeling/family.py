"""A model family: one object that its folder exports, with all that the rest of the toolkit asks of it."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


class Prompt(Protocol):
    """What a family's prompt module holds. It imports nothing heavy: processes that encode rows need it alone."""

    RESERVED: int  # ids of a row that are neither source nor answer
    SUPERVISED_PROMPT_IDS: int  # last ids of the prompt that carry loss, too

    def encode_prompt(
        self, tokenizer: Any, query: str, history: Sequence = (), max_src_len: int | None = None
    ) -> tuple[list[int], int]:
        """(ids of the generation prompt, number of ids of the question cut away)."""

    def encode_answer(self, tokenizer: Any, answer: str) -> list[int]:
        """Ids of an answer, without its end."""

    def stop_ids(self, tokenizer: Any) -> list[int]:
        """Ids that end an answer; the first one closes training rows."""

    def clean_response(self, text: str) -> str:
        """What the released chat does to decoded text."""


@dataclass(frozen=True)
class Family:
    """A model family, as its folder's `__init__.py` exports it by the name FAMILY.

    Its classes are imported when they are first asked for, so that the object costs nothing: `--help` has it too.
    """

    name: str  # of --mode
    title: str  # what people call it
    package: str  # its folder
    config: str  # module.Class in the folder; so are the next two
    network: str
    tokenizer: str
    # How its config.json is recognised: keys that every release has, and values of model_type, where these are its own
    # (none: any); part of the name of the released repository decides between families whose keys are the same.
    required_keys: tuple[str, ...]
    model_types: tuple[str, ...]
    released_name: str
    layers: str  # the list of its layers, as parameters name it
    norms: tuple[str, ...]  # parts of the names of norms: their weights do not decay
    lora_targets: tuple[str, ...]  # last names of the linear layers that can get matrices
    special_ids: tuple[str, ...]  # must be alike in config.json and in the tokenizer, where both have them
    batch_fields: tuple[str, ...]  # what the network takes of a batch; with row_lengths rows can be packed
    prefix_encoder: str | None = None  # the module of P-Tuning v2, as parameters name it; None: it has none
    is_encoder_decoder: bool = False
    vllm_values: dict | None = (
        None  # of config.json, where vLLM computes as released; None: it does not know the family
    )

    def load(self, name: str) -> Any:
        """What a `module.Class` of the folder names."""
        module, _, attribute = name.partition(".")
        return getattr(importlib.import_module(f"{self.package}.{module}"), attribute)

    @property
    def config_class(self) -> Any:
        """Its configuration, a `ReleasedConfig`."""
        return self.load(self.config)

    @property
    def model_class(self) -> Any:
        """Its network, a `LabelledLM`."""
        return self.load(self.network)

    @property
    def tokenizer_class(self) -> Any:
        """Its tokenizer, a `SentencePieceTokenizer`."""
        return self.load(self.tokenizer)

    @property
    def prompt(self) -> Prompt:
        """Its prompt module."""
        return importlib.import_module(f"{self.package}.prompt")  # type: ignore[return-value]

    @property
    def can_pack(self) -> bool:
        """Does its network keep rows of one sequence apart?"""
        return "row_lengths" in self.batch_fields

    def recognises(self, config: dict) -> bool:
        """Can a config.json be of this family?"""
        has_keys = all(key in config for key in self.required_keys)
        return has_keys and (not self.model_types or config.get("model_type") in self.model_types)
