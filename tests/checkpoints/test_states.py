"""States: found, compared with the run, and read without running what is in them."""

import json
import os
import pickle
import shutil
from dataclasses import asdict

import pytest
import torch
from made_states import make_state

from checkpoints import state_checks
from checkpoints import states as checkpoints_states
from checkpoints.progress import Progress
from runtime import folders
from runtime.exits import BadNumbersError
from training import resuming
from training.setup import Setup


def setup_of(ds_config):
    return Setup(torch.device("cpu"), "fp32", ds_config, rank=0, world=1, group=None)


def test_the_newest_whole_state_is_found(tmp_path):
    for step in (4, 20, 8):
        make_state(tmp_path, step)
    assert resuming.find_state("auto", str(tmp_path)) == (str(tmp_path / "state-step-20"), [])
    (tmp_path / "state-step-20" / "state.json").write_text("{}")
    (tmp_path / "state-step-8" / "manifest.json").unlink()
    folder, skipped = resuming.find_state("auto", str(tmp_path))
    assert folder == str(tmp_path / "state-step-4") and len(skipped) == 2
    assert "state-step-20 is left out, it is not whole: " in skipped[0] and "manifest.json: missing" in skipped[1]
    with pytest.raises(ValueError, match=r"--resume \S+/state-step-20: .*use an older state, or --resume auto"):
        resuming.find_state(str(tmp_path / "state-step-20"), str(tmp_path))
    assert resuming.find_state("auto", str(tmp_path / "absent")) == (None, [])


@pytest.mark.parametrize(
    "current, split, says",
    [
        ({"--seed": 2, "rows": "b"}, [2, 1, 2], "--seed was 1, now it is 2: resume with what the run began with"),
        ({"--seed": 1, "rows": "b"}, [2, 1, 2], "rows was other contents: resume"),
        ({"--seed": 1, "rows": "a", "--new": 3}, [2, 1, 2], "--new was None, now it is 3"),
        ({"--seed": 1, "rows": "a"}, [2, 1, 1], r"an update had 4 rows \(2 x 1 x 2: .*now it has 2 .*so that it is 4"),
    ],
)
def test_another_run_is_refused(tmp_path, current, split, says):
    folder = make_state(tmp_path, 4)
    with pytest.raises(ValueError, match=f"--resume {folder}: {says}"):
        resuming.check_same_run(str(folder), state_checks.read_info(str(folder)), current, split)


def test_another_split_is_noted(tmp_path):
    info = state_checks.read_info(str(make_state(tmp_path, 4)))
    same = {"--seed": 1, "rows": "a"}
    assert resuming.check_same_run("x", info, same, [2, 1, 2]) == []
    [note] = resuming.check_same_run("x", info, same, [1, 4, 1])
    assert "2 x 1 x 2 before, 1 x 4 x 1 now" in note
    with_adam = {**same, "--optimizer": "DeepSpeed CPU AdamW"}
    [note] = resuming.check_same_run("x", {**info, "fingerprint": with_adam}, with_adam, [2, 1, 2])
    assert "does not restart to the bit" in note


def test_a_state_that_does_not_say_enough(tmp_path):
    with pytest.raises(ValueError, match=r"state.json: progress is None: use another state"):
        state_checks.read_info(str(make_state(tmp_path, 4, progress=None)))


@pytest.mark.parametrize(
    "more, says",
    [
        ({"progress": {}}, "progress.step is 'missing'"),
        ({"progress": {"step": "4", "usual_loss": {}}}, "progress.step is '4'"),
        ({"progress": {"step": 4}}, "progress.usual_loss is 'missing'"),
        ({"progress": {"step": 4, "usual_loss": {"x": 1}}}, r"progress.usual_loss is {'x': 1}"),
        ({"progress": {"step": 4, "usual_loss": {}, "of_a_newer_version": 1}}, "progress.of_a_newer_version is 1"),
        ({"progress": {"step": 4, "usual_loss": {}, "best_value": "high"}}, "progress.best_value is 'high'"),
        ({"split": [2, 1]}, r"split is \[2, 1\], not three numbers"),
        ({"split": [2, 1, None]}, r"split is \[2, 1, None\], not three numbers"),
    ],
)
def test_a_state_whose_values_are_not_right(tmp_path, more, says):
    with pytest.raises(ValueError, match=f"state.json: {says}: use another state"):
        state_checks.read_info(str(make_state(tmp_path, 4, **more)))


