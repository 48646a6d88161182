"""Checkpoints on disk: folders opened and understood, whoever saved them."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from checkpoints.adapter_settings import SETTINGS_FILE
from checkpoints.base_weights import check_weights, load_base
from checkpoints.bases import base_name, require_own_base
from checkpoints.kinds import KINDS, SavedKind, kind_of, weight_file
from checkpoints.released_files import COMPANIONS
from checkpoints.trained_weights import check_trained, put_trained, trained_shapes
from checkpoints.weight_files import weight_files
from modeling.family import Family
from modes import MODES, possible_modes
from runtime.exits import UserError
from runtime.file_kinds import BROUGHT_ELSE, explain
from runtime.folders import file_entry, last_named, numbered
from runtime.plain_files import shown
from runtime.ranks import print_rank_0
from runtime.streams import visible
from utils import read_json

if TYPE_CHECKING:
    import torch

RUN_FILE = "run.json"
CHECKPOINT = r"epoch-\d+-step-(\d+)"
MOST_NAMED = 4  # checkpoints, or keys of a file, that a message names
BASE_FIX = "give its place with --model_name_or_path"  # of a base that is not where it was


def resolve_folder(name: str, flag: str = "--model_name_or_path") -> str:
    """Folder of a checkpoint: a local one as it is, a hub name from the hub's cache, which is filled if need be.

    Where a repository has its weights in two formats, only the safetensors are fetched. Its code is fetched to lie
    beside what is saved; it is never run here.
    """
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.model", "*.safetensors", *COMPANIONS]
    try:
        folder = snapshot_download(name, allow_patterns=patterns)
        if not any(file.endswith(".safetensors") for file in os.listdir(folder)):
            folder = snapshot_download(name, allow_patterns=[*patterns, "*.bin"])
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{flag} {name}: cannot be fetched from the hub ({reason}): give a folder") from None


def read_config(folder: str, mode: Family, changes: dict | None = None) -> Any:
    """The family's configuration with changed settings; UserError that names the file for values not supported."""
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise UserError(f"{folder}: no config.json in it: name a folder with a whole checkpoint")
    values = read_json(path)
    try:
        config = mode.config_class.from_dict(values, **(changes or {}))
    except UserError as error:
        raise UserError(f"{folder}/{error}") from None
    except (TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: {error}") from None
    tell_unused(path, tuple(mode.config_class.unused_keys(values)))
    return config


@functools.cache
def tell_unused(path: str, names: Sequence[str]) -> None:
    """Say once, on the first process, which keys of a file are not used."""
    if names:
        more = f" and {len(names) - MOST_NAMED} others" if len(names) > MOST_NAMED else ""
        said = ", ".join(visible(name[:60]) for name in names[:MOST_NAMED])
        print_rank_0(f"note: {path}: not used here: {said}{more}", file=sys.stderr)


def read_tokenizer_settings(folder: str, mode: Family) -> dict:
    """What tokenizer_config.json gives the family's tokenizer; keys that it has no use for reach no library."""
    path = os.path.join(folder, "tokenizer_config.json")
    if not os.path.exists(path):
        return {}
    values = {name: value for name, value in read_json(path).items() if value is not None}
    settings = mode.tokenizer_class.settings
    for name in filter(values.__contains__, settings):
        is_good, rule = settings[name]
        value = values[name]
        if name.endswith("_token") and isinstance(value, dict):  # as an AddedToken is written
            value = values[name] = value.get("content")
        if not is_good(value):
            raise UserError(f"{path}: {name} = {shown(value)}: must be {rule}: copy it from the release")
    tell_unused(path, tuple(name for name in values if name not in (*settings, *mode.tokenizer_class.free_settings)))
    return {name: value for name, value in values.items() if name in settings}


def read_tokenizer(folder: str, mode: Family, config: Any) -> Any:
    """The family's tokenizer; UserError where it is absent or has other ids than the configuration says."""
    vocab_name = mode.tokenizer_class.vocab_files_names["vocab_file"]
    if not os.path.isfile(os.path.join(folder, vocab_name)):
        raise UserError(f"{folder}/{vocab_name}: missing: copy it from the release (--mode {mode.name} needs it)")
    if said := explain(os.path.join(folder, vocab_name), BROUGHT_ELSE):
        raise UserError(f"{folder}/{vocab_name}: {said}")
    settings = read_tokenizer_settings(folder, mode)
    try:
        tokenizer = mode.tokenizer_class(os.path.join(folder, vocab_name), name_or_path=folder, **settings)
    except UserError as error:  # names the file alone where it is the settings'
        said = str(error)
        raise UserError(f"{folder}/{said}" if said.startswith("tokenizer_config.json") else said) from None
    except (TypeError, AttributeError, KeyError) as error:  # the library does not look at types before it uses them
        raise UserError(f"{folder}/tokenizer_config.json: {error}: copy it from the release") from None
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: {vocab_name} has {tokenizer.vocab_size} ids but the model only {config.vocab_size}:"
            " the files are of different releases"
        )
    for name in mode.special_ids:
        in_config, in_tokenizer = getattr(config, name, None), getattr(tokenizer, name, None)
        if None not in (in_config, in_tokenizer) and in_config != in_tokenizer:
            raise UserError(
                f"{folder}: {name} is {in_config} in config.json but {in_tokenizer} in {vocab_name}:"
                " the files are of different releases (v1.0 and v1.1 of ChatGLM-6B have shifted ids)"
            )
    return tokenizer


