"""What is saved opens in programs that we did not write: the released code of old libraries, peft, converters."""

import fnmatch
import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from launching import load_script
from reference import GOLDEN_FOLDERS, ROOT
from safetensors.torch import load_file

import merge_lora
from checkpoints import base_weights, opening, released_files, saving, weight_files
from checkpoints.base_weights import check_weights
from checkpoints.opening import open_checkpoint
from checkpoints.released_files import COMPANIONS
from checkpoints.saving import describe_run, save_checkpoint
from runtime.folders import verify
from train_types import TRAIN_TYPES
from utils import read_json

PEFT_0_5 = (  # every key that LoraConfig of peft 0.5.0 takes
    "peft_type auto_mapping base_model_name_or_path revision task_type inference_mode r target_modules lora_alpha"
    " lora_dropout fan_in_fan_out bias modules_to_save init_lora_weights layers_to_transform layers_pattern"
).split()
CODE = "raise SystemExit('this code was run')\n"
BESIDE = {
    "modeling_chatglm.py": CODE,
    "tokenization_chatglm.py": CODE,
    "generation_config.json": '{"max_length": 77, "do_sample": true}\n',
    "LICENSE": "what may be done\n",
    "MODEL_LICENSE": "what may be done with the weights\n",
}
OTHERS = {"README.md": "of the release\n", "notes.txt": "of nobody\n"}


@pytest.fixture(scope="module")
def saved(golden, tmp_path_factory):
    """Folders of every kind, saved from a base that has the release's other files: {kind: folder}, base."""
    place = tmp_path_factory.mktemp("released")
    base = place / "base"
    base.mkdir()
    for path in GOLDEN_FOLDERS[golden.mode.name].iterdir():
        if not path.name.startswith("golden"):
            shutil.copy(path, base)
    for name, text in {**BESIDE, **OTHERS}.items():
        (base / name).write_text(text, encoding="utf-8")
    lora = {"lora_dim": 2, "lora_alpha": 8, "lora_dropout": 0.0, "lora_module_name": "query_key_value,dense"}
    prefix = {"pre_seq_len": 3, "prefix_projection": True}
    folders = {"base": base}
    for train_type, flags in (("all", {}), ("lora", lora), ("ptuning", prefix)):
        args = SimpleNamespace(mode=golden.mode.name, train_type=train_type, model_name_or_path=str(base), **flags)
        config = golden.mode.config_class.from_pretrained(base, **(prefix if train_type == "ptuning" else {}))
        model = base_weights.load_base(str(base), golden.mode, config, torch.float32)
        model = TRAIN_TYPES[train_type].prepare(model, args, golden.mode)
        tokenizer = golden.mode.tokenizer_class.from_pretrained(base)
        run = describe_run(args, str(base), "fp32", epoch=1, step=1)
        folders[train_type] = place / train_type
        problem = save_checkpoint(model, tokenizer, str(place / train_type), TRAIN_TYPES[train_type], run, zero3=False)
        assert problem is None
    folders["merged"] = place / "merged"
    merge_lora.main(["--model_dir", str(folders["lora"]), "--output_dir", str(folders["merged"])])
    return folders


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["all", "merged"])
def test_whole_checkpoints_hold_what_a_release_holds(golden, saved, kind):
    """Kind: files beside the weights that other programs read."""
    base, folder = saved["base"], saved[kind]
    for name in BESIDE:
        assert (folder / name).read_bytes() == (base / name).read_bytes(), name
    assert not names(folder) & set(OTHERS)
    assert not verify(folder) and set(BESIDE) < set(read_json(folder / "manifest.json")["files"])
    before, after = read_json(base / "config.json"), read_json(folder / "config.json")
    assert after == {**before, "torch_dtype": "float32" if kind == "all" else "float16"}
    assert "THUDM/" in after["_name_or_path"] and "dtype" not in after


@pytest.mark.parametrize("kind", ["all", "merged", "lora", "ptuning"])
def test_tokenizer_files_are_the_release_own(golden, saved, kind):
    for name in ("tokenizer_config.json", golden.mode.tokenizer_class.vocab_files_names["vocab_file"]):
        assert (saved[kind] / name).read_bytes() == (saved["base"] / name).read_bytes()


@pytest.mark.parametrize("kind", ["lora", "ptuning"])
def test_folders_without_a_network_hold_no_code_of_one(saved, kind):
    assert not names(saved[kind]) & set(BESIDE)


