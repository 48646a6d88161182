"""A base model is known again by its weights: the same one in other files is, another one of the same shapes is not."""

# ruff: noqa: F811

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from doctor_lines import adapter, bad, look, spoilt, text_of
from refusing import (
    FOLDERS,
    OUTPUT_LAYER,
    WeightsReached,
    both,
    case,
    change_json,
    one_file,
    put,
    replaced,
    sandbox,  # noqa: F401, a fixture
)

import merge_lora
from checkpoints import opening, weight_files
from checkpoints.bases import base_fingerprint
from evaluation import forgetting
from modes import MODES
from runtime.folders import file_entry
from training import run_folder


def fingerprint_of(folder, mode="glm3", **changes):
    return base_fingerprint(str(folder), MODES[mode], opening.read_config(str(folder), MODES[mode], changes))


def state_of(folder):
    """The stored tensors."""
    return {name: rows[:].clone() for name, _, rows in weight_files.stored_tensors(str(folder))}


def stored_as(state, folder, size):
    """The weights in safetensors files of this size at most, in place of those that lie there."""
    for path in folder.glob("pytorch_model*"):
        path.unlink()
    weight_files.write_weights(state, str(folder), size)


@pytest.mark.parametrize("mode", MODES)
def test_the_same_weights_in_other_files_are_the_same_base(sandbox, mode):
    """Other formats, shards and precisions that hold the same values, and without what no model reads."""
    released = fingerprint_of(FOLDERS[mode], mode)
    state = state_of(FOLDERS[mode])
    assert fingerprint_of(FOLDERS[mode], mode, pre_seq_len=4) == released, "a new prefix is not part of the base"
    copies = [("5GB", state), ("100KB", state), ("5GB", {name: t.float() for name, t in state.items()})]
    tied = {"glm": "lm_head.weight"}.get(mode)
    copies.append(("5GB", {n: t for n, t in state.items() if n != tied and not n.endswith("inv_freq")}))
    copies.append(("5GB", {**state, "transformer.rotary_pos_emb.inv_freq": torch.ones(4)}))
    for number, (size, copy) in enumerate(copies):
        folder = sandbox.model(mode, f"copy-{number}")
        stored_as(copy, folder, size)
        assert len(list(folder.glob("*.safetensors"))) == 1 or size == "100KB"
        assert fingerprint_of(folder, mode) == released, number
    one_file(name="pytorch_model.bin")(sandbox.model(mode))
    assert fingerprint_of("model", mode) == released


