"""Weights are read from their files: the same as transformers reads them, without a second copy in memory."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import check_done, free_port, run_command
from reference import GOLDEN_FOLDERS, ROOT

from checkpoints.base_weights import empty_model, load_base, put_part
from checkpoints.weight_files import stored_tensors, weight_files, write_weights
from modes import MODES

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["bin", "safetensors"]
LARGE = {  # changes to glm3's small configuration: some 330 MB in float16, one layer in a shard
    "hidden_size": 1024,
    "num_layers": 11,
    "num_attention_heads": 16,
    "kv_channels": 64,
    "ffn_hidden_size": 4096,
}


def state_of(folder):
    """{name: tensor} of all stored tensors."""
    return {name: rows[:].clone() for name, _, rows in stored_tensors(folder)}


def rewrite(mode_name, folder, change=lambda state: state, max_shard_size="300KB"):
    """A small checkpoint in several .safetensors files, its weights changed."""
    source = GOLDEN_FOLDERS[mode_name]
    folder.mkdir(exist_ok=True)
    shutil.copy(source / "config.json", folder)
    state = {name: tensor for name, tensor in state_of(source).items() if not name.endswith("inv_freq")}
    write_weights(change(state), folder, max_shard_size=max_shard_size)
    return str(folder)


def write_large(folder):
    """A checkpoint large enough to measure memory with."""
    mode = MODES["glm3"]
    config = mode.config_class.from_pretrained(GOLDEN_FOLDERS["glm3"], **LARGE)
    folder.mkdir()
    config.save_pretrained(folder)
    state = {
        name: torch.full(tensor.shape, 0.5, dtype=torch.float16)
        for name, tensor in empty_model(mode, config).state_dict().items()
    }
    write_weights(state, folder, max_shard_size="40MB")
    return str(folder)


def largest_file(folder):
    return max(path.stat().st_size for path in folder.iterdir())


@pytest.fixture
def folder(request, golden, tmp_path):
    """A family's checkpoint as .bin files or as .safetensors files."""
    return golden.folder if request.param == "bin" else rewrite(golden.mode.name, tmp_path / "model")


both_layouts = pytest.mark.parametrize("folder", LAYOUTS, indirect=True)


@both_layouts
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_as_transformers_reads(golden, folder, dtype):
    config = golden.config()
    model = load_base(folder, golden.mode, config, dtype)
    wanted = golden.mode.model_class.from_pretrained(folder, config=golden.config(), dtype=dtype)
    state, wanted_state = model.state_dict(), wanted.state_dict()
    assert list(state) == list(wanted_state)
    for name, tensor in wanted_state.items():
        assert state[name].dtype == dtype and torch.equal(state[name], tensor), name
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in wanted.named_parameters()]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training == wanted.training and model.config.to_dict() == wanted.config.to_dict()
    assert model.config._attn_implementation == wanted.config._attn_implementation == "sdpa"
    assert config.to_dict() == golden.config().to_dict(), "the caller's configuration was changed"
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


@both_layouts
def test_weights_are_copies(golden, folder):
    paths = [Path(folder, name) for name in weight_files(folder)]
    digests = {path: hashlib.sha256(path.read_bytes()).digest() for path in paths}
    model = load_base(folder, golden.mode, golden.config(), torch.float16)  # as stored, where a view would do
    with open("/proc/self/maps", encoding="utf-8") as file:
        mapped = file.read()
    assert not any(str(path) in mapped for path in paths), "a file is still mapped"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    assert digests == {path: hashlib.sha256(path.read_bytes()).digest() for path in digests}
    again = load_base(folder, golden.mode, golden.config(), torch.float16)
    assert not any((parameter == 7.0).all() for parameter in again.parameters())


@both_layouts
def test_tied_weights_are_one(golden, folder):
    model = load_base(folder, golden.mode, golden.config(), torch.float32)
    tied = model.all_tied_weights_keys
    assert tied == ({"lm_head.weight": "transformer.word_embeddings.weight"} if golden.mode.name == "glm" else {})
    for name, source in tied.items():
        assert model.get_parameter(name) is model.get_parameter(source)
    assert len(list(model.parameters())) == len(model.state_dict()) - len(tied)


