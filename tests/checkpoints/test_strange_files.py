"""Files of strangers that reach too far: code of others through config.json, memory through a few bytes, no end, NaN.

Each test names the kind. What is refused is refused before it is made, fetched or waited for.
"""

import json
import os
import pickle
import re
import resource
import struct
import sys
import types
import zipfile

import pytest
import torch
from reference import GOLDEN_FOLDERS
from refusing import (
    FOLDERS,
    OUTPUT_LAYER,
    WeightsReached,
    case,
    change_json,
    drop,
    one_file,
    put,
    replaced,
    sandbox,  # noqa: F401, a fixture
)
from safetensors.torch import save_file

from checkpoints import base_weights, opening, weight_files
from checkpoints.pickles import check_pickle
from modes import MODES
from runtime import plain_files
from runtime.exits import UserError
from utils import read_json

BIN = "pytorch_model.bin"
GIB = 1 << 30


def peak():
    """Most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---------------------------------------------------------------- config.json and its like reach no other part


class Kernels(types.ModuleType):
    """Stands for the hub's loader of code: notes every use."""

    def __init__(self):
        super().__init__("kernels")
        self.__spec__ = types.SimpleNamespace(name="kernels")
        self.used = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        self.used.append(name)
        raise RuntimeError(f"kernels.{name} was asked for")


@pytest.fixture
def kernels(monkeypatch):
    stand_in = Kernels()
    monkeypatch.setitem(sys.modules, "kernels", stand_in)
    import transformers.integrations.hub_kernels as hub_kernels
    import transformers.modeling_flash_attention_utils as flash

    def used(name):
        return lambda *args, **kwargs: (stand_in.used.append((name, args)), pytest.fail("code would be fetched"))

    for module, name in (
        (hub_kernels, "get_kernel"),
        (hub_kernels, "load_and_register_attn_kernel"),
        (flash, "lazy_import_flash_attention"),
    ):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, used(name))
    import transformers.modeling_utils as modeling_utils

    monkeypatch.setattr(modeling_utils, "lazy_import_flash_attention", used("lazy_import_flash_attention"))
    return stand_in


NAMES_CODE = r"config\.json: {key} = .*: names code of others, which is never fetched or run here: remove it"
CODE_VALUES = ["kernels-community/flash-attn", {"": "evil/evil"}, "evil/evil@main:run", 5, ["evil/evil"]]
COMMANDS = {
    "train": "--train_path rows.json --model_name_or_path model --output_dir out --device cpu",
    "predict": "--model_path model --prompt a --device cpu",
}


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_config_cannot_name_code(sandbox, kernels, command, key):
    folder = sandbox.model()
    for value in CODE_VALUES:
        change_json("config.json", **{key: value})(folder)
        sandbox.fails(f"{command}.py", *COMMANDS[command].split(), says=NAMES_CODE.format(key=key))
    assert kernels.used == []


def test_a_config_under_an_adapter_cannot_name_code(sandbox, kernels):
    change_json("config.json", _attn_implementation="evil/evil")(sandbox.model())
    folder = sandbox.adapter(base_model=str(sandbox.folder / "model"))
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
    says = NAMES_CODE.format(key="_attn_implementation")
    sandbox.fails("merge_lora.py", "--model_dir", "adapter", "--device", "cpu", says=says)
    assert kernels.used == []


def test_the_stand_in_notices_a_request_for_code(kernels):
    """The same value, given to the library, asks for the code."""
    mode = MODES["glm3"]
    config = mode.config_class.from_pretrained(GOLDEN_FOLDERS["glm3"])
    config._attn_implementation = "kernels-community/flash-attn"
    with pytest.raises(BaseException), torch.device("meta"):
        mode.model_class(config)
    assert kernels.used


def test_keys_of_no_use_are_told_and_left(tmp_path, capsys):
    """Keys that the family has no use for reach no library: neither memory nor attributes come of them."""
    folder = tmp_path / "model"
    folder.mkdir()
    strange = {
        "num_labels": 10**8,
        "pruned_heads": {"0": [1]},
        "id2label": {"x": 1},
        "per_layer_config": {"0": {}},
        "use_kernels": True,
        "configuration_files": ["other.json"],
        "from_dict": 1,
        "__class__": 2,
    }
    put("config.json", (GOLDEN_FOLDERS["glm3"] / "config.json").read_bytes())(folder)
    change_json("config.json", **strange)(folder)
    before = peak()
    config = opening.read_config(str(folder), MODES["glm3"])
    assert peak() - before < GIB // 4
    assert config.to_dict() == opening.read_config(str(GOLDEN_FOLDERS["glm3"]), MODES["glm3"]).to_dict()
    names = "num_labels, pruned_heads, id2label, per_layer_config and 4 others"
    assert capsys.readouterr().err == f"note: {folder}/config.json: not used here: {names}\n"


