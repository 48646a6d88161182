"""Training that goes on from an adapter or a prefix encoder, ours or another tool's: the same function, the same flags."""

# ruff: noqa: F811

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from launching import check_done, free_port, run_command
from peft_adapters import CPU, adapted
from reference import GOLDEN_FOLDERS, ROOT, Golden
from refusing import change_json, sandbox  # noqa: F401, a fixture
from safetensors.torch import load_file, save_file

from checkpoints.base_weights import load_base
from checkpoints.opening import load_opened, open_checkpoint, read_config
from checkpoints.saving import describe_run, save_checkpoint
from flags.train import parse_train
from rows.batches import collate
from rows.encoding import encode_row
from train_types import TRAIN_TYPES
from training import resuming
from training.going_on import check_start, open_start, put_start
from training.setup import Setup

LORA = {"lora_dim": 3, "lora_alpha": 12.0, "lora_dropout": 0.2, "lora_module_name": "dense,query_key_value"}
PREFIX = {"pre_seq_len": 5, "prefix_projection": False}


def saved(folder, train_type="lora", mode="glm3"):
    """A checkpoint as train.py saves it, with a visible effect."""
    golden = Golden(mode)
    flags = LORA if train_type == "lora" else PREFIX
    args = SimpleNamespace(mode=mode, train_type=train_type, model_name_or_path=golden.folder, **flags)
    torch.manual_seed(0)
    model = golden.model(**(PREFIX if train_type == "ptuning" else {}))
    model = TRAIN_TYPES[train_type].prepare(model, args, golden.mode)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "prefix_encoder" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    run = describe_run(args, golden.folder, "fp32", epoch=1, step=7)
    assert save_checkpoint(model, golden.tokenizer(), str(folder), TRAIN_TYPES[train_type], run, zero3=False) is None
    return folder


def begun(folder, *flags):
    """(args, the model that train.py begins with) for the folder of an adapter or a prefix encoder."""
    (folder.parent / "rows.json").write_text((ROOT / "data" / "spo_0.json").read_text(encoding="utf-8")[:400])
    words = ["--train_path", str(folder.parent / "rows.json"), "--model_name_or_path", str(folder)]
    args = parse_train([*words, "--output_dir", str(folder.parent / "out"), *flags])
    start = open_start(args)
    config = read_config(start.base_folder, start.mode, TRAIN_TYPES[args.train_type].config_changes(args))
    check_start(start, config)
    model = load_base(start.base_folder, start.mode, config, torch.float32)
    return args, put_start(model, start, args)


@torch.no_grad()
def logits(model, mode="glm3"):
    return model(input_ids=Golden(mode).tensors["one.input_ids"]).logits


def test_an_adapter_of_ours(tmp_path):
    """It begins as predict.py has it, with its own settings, and its weights train."""
    folder = saved(tmp_path / "adapter")
    args, model = begun(folder)
    assert {name: getattr(args, name) for name in LORA} == LORA
    assert args.continued_from == {"path": str(folder), "step": 7}
    assert args.model_name_or_path == str(GOLDEN_FOLDERS["glm3"])
    wanted, _ = load_opened(open_checkpoint(str(folder)), torch.float32, CPU)
    assert torch.equal(logits(model.eval()), logits(wanted))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    from modeling.fused_ops import SeededDropout

    assert {module.p for module in model.modules() if isinstance(module, SeededDropout)} == {0.2}
    run = describe_run(args, str(GOLDEN_FOLDERS["glm3"]), "fp32")
    assert run["continued_from"] == args.continued_from and run["base_model"] == str(GOLDEN_FOLDERS["glm3"])
    assert "continued_from" not in run["flags"]


@pytest.mark.parametrize("name", ["regex", "patterns", "rslora"])
def test_an_adapter_of_peft(name, tmp_path):
    """What flags cannot say is kept too, and what is saved then is the same function again."""
    golden, folder = Golden("glm3"), tmp_path / "adapter"
    wanted = logits(adapted(golden, folder, name))
    args, model = begun(folder, "--lora_dropout", "0")
    assert (args.lora_dim, args.lora_dropout, args.mode, args.continued_from["step"]) == (4, 0.0, "glm3", None)
    assert (logits(model.eval()) - wanted).abs().max() < 1e-6
    run = describe_run(args, golden.folder, "fp32")
    save_checkpoint(model, golden.tokenizer(), str(tmp_path / "next"), TRAIN_TYPES["lora"], run, zero3=False)
    again, _ = load_opened(open_checkpoint(str(tmp_path / "next")), torch.float32, CPU)
    assert (logits(again) - wanted).abs().max() < 1e-6


