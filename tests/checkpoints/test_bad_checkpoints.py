"""Checkpoint folders that are spoilt, incomplete or of another kind end with exit code 2 and one line.

The released ones through train.py, those that train.py saved through predict.py and merge_lora.py.
"""

import json
import pickle
import re
import warnings
import zipfile
from types import SimpleNamespace

import pytest
import torch
from refusing import (
    FOLDERS,
    NO_CHANGE,
    OUTPUT_LAYER,
    WeightsReached,
    both,
    case,
    change_json,
    cut,
    drop,
    one_file,
    put,
    replaced,
    sandbox,  # noqa: F401, a fixture
    weight_map,
    without,
)
from safetensors.torch import save_file

import train_types
from checkpoints import adapter_settings, base_weights, inspection, opening, weight_files
from flags.train import check_folder, train_parser
from modes import MODES, possible_modes
from runtime import machine

# ---------------------------------------------------------------- released folders


class Runs:
    """A pickle of this makes a file when it is read without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


RAN = "code-ran"  # the file it makes, in the current folder
BIN = "pytorch_model.bin"
NO_NAMES = both(change_json("config.json", _name_or_path=None), change_json("tokenizer_config.json", name_or_path=None))
NOT_WEIGHTS = r"pytorch_model\.bin: .*(do not use it|download it again)"
NOT_TENSORS = r"pytorch_model\.bin: not a weight file \(not a plain table of tensors\): download it again"
SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")


class Over:
    """A pickle of a tensor with an offset, size and steps of its own over the memory of another."""

    def __init__(self, tensor, *offset_size_stride):
        storage = torch.storage.TypedStorage(wrap_storage=tensor.untyped_storage(), dtype=tensor.dtype, _internal=True)
        self.arguments = (storage, *offset_size_stride, False, {})

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


def packed_again(compression=zipfile.ZIP_STORED, keep=1.0):
    """A function that packs the .bin file again, compressed or with a part of each tensor's bytes."""

    def spoil(folder):
        with zipfile.ZipFile(folder / BIN) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(folder / BIN, "w", compression) as archive:
            for name, content in records.items():
                archive.writestr(name, content[: int(len(content) * keep)] if "/data/" in name else content)

    return spoil


def put_behind(name, content):
    """A function that puts bytes behind a file."""

    def spoil(folder):
        with open(folder / name, "ab") as file:
            file.write(content)

    return spoil


def old_file(change):
    """A function that stores the weights, changed, in one file in the format of before torch 1.6."""

    def spoil(folder):
        state = {}
        for name in SHARDS:
            state |= torch.load(folder / name, weights_only=True)
        drop("pytorch_model*")(folder)
        torch.save(change(state), folder / BIN, _use_new_zipfile_serialization=False)

    return spoil


def output_layer_in_both(folder):
    """Store the output layer in both shards."""
    first, second = (torch.load(folder / name, weights_only=True) for name in SHARDS)
    layer = (first | second)[OUTPUT_LAYER]
    for name, state in zip(SHARDS, (first, second)):
        torch.save({**state, OUTPUT_LAYER: layer}, folder / name)