class ReleasedTokenizer:
    """How an old library makes a released tokenizer: settings become attributes, and these have no setters."""

    bos_token = property(lambda self: "<s>")
    eos_token = property(lambda self: "</s>")
    unk_token = pad_token = property(lambda self: "<unk>")

    def __init__(self, **settings):
        for key, value in settings.items():
            setattr(self, key, value)


def test_settings_that_stop_released_tokenizers_are_left_out(golden, tmp_path):
    """Kind: keys that newer libraries write and older ones refuse, also where the base has them already."""
    keys = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    is_glm = golden.mode.name == "glm"
    if is_glm:
        keys = {"bos_token": "<sop>", "eos_token": "<eop>", "unk_token": "<unk>", "pad_token": "<pad>"}
    base = tmp_path / "base"
    base.mkdir()
    for path in GOLDEN_FOLDERS[golden.mode.name].glob("*token*"):
        shutil.copy(path, base)
    vocab = golden.mode.tokenizer_class.vocab_files_names["vocab_file"]
    shutil.copy(GOLDEN_FOLDERS[golden.mode.name] / vocab, base)
    more = {"backend": "custom", "is_local": True, "model_specific_special_tokens": {}, **keys}
    more = {**read_json(base / "tokenizer_config.json"), **more}
    for name, values in (("tokenizer_config.json", more), ("special_tokens_map.json", keys)):
        (base / name).write_text(json.dumps(values), encoding="utf-8")
    read = golden.mode.tokenizer_class.from_pretrained(base)
    read.save_pretrained(tmp_path / "copied")
    golden.mode.tokenizer_class(str(shutil.copy(base / vocab, tmp_path))).save_pretrained(tmp_path / "new")
    for kind in ("copied", "new"):
        for path in (tmp_path / kind).glob("*.json"):
            values = read_json(path)
            assert not {"backend", "is_local", "model_specific_special_tokens"} & set(values)
            if is_glm:
                assert values["eos_token"] == "<eop>" and values.get("num_image_tokens", 0) == 0
            else:
                ReleasedTokenizer(**values)
        settings = read_json(tmp_path / kind / "tokenizer_config.json")
        assert settings["tokenizer_class"] == "ChatGLMTokenizer"
        assert settings["auto_map"]["AutoTokenizer"] == ["tokenization_chatglm.ChatGLMTokenizer", None]
        again = golden.mode.tokenizer_class.from_pretrained(tmp_path / kind)
        assert again.encode("水泵 <n>") == read.encode("水泵 <n>") and again.eos_token == keys["eos_token"]


def test_adapters_are_for_peft_of_any_age(golden, saved):
    """Kind: keys and names that older versions of a library read."""
    settings = read_json(saved["lora"] / "adapter_config.json")
    assert set(settings) == set(PEFT_0_5)
    assert settings["base_model_name_or_path"] == str(saved["base"])
    assert settings["target_modules"] == ["dense", "query_key_value"] and settings["r"] == 2
    weights = load_file(saved["lora"] / "adapter_model.safetensors")
    modules = dict(golden.model().named_modules())
    for name in weights:
        module, matrix = name.removeprefix("base_model.model.").split(".lora_")
        assert name.startswith("base_model.model.transformer.") and matrix in ("A.weight", "B.weight")
        assert module in modules


def test_a_setting_that_says_something_stays(tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        '{"r": 2, "target_modules": ["dense"], "use_dora": true, "use_rslora": false, "peft_version": "0.21.2"}'
    )
    released_files.write_adapter_settings(tmp_path, "THUDM/chatglm3-6b")
    values = read_json(tmp_path / "adapter_config.json")
    assert values["use_dora"] is True and "use_rslora" not in values
    assert values["base_model_name_or_path"] == "THUDM/chatglm3-6b"


def official(folder, encoder):
    """What the official P-Tuning code does with a checkpoint's folder."""
    state = torch.load(os.path.join(folder, "pytorch_model.bin"), weights_only=True)
    start = "transformer.prefix_encoder."
    encoder.load_state_dict({name[len(start) :]: t for name, t in state.items() if name.startswith(start)})
    return encoder


