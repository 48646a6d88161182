"""Adapters of peft and prefix encoders of the official code: opened, answered with, merged, looked at, refused by name.

The references are peft's own model and the golden numbers, not what is tested.
"""

# ruff: noqa: F811

import argparse
import json
import re
import shutil

import pytest
import torch
from peft_adapters import CPU, KINDS, adapted
from predicting import answers, write_rows
from reference import GOLDEN_FOLDERS, Golden
from refusing import change_json, drop, put, sandbox  # noqa: F401, a fixture
from safetensors.torch import load_file, save_file

import merge_lora
from checkpoints import base_weights, inspection, weight_files
from checkpoints.opening import load_opened, open_checkpoint
from modes import MODES
from runtime import machine

SAFETENSORS, BIN = "adapter_model.safetensors", "adapter_model.bin"


def look(folder, base=None, mode=None, full=False):
    """(marks, text) of doctor.py on a folder."""
    args = argparse.Namespace(mode=mode, full=full, model_name_or_path=base and str(base))
    lines = list(inspection.folder_lines(str(folder), args, machine.Facts()))
    return [mark for mark, *_ in lines], " ".join(text for *_, text in lines)


@torch.no_grad()
def logits_of(folder, ids, mode=None, base=None):
    """Logits of what a folder holds, in float32."""
    opened = open_checkpoint(str(folder), mode, base=base)
    model, _ = load_opened(opened, torch.float32, CPU)
    return model(input_ids=ids).logits


@pytest.mark.parametrize("mode_name, name", [("glm", "plain"), *(("glm3", name) for name in KINDS)])
@torch.no_grad()
def test_an_adapter_of_peft_is_the_same_function(mode_name, name, tmp_path):
    """Of the kind: settings that peft obeys. peft's own model has the right logits."""
    golden = Golden(mode_name)
    model = adapted(golden, tmp_path, name, {"target_modules": "all-linear"} if name == "all-linear" else None)
    ids = golden.tensors["one.input_ids"]
    wanted = model(input_ids=ids).logits
    assert (logits_of(tmp_path, ids) - wanted).abs().max() < 1e-6
    with model.disable_adapter():
        assert (model(input_ids=ids).logits - wanted).abs().max() > 1e-2


def stored_as_bin(folder, state):
    torch.save(state, folder / BIN)


def with_adapters_name(folder, state):
    save_file({name.replace(".weight", ".default.weight"): tensor for name, tensor in state.items()}, folder / SAFETENSORS)


def without_peft_prefix(folder, state):
    torch.save({name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}, folder / BIN)


@pytest.mark.parametrize("store", [stored_as_bin, with_adapters_name, without_peft_prefix])
@torch.no_grad()
def test_names_and_files_of_other_trainers(store, tmp_path):
    """Of the kind: what lies in folders of LLaMA-Factory and of the ChatGLM3 demo. No other file is opened."""
    golden = Golden("glm3")
    model = adapted(golden, tmp_path)
    state = load_file(tmp_path / SAFETENSORS)
    drop(SAFETENSORS, "README.md")(tmp_path)
    store(tmp_path, state)
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin", "trainer_state.json", "README.md"):
        put(name, b"not to be read")(tmp_path)
    put("tokenizer.model", b"of another model")(tmp_path)
    ids = golden.tensors["one.input_ids"]
    assert (logits_of(tmp_path, ids) - model(input_ids=ids).logits).abs().max() < 1e-6