MODELS = [
    case("no-config", "glm3", drop("config.json"),
         r"--model_name_or_path model: no config\.json in it: name a folder with a whole checkpoint"),
    case("config-not-json", "glm3", put("config.json", "{"),
         r"model/config\.json: cannot be read as JSON \(.*\): give a complete file"),
    case("config-is-an-array", "glm3", put("config.json", "[]"), r"model/config\.json: is a list, not a JSON object"),
    case("config-of-no-family", "glm3", put("config.json", "{}"),
         r"--mode: config\.json of model fits none of glm, glm2, glm3"),
    case("config-text-for-a-number", "glm3", change_json("config.json", num_layers="four"),
         r"model/config\.json: .*num_layers"),
    case("config-unknown-dtype", "glm3", change_json("config.json", torch_dtype="float13"),
         r"model/config\.json: .*float13"),
    case("config-with-a-prefix-nobody-trained", "glm3", change_json("config.json", pre_seq_len=8),
         r"model.*(prefix|pre_seq_len)"),
    case("other-network", "glm3", change_json("config.json", rmsnorm=False),
         r"model/config\.json: rmsnorm = False: only True is supported"),
    case("quantised", "glm3", change_json("config.json", quantization_bit=4),
         r"model/config\.json: quantization_bit = 4: .*: use the fp16 release"),
    case("quantised-glm", "glm", change_json("config.json", quantization_bit=8),
         r"model/config\.json: quantization_bit = 8: .*: use the fp16 release"),
    case("vocabulary-v1.0-config", "glm", change_json("config.json", vocab_size=150528),
         r"model/config\.json: vocab_size = 150528: this is ChatGLM-6B v1\.0.*: use the release of 2023-04-06 or "
         r"later"),
    case("vocabulary-v1.0-tokenizer", "glm", change_json("tokenizer_config.json", num_image_tokens=20000),
         r"tokenizer_config\.json: num_image_tokens = 20000: this is the v1\.0 vocabulary.*: use the release of"),
    case("end-token-of-another-release", "glm3", change_json("config.json", eos_token_id=5),
         r"model: eos_token_id is 5 in config\.json but 2 in tokenizer\.model"),
    case("ids-of-another-release", "glm", change_json("config.json", gmask_token_id=6),
         r"model: gmask_token_id is 6 in config\.json but 5 in ice_text\.model: the files are of different releases"),
    case("family-not-said", "glm3", NO_NAMES, r"--mode: config\.json of model fits glm2 or glm3: give --mode"),
    case("no-tokenizer", "glm3", drop("tokenizer.model"), r"model/tokenizer\.model: missing: copy it from the release"),
    case("no-tokenizer-glm", "glm", drop("ice_text.model"),
         r"model/ice_text\.model: missing: copy it from the release"),
    case("tokenizer-spoilt", "glm3", put("tokenizer.model", "x" * 100),
         r"model/tokenizer\.model: not a sentencepiece model \(.*\): download it again"),
    case("tokenizer-empty", "glm", put("ice_text.model", ""),
         r"model/ice_text\.model: not a sentencepiece model \(.*\): download it again"),
    case("tokenizer-config-not-json", "glm", put("tokenizer_config.json", "{"),
         r"model/tokenizer_config\.json: cannot be read as JSON"),
    case("no-weights", "glm3", drop("pytorch_model*"),
         r"--model_name_or_path model: no weights in it \(none of .*\): download them, or merge first"),
    case("index-alone", "glm3", drop("pytorch_model-*.bin"),
         r"model/pytorch_model-00001-of-00002\.bin: missing, but pytorch_model\.bin\.index\.json names it: "
         r"download it again"),
    case("index-names-a-missing-shard", "glm3", drop("pytorch_model-00002*"),
         r"model/pytorch_model-00002-of-00002\.bin: missing, but .*index\.json names it: download it again"),
    case("index-points-outside", "glm3", weight_map({"a": "../rows.json"}),
         r"index\.json: names '\.\./rows\.json', outside its folder: do not use this checkpoint"),
    case("index-points-to-root", "glm3", weight_map({"a": "/etc/passwd"}),
         r"index\.json: names '/etc/passwd', outside its folder: do not use this checkpoint"),
    case("index-not-json", "glm3", put("pytorch_model.bin.index.json", "{"),
         r"index\.json: cannot be read as JSON \(.*\): give a complete file"),
    case("index-without-a-map", "glm3", weight_map([]), r"index\.json: .*weight_map"),
    case("index-with-numbers", "glm3", weight_map({"a": 1}), r"index\.json: .*"),
    case("bin-cut-off", "glm3", cut("pytorch_model-00001*"),
         r"model/pytorch_model-00001-of-00002\.bin: truncated or not a weight file \(.*\): download it again"),
    case("bin-cut-off-at-its-end", "glm3", cut("pytorch_model-00002*", 0.999),
         r"model/pytorch_model-00002-of-00002\.bin: truncated or not a weight file \(.*\): download it again"),
    case("bin-empty", "glm3", both(drop("pytorch_model*"), put(BIN, "")), NOT_WEIGHTS),
    case("bin-is-a-page", "glm3", both(drop("pytorch_model*"), put(BIN, "<html>Not found</html>")),
         r"pytorch_model\.bin: is a web page: download the file itself"),
    case("bin-is-garbage", "glm3", both(drop("pytorch_model*"), put(BIN, b"hello world" * 10)), NOT_WEIGHTS),
    case("bin-is-a-pointer", "glm3",
         both(drop("pytorch_model*"), put(BIN, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")),
         r"pytorch_model\.bin: is a Git LFS pointer, .*git lfs pull"),
    case("bin-of-a-list", "glm3", one_file(lambda state: list(state.values()), BIN), NOT_WEIGHTS),
    case("bin-of-more-than-tensors", "glm3", one_file(lambda state: {**state, "step": 3}, BIN), NOT_WEIGHTS),
    case("bin-of-a-nested-state", "glm3", one_file(lambda state: {"model": state}, BIN), NOT_WEIGHTS),
    case("bin-that-runs-code", "glm3", one_file(lambda state: {"a": Runs(RAN)}, BIN),
         r"model/pytorch_model\.bin: holds more than tensors.*: do not use it"),
    case("pickle-that-runs-code", "glm3",
         both(drop("pytorch_model*"), put(BIN, pickle.dumps({"a": Runs(RAN)}, protocol=2))),
         r"model/pytorch_model\.bin: holds more than tensors.*: do not use it"),
    case("safetensors-cut-off", "glm3", both(one_file(), cut("model.safetensors", 0.9)),
         r"model/model\.safetensors: truncated or not safetensors \(.*\): download it again"),
    case("safetensors-empty", "glm3", both(one_file(), put("model.safetensors", "")),
         r"model/model\.safetensors: truncated or not safetensors \(.*\): download it again"),
    case("safetensors-is-a-page", "glm3", both(one_file(), put("model.safetensors", "<html>Not found</html>")),
         r"model/model\.safetensors: is a web page: download the file itself"),
    case("weight-missing", "glm3", one_file(without),
         rf"model: {OUTPUT_LAYER} is missing: download the checkpoint again"),
    case("weight-missing-bin", "glm3", one_file(without, BIN),
         rf"model: {OUTPUT_LAYER} is missing: download the checkpoint again"),
    case("weights-of-more-layers", "glm3", change_json("config.json", num_layers=3),
         r"model: transformer\.encoder\.layers\.3\.\S+ is not of --mode glm3 \(and 6 others\): wrong --mode or "
         r"files"),
    case("weights-of-fewer-layers", "glm3", change_json("config.json", num_layers=5),
         r"model: transformer\.encoder\.layers\.4\.\S+ is missing \(and 6 others\): download the checkpoint again"),
    case("weight-unexpected", "glm3", one_file(lambda state: {**state, "extra": torch.zeros(1)}),
         r"model: extra is not of --mode glm3: wrong --mode or files"),
    case("weight-of-a-prefix", "glm3",
         one_file(lambda state: {**state, "transformer.prefix_encoder.embedding.weight": torch.zeros(8, 256)}),
         r"model: transformer\.prefix_encoder\.embedding\.weight is not of --mode glm3: it is a prefix encoder's, "
         r"and config\.json has no pre_seq_len: set it to 8"),
    case("weight-of-another-shape", "glm3", one_file(replaced(lambda t: t[:, :3].contiguous())),
         rf"model: {OUTPUT_LAYER} has shape \[1280, 3\], --mode glm3 with this config\.json needs \[1280, 64\]: "
         rf"the files do not belong together"),
    case("weight-of-8-bits", "glm3", one_file(replaced(lambda t: t.to(torch.int8))),
         rf"model: {OUTPUT_LAYER} is quantised \(I8\): use the fp16 release"),
    case("weight-of-8-bits-bin", "glm3", one_file(replaced(lambda t: t.to(torch.int8)), BIN),
         rf"model: {OUTPUT_LAYER} is quantised \(int8\): use the fp16 release"),
    case("weight-of-8-bits-float", "glm3", one_file(replaced(lambda t: t.to(torch.float8_e4m3fn))),
         rf"model: {OUTPUT_LAYER} is quantised \(F8_E4M3\): use the fp16 release"),
    case("weight-packed-in-4-bits", "glm3", one_file(replaced(lambda t: t[:, ::2].to(torch.int8))),
         rf"model: {OUTPUT_LAYER} is quantised \(I8\): use the fp16 release"),
    case("weight-of-64-bits", "glm3", one_file(replaced(lambda t: t.double())),
         rf"model: {OUTPUT_LAYER} is of an unusual type \(F64\): use the fp16 release"),
    case("weight-of-64-bits-bin", "glm3", one_file(replaced(lambda t: t.double()), BIN),
         rf"model: {OUTPUT_LAYER} is of an unusual type \(float64\): use the fp16 release"),
    case("weight-complex", "glm3", one_file(replaced(lambda t: t.cfloat()), BIN),
         rf"model: {OUTPUT_LAYER} is of an unusual type \(complex64\): use the fp16 release"),
    case("weight-bool", "glm3", one_file(replaced(lambda t: t.bool())),
         rf"model: {OUTPUT_LAYER} is of an unusual type \(BOOL\): use the fp16 release"),
    case("weight-sparse", "glm3", one_file(replaced(lambda t: t.to_sparse()), BIN), NOT_TENSORS),
    case("weight-without-data", "glm3", one_file(replaced(lambda t: t.to("meta")), BIN), NOT_TENSORS),
    case("weights-numbered", "glm3", one_file(lambda state: dict(enumerate(state.values())), BIN), NOT_TENSORS),
    case("weight-expanded", "glm3", one_file(replaced(lambda t: t[:1, :1].clone().expand(1280, 64)), BIN),
         rf"pytorch_model\.bin: {OUTPUT_LAYER} claims more than is stored of it: do not use it"),
    case("weight-beyond-its-memory", "glm3",
         one_file(replaced(lambda t: Over(t[:9].clone(), 0, (1280, 64), (64, 1))), BIN), NOT_WEIGHTS),
    case("weight-beyond-its-memory-old-format", "glm3",
         old_file(replaced(lambda t: Over(t[:9].clone(), 0, (10**9, 64), (64, 1)))), NOT_WEIGHTS),
    case("weight-behind-its-memory", "glm3", one_file(replaced(lambda t: Over(t, 1, (1280, 64), (64, 1))), BIN),
         NOT_WEIGHTS),
    case("weight-that-runs-backwards", "glm3", one_file(replaced(lambda t: Over(t, 0, (1280, 64), (-64, 1))), BIN),
         NOT_WEIGHTS),
    case("bin-compressed", "glm3", both(one_file(name=BIN), packed_again(zipfile.ZIP_DEFLATED)), NOT_WEIGHTS),
    case("bin-records-shorter-than-said", "glm3", both(one_file(name=BIN), packed_again(keep=0.5)),
         r"pytorch_model\.bin: (its tensors claim more than it holds|truncated).*: download it again"),
    case("safetensors-with-more-behind", "glm3", both(one_file(), put_behind("model.safetensors", b"x" * 64)),
         r"model/model\.safetensors: truncated or not safetensors \(.*\): download it again"),
    case("index-of-exchanged-shards", "glm3",
         weight_map({OUTPUT_LAYER: SHARDS[0], "transformer.embedding.word_embeddings.weight": SHARDS[1]}),
         r"model: \S+ is in \S+, the index says \S+: the files do not belong together"),
    case("weight-in-two-shards", "glm3", output_layer_in_both,
         rf"model: {OUTPUT_LAYER} is in both {SHARDS[0]} and {SHARDS[1]}: download the checkpoint again"),
    case("index-to-a-folder", "glm3", both(weight_map({"a": "sub"}), lambda folder: (folder / "sub").mkdir()),
         r"model/sub: missing, but pytorch_model\.bin\.index\.json names it: download it again"),
    case("layers-without-end", "glm3", change_json("config.json", num_layers=10**7),
         r"model/config\.json: num_layers = 10000000, but only 31 weights are stored: the files do not belong"),
    case("size-negative", "glm3", change_json("config.json", hidden_size=-64), r"model/config\.json: .*-64"),
    case("size-zero", "glm3", change_json("config.json", kv_channels=0), r"model/config\.json: "),
    case("size-fraction", "glm3", change_json("config.json", ffn_hidden_size=1.5), r"model/config\.json: "),
    case("size-enormous", "glm", change_json("config.json", hidden_size=10**12), r"model/config\.json: "),
]


@pytest.mark.parametrize("mode, spoil, says", MODELS)
def test_model_folders(sandbox, mode, spoil, says):
    spoil(sandbox.model(mode))
    sandbox.train_fails(model_name_or_path="model", says=says)


def links(folder):
    """Make the folder one of the hub's cache: links to files outside of it."""
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../blobs/{number}")


def index_of_more(folder):
    """Let the index name a rotary buffer that no shard holds, and leave out what the second shard holds."""
    path = folder / "pytorch_model.bin.index.json"
    table = json.loads(path.read_text())["weight_map"]
    buffer = "transformer.rotary_pos_emb.inv_freq"
    first = {name: file for name, file in table.items() if file == SHARDS[0] and name != buffer}
    weight_map({**first, buffer: SHARDS[0], "lm_head.inv_freq": SHARDS[1]})(folder)


GOOD_MODELS = [
    case("links", links),
    case("index-of-other-names", index_of_more),
    case("shard-without-a-name", lambda folder: torch.save({"a": Runs(RAN)}, folder / "pytorch_model-00003.bin")),
    case("pickle-beside-safetensors", both(one_file(), lambda folder: torch.save({"a": Runs(RAN)}, folder / BIN))),
    case("transposed", one_file(replaced(lambda t: t.t().contiguous().t()), BIN)),
    case("part-of-another", one_file(replaced(lambda t: torch.cat([t, t])[640:1920]), BIN)),
    case("parameter", one_file(replaced(torch.nn.Parameter), BIN)),
    case("old-format", old_file(lambda state: state)),
    case("32-bits", one_file(replaced(lambda t: t.float()))),
]


@pytest.mark.parametrize("spoil", GOOD_MODELS)
def test_unusual_model_folders(sandbox, spoil):
    """They hold what the model needs; files that are not needed are not opened."""
    spoil(sandbox.model())
    with pytest.raises(WeightsReached):
        sandbox.run("predict.py", *sandbox.fill("--model_path model --prompt a --device cpu"))
    assert not (sandbox.folder / RAN).exists()


def test_settings_of_generation_that_cannot_be(sandbox):
    put("generation_config.json", '{"temperature": "warm"}')(sandbox.model())
    sandbox.allow_weights()
    flags = "--model_path model --prompt a --max_new_tokens 1 --device cpu"
    sandbox.fails("predict.py", *sandbox.fill(flags), says=r"model/generation_config\.json: .*: fix or remove it")


@pytest.mark.parametrize("protocol", [None, 2, pickle.DEFAULT_PROTOCOL])
def test_a_checkpoint_cannot_run_code(sandbox, protocol):
    content = {"a": Runs(str(sandbox.folder / RAN))}
    if protocol is None:
        torch.save(content, sandbox.folder / BIN)
    else:
        sandbox.write(BIN, pickle.dumps(content, protocol=protocol))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: holds more than tensors"):
            weight_files.weight_shapes(str(sandbox.folder))
    assert not (sandbox.folder / RAN).exists()
    if protocol is None:
        torch.load(sandbox.folder / BIN, weights_only=False)
    else:
        pickle.loads((sandbox.folder / BIN).read_bytes())
    assert (sandbox.folder / RAN).exists()  # the trap works


NAMES = [
    case("no-such-folder", "nowhere",
         "--model_name_or_path nowhere: no such folder: give a checkpoint folder or a hub name such as"),
    case("no-such-path", "/no/such/folder", "--model_name_or_path /no/such/folder: no such folder"),
    case("a-file", "rows.json", r"--model_name_or_path rows\.json: is a file: name the checkpoint's folder"),
    case("hub-unreachable", "THUDM/chatglm3-6b",
         r"--model_name_or_path THUDM/chatglm3-6b: cannot be fetched from the hub \(.+\): give a folder"),
    case("no-hub-name", "a--b/c", "--model_name_or_path a--b/c: "),
]


@pytest.mark.parametrize("name, says", NAMES)
def test_model_names(sandbox, name, says, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(sandbox.folder))
    sandbox.train_fails(model_name_or_path=name, says=says)


@pytest.mark.parametrize("mode, other", [(a, b) for a in MODES for b in MODES if a != b])
def test_wrong_mode(sandbox, mode, other):
    says = rf"--mode {other}: config\.json of \S+/{MODES[mode].package} is of {mode}: change --mode or --model_name"
    sandbox.train_fails(f"--mode {other} --model_name_or_path {{{mode}}}", says)


def test_a_folder_of_the_hub_that_could_be_two_families(sandbox):
    NO_NAMES(sandbox.model("glm3"))
    args = train_parser().parse_args("--train_path x --model_name_or_path a/b --output_dir x".split())
    with pytest.raises(SystemExit):
        check_folder(args, str(sandbox.folder / "model"))
    assert "fits glm2 or glm3: give --mode" in sandbox.capsys.readouterr().err


# ---------------------------------------------------------------- families that are known and not supported

TIKTOKEN = "IQ== 0\nIg== 1\nIw== 2\n"
OTHERS = [  # what the folder of a ChatGLM3 becomes, and what it is said to be
    case("glm-4", both(change_json("config.json", padded_vocab_size=151552, _name_or_path="THUDM/glm-4-9b"),
                       change_json("config.json", rope_ratio=500), put("tokenizer.model", TIKTOKEN)),
         r"GLM-4 \(padded_vocab_size = 151552\)"),
    case("glm-4-without-a-name", both(change_json("config.json", padded_vocab_size=151552), NO_NAMES),
         r"GLM-4 \(padded_vocab_size = 151552\)"),
    case("small-glm-4", change_json("config.json", _name_or_path="/data/GLM-4-9b-chat/"),
         r"GLM-4 \(_name_or_path = GLM-4-9b-chat\)"),
    case("tokenizer-of-glm-4", both(NO_NAMES, put("tokenizer.model", TIKTOKEN)),
         r"GLM-4 \(tokenizer\.model is a list"),
    *[case(f"hf-{name}", put("config.json", json.dumps({"model_type": name, "num_hidden_layers": 4})),
           rf"{said} \(model_type = {name}\)")
      for name, said in (("glm", "GLM-4"), ("glm4", "GLM-4"), ("llama", "LLaMA"), ("qwen2", "Qwen2"), ("mt5", "mT5"))],
]


@pytest.mark.parametrize("spoil, is_what", OTHERS)
def test_other_families_are_refused_by_name(sandbox, spoil, is_what):
    """Of a kind: a checkpoint that is not for this toolkit is told what it is, by every command, with and without
    --mode; not that it fits a family, and not to download it again."""
    folder = sandbox.model()
    spoil(folder)
    says = rf"model/config\.json: is of {is_what}.*, which is not supported by this toolkit: use ChatGLM-6B, ChatGLM2"
    sandbox.train_fails(model_name_or_path="model", says=f"error: --model_name_or_path {says}")
    sandbox.train_fails("--mode glm3", model_name_or_path="model", says=says)
    sandbox.fails("predict.py", *sandbox.fill("--model_path model --prompt a --device cpu"), says=says)
    NO_CHANGE(sandbox.adapter(base_model=str(folder)))
    sandbox.fails("merge_lora.py", "--model_dir", "adapter", says=says)
    [line] = [text for mark, _, text in inspection.folder_lines(str(folder), SimpleNamespace(mode=None, full=False, model_name_or_path=None),
                                                            machine.Facts()) if mark == machine.BAD]  # fmt: skip
    assert re.search(says, line)


def test_names_of_folders_do_not_make_a_glm_4(tmp_path):
    """The vocabulary decides, and only the last part of a name counts."""
    config = json.loads((FOLDERS["glm3"] / "config.json").read_text())
    for changes in (
        {"_name_or_path": "/data/glm-4/chatglm3-6b"},
        {"_name_or_path": "THUDM/glm-4-9b/chatglm3"},
        {"_name_or_path": "glm-4-my-chatglm3", "padded_vocab_size": 65024},
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        assert possible_modes(str(tmp_path)) == ["glm3"]


# ---------------------------------------------------------------- what a freeze pattern means


@pytest.mark.parametrize("pattern", ["layers.2", "layers.2.", ".layers.2"])
def test_layers_2_is_not_layers_27(pattern):
    mode = MODES["glm"]
    model = base_weights.empty_model(mode, opening.read_config(FOLDERS["glm"], mode))
    args = train_parser().parse_args(
        f"--train_path x --model_name_or_path x --output_dir x --freeze_module_name {pattern}".split()
    )
    names = [name for name, _ in model.named_parameters()]
    assert train_types.freeze_problems(names, args, mode) == []
    train_types.freeze_prepare(model, args, mode)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in names if name.startswith("transformer.layers.2.")}
    assert {name for name in names if ".layers.27." in name}


# ---------------------------------------------------------------- folders that train.py saved

LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["query_key_value"]}
LORA_A = "base_model.model.transformer.encoder.layers.0.self_attention.query_key_value.lora_A.weight"
CONFIG = json.loads((FOLDERS["glm3"] / "config.json").read_text())
PREFIX_CONFIG = json.dumps({**CONFIG, "pre_seq_len": 8, "prefix_projection": False})


def adapter_of(state):
    """A function that writes an adapter's files with these weights."""

    def spoil(folder):
        put("adapter_config.json", json.dumps(LORA))(folder)
        save_file(state, folder / adapter_settings.ADAPTER_FILE)

    return spoil


def prefix_of_4(folder):
    """Weights of a prefix encoder of 4 virtual tokens."""
    save_file({"transformer.prefix_encoder.embedding.weight": torch.zeros(4, 256)}, folder / adapter_settings.PREFIX_FILE)


SAVED = [  # changes to run.json, what is done to the folder, pattern, and whether weights must be read
    case("adapter-file-missing", {}, drop("none"),
         r"adapter/adapter_model\.safetensors: missing, but run\.json says it is there: copy the folder again",
         False),
    case("prefix-file-missing", {"weights": "prefix"}, drop("none"),
         r"adapter/prefix_encoder\.safetensors: missing, but run\.json says it is there: copy the folder again",
         False),
    case("base-moved", {"base_model": "/gone/base"}, NO_CHANGE,
         r"adapter/run\.json: base model /gone/base is not there: ", False),
    case("base-of-another-family", {"base_model": str(FOLDERS["glm"])}, NO_CHANGE, r"\S*/glm1.* is of glm\b", False),
    case("run-not-json", {}, put("run.json", "{"),
         r"adapter/run\.json: cannot be read as JSON \(.*\): give a complete file", False),
    case("run-an-array", {}, put("run.json", "[]"), r"adapter/run\.json: is a list, not a JSON object", False),
    case("run-without-base", {"drop": ["base_model"]}, NO_CHANGE, r"adapter/run\.json: .*base_model", False),
    case("run-without-mode", {"drop": ["mode"]}, NO_CHANGE, r"adapter/run\.json: .*mode", False),
    case("run-of-unknown-mode", {"mode": "glm9"}, NO_CHANGE, r"adapter/run\.json: .*glm9", False),
    case("run-of-unknown-weights", {"weights": "delta"}, NO_CHANGE, r"adapter/run\.json: .*delta", False),
    case("tokenizer-missing", {}, both(NO_CHANGE, drop("tokenizer.model")),
         r"adapter/tokenizer\.model: missing: copy it from the release", False),
    case("prefix-config-missing", {"weights": "prefix"}, put("prefix_encoder.safetensors", b""),
         r"adapter/config\.json: cannot be read as JSON", False),
    case("prefix-config-without-prefix", {"weights": "prefix"},
         both(put("prefix_encoder.safetensors", b""), put("config.json", "{}")),
         r"adapter/config\.json: .*pre_seq_len", False),
    case("adapter-config-missing", {}, NO_CHANGE, r"adapter/adapter_config\.json: missing: copy the folder again", False),
    case("adapter-cut-off", {}, both(adapter_of({LORA_A: torch.zeros(4, 64)}), cut("adapter_model*", 0.9)),
         r"adapter/adapter_model\.safetensors: truncated", True),
    case("adapter-of-another-rank", {}, adapter_of({LORA_A: torch.zeros(1, 1)}),
         r"adapter/adapter_model\.safetensors: .*shape", True),
    case("adapter-of-other-layers", {}, adapter_of({"x": torch.zeros(1)}),
         r"adapter/adapter_model\.safetensors: .*(missing|x)", True),
    case("prefix-cut-off", {"weights": "prefix"},
         both(put("config.json", PREFIX_CONFIG), put("prefix_encoder.safetensors", b"x" * 9)),
         r"adapter/prefix_encoder\.safetensors: truncated", True),
    case("prefix-of-another-length", {"weights": "prefix"},
         both(put("config.json", PREFIX_CONFIG), prefix_of_4),
         r"adapter/prefix_encoder\.safetensors: .*has shape \(4, 256\), the base model needs \(8, 256\)", True),
]


@pytest.mark.parametrize("run, spoil, says, reads_weights", SAVED)
def test_saved_folders(sandbox, run, spoil, says, reads_weights):
    spoil(sandbox.adapter(**run))
    if reads_weights:
        sandbox.allow_weights()
    flags = "--model_path adapter --prompt a --max_new_tokens 1 --device cpu"
    sandbox.fails("predict.py", *sandbox.fill(flags), says=says)


def test_an_adapter_of_other_layers_is_not_merged(sandbox):
    adapter_of({"x": torch.zeros(1)})(sandbox.adapter())
    sandbox.allow_weights()
    says = r"adapter/adapter_model\.safetensors: .*(missing|x)"
    sandbox.fails("merge_lora.py", "--model_dir", "adapter", "--device", "cpu", says=says)
