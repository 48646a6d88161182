"""Which base was this trained on? Base models known again by their weights, whatever files these lie in."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from checkpoints.weight_files import stored_tensors
from runtime.exits import UserError

if TYPE_CHECKING:
    from checkpoints.opening import Opened
    from modeling.family import Family

NUM_ROWS = 2  # of a matrix in the sample: each is a wait for the disk
NUM_THREADS = 16
OTHER_BASE_FIX = "give its own base with --model_name_or_path, or add --allow_other_base to take this one all the same"


def base_name(name: str) -> str:
    """How run.json names a base: a folder by its whole path, a hub name as it is."""
    return os.path.abspath(name) if os.path.isdir(name) else name


def base_fingerprint(folder: str, mode: Family, config: Any) -> str:
    """SHA-256 over a sample of a base model's weights, and the numbers in config.json that its network computes with.

    Of every tensor it takes the name, the shape and NUM_ROWS evenly spaced rows (of a vector: all values) as float32.
    It is the same for the same values in .bin or safetensors files and however they are sharded, for a float32 copy of
    16-bit weights too, and another one for a bf16 copy of fp16 weights. A change of other rows alone, such as new
    vectors for a few tokens, is missed. Some MB of a 6B model are read, in mapped files.
    """
    tied = set(mode.model_class._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    samples = {}
    with ThreadPoolExecutor(NUM_THREADS) as threads:  # the time goes into waiting for the disk
        for name, shape, rows in stored_tensors(folder):
            if name not in tied and not name.endswith("inv_freq"):  # not always stored, and read by no model
                samples[name] = shape, threads.submit(hash_of, sample(shape, rows))
    lines = [f"{name} {list(shape)} {digest.result()}" for name, (shape, digest) in sorted(samples.items())]
    lines += [f"{name} {value!r}" for name, value in sorted(config.network_numbers.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sample(shape: tuple, rows: Any) -> list:
    """Parts of a stored tensor, not read yet: rows[a:b] is the tensor of these rows."""
    if len(shape) < 2 or not shape[0]:
        return [rows[:]] if len(shape) == 1 else []
    numbers = {shape[0] * (2 * n + 1) // (2 * NUM_ROWS) for n in range(NUM_ROWS)}  # at the ends padding may lie
    return [rows[n : n + 1] for n in sorted(numbers)]


def hash_of(parts: Any) -> str:
    """SHA-256 of the values of tensors as float32."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.detach().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def require_own_base(opened: Opened, config: Any) -> None:
    """UserError where the base under an adapter or a prefix encoder is not the one that it was trained on.

    opened: an `Opened` checkpoint. A run.json of before there were fingerprints does not tell.
    """
    said = opened.run.get("base_fingerprint")
    if not opened.kind.needs_base or said is None:
        return
    if said != base_fingerprint(opened.base_folder, opened.mode, config):
        raise UserError(
            f"{opened.folder}: was trained on {opened.run['base_model']}, and {opened.base_folder} holds other weights,"
            f" another precision or another config.json: {OTHER_BASE_FIX}"
        )


def known_bases(opened: Opened, config: Any) -> tuple[str | Any | None, list[Any]]:
    """(fingerprint of the model that an opened checkpoint was trained from or None, those it may be compared with)."""
    own = base_fingerprint(opened.base_folder, opened.mode, config)
    trained_from = own if opened.kind.needs_base else opened.run.get("base_fingerprint")
    return trained_from, sorted({own, trained_from} - {None})