@pytest.mark.parametrize("name", MODES)
def test_released_files_are_read_without_a_note(name, capsys):
    mode, folder = MODES[name], str(GOLDEN_FOLDERS[name])
    config = opening.read_config(folder, mode)
    by_library = mode.config_class.from_pretrained(folder)
    assert config.to_diff_dict() == by_library.to_diff_dict()
    tokenizer = opening.read_tokenizer(folder, mode, config)
    by_library = mode.tokenizer_class.from_pretrained(folder)
    for name in ("special_tokens_map", "added_tokens_decoder", "padding_side", "vocab_size"):
        assert getattr(tokenizer, name) == getattr(by_library, name)
    assert tokenizer.get_vocab() == by_library.get_vocab()
    assert capsys.readouterr().err == ""


CONFIGS = [
    *(
        case(f"dtype-{value}", {"torch_dtype": value}, r"torch_dtype = .*: must be one of float16, bfloat16, float32")
        for value in ("load", "int8", 5, ["float16"], {"a": 1})
    ),
    case("dtype-of-the-new-name", {"dtype": "hub"}, r"dtype = 'hub': must be one of float16"),
    case("quantised", {"quantization_config": {"quant_method": "evil"}}, r"quantization_config = .*not supported"),
    case("two-names", {"vocab_size": 5}, r"vocab_size = 5, but padded_vocab_size = 1280: they mean the same"),
    case(
        "too-wide", {"hidden_size": 1 << 25}, r"hidden_size = 33554432: must be a whole number of .* at most 16777216"
    ),
    case("ratio-enormous", {"rope_ratio": int("9" * 20)}, r"rope_ratio = 9+: must be a number above 0 and at most"),
    case("ratio-of-no-number", {"rope_ratio": float("nan")}, r"rope_ratio = nan: must be a number above 0"),
    case("long-value", {"quantization_bit": "x" * 10**6}, r"quantization_bit = 'x{50,60}\.\.\.: a quantised"),
    case("true-as-a-float", {"multi_query_attention": 1.0}, r"multi_query_attention"),
]


@pytest.mark.parametrize("changes, says", CONFIGS)
def test_config_values_of_another_kind_are_refused(tmp_path, changes, says):
    put("config.json", (GOLDEN_FOLDERS["glm3"] / "config.json").read_bytes())(tmp_path)
    change_json("config.json", **changes)(tmp_path)
    with pytest.raises(UserError, match=rf"^{tmp_path}/config\.json: .*{says}") as caught:
        opening.read_config(str(tmp_path), MODES["glm3"])
    assert len(str(caught.value)) < 400


TOKENIZERS = [
    case("token-a-number", {"eos_token": 5}, r"eos_token = 5: must be the name of a token"),
    case("token-a-list", {"pad_token": ["a"]}, r"pad_token = \['a'\]: must be the name of a token"),
    case("token-half-a-character", {"eos_token": "\ud800"}, r"eos_token = .*: must be the name of a token"),
    case("token-empty", {"unk_token": {"__type": "AddedToken"}}, r"unk_token = None: must be the name of a token"),
    case("padding", {"padding_side": "up"}, r"padding_side = 'up': must be left or right"),
    case("switch", {"encode_special_tokens": "yes"}, r"encode_special_tokens = 'yes': must be true or false"),
]


@pytest.mark.parametrize("changes, says", TOKENIZERS)
def test_settings_of_the_tokenizer(sandbox, changes, says):
    folder = sandbox.model()
    change_json("tokenizer_config.json", **changes)(folder)
    sandbox.fails("predict.py", *COMMANDS["predict"].split(), says=rf"model/tokenizer_config\.json: {says}")