def test_what_evaluations_are_compared_by():
    """Another metric, or other held-out rows, forget the best value; weights that could not be saved are not it."""
    progress = Progress(step=3)
    progress.judge_by("loss", "rows")
    assert progress.is_best("loss", 2.0) and not progress.is_best("loss", 2.5)
    again = Progress.from_info({"progress": asdict(progress)})
    again.judge_by("loss", "rows")
    assert (again.best_value, again.best_step, again.num_worse) == (2.0, 3, 1)
    for change in (("f1", "rows"), ("loss", "others")):
        other = Progress.from_info({"progress": asdict(progress)})
        other.judge_by(*change)
        assert (other.best_value, other.best_step, other.num_worse) == (None, 0, 0)
    assert again.is_best("loss", 1.0)
    again.forget_best((2.0, 3))
    assert again.is_best("loss", 1.5)


def test_a_run_without_a_state_begins_anew_only_in_its_own_folder(tmp_path):
    current = {"--seed": 1}
    resuming.check_own_folder(str(tmp_path), current)
    (tmp_path / "epoch-1-step-3").mkdir()
    with pytest.raises(ValueError, match="epoch-1-step-3 of another run .* choose a new --output_dir"):
        resuming.check_own_folder(str(tmp_path), current)
    (tmp_path / "fingerprint.json").write_text('{"--seed": 1}')
    resuming.check_own_folder(str(tmp_path), current)
    with pytest.raises(ValueError, match="--seed was 1, now it is 2"):
        resuming.check_own_folder(str(tmp_path), {"--seed": 2})


def test_the_fingerprint_holds_what_decides_the_weights(tmp_path, golden):
    from flags.train import train_parser

    words = ["--train_path", "x", "--model_name_or_path", golden.folder, "--output_dir", "y"]
    base = tmp_path / "base"
    shutil.copytree(golden.folder, base)

    def of(*more, folder=golden.folder, key="rows"):
        args = train_parser().parse_args([*words, *more])
        ds = {"zero_optimization": {"stage": 2}}
        return resuming.fingerprint(args, str(folder), key, setup_of(ds), "torch AdamW")

    assert of() == of(folder=base) == of("--output_dir", "z", "--save_state_step", "5", "--num_proc", "3")
    for flags in (["--seed", "5"], ["--packing"], ["--num_train_epochs", "3"], ["--lora_dropout", "0"]):
        assert [line.split()[0] for line in resuming.differences(of(), of(*flags))] == [flags[0]]
    # A run that was begun before a switch was there goes on without it.
    saved = {name: value for name, value in of().items() if name != "--no_normalize"}
    assert resuming.differences(saved, of()) == []
    assert resuming.differences(saved, of("--no_normalize")) == ["--no_normalize was None, now it is True"]
    assert resuming.differences(of(), of(key="others")) == ["rows of --train_path was other contents"]
    [shard] = base.glob("*-00002-of-00002.bin")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert resuming.differences(of(), of(folder=base)) == ["base weights was other contents"]


class Attack:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_state_that_would_run_code_is_not_read(tmp_path, is_zip):
    marker, path = tmp_path / "marker", tmp_path / "rank-0.pt"
    torch.save({"torch": torch.zeros(3), "x": Attack(marker)}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ValueError, match="rank-0.pt: holds more than tensors: it is not read.*do not use it"):
        checkpoints_states.load_tensors(str(path))
    path.write_bytes(pickle.dumps(Attack(marker)))
    with pytest.raises(ValueError, match="rank-0.pt: "):
        checkpoints_states.load_tensors(str(path))
    assert not marker.exists()


def test_what_deepspeed_writes_is_read(tmp_path):
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    scaler = DynamicLossScaler(2**16, 2, 1000, 1, 2, False)
    files = checkpoints_states.state_files(str(tmp_path))
    state = {"loss_scaler": scaler, "zero_stage": ZeroStageEnum.weights, "shape": torch.Size([2]), "w": torch.ones(3)}
    files.save(state, str(tmp_path / "x.pt"))
    assert files.problem is None and files.written == {"x.pt": os.path.getsize(tmp_path / "x.pt")}
    again = files.load(str(tmp_path / "x.pt"))
    assert again["loss_scaler"].cur_scale == 2**16 and again["zero_stage"] == 3 and torch.equal(again["w"], state["w"])


def test_what_is_not_finite_is_not_saved(tmp_path):
    files = checkpoints_states.state_files(str(tmp_path))
    files.save({"a": [torch.ones(3), torch.tensor([1e30, 1e38])]}, str(tmp_path / "x.pt"))
    assert files.problem is None, "large is not infinite"
    files.save({"a": [torch.ones(3), torch.tensor([1.0, float("nan")])]}, str(tmp_path / "y.pt"))
    assert isinstance(files.problem, BadNumbersError) and "a.1 holds values that are not finite" in str(files.problem)
    assert not (tmp_path / "y.pt").exists()