def test_prefixes_have_the_official_names_and_format(golden, saved, tmp_path):
    """Kind: weights under the name and in the format that the official code loads."""
    folder = saved["ptuning"]
    config = read_json(folder / "config.json")
    settings = {"pre_seq_len": 3, "prefix_projection": True}
    assert config == {**read_json(saved["base"] / "config.json"), "torch_dtype": "float32", **settings}
    assert not verify(folder) and "pytorch_model.bin" in read_json(folder / "manifest.json")["files"]
    state = load_file(folder / "prefix_encoder.safetensors")
    model = golden.mode.model_class(golden.mode.config_class.from_pretrained(saved["base"], **settings))
    for place in (folder, tmp_path / "exported"):
        if place != folder:
            export = load_script("export_prefix")
            export.main(["--model_dir", str(folder), "--output_dir", str(place)])
            assert not verify(place) and read_json(place / "config.json") == config
        encoder = official(place, model.transformer.prefix_encoder)
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(tensor, state[f"transformer.prefix_encoder.{name}"])
    assert open_checkpoint(str(folder)).kind.name == "prefix"
    with pytest.raises(ValueError, match="holds a prefix encoder alone: name the base model"):
        check_weights(str(folder), golden.mode, golden.config())


def test_a_large_prefix_is_written_once(tmp_path, monkeypatch):
    state = {"transformer.prefix_encoder.embedding.weight": torch.zeros(4, 8)}
    monkeypatch.setattr(released_files, "MOST_PREFIX_BIN_BYTES", 127)
    released_files.write_prefix(state, tmp_path)
    assert names(tmp_path) == {"prefix_encoder.safetensors"}
    monkeypatch.setattr(released_files, "MOST_PREFIX_BIN_BYTES", 128)
    released_files.write_prefix(state, tmp_path)
    assert names(tmp_path) == {"prefix_encoder.safetensors", "pytorch_model.bin"}


def test_a_weight_file_that_reads_back_otherwise_is_not_saved(tmp_path):
    """Every file of weights is read back before the folder gets its name."""
    state = {"transformer.prefix_encoder.embedding.weight": torch.zeros(4, 8)}
    released_files.write_prefix(state, tmp_path)
    saving.check_written(tmp_path, state)
    weight_files.write_bin({"other": torch.zeros(3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(AssertionError, match="pytorch_model.bin"):
        saving.check_written(tmp_path, state)


@pytest.mark.parametrize("kind", ["all", "lora"])
def test_only_prefixes_are_exported(saved, tmp_path, kind):
    export = load_script("export_prefix")
    with pytest.raises(ValueError, match="--model_dir .* weights: name one of --train_type ptuning"):
        export.main(["--model_dir", str(saved[kind]), "--output_dir", str(tmp_path / "new")])
    with pytest.raises(ValueError, match="no run.json in it"):
        export.main(["--model_dir", str(tmp_path), "--output_dir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def test_links_out_of_the_folder_and_large_files_are_not_copied(tmp_path, monkeypatch, capsys):
    """Kind: files of strangers that are copied. Links inside the hub's cache are followed: it consists of them."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123abc"
    blobs, folder = tmp_path / "models--a--b" / "blobs", tmp_path / "saved"
    for path in (snapshot, blobs, folder, snapshot / "package.py"):
        path.mkdir(parents=True)
    (blobs / "77").write_text(CODE)
    (tmp_path / "secret").write_text("mine")
    (snapshot / "modeling_chatglm.py").symlink_to(blobs / "77")
    (snapshot / "LICENSE").symlink_to(tmp_path / "secret")
    (snapshot / "quantization.py").write_text("#" * 50)
    monkeypatch.setattr(released_files, "MOST_COMPANION_BYTES", 49)
    released_files.copy_companions(str(snapshot), str(folder))
    assert names(folder) == {"modeling_chatglm.py"} and not (folder / "modeling_chatglm.py").is_symlink()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "LICENSE is a link out" in said[0] and "quantization.py has 50 bytes" in said[1]


def test_the_code_is_fetched_from_the_hub(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.append(allow_patterns) or str(tmp_path)
    )
    opening.resolve_folder("THUDM/chatglm3-6b")
    assert set(COMPANIONS) < set(asked[0])


def test_the_list_of_files_names_them_all(saved):
    """docs/files.md, in both languages: what is saved, file by file."""
    halves = (ROOT / "docs" / "files.md").read_text(encoding="utf-8").split("## 中文")
    for text in halves:
        patterns = re.findall(r"`([\w.*-]+)`", text)
        for kind in ("all", "merged", "lora", "ptuning"):
            for name in names(saved[kind]):
                assert any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns), name
    english, chinese = (sorted(re.findall(r"`[^`\n]+`|^\|", text, re.M)) for text in halves)
    assert english == chinese