def test_settings_that_reach_no_library(sandbox):
    """Hostile values under keys that nothing here reads: the tokenizer is that of the release."""
    folder = sandbox.model()
    change_json(
        "tokenizer_config.json",
        added_tokens_decoder={"a": 5},
        chat_template=[{"x": 1}],
        backend={"a": 1},
        extra_special_tokens=7,
        auto_map={"AutoTokenizer": ["evil.py", None]},
        tokenizer_class=["evil"],
        model_max_length="x",
    )(folder)
    put("special_tokens_map.json", "[" * 9999)(folder)
    put("added_tokens.json", '{"a": "b"}')(folder)
    config = opening.read_config(str(folder), MODES["glm3"])
    tokenizer = opening.read_tokenizer(str(folder), MODES["glm3"], config)
    assert tokenizer.get_vocab() == MODES["glm3"].tokenizer_class.from_pretrained(GOLDEN_FOLDERS["glm3"]).get_vocab()


@pytest.mark.parametrize("value", ["warm", [1], {"a": 1}, 1e300])
def test_settings_of_generation(tmp_path, capsys, value):
    put("generation_config.json", json.dumps({"temperature": value}))(tmp_path)
    with pytest.raises(UserError, match=r"generation_config\.json: temperature = .*: must be a number"):
        base_weights.read_generation_config(str(tmp_path))
    put("generation_config.json", json.dumps({"eos_token_id": [2, 5], "cache_implementation": "x", "a": 1}))(tmp_path)
    assert base_weights.read_generation_config(str(tmp_path)).eos_token_id == [2, 5]
    assert "not used here: cache_implementation, a" in capsys.readouterr().err


# ---------------------------------------------------------------- few bytes, much memory


def archive(folder, pickled, compression=zipfile.ZIP_STORED, **records):
    """Write BIN as torch does, with this pickle."""
    with zipfile.ZipFile(folder / BIN, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3\n")
        for name, content in records.items():
            file.writestr(f"archive/data/{name}", content)


def called(name, argument):
    """A pickle, protocol 2, of one call of a function that torch's reader allows."""
    return b"\x80\x02}X\x01\x00\x00\x00ac" + name.replace(" ", "\n").encode() + b"\n" + argument + b"\x85Rs."


def number(value):
    return b"\x8a\x08" + value.to_bytes(8, "little")


BOMBS = {  # a pickle of a few bytes, which torch.load(weights_only=True) obeys
    "bytearray": called("builtins bytearray", number(6 * GIB)),
    "tensor": called("torch Tensor", number(2 * GIB)),
    "quantised": called("torch._utils _rebuild_qtensor", number(2 * GIB)),
    "tuples": b"\x80\x02}X\x01\x00\x00\x00aK\x01" + b"q\x00h\x00\x86" * 60 + b"Ns.",  # as a key it is hashed for ever
    "set": called("builtins set", b"]"),
    "old-opcodes": b"\x80\x02}X\x01\x00\x00\x00a(i__builtin__\nbytearray\ns.",
}


OLD_PARTS = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {}, [])  # pickles that begin an old file
NESTED = b"\x80\x02)" + b"q\x00h\x00\x86" * 60  # a tuple whose text has no end


def old_bombs():
    """{name: an old file} with a value whose text torch would make for a message."""
    parts = [pickle.dumps(part, 2) for part in OLD_PARTS]
    found = {}
    for at, content in ((0, NESTED + b"."), (1, NESTED + b"."), (4, b"\x80\x02](" + NESTED[2:] + b"e.")):
        found[f"old-nested-{at}"] = b"".join([*parts[:at], content, *parts[at + 1 :]])
    return found


