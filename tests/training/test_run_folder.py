"""What a run keeps: checkpoints that are whole and finite, the last one, the best one from elsewhere."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from reference import Golden
from safetensors.torch import load_file, save_file

import utils
from checkpoints import saving
from checkpoints.saving import check_written, describe_run, save_checkpoint
from runtime.exits import BadNumbersError
from runtime.folders import is_whole, new_folder
from train_types import TRAIN_TYPES
from training.run_folder import RunFolder, last_checkpoint

FLAGS = {"lora_dim": 2, "lora_alpha": 4, "lora_dropout": 0.0, "lora_module_name": "dense"}


@pytest.fixture
def lora():
    """(model, tokenizer, args) of glm3 with LoRA."""
    golden = Golden("glm3")
    args = SimpleNamespace(mode="glm3", train_type="lora", model_name_or_path=golden.folder, **FLAGS)
    return TRAIN_TYPES["lora"].prepare(golden.model(), args, golden.mode), golden.tokenizer(), args


def save(lora, folder):
    model, tokenizer, args = lora
    run = describe_run(args, args.model_name_or_path, "fp32", epoch=1, step=1)
    return save_checkpoint(model, tokenizer, str(folder), TRAIN_TYPES["lora"], run, zero3=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(lora, tmp_path, value):
    assert save(lora, tmp_path / "good") is None and is_whole(str(tmp_path / "good"))
    settings = json.loads((tmp_path / "good" / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == lora[2].model_name_or_path and settings["r"] == 2
    name, parameter = [pair for pair in lora[0].named_parameters() if "lora_B" in pair[0]][-1]
    with torch.no_grad():
        parameter[0, 0] = value
    with pytest.raises(BadNumbersError, match=f"{name.rpartition('.lora_B')[0]}.*not finite: .*/bad was not saved"):
        save(lora, tmp_path / "bad")
    assert os.listdir(tmp_path) == ["good"]


def test_what_was_written_is_counted(tmp_path):
    """Kind: a save that leaves something out. As many tensors and values as there are, or it is no checkpoint."""
    state = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    save_file(state, tmp_path / "x.safetensors")
    check_written(str(tmp_path), state)
    for other in ({"a": state["a"]}, {**state, "b": torch.zeros(5)}, {**state, "c": torch.zeros(1)}):
        with pytest.raises(AssertionError, match=r"tensors and values \(2, 10\), not"):
            check_written(str(tmp_path), other)
    torch.save({"a": state["a"]}, tmp_path / "x.bin")
    with pytest.raises(AssertionError, match=r"x.bin.*tensors and values \(1, 6\), not \(2, 10\)"):
        check_written(str(tmp_path), state)


def closed(folder, **run):
    """A whole folder with a run.json."""
    with new_folder(str(folder)) as scratch:
        with open(os.path.join(scratch, "run.json"), "w") as file:
            json.dump({"mode": "glm3", "weights": "adapter", "base_model": "x", **run}, file)
        save_file({"a": torch.tensor([float(run.get("step", 0))])}, os.path.join(scratch, "adapter_model.safetensors"))
    return folder


def test_the_last_checkpoint_of_a_run_that_is_done(tmp_path):
    """Only where the run says that it is done, and only the checkpoint of that step, if it is whole."""
    out, events = str(tmp_path), tmp_path / "events.jsonl"
    for step in (3, 6, 16):
        closed(tmp_path / f"epoch-{step // 3}-step-{step}", step=step)
    assert last_checkpoint(out) is None
    events.write_text('{"step": 6, "event": "saved"}\n')
    assert last_checkpoint(out) is None
    events.write_text('{"step": 6, "event": "saved"}\n{"step": 6, "event": "done"}\n')
    assert last_checkpoint(out) == str(tmp_path / "epoch-2-step-6")
    events.write_text('{"step": 4, "event": "done"}\n')
    assert last_checkpoint(out) is None
    events.write_text('{"step": 6, "event": "done"}\n')
    weights = tmp_path / "epoch-2-step-6" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert last_checkpoint(out) is None, "it is damaged"


def test_the_best_weights_come_along(tmp_path, capsys):
    """A run that goes on in another folder takes best/ of the step that its state names, of this run, whole."""
    args = SimpleNamespace(output_dir=str(tmp_path / "new"), learning_rate=0.1, seed=1)
    folder = RunFolder.__new__(RunFolder)
    folder.args, folder.base = args, SimpleNamespace(fingerprint="base")
    state = str(tmp_path / "old" / "state-step-9")
    best = tmp_path / "old" / "best"
    for name in ("old", "new"):
        (tmp_path / name).mkdir()

    def take(step=6, **run):
        if run:
            closed(best, **{"step": 6, "base_fingerprint": "base", "flags": {"learning_rate": 0.1}, **run})
        folder.take_best(state, step)
        found = (tmp_path / "new" / "best").exists()
        said = capsys.readouterr().out
        assert ("is not there before an evaluation is better than that of step 6" in said) == (not found and step == 6)
        return found

    assert not take() and not take(step=5)
    assert not take(step=5, seed=1), "the best of a later step"
    assert not take(step=7), "of an earlier one"
    assert not take(base_fingerprint="other") and not take(flags={"learning_rate": 0.2})
    assert not take(flags={"learning_rate": 0.1, "seed": 2})
    os.makedirs(best, exist_ok=True)
    closed(best, step=6)
    (best / "manifest.json").unlink()
    assert not take(), "not whole"
    assert take(seed=1) and is_whole(str(tmp_path / "new" / "best"))
    assert load_file(tmp_path / "new" / "best" / "adapter_model.safetensors")["a"].item() == 6
    assert take(step=8) and take(flags={"learning_rate": 0.2}), "what is there stays"
    assert load_file(tmp_path / "new" / "best" / "adapter_model.safetensors")["a"].item() == 6


def test_each_rank_draws_its_own_dropout(monkeypatch):
    """The seeds of Python, numpy and torch follow from the flag and the rank."""
    import random

    import numpy

    draws = {}
    for seed in (7, 8):
        for rank in (0, 1):
            monkeypatch.setattr(utils, "rank", lambda rank=rank: rank)
            utils.set_seed(seed)
            assert torch.initial_seed() == seed + rank
            draws[seed, rank] = random.random(), numpy.random.rand(), torch.rand(1).item()
    assert (
        draws[7, 1] == draws[8, 0]
        and not set(draws[7, 0]) & set(draws[7, 1])
        and not set(draws[8, 1]) & set(draws[8, 0])
    )
    utils.set_seed(2**32 + 5)  # numpy takes 32 bits
    assert numpy.random.rand() == numpy.random.RandomState(6).rand()


def test_what_a_checkpoint_takes():
    """An adapter: its own weights; a prefix encoder: twice, while that is not much; a whole one: all; and some room."""
    from checkpoints import released_files

    model = torch.nn.Sequential(torch.nn.Linear(3, 5, bias=False), torch.nn.Linear(5, 7, bias=False).half())
    model[0].requires_grad_(False)
    sizes = {"adapter": 70, "prefix": 140, "whole": 60 + 70}
    for weights, num_bytes in sizes.items():
        train_type = SimpleNamespace(weights=weights)
        assert saving.checkpoint_bytes(model, train_type) == num_bytes + saving.TOKENIZER_BYTES
    model[1].weight.ds_numel = released_files.MOST_PREFIX_BIN_BYTES  # split over the ranks: this is the whole
    wanted = 2 * released_files.MOST_PREFIX_BIN_BYTES + saving.TOKENIZER_BYTES
    assert saving.checkpoint_bytes(model, SimpleNamespace(weights="prefix")) == wanted


def test_whole_weights_come_back(tmp_path):
    """All of them, under the released names, with what lies beside them."""
    from checkpoints.opening import load_opened, open_checkpoint

    golden = Golden("glm3")
    args = SimpleNamespace(mode="glm3", train_type="all", model_name_or_path=golden.folder)
    model = TRAIN_TYPES["all"].prepare(golden.model(), args, golden.mode)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.add_(0.01 * number)
    run = describe_run(args, golden.folder, "fp32", epoch=2, step=5)
    folder = tmp_path / "epoch-2-step-5"
    assert save_checkpoint(model, golden.tokenizer(), str(folder), TRAIN_TYPES["all"], run, zero3=False) is None
    again, _ = load_opened(open_checkpoint(str(folder)), torch.float32, torch.device("cpu"))
    state = again.state_dict()
    assert set(state) == set(model.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    said = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert (said["weights"], said["epoch"], said["step"], said["train_type"]) == ("whole", 2, 5, "all")


def test_a_disk_that_fails_is_no_reason_to_end(lora, tmp_path, monkeypatch, capsys):
    """The reason is given back for a checkpoint, and told for the best weights."""
    from checkpoints import saving
    from training import run_folder

    def broken(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(saving, "write_checkpoint", broken)
    assert save(lora, tmp_path / "x") == "Input/output error"
    monkeypatch.setattr(run_folder, "is_whole", broken)
    folder = RunFolder.__new__(RunFolder)
    folder.args, folder.base_fingerprint = SimpleNamespace(output_dir=str(tmp_path)), ""
    folder.take_best(str(tmp_path / "old" / "state-step-3"), 3)
    assert capsys.readouterr().out.endswith("better than that of step 3: Input/output error\n")


def test_large_values_are_finite():
    """A sum that runs over is no infinity; whole numbers are looked over."""
    from checkpoints.weight_files import finite_problem

    good = {"a": torch.full((9,), 6e4, dtype=torch.float16), "b": torch.full((9,), 3e38), "c": torch.arange(3)}
    assert finite_problem(good.items()) is None and finite_problem([]) is None
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = {**good, "d": torch.tensor([1.0, value, 2.0]), "e": torch.tensor([value])}
        assert finite_problem(bad.items()) == "d holds values that are not finite"