def test_a_change_in_any_tensor_is_another_base(sandbox):
    """Of each tensor's sample; of the precision, of a shape, and of config.json."""
    folder, state = sandbox.model(), state_of(FOLDERS["glm3"])
    state = {name: tensor for name, tensor in state.items() if not name.endswith("inv_freq")}
    seen, num_changes = {fingerprint_of(folder)}, 0
    for name, tensor in state.items():
        rows = (len(tensor) // 4, len(tensor) * 3 // 4) if tensor.dim() > 1 else (0,)
        for row in rows:
            changed = tensor.clone()
            changed[row].view(-1)[-1] += 1
            stored_as({**state, name: changed}, folder, "5GB")
            seen.add(fingerprint_of(folder))
            num_changes += 1
    for other in ({n: t.bfloat16() for n, t in state.items()}, {**state, OUTPUT_LAYER: state[OUTPUT_LAYER].t()}):
        stored_as(other, folder, "5GB")
        seen.add(fingerprint_of(folder))
    seen.add(fingerprint_of(FOLDERS["glm3"], rope_ratio=50))
    assert len(seen) == 1 + num_changes + 3
    assert fingerprint_of(FOLDERS["glm3"], seq_length=64) in seen, "how long a text may be is no other network"


def test_a_change_outside_the_sample_keeps_the_fingerprint(sandbox):
    """A change of nothing but rows that are not in the sample, as of the vector of one token."""
    folder, state = sandbox.model(), state_of(FOLDERS["glm3"])
    changed = state[OUTPUT_LAYER].clone()
    changed[7] += 1
    stored_as({**state, OUTPUT_LAYER: changed}, folder, "5GB")
    assert fingerprint_of(folder) == fingerprint_of(FOLDERS["glm3"])


# ---------------------------------------------------------------- an adapter or a prefix on another base


def twin(sandbox, name="twin"):
    """A base of the same shapes and other weights."""
    folder = sandbox.model(name=name)
    one_file(replaced(lambda tensor: tensor + 1))(folder)
    return folder


OWN = {"base_fingerprint": fingerprint_of(FOLDERS["glm3"])}
OTHER = r"adapter: was trained on \S+/glm3, and twin holds other weights, another precision or .*--allow_other_base"
ON_TWIN = ("--model_name_or_path", "twin", "--device", "cpu")


@pytest.mark.parametrize(
    "script, words",
    [
        ("predict.py", ("--model_path", "adapter", "--prompt", "a")),
        ("merge_lora.py", ("--model_dir", "adapter")),
    ],
)
def test_another_base_of_the_same_shapes_is_refused(sandbox, script, words):
    """Shapes alone do not tell one base from another; nothing is written, no weight is loaded."""
    adapter(sandbox, **OWN)
    twin(sandbox)
    sandbox.fails(script, *words, *ON_TWIN, says=OTHER)
    with pytest.raises(WeightsReached):
        sandbox.run(script, *words, *ON_TWIN, "--allow_other_base")


def test_a_base_that_was_replaced_where_it_lies_is_refused(sandbox):
    """Also under a prefix encoder, and by the doctor."""
    folder = adapter(sandbox, base_model="twin", **OWN)
    twin(sandbox)
    says = r"adapter: was trained on twin, and twin holds other weights"
    sandbox.fails("predict.py", "--model_path", "adapter", "--prompt", "a", "--device", "cpu", says=says)
    assert spoilt(look(folder), "adapter: was trained on twin", "--allow_other_base")
    prefix = sandbox.adapter("prefix", weights="prefix", train_type="ptuning", base_model="twin", **OWN)
    config = json.loads((FOLDERS["glm3"] / "config.json").read_text()) | {"pre_seq_len": 4, "prefix_projection": False}
    both(put("config.json", json.dumps(config)), put("prefix_encoder.safetensors", b""))(prefix)
    sandbox.fails("predict.py", "--model_path", "prefix", "--prompt", "a", says="prefix: was trained on twin")


def test_the_same_base_elsewhere_and_an_older_run_are_taken(sandbox):
    folder = adapter(sandbox, **OWN)
    shutil.move(sandbox.model(), sandbox.folder / "moved")
    one_file()(sandbox.folder / "moved")
    with pytest.raises(WeightsReached):
        sandbox.run("predict.py", "--model_path", "adapter", "--prompt", "a", "--model_name_or_path", "moved")
    lines = look(folder)
    assert not bad(lines) and "base's weights" not in [name for _, name, _ in lines]
    change_json("run.json", base_fingerprint=None, base_model=str(twin(sandbox)))(folder)
    with pytest.raises(WeightsReached):
        sandbox.run("predict.py", "--model_path", "adapter", "--prompt", "a", "--device", "cpu")
    lines = look(folder)
    assert not bad(lines) and "not known" in text_of(lines, "base's weights")


def test_the_merged_run_names_the_base_that_was_used(sandbox, capsys):
    """Also where it is another one on purpose; the flags of the training stay."""
    sandbox.allow_weights()
    flags = {"model_name_or_path": str(FOLDERS["glm3"]), "max_src_len": 48}
    adapter(sandbox, flags=flags, **OWN)
    folder = twin(sandbox)
    merge_lora.main(["--model_dir", "adapter", "--output_dir", "on-twin", *ON_TWIN, "--allow_other_base"])
    merge_lora.main(["--model_dir", "adapter", "--output_dir", "on-own", "--device", "cpu"])
    runs = [json.loads((sandbox.folder / name / "run.json").read_text()) for name in ("on-twin", "on-own")]
    assert [run["base_model"] for run in runs] == [str(folder), str(FOLDERS["glm3"])]
    assert [run["base_fingerprint"] for run in runs] == [fingerprint_of(folder), OWN["base_fingerprint"]]
    assert all(run["flags"] == flags and run["weights"] == "whole" for run in runs)


WHOLE = [
    case("base", f"--model_name_or_path {FOLDERS['glm2']}", "--model_name_or_path .*: .* holds whole weights, which"),
    case("other-base", "--allow_other_base", "--allow_other_base: .* holds whole weights, which need no base: remove"),
]


@pytest.mark.parametrize("more, says", WHOLE)
def test_whole_weights_take_no_base(sandbox, more, says):
    """A flag that would mean nothing is refused."""
    words = ["--model_path", FOLDERS["glm3"], "--prompt", "a", "--device", "cpu"]
    sandbox.fails("predict.py", *words, *more.split(), says=says)


def test_another_tokenizer_beside_the_weights_is_refused(sandbox):
    """The vocabulary of another release, whose number of ids fits."""
    folder = adapter(sandbox, tokenizer_sha256=file_entry(str(FOLDERS["glm3"] / "tokenizer.model"))["sha256"])
    assert not bad(look(folder))
    change_json("run.json", tokenizer_sha256="0" * 64)(folder)
    assert spoilt(look(folder), "tokenizer.model: is not the one that the run had", "copy the folder again")
    says = r"adapter/tokenizer\.model: is not the one that the run had"
    sandbox.fails("predict.py", "--model_path", "adapter", "--prompt", "a", "--device", "cpu", says=says)


def test_forgetting_is_not_measured_against_another_base(sandbox):
    """A result of --before must be of what the model was trained from, as far as both are known."""
    args = SimpleNamespace(before="before.json", model_path="run")
    for bases, trained_from in ((["a", "b"], "b"), (["a"], None), (None, "b")):
        forgetting.require_same_base({"model": "m", "bases": bases}, trained_from, args)
    with pytest.raises(ValueError, match=r"--before before\.json: is of m, and run was trained from another base"):
        forgetting.require_same_base({"model": "m", "bases": ["a", "b"]}, "c", args)


def test_best_weights_of_another_run_are_not_taken():
    """The step alone does not tell one run from another."""
    args = SimpleNamespace(seed=1, train_type="lora", output_dir="new")
    base = SimpleNamespace(folder="folder", fingerprint="f")
    own = run_folder.RunFolder(args, base, None, None, None, {})
    flags = {"seed": 1, "train_type": "lora", "output_dir": "old"}
    assert own.is_own({"flags": flags, "base_fingerprint": "f"}) and own.is_own({"flags": flags}) and own.is_own({})
    assert not own.is_own({"flags": {**flags, "seed": 2}}) and not own.is_own({"base_fingerprint": "g"})