@pytest.mark.parametrize("change", [lambda t: t + 1, lambda t: t[:3].clone(), None], ids=["other", "small", "absent"])
def test_the_stored_copy_of_a_tied_weight_is_not_read(change, tmp_path):
    mode = MODES["glm"]

    def spoil(state):
        copy = state.pop("lm_head.weight")
        return {**state, "lm_head.weight": change(copy)} if change else state

    folder = rewrite("glm", tmp_path / "model", spoil)
    model = load_base(folder, mode, mode.config_class.from_pretrained(folder), torch.float16)
    assert torch.equal(model.lm_head.weight, state_of(folder)["transformer.word_embeddings.weight"])


def test_an_old_bin_file(golden, tmp_path):
    """torch before 1.6 wrote pickles that cannot be mapped."""
    state = state_of(golden.folder)
    torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    model = load_base(str(tmp_path), golden.mode, golden.config(), torch.float16)
    assert all(torch.equal(parameter, state[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("projection", [False, True])
def test_a_new_prefix_follows_the_seed(golden, projection):
    config = golden.config(pre_seq_len=4, prefix_projection=projection)

    def prefix_of(seed):
        torch.manual_seed(seed)
        model = load_base(golden.folder, golden.mode, config, torch.float32)
        return {name: p for name, p in model.named_parameters() if "prefix_encoder." in name}

    first, again, other = prefix_of(1), prefix_of(1), prefix_of(2)
    assert len(first) == (5 if projection else 1)
    for name, weight in first.items():
        assert torch.equal(weight, again[name]) and not torch.equal(weight, other[name])
    assert 0.8 < first["transformer.prefix_encoder.embedding.weight"].std() < 1.2


def test_a_stored_prefix_is_read(golden, tmp_path):
    config = golden.config(pre_seq_len=4, prefix_projection=False)
    name = "transformer.prefix_encoder.embedding.weight"
    prefix = torch.randn(empty_model(golden.mode, config).get_parameter(name).shape)
    folder = rewrite(golden.mode.name, tmp_path / "model", lambda state: {**state, name: prefix})
    assert torch.equal(load_base(folder, golden.mode, config, torch.float32).get_parameter(name), prefix)


def test_differences_are_named(golden, tmp_path):
    names = [name for name in state_of(golden.folder) if name.endswith("dense_4h_to_h.weight")]

    def spoil(state):
        state = {**state, "extra": torch.zeros(1), names[1]: state[names[1]][:3].clone()}
        del state[names[0]]
        return state

    folder = rewrite(golden.mode.name, tmp_path / "model", spoil)
    with pytest.raises(ValueError) as caught:
        load_base(folder, golden.mode, golden.config(), torch.float32)
    assert str(caught.value) == f"{folder}: missing {[names[0]]}, unexpected ['extra'], wrong {[names[1]]}"


def with_attention(config, name):
    config._attn_implementation = name
    return config


def test_settings_of_generation(tmp_path):
    mode = MODES["glm3"]
    folder = rewrite("glm3", tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    config = mode.config_class.from_pretrained(folder)
    assert load_base(folder, mode, config, torch.float32).generation_config.temperature != 0.25
    path.write_text(json.dumps({"temperature": 0.25, "do_sample": True}))
    settings = load_base(folder, mode, config, torch.float32).generation_config
    assert settings.to_dict() == mode.model_class.from_pretrained(folder).generation_config.to_dict()
    assert (settings.temperature, settings.do_sample) == (0.25, True)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json: cannot be read as JSON"):
        load_base(folder, mode, config, torch.float32)


@torch.no_grad()
def test_attention_is_chosen(golden):
    logits = []
    for name in ("eager", "sdpa"):
        model = load_base(golden.folder, golden.mode, with_attention(golden.config(), name), torch.float32)
        assert model.config._attn_implementation == name
        logits.append(model(golden.tensors["one.input_ids"]).logits)
    assert (logits[0] - logits[1]).abs().max() < 1e-4


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_on_a_terminal_only(is_terminal, capsys, monkeypatch):
    mode = MODES["glm3"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    load_base(GOLDEN_FOLDERS["glm3"], mode, mode.config_class.from_pretrained(GOLDEN_FOLDERS["glm3"]), torch.float32)
    assert ("loading" in capsys.readouterr().err) == is_terminal


def test_memory_is_the_model_and_one_file(tmp_path):
    """Resident pages of the file that is being read count here, though the system takes them back at will."""
    folder = write_large(tmp_path / "large")
    process = subprocess.run(
        [sys.executable, ROOT / "tests" / "helpers" / "worker_loading.py", "plain", "glm3", folder, "float16"],
        env={"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    check_done(process)
    measured = json.loads(process.stdout.splitlines()[-1])
    assert measured["held"] > 300e6
    assert measured["held"] * 0.95 < measured["peak"] < measured["held"] + largest_file(tmp_path / "large")


class Split:
    """What put_part looks at of a parameter that DeepSpeed has split."""

    ds_secondary_tensor = None

    def __init__(self, shape, rank, world):
        self.ds_shape = torch.Size(shape)
        self.ds_numel = self.ds_shape.numel()
        self.ds_zero_partition_rank = rank
        self.ds_tensor = torch.full((-(-self.ds_numel // world),), -1.0)
        self.ds_tensor.ds_numel = self.ds_tensor.numel()
        self.ds_tensor.final_location = None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_the_parts_of_all_ranks_make_up_each_tensor(layout, world, tmp_path):
    """Parts that end within a row, a last one that is padded, and ranks that have nothing but padding."""
    state = {"matrix": torch.randn(5, 3), "bias": torch.randn(8), "one": torch.randn(1), "cube": torch.randn(2, 3, 4)}
    if layout == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        write_weights(state, tmp_path)
    for name, shape, rows in stored_tensors(str(tmp_path)):
        parts = []
        for rank in range(world):
            parameter = Split(shape, rank, world)
            put_part(parameter, rows)
            parts.append(parameter.ds_tensor)
        together = torch.cat(parts)
        assert torch.equal(together[: state[name].numel()].view(shape), state[name])
        assert not together[state[name].numel() :].any()


@pytest.mark.launch
def test_each_rank_reads_its_part(tmp_path):
    """Under ZeRO-3 on two processes, .bin and .safetensors, with the parts on the device, offloaded, and doubled."""
    checkpoints = []
    for mode_name in ("glm", "glm3"):
        checkpoints.append(f"{mode_name}:{GOLDEN_FOLDERS[mode_name]}")
        checkpoints.append(f"{mode_name}:{rewrite(mode_name, tmp_path / mode_name)}")
    large = write_large(tmp_path / "large")
    process = run_command(
        f"PYTHONPATH={ROOT} deepspeed --num_accelerators 2 --no_local_rank --master_port {free_port()}"
        f" {ROOT}/tests/helpers/worker_loading.py {tmp_path} {' '.join(checkpoints)} glm3:{large}",
        tmp_path,
        # Real weights are too large for malloc's heap, where freed memory stays resident; these shall be so too.
        MALLOC_MMAP_THRESHOLD_="1000000",
    )
    check_done(process)
    total, stored = (
        sum(tensor.nbytes for tensor in state_of(folder).values()) for folder in (large, str(tmp_path / "glm3"))
    )
    for rank in (0, 1):
        results = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for name in ("no_offload", "offload"):
            measured = results[name]
            assert measured["held"] == pytest.approx(total / 2, rel=1e-3)
            assert total / 2 <= measured["read"] < 1.01 * total / 2
            assert measured["peak"] < measured["held"] + largest_file(tmp_path / "large")
        assert results["two_copies"]["read"] == (stored if rank == 0 else 0), "the first process reads and sends"