def test_random_states_come_back(tmp_path):
    import random

    import numpy

    torch.save(checkpoints_states.random_states(), tmp_path / "rank-0.pt")
    drawn = torch.rand(3), random.random(), numpy.random.rand()
    checkpoints_states.set_random_states(checkpoints_states.load_tensors(str(tmp_path / "rank-0.pt")))
    again = torch.rand(3), random.random(), numpy.random.rand()
    assert torch.equal(drawn[0], again[0]) and drawn[1:] == again[1:]


def test_which_flags_are_compared(golden):
    """Kind: a list of exceptions that one more would not show. What is not on this list must be as it was."""

    from flags.train import train_parser

    words = ["--train_path", "x", "--model_name_or_path", golden.folder, "--output_dir", "y"]
    args = train_parser().parse_args(words)
    free = (
        "output_dir resume save_model_step save_state_step save_total_limit show_loss_step step_timeout start_timeout"
    )
    free += " local_rank num_proc train_path model_name_or_path ds_file device precision optimizer per_device_train_batch_size"
    free += " gradient_accumulation_steps eval_path eval_step eval_generate eval_max_new_tokens task replay_path"
    free += " metric_for_best_model early_stopping_patience"
    ds = {"zero_optimization": {"stage": 2}}

    def of(**changes):
        more = {**vars(args), **changes}
        return resuming.fingerprint(type(args)(**more), golden.folder, "k", setup_of(ds), "AdamW")

    first = of()
    for name in vars(args):
        lines = resuming.differences(first, of(**{name: "another"}))
        assert bool(lines) == (name not in free.split()), name
    assert (first["--precision"], first["--device"], first["--optimizer"]) == ("fp32", "cpu", "AdamW")
    assert len(first["base weights"]) == len(set(first["base weights"])) > 1


def test_a_state_needs_the_files_of_every_process(tmp_path):
    """Two processes: two parts of the optimizer and two random states, or the state does not get its name."""
    sizes = {f"deepspeed/zero_{n}_optim_states.pt": 3 for n in range(2)} | {f"rank-{n}.pt": 2 for n in range(2)}
    info = {"world_size": 2, "progress": {"step": 3}}

    def scratch():
        folder = tmp_path / "state-step-3.partial"
        (folder / "deepspeed").mkdir(parents=True, exist_ok=True)
        for name, size in sizes.items():
            (folder / name).write_bytes(b"x" * size)

    for missing in sizes:
        scratch()
        with pytest.raises(AssertionError, match="files of a state are missing"):
            checkpoints_states.close_state(
                str(tmp_path / "state-step-3"), info, {n: s for n, s in sizes.items() if n != missing}
            )
    for world in (1, 3):
        with pytest.raises(AssertionError, match="files of a state are missing"):
            checkpoints_states.close_state(str(tmp_path / "state-step-3"), {**info, "world_size": world}, sizes)
    assert os.listdir(tmp_path) == ["state-step-3.partial"]
    checkpoints_states.close_state(str(tmp_path / "state-step-3"), info, sizes)
    assert os.listdir(tmp_path) == ["state-step-3"] and folders.is_whole(str(tmp_path / "state-step-3"))
    assert json.loads((tmp_path / "state-step-3" / "state.json").read_text()) == info


def test_what_is_mended_in_a_converted_state():
    """Each parameter counts its own steps, each group has its decay, and the rate is that of the schedule."""
    from types import SimpleNamespace

    shared = torch.tensor(7.0)
    states = {n: {"step": shared, "exp_avg": torch.zeros(1)} for n in range(3)} | {3: {}}
    groups = [{"lr": 1.0, "weight_decay": 0.5}, {"lr": 1.0, "weight_decay": 0.5}]
    optimizer = SimpleNamespace(optimizer=SimpleNamespace(state=states), param_groups=groups)
    engine = SimpleNamespace(optimizer=optimizer, lr_scheduler=SimpleNamespace(get_last_lr=lambda: [0.25, 0.125]))
    checkpoints_states.fix_converted(engine, [0.1, 0.0])
    assert groups == [{"lr": 0.25, "weight_decay": 0.1}, {"lr": 0.125, "weight_decay": 0.0}]
    for number in range(3):
        states[number]["step"] += 1
    assert [state["step"].item() for state in states.values() if state] == [8, 8, 8] and shared.item() == 7


def test_random_states_of_a_gpu(monkeypatch):
    """Kept and set where there is one; a state that was saved without one is taken as well."""
    assert "cuda" not in checkpoints_states.random_states() or torch.cuda.is_available()
    state, given = torch.tensor([3, 1], dtype=torch.uint8), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", given.append)
    states = checkpoints_states.random_states()
    assert states["cuda"] is state
    checkpoints_states.set_random_states(states)
    assert len(given) == 1 and given[0] is state
    del states["cuda"]
    checkpoints_states.set_random_states(states)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checkpoints_states.set_random_states({**states, "cuda": state})
    assert len(given) == 1