def test_what_a_run_goes_on_from_is_part_of_its_fingerprint(tmp_path):
    """A state is not gone on with from another adapter; where the adapter lies does not matter."""
    saved(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")

    def of(name):
        args, _ = begun(tmp_path / name)
        setup = Setup(CPU, "fp32", {"zero_optimization": {"stage": 2}}, rank=0, world=1, group=None)
        return resuming.fingerprint(args, str(GOLDEN_FOLDERS["glm3"]), "rows", setup, "torch AdamW")

    assert resuming.differences(of("a"), of("b")) == []
    path = tmp_path / "b" / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    assert resuming.differences(of("a"), of("b")) == ["weights it went on from was other contents"]


REFUSED = [  # kind of what is gone on from, flags, what the line says
    ("lora", "--train_type freeze", r"--train_type freeze: start holds an adapter, .* merge it \(python merge_lora.py"),
    ("lora", "--train_type all", "--train_type all: start holds an adapter, which --train_type lora trains on"),
    ("lora", "--train_type ptuning", "--train_type ptuning: start holds an adapter, which --train_type lora"),
    ("lora", "--lora_dim 8", "--lora_dim 8: an adapter is trained on as it is, and start has 3: remove this flag"),
    ("lora", "--lora_alpha 8", "--lora_alpha 8.0: an adapter is trained on as it is, and start has 12.0: remove"),
    ("lora", "--lora_module_name dense", "--lora_module_name dense: .* start has dense,query_key_value: remove"),
    ("lora", "--mode glm2", "--mode glm2: start is of glm3: change --mode"),
    ("ptuning", "", "--train_type lora: start holds a prefix encoder, which --train_type ptuning trains on"),
    ("ptuning", "--train_type ptuning --pre_seq_len 6", "--pre_seq_len 6: a prefix encoder .* start has 5: remove"),
    ("ptuning", "--train_type ptuning --prefix_projection True", "--prefix_projection True: .* start has False"),
]


@pytest.fixture(scope="module")
def starts(tmp_path_factory):
    """An adapter and a prefix encoder, to be copied."""
    return {
        train_type: saved(tmp_path_factory.mktemp(train_type) / "start", train_type)
        for train_type in ("lora", "ptuning")
    }


@pytest.mark.parametrize("kind, flags, says", REFUSED)
def test_other_settings_are_refused(kind, flags, says, starts, sandbox):
    """Of the kind: flags that the weights have decided already. One line, before anything is read."""
    shutil.copytree(starts[kind], "start")
    sandbox.train_fails(flags, says, model_name_or_path="start")


def test_flags_that_say_the_same_are_taken(starts, tmp_path):
    shutil.copytree(starts["lora"], tmp_path / "start")
    args, _ = begun(
        tmp_path / "start", "--lora_dim", "3", "--lora_module_name", "query_key_value,dense", "--lora_dropout", "0"
    )
    assert (args.lora_dim, args.lora_dropout) == (3, 0.0)


BASES = [  # changes to run.json, what the line says
    ({"base_model": "/gone"}, "base model /gone is not there: put it back there, or a link to it"),
    ({"base_fingerprint": "x"}, "holds other weights, .*: put its own base there, or start anew from this one"),
]


@pytest.mark.parametrize("change, says", BASES)
def test_a_base_that_is_not_that_of_the_training(change, says, starts, sandbox):
    """The fixes are those of train.py, which has no other flag for the base."""
    shutil.copytree(starts["lora"], "start")
    change_json("run.json", **change)(sandbox.folder / "start")
    sandbox.train_fails("", says, model_name_or_path="start")


def test_an_adapter_of_peft_without_a_base(tmp_path, sandbox):
    adapted(Golden("glm3"), sandbox.folder / "start", change={"base_model_name_or_path": None})
    sandbox.capsys.readouterr()
    sandbox.train_fails("", "is None: write its folder or hub name into that file", model_name_or_path="start")


def test_merging_what_is_no_adapter(starts, sandbox):
    shutil.copytree(starts["ptuning"], "start")
    says = r"start: holds a prefix encoder, which cannot be merged: use it as it is \(python predict.py --model_path start\)"
    sandbox.fails("merge_lora.py", "--model_dir", "start", says=says)
    says = r"glm3: holds a whole model, which needs no merging: use it as it is \(python predict.py"
    sandbox.fails("merge_lora.py", "--model_dir", str(GOLDEN_FOLDERS["glm3"]), says=says)


@pytest.mark.launch
def test_a_prefix_encoder_split_over_two_processes(starts, tmp_path):
    """train.py under ZeRO-3, learning rate 0: the first loss is that of what it goes on from, and so is what it saves."""
    rows = [json.loads(row) for row in (ROOT / "data" / "spo_0.json").read_text(encoding="utf-8").splitlines()[:4]]
    (tmp_path / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    shutil.copytree(starts["ptuning"], tmp_path / "start")
    process = run_command(
        f"deepspeed --num_accelerators 2 --master_port {free_port()} train.py --train_path rows.json --output_dir out"
        " --model_name_or_path start --train_type ptuning --ds_file ds_zero3_no_offload.json --max_len 300"
        " --max_src_len 200 --per_device_train_batch_size 2 --learning_rate 0",
        tmp_path,
    )
    check_done(process)
    model, tokenizer = load_opened(open_checkpoint(str(tmp_path / "start")), torch.float32, CPU)
    prompt = open_checkpoint(str(tmp_path / "start")).mode.prompt
    texts = [(row["instruction"] + row["input"], row["output"]) for row in rows]
    batch = collate([encode_row(*text, tokenizer, prompt, 300, 200) for text in texts], tokenizer.pad_token_id)
    model.transformer.prefix_encoder.dropout.p = 0.0
    with torch.no_grad():
        wanted = model(**batch).loss.item()
    [line] = map(json.loads, (tmp_path / "out" / "train_log.jsonl").read_text().splitlines())
    assert line["loss"] == pytest.approx(wanted, rel=0.02)  # the prefix encoder has dropout in training
    last = tmp_path / "out" / "epoch-1-step-1"
    before, after = (load_file(folder / "prefix_encoder.safetensors") for folder in (tmp_path / "start", last))
    assert set(before) == set(after) and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert json.loads((last / "run.json").read_text())["continued_from"]["step"] == 7