@dataclass
class Opened:
    """A checkpoint folder understood: its family, where the base weights and its own lie, and its run.json.

    run: {} where train.py did not save it. file: name of the file that holds an adapter or a prefix encoder. base_name:
    the base as a run.json names it, a folder's whole path or a hub name.
    """

    folder: str
    mode: Any  # its Family; None until that is known
    base_folder: str
    kind: SavedKind
    run: dict
    file: str = ""
    base_name: str = ""

    @property
    def modes(self) -> list[str]:
        """Names of the modes that it can be."""
        return [self.run["mode"]] if self.run else possible_modes(self.base_folder)

    @property
    def trained_path(self) -> str:
        """The file of an adapter or a prefix encoder."""
        return os.path.join(self.folder, self.file)

    def config(self) -> Any:
        """Configuration for the base weights with what was trained on top."""
        return read_config(self.base_folder, self.mode, self.config_changes())

    def config_changes(self) -> dict:
        """Settings that what was trained brings: those of a prefix encoder."""
        return self.kind.config_changes(self, lambda: trained_shapes(self))

    def tokenizer(self, config: Any) -> Any:
        """The tokenizer saved beside the weights, of other tools' adapters and prefix encoders the base's.

        UserError where it is another than that of the training.
        """
        tokenizer = read_tokenizer(self.folder if self.run else self.base_folder, self.mode, config)
        said = self.run.get("tokenizer_sha256")
        if said not in (None, file_entry(tokenizer.vocab_file)["sha256"]):
            raise UserError(
                f"{tokenizer.vocab_file}: is not the one that the run had (SHA-256), so its ids may mean other words:"
                " copy the folder again"
            )
        return tokenizer


def open_checkpoint(path: str, mode_name: str | None = None, base: Any = None, flag: str = "--model_path") -> Opened:
    """Understand any folder that we save, a released one, one of another tool, or a hub name.

    UserError says what is wrong with it. mode_name: the family where the files do not tell. base: where the base model
    is now, if it has moved or the folder does not name it.
    """
    opened = look_into(path, base, flag)
    names = opened.modes
    if mode_name and mode_name not in names:
        raise UserError(f"--mode {mode_name}: {path} is of {' or '.join(names) or 'no family known here'}: change it")
    if not mode_name and len(names) != 1:
        raise UserError(f"--mode: {path} can be {' or '.join(names) or 'no family known here'}: give --mode")
    opened.mode = MODES[mode_name or names[0]]
    return opened


def look_into(path: str, base: Any = None, flag: str = "--model_path") -> Opened:
    """`open_checkpoint` before the family is known: what `Opened.modes` are, is still to be looked at."""
    folder = resolve_folder(path, flag)
    run_path = os.path.join(folder, RUN_FILE)
    run = read_run(run_path) if os.path.isfile(run_path) else {}
    kind = KINDS[run["weights"]] if run else kind_of(folder)
    if not kind.needs_base:
        if base:
            raise UserError(f"--model_name_or_path {base}: {path} holds whole weights, which need no base: remove it")
        return Opened(folder, None, folder, kind, run)
    file = kind.files[0] if run else weight_file(folder, kind)
    if not os.path.isfile(os.path.join(folder, file)):
        raise UserError(f"{folder}/{file}: missing, but run.json says it is there: copy the folder again")
    name = base or (run["base_model"] if run else kind.named_base(folder))
    said_by = run_path if run else os.path.join(folder, SETTINGS_FILE)
    said = f"--model_name_or_path {name}" if base else f"{said_by}: base model {name}"
    base_folder = resolve_base(name, said, base is not None, run.get("mode"))
    return Opened(folder, None, base_folder, kind, run, file, base_name(name))