def test_an_adapter_of_peft_through_every_command(golden, tmp_path, capsys):
    folder, rows = tmp_path / "checkpoint-30", write_rows(tmp_path / "rows.json", 3)
    model = adapted(golden, folder)
    marks, text = look(folder, full=True)
    assert machine.BAD not in marks and "adapter weights on" in text and "not saved by this toolkit" in text
    merge_lora.main(["--model_dir", str(folder), "--precision", "fp32"])
    merged = tmp_path / "checkpoint-30-merged"
    run = json.loads((merged / "run.json").read_text())
    assert (run["mode"], run["weights"], run["base_model"]) == (golden.mode.name, "whole", golden.folder)
    ids = golden.tensors["one.input_ids"]
    with torch.no_grad():
        assert (logits_of(merged, ids) - model(input_ids=ids).logits).abs().max() < 1e-4
    found = answers(folder, rows, tmp_path / "a.jsonl")
    assert found == answers(merged, rows, tmp_path / "m.jsonl")
    change_json("adapter_config.json", base_model_name_or_path=None)(folder)
    assert found == answers(folder, rows, tmp_path / "b.jsonl", "--model_name_or_path", golden.folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An adapter of peft on glm3, to be copied and spoilt."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    adapted(Golden("glm3"), folder)
    return folder


REFUSED = [  # changed settings, what the line says
    ({"use_dora": True}, r"use_dora = True: DoRA .*: merge it with the tool that made it"),
    ({"modules_to_save": ["output_layer"]}, r"modules_to_save = \['output_layer'\]: whole layers .*: merge it"),
    ({"bias": "lora_only"}, "bias = 'lora_only': biases of the base were trained too: merge it"),
    ({"layer_replication": [[0, 2]]}, "layer_replication = .*: repeats layers"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices = .*: vectors of tokens"),
    ({"megatron_config": {"a": 1}}, "megatron_config = .*: is of another network"),
    ({"loftq_config": {"bits": 4}}, "loftq_config = .*: changes the base's weights too"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4': changes the base's weights too"),
    ({"of_a_newer_peft": {"x": "y" * 999}}, r"of_a_newer_peft = \{'x': 'y*\.\.\.: is not known here: merge it"),
    ({"alpha_pattern": {"(a+)+$": 3}}, "alpha_pattern = .*: expressions are not run here"),
    ({"target_modules": ["q_proj"]}, r"target_modules = \['q_proj'\]: must be names out of query_key_value"),
    ({"target_modules": ["query_key_value", "output_layer"]}, "target_modules = .*: must be names out of"),
    ({"target_modules": ["dense"]}, r"has shape .*, the base model needs .*: it is of another base model or of other"),
    ({"r": 8}, r"lora_A.weight has shape \(4, 64\), its r is 8: merge it"),
    ({"peft_type": "IA3"}, "peft_type = 'IA3': must be LORA; this is IA3, vectors that scale activations: merge it"),
    ({"peft_type": "PREFIX_TUNING"}, "peft_type = 'PREFIX_TUNING': .*cannot be merged; train.py trains"),
    ({"peft_type": ["x"]}, r"peft_type = \['x'\]: must be LORA"),
    ({"base_model_name_or_path": "/gone"}, "adapter_config.json: base model /gone is not there: give its place with"),
    ({"base_model_name_or_path": None}, "base_model_name_or_path is None: name the base with --model_name_or_path"),
    ({"base_model_name_or_path": "me/gone"}, "base model me/gone: cannot be fetched .*: give its place with --model"),
]


@pytest.mark.parametrize("change, says", REFUSED)
def test_what_cannot_be_obeyed_is_refused_by_name(change, says, plain, sandbox):
    """Of the kind: a field of another tool that would change the function. Before a weight of the base is read."""
    shutil.copytree(plain, sandbox.folder / "adapter")
    change_json("adapter_config.json", **change)(sandbox.folder / "adapter")
    sandbox.fails("predict.py", *sandbox.fill("--model_path adapter --prompt a --device cpu"), says=says)


def test_harmless_settings(tmp_path):
    """A class that is named is not looked for, and unknown keys that say nothing are let pass."""
    change = {"auto_mapping": {"base_model_class": "X", "parent_library": "os.gone"}, "of_a_newer_peft": None}
    change |= {"runtime_config": {"ephemeral_gpu_offload": False}, "modules_to_save": [], "lora_bias": False}
    adapted(Golden("glm3"), tmp_path, change=change)
    assert machine.BAD not in look(tmp_path)[0]


SPOILT = [  # what is done to the weights' table, what the line says
    (lambda s: {**s, "base_model.model.transformer.embedding.word_embeddings.lora_embedding_A": torch.zeros(4, 9)},
     "lora_embedding_A is of an embedding: merge it"),
    (lambda s: {**s, "base_model.model.transformer.output_layer.lora_A.weight": torch.zeros(4, 64)},
     "output_layer.lora_A.weight is of a layer that adapters do not change here: merge it"),
    (lambda s: {name: tensor for name, tensor in s.items() if ".layers.1." not in name}, "has shape missing, the base"),
    (lambda s: {name: torch.zeros(0) for name in s}, "is empty: it was saved under ZeRO-3 without its values"),
    (lambda s: {"x": torch.zeros(1)}, "x is of a layer that adapters do not change here"),
    (lambda s: {**s, **{name.replace(".weight", ".default.weight"): tensor.clone() for name, tensor in s.items()}},
     "holds the same weight under two names"),
]


@pytest.mark.parametrize("spoil, says", SPOILT)
def test_weights_that_do_not_fit_an_adapter(spoil, says, tmp_path):
    adapted(Golden("glm3"), tmp_path)
    save_file(spoil(load_file(tmp_path / SAFETENSORS)), tmp_path / SAFETENSORS)
    assert re.search(says, look(tmp_path)[1])


def test_an_expression_of_a_stranger_is_not_run(tmp_path):
    """It would take longer than anybody waits."""
    adapted(Golden("glm3"), tmp_path, change={"target_modules": "(([a-z_0-9]+)*.?)*!", "exclude_modules": "(x+x+)+y"})
    assert machine.BAD not in look(tmp_path)[0]


def test_a_folder_with_an_adapter_and_whole_weights_is_refused(sandbox):
    folder = sandbox.model()
    put("adapter_config.json", "{}")(folder)
    says = r"model: holds an adapter \(adapter_config.json\) and whole weights: move one of them"
    sandbox.fails("merge_lora.py", "--model_dir", "model", says=says)


def test_adapter_files_that_are_not_there(sandbox):
    put("adapter_config.json", json.dumps({"base_model_name_or_path": str(GOLDEN_FOLDERS["glm3"])}))(sandbox.folder)
    says = r"no weights in it \(none of adapter_model.safetensors, adapter_model.bin\)"
    sandbox.fails("predict.py", *sandbox.fill("--model_path . --prompt a --device cpu"), says=says)
    drop("adapter_config.json")(sandbox.folder)
    put(BIN, b"x")(sandbox.folder)
    says = "adapter_config.json: missing: merge it with the tool"
    sandbox.fails("predict.py", *sandbox.fill("--model_path . --prompt a --device cpu"), says=says)


# ---------------------------------------------------------------- prefix encoders of the official code


def official(golden, kind, folder, drop_keys=(), keep=True):
    """A prefix encoder as the official trainer leaves it: its weights alone in pytorch_model.bin."""
    folder.mkdir()
    start = f"{kind}.weights."
    state = {k.removeprefix(start): t.float() for k, t in golden.tensors.items() if k.startswith(start)}
    torch.save(state, folder / "pytorch_model.bin")
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(f"{golden.folder}/{name}", folder)
    settings = {"pre_seq_len": golden.values[f"{kind}.pre_seq_len"], "prefix_projection": kind == "prefix_projection"}
    change_json("config.json", **{key: None if key in drop_keys else value for key, value in settings.items()})(folder)
    put("training_args.bin", b"not to be read")(folder)
    return state


@pytest.mark.parametrize("kind", ["prefix_projection", "prefix_embedding"])
@torch.no_grad()
def test_an_official_prefix_encoder_has_the_golden_loss(golden, kind, tmp_path):
    """Also where config.json does not tell its length and kind, which the shapes do."""
    for number, drop_keys in enumerate([(), ("pre_seq_len", "prefix_projection")]):
        folder = tmp_path / str(number)
        official(golden, kind, folder, drop_keys)
        model, _ = load_opened(open_checkpoint(str(folder), golden.mode.name, golden.folder), torch.float32, CPU)
        loss = model(golden.tensors["train.input_ids"], labels=golden.tensors["train.labels"]).loss
        assert abs(loss - golden.tensors[f"{kind}.loss"]) < 1e-5


def test_an_official_prefix_encoder_through_every_command(sandbox, tmp_path):
    golden, folder = Golden("glm3"), sandbox.folder / "ptuning"
    state = official(golden, "prefix_embedding", folder)
    says = "ptuning: holds a prefix encoder, which does not say what its base is: name it with --model_name_or_path"
    sandbox.fails("predict.py", *sandbox.fill("--model_path ptuning --prompt a --device cpu"), says=says)
    assert says in look(folder)[1]
    says = "ptuning: holds a prefix encoder, which cannot be merged: use it as it is .*--model_path ptuning --model_name"
    sandbox.fails("merge_lora.py", "--model_dir", "ptuning", says=says)
    says = "ptuning: holds a prefix encoder alone: name the base model .* predict.py takes both"
    sandbox.train_fails(model_name_or_path="ptuning", says=says)
    marks, text = look(folder, golden.folder, full=True)
    assert machine.BAD not in marks and f"{sum(t.numel() for t in state.values()):,} in fp32" in text
    sandbox.allow_weights()
    rows = write_rows(sandbox.folder / "spo.json", 2)
    found = answers(folder, rows, sandbox.folder / "p.jsonl", "--model_name_or_path", golden.folder)
    assert found != answers(golden.folder, rows, sandbox.folder / "b.jsonl")


@torch.no_grad()
def test_a_whole_checkpoint_with_its_prefix_encoder(golden, tmp_path):
    """As the first official code saved it: base and prefix encoder in one."""
    folder, kind = tmp_path / "whole", "prefix_projection"
    prefix = official(golden, kind, folder)
    state = {name: rows[:].clone() for name, _, rows in weight_files.stored_tensors(golden.folder)}
    torch.save({**state, **prefix}, folder / "pytorch_model.bin")
    vocabulary = golden.mode.tokenizer_class.vocab_files_names["vocab_file"]
    shutil.copy(f"{golden.folder}/{vocabulary}", folder)
    model, _ = load_opened(open_checkpoint(str(folder)), torch.float32, CPU)
    loss = model(golden.tensors["train.input_ids"], labels=golden.tensors["train.labels"]).loss
    assert abs(loss - golden.tensors[f"{kind}.loss"]) < 1e-5
    change_json("config.json", pre_seq_len=None)(folder)
    assert "config.json has no pre_seq_len: set it to 8" in look(folder)[1]


# ---------------------------------------------------------------- names of whole weights


@pytest.mark.parametrize("old, new", [("transformer.", ""), ("", "module."), ("transformer.", "module.")])
def test_names_of_a_network_that_was_saved_alone(golden, old, new, tmp_path):
    """Of the kind: the same weights under other names. Read from headers and streamed alike, and one base all the same."""
    from checkpoints.bases import base_fingerprint

    stored = weight_files.stored_tensors(golden.folder)
    state = {re.sub(f"^{old}", new, name): rows[:].clone() for name, _, rows in stored}
    shutil.copy(f"{golden.folder}/config.json", tmp_path)
    torch.save(state, tmp_path / "pytorch_model.bin")
    config = golden.config()
    base_weights.check_weights(str(tmp_path), golden.mode, config)
    model = base_weights.load_base(str(tmp_path), golden.mode, config, torch.float16)
    wanted = base_weights.load_base(golden.folder, golden.mode, config, torch.float16).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    fingerprints = [base_fingerprint(folder, golden.mode, config) for folder in (str(tmp_path), golden.folder)]
    assert fingerprints[0] == fingerprints[1]


def test_weights_of_a_model_with_an_adapter(sandbox):
    """They are told from those of a plain network."""
    folder = sandbox.model()
    state = {f"base_model.model.{n}": rows[:].clone() for n, _, rows in weight_files.stored_tensors(str(GOLDEN_FOLDERS["glm3"]))}
    drop("pytorch_model*")(folder)
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match="is missing|it was saved from a model with an adapter: merge it"):
        base_weights.check_weights(str(folder), MODES["glm3"], MODES["glm3"].config_class.from_pretrained(folder))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "tokenizer.model", "config.json"])
@pytest.mark.parametrize(
    "content, says",
    [
        (POINTER, "is a Git LFS pointer, which only names the file: fetch the file itself with git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page: download the file itself"),
        (b"\x1f\x8b\x08\x00abc", "is a gzip archive: unpack it first"),
        (b"PK\x03\x04\x14\x00abc", "is a zip archive: unpack it first"),
    ],
)
def test_files_that_are_something_else(name, content, says, sandbox):
    """Of the kind: downloads that brought something else. Named for what they are."""
    folder = sandbox.model()
    if "model." in name and name != "tokenizer.model":
        drop("pytorch_model*")(folder)
    put(name, content)(folder)
    sandbox.train_fails(model_name_or_path="model", says=rf"model/{re.escape(name)}: {says}")