@pytest.mark.parametrize(
    "name", [*BOMBS, *old_bombs(), "packed", "packed-pickle", "memory-claimed", "old", "too-many-records", "disks"]
)
def test_small_files_take_little_memory(tmp_path, monkeypatch, name):
    """What a pickle would make is looked at first; without that, some of these take gigabytes or never end."""
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("it would be made"))
    if name in BOMBS:
        archive(tmp_path, BOMBS[name])
    elif name in old_bombs():
        (tmp_path / BIN).write_bytes(old_bombs()[name])
    elif name == "disks":  # zipfile itself raises where it is asked whether this is an archive
        locator = b"PK\x06\x07" + struct.pack("<LQL", 0, 0, 7)
        (tmp_path / BIN).write_bytes(locator + b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 0, 0, 0, 0, 0))
    elif name == "packed":
        archive(tmp_path, pickle.dumps({}, 2), zipfile.ZIP_DEFLATED, **{"0": bytes(1 << 26)})
    elif name == "packed-pickle":
        archive(tmp_path, b"\x80\x02" + b"N0" * (1 << 25) + b".", zipfile.ZIP_DEFLATED)
    elif name == "memory-claimed":
        torch.save({"a": torch.zeros(9)}, tmp_path / BIN)
        with zipfile.ZipFile(tmp_path / BIN) as file:
            [pickled] = [file.read(record) for record in file.namelist() if record.endswith("data.pkl")]
        archive(tmp_path, pickled.replace(b"cpuq\x06K\x09", b"cpuq\x06" + number(GIB)), **{"0": bytes(36)})
    elif name == "old":
        torch.save({"a": torch.zeros(9)}, tmp_path / BIN, _use_new_zipfile_serialization=False)
        content = (tmp_path / BIN).read_bytes()
        assert b"cpuq\x06K\x09" in content
        (tmp_path / BIN).write_bytes(content.replace(b"cpuq\x06K\x09", b"cpuq\x06" + number(GIB), 1))
    else:
        archive(tmp_path, b"\x80\x02}." + b"N" * (9 << 20))
    before = peak()
    if name in ("too-many-records",):
        with pytest.raises(pickle.UnpicklingError):
            check_pickle(str(tmp_path / BIN))
    with pytest.raises(UserError, match=rf"{tmp_path}/{BIN}: .*(do not use it|download it again)$"):
        weight_files.read_bin(str(tmp_path / BIN))
    assert peak() - before < GIB // 4


@pytest.mark.parametrize("is_old", [False, True])
def test_what_torch_saves_is_read(tmp_path, is_old):
    """Tables, ordered tables with versions, parameters, shared memory, all usual types: read as before."""
    table = torch.nn.Linear(3, 2).state_dict()
    shared = torch.arange(12.0).reshape(3, 4)
    table |= {
        "view": shared[1:],
        "turned": shared.t(),
        "parameter": torch.nn.Parameter(shared),
        "empty": torch.zeros(0),
    }
    types = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.int64, torch.bool)
    table |= {f"of {dtype}": torch.ones(2, 3, dtype=dtype) for dtype in types}
    torch.save(table, tmp_path / BIN, _use_new_zipfile_serialization=not is_old)
    read = weight_files.read_bin(str(tmp_path / BIN))
    assert read.keys() == table.keys() and all(torch.equal(read[name], table[name]) for name in table)


def test_many_weights_cannot_share_their_bytes(tmp_path):
    """A tied pair may; a whole network in the bytes of one layer would be allocated layer by layer."""
    one = torch.zeros(1000, 10)
    torch.save({"embedding": one, "output": one}, tmp_path / BIN)
    assert len(weight_files.read_bin(str(tmp_path / BIN))) == 2
    torch.save({f"layers.{i}": one for i in range(9)}, tmp_path / BIN)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: many weights lie in the same bytes of it: do not use it"):
        weight_files.read_bin(str(tmp_path / BIN))


def test_a_header_of_safetensors_is_bounded(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 99 << 20) + b" " * 100)
    with pytest.raises(UserError, match=r"model\.safetensors: truncated or not safetensors \(a header of 103,809,024"):
        weight_files.safetensors_shapes(str(path))


# ---------------------------------------------------------------- files that are no files, JSON without measure


def special(folder, kind):
    """A path that is no regular file."""
    path = folder / "special"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        import socket

        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    return path


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a device", "a socket"])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind):
    """Opened, a pipe is waited for and a device read without end."""
    path = special(tmp_path, kind)
    for read in (plain_files.open_plain, read_json):
        with pytest.raises(UserError, match=rf"{path}: is {kind}, not a file: write its contents to a file"):
            read(str(path))


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer_config.json",
        "pytorch_model.bin.index.json",
        "generation_config.json",
        "pytorch_model-00001-of-00002.bin",
        "tokenizer.model",
    ],
)
def test_pipes_in_a_checkpoint_are_not_waited_for(sandbox, name):
    folder = sandbox.model()
    drop(name)(folder)
    os.mkfifo(folder / name)
    if name == "generation_config.json":  # not a file, so there is none
        with pytest.raises(WeightsReached):
            sandbox.run("predict.py", *COMMANDS["predict"].split())
        return
    sandbox.fails(
        "predict.py", *COMMANDS["predict"].split(), says=r"model(/\S+)?: .*(not a file|missing|no weights|no con)"
    )


def test_rows_from_a_pipe_are_refused_by_name(sandbox):
    os.mkfifo(sandbox.folder / "pipe.json")
    sandbox.train_fails(
        train_path="pipe.json", says=r"pipe\.json: is a pipe: rows are read more than once: write them to a"
    )