def read_run(path: str) -> dict:
    """A run.json with what loading needs; UserError names what is not in it."""
    run = read_json(path)
    known = {"mode": list(MODES), "weights": sorted(KINDS)}
    for key, choices in known.items():
        if run.get(key) not in choices:
            raise UserError(f"{path}: {key} is {run.get(key)!r}: it must be one of {', '.join(choices)}")
    if KINDS[run["weights"]].needs_base and not isinstance(run.get("base_model"), str):
        raise UserError(f"{path}: base_model is {run.get('base_model')!r}: it must name the base checkpoint")
    return run


def no_checkpoint_problem(flag: str, path: str, kind: Any = None) -> str | None:
    """For a run's folder, or a state, that is given as a model: a message with the checkpoints there are; else None.

    kind: of their weights, as run.json has it; None: all.
    """
    is_state = os.path.isfile(os.path.join(path, "state.json"))
    parent = os.path.dirname(last_named(path)) if is_state else path
    names = [*numbered(parent or ".", CHECKPOINT), "best"]
    found = [place for name in names if os.path.isfile(os.path.join(place := os.path.join(parent, name), RUN_FILE))]
    if not is_state and not found:
        return None
    what = "is a state to resume a training from, not a model" if is_state else "is a run's folder, not a checkpoint"
    fitting = [place for place in found if kind in (None, weights_kind(place))]
    if not fitting:
        return f"{flag} {path}: {what}; there is no checkpoint{f' of {kind} weights' * bool(kind)} to name instead"
    more = f" ({len(fitting) - MOST_NAMED} more)" if len(fitting) > MOST_NAMED else ""
    if more and fitting[-1].endswith("best"):
        fitting.insert(MOST_NAMED - 1, fitting.pop())
    return f"{flag} {path}: {what}: name {' or '.join(fitting[:MOST_NAMED])}{more}"


def weights_kind(folder: str) -> Any:
    """What a checkpoint's run.json calls its weights; '' where it cannot be read."""
    try:
        return read_run(os.path.join(folder, RUN_FILE))["weights"]
    except UserError:
        return ""


def resolve_base(name: str, said: str, is_given: bool, mode_name: str | None = None) -> str:
    """Folder of a base model, of the run's family.

    said: where the name comes from, for messages. is_given: by a flag. mode_name: of the run; None: any.
    """
    if not os.path.isdir(name) and (os.path.isabs(name) or os.path.exists(name)):
        if is_given:
            raise UserError(f"{said}: no such folder: give the base model's folder")
        raise UserError(f"{said} is not there: {BASE_FIX}")
    try:
        folder = resolve_folder(name, said.removesuffix(f" {name}"))
    except UserError as error:
        if is_given:
            raise
        raise UserError(f"{str(error).removesuffix('give a folder')}{BASE_FIX}") from None
    weight_files(folder)
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise UserError(f"{folder}: no config.json in it: name the base model's folder")
    modes = possible_modes(folder)
    if mode_name and mode_name not in modes:
        raise UserError(
            f"{said} is of {' or '.join(modes) or 'no family known here'}, but the run is of {mode_name}:"
            " give the model that was fine-tuned"
        )
    return folder


def load_base_and_trained(
    opened: Opened, config: Any, dtype: torch.dtype, device: torch.device, allow_other_base: bool = False
) -> torch.nn.Module:
    """The base model in `dtype` on the device with the trained weights on it, checked before they are read.

    allow_other_base: take another base of the same shapes than that of the training, too.
    """
    check_opened(opened, config, allow_other_base)
    return put_trained(load_base(opened.base_folder, opened.mode, config, dtype, device), opened)


def check_opened(opened: Opened, config: Any, allow_other_base: bool = False) -> None:
    """Do the files of a checkpoint and of its base belong together and to the family? UserError says what does not."""
    check_weights(opened.base_folder, opened.mode, config, new_prefix=opened.kind.base_makes_it)
    if not allow_other_base:
        require_own_base(opened, config)
    if opened.kind.needs_base:
        check_trained(opened, config)


def load_opened(
    opened: Opened, dtype: torch.dtype, device: torch.device, allow_other_base: bool = False
) -> tuple[torch.nn.Module, Any]:
    """(model in eval mode on the device, tokenizer) of an opened checkpoint, as `load_base_and_trained` says."""
    config = opened.config()
    tokenizer = opened.tokenizer(config)
    model = load_base_and_trained(opened, config, dtype, device, allow_other_base)
    return model.to(device=device, dtype=dtype).eval(), tokenizer