JSON_TEXTS = [
    case("deep", "[" * 100_000, "recursion"),
    case("deep-object", '{"a":' * 100_000, "recursion"),
    case("digits", '{"a": ' + "9" * 5000 + "}", "a whole number of 5000 digits"),
    case("digits-few", '{"a": ' + "9" * 101 + "}", "a whole number of 101 digits"),
    case("twice", '{"r": 4, "r": 8}', "key 'r' stands twice"),
    case("bytes", b'{"a": "\xff"}', "utf-8"),
    case("surrogate-key", '{"\\ud800": 1, "\\ud800": 2}', r"key '\\ud800' stands twice"),
]


@pytest.mark.parametrize("text, says", JSON_TEXTS)
def test_json_without_measure(tmp_path, text, says):
    put("a.json", text)(tmp_path)
    with pytest.raises(UserError, match=rf"a\.json: cannot be read as JSON \(.*{says}"):
        read_json(str(tmp_path / "a.json"))


def test_json_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_files, "MOST_JSON_BYTES", 100)
    put("a.json", "{}" + " " * 99)(tmp_path)
    with pytest.raises(UserError, match=r"a\.json: is larger than 100 bytes"):
        read_json(str(tmp_path / "a.json"))


# ---------------------------------------------------------------- weights that are no numbers


def with_one(value):
    """A function of the output layer that makes one of its values another."""

    def change(tensor):
        tensor = tensor.clone()
        tensor[3, 5] = value
        return tensor

    return change


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("file", ["model.safetensors", BIN])
def test_a_base_that_is_not_finite_is_refused(sandbox, value, file):
    """Answers of such a model would be empty, with exit code 0."""
    one_file(replaced(with_one(value)), file)(sandbox.model())
    sandbox.allow_weights()
    flags = "--model_path model --prompt a --max_new_tokens 1 --device cpu"
    sandbox.fails(
        "predict.py", *flags.split(), says=rf"model/{re.escape(file)}: {OUTPUT_LAYER} holds values that are not finite"
    )


def test_weights_too_large_for_half_precision(sandbox):
    one_file(replaced(lambda t: with_one(1e6)(t.float())))(sandbox.model())
    mode = MODES["glm3"]
    config = opening.read_config("model", mode)
    sandbox.allow_weights()
    base_weights.load_base("model", mode, config, torch.bfloat16)
    with pytest.raises(UserError, match=rf"{OUTPUT_LAYER} is too large for float16: use --precision bf16 or fp32"):
        base_weights.load_base("model", mode, config, torch.float16)


@pytest.mark.parametrize(
    "command", ["predict.py --prompt a --max_new_tokens 1 --model_path", "merge_lora.py --model_dir"]
)
def test_an_adapter_that_is_not_finite_is_refused(sandbox, command):
    folder = sandbox.adapter()
    state = {}
    for i in range(4):
        name = f"base_model.model.transformer.encoder.layers.{i}.self_attention.query_key_value"
        state |= {f"{name}.lora_A.weight": torch.ones(4, 64), f"{name}.lora_B.weight": torch.zeros(128, 4)}
    state[f"{name}.lora_B.weight"][5, 1] = float("nan")
    save_file(state, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query_key_value"]}
    put("adapter_config.json", json.dumps(settings))(folder)
    sandbox.allow_weights()
    script, *flags = command.split()
    sandbox.fails(
        script,
        *flags,
        "adapter",
        "--device",
        "cpu",
        says=rf"adapter/adapter_model\.safetensors: {re.escape(name)}\.lora_B\.weight holds values that are not finite",
    )


def test_a_prefix_that_is_not_finite_is_refused(sandbox):
    folder = sandbox.adapter(weights="prefix", train_type="ptuning")
    put("config.json", (FOLDERS["glm3"] / "config.json").read_bytes())(folder)
    change_json("config.json", pre_seq_len=8, prefix_projection=False)(folder)
    name = "transformer.prefix_encoder.embedding.weight"
    save_file({name: torch.full((8, 256), float("inf"))}, folder / "prefix_encoder.safetensors")
    sandbox.allow_weights()
    flags = "--model_path adapter --prompt a --max_new_tokens 1 --device cpu"
    sandbox.fails(
        "predict.py", *flags.split(), says=rf"prefix_encoder\.safetensors: {name} holds values that are not finite"
    )
