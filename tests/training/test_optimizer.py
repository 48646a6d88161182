"""Learning rate, weight decay and the DeepSpeed configuration."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from training.ds_config import complete_config, conflicts, offloads, read_ds_file, wanted_precision
from training.optimizer import build_optimizer, build_scheduler, choose_adam, learning_rate_factor, parameter_groups

NORMS = ("layernorm",)


def flags(**changes):
    values = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_grad_norm": 1.0,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "warmup_ratio": 0.2,
        "lr_scheduler_type": "cosine",
        "optimizer": "auto",
        "precision": "auto",
        "ds_file": "x.json",
    }
    return SimpleNamespace(**{**values, **changes})


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_learning_rate(kind):
    factors = [learning_rate_factor(step, 4, 20, kind) for step in range(20)]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factors[4] == 1.0 and all(0 < factor <= 1 for factor in factors)
    rest = factors[4:]
    assert rest == sorted(rest, reverse=True)
    middle = {"cosine": 0.5, "linear": 0.5, "constant": 1.0}[kind]
    assert factors[12] == pytest.approx(middle)
    assert learning_rate_factor(0, 0, 20, kind) == 1.0


@pytest.mark.parametrize(
    "kind, rest",
    [
        ("cosine", [1, 0.9504844, 0.8117449, 0.6112605, 0.3887395, 0.1882551, 0.0495156]),  # (1 + cos(n pi / 7)) / 2
        ("linear", [1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]),
        ("constant", [1] * 7),
    ],
)
def test_scheduler_sets_every_update(kind, rest):
    """Kind: a test that compares with the function under test. A quarter of ten updates warms up three, not two."""
    args = flags(warmup_ratio=0.25, lr_scheduler_type=kind)
    optimizer = build_optimizer(torch.nn.Linear(2, 2), args, NORMS)
    scheduler = build_scheduler(optimizer, args, num_steps=10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1e-3 * factor for factor in (1 / 4, 2 / 4, 3 / 4, *rest)], abs=1e-10)


def test_the_end_of_the_learning_rate():
    """Beyond the last update, and where all of them warm up, the factor stays in its range."""
    assert [learning_rate_factor(30, 4, 20, kind) for kind in ("cosine", "linear", "constant")] == [0, 0, 1]
    assert [learning_rate_factor(step, 3, 3, "linear") for step in (2, 3, 4)] == [3 / 4, 1, 0]


def test_what_no_flag_changes_reaches_adamw(monkeypatch):
    """Kind: constants that a test takes from the file under test, or from the golden files."""
    [group] = build_optimizer(torch.nn.Linear(2, 2, bias=False), flags(weight_decay=0.3), NORMS).param_groups
    found = [group[name] for name in ("lr", "betas", "eps", "weight_decay", "fused", "amsgrad", "maximize")]
    assert found == [1e-3, (0.9, 0.95), 1e-8, 0.3, True, False, False]
    import deepspeed.ops.adam

    asked = {}
    monkeypatch.setattr(deepspeed.ops.adam, "DeepSpeedCPUAdam", lambda groups, **given: asked.update(given) or groups)
    [group] = build_optimizer(torch.nn.Linear(2, 2, bias=False), flags(), NORMS, is_compiled=True)
    assert asked == {"lr": 1e-3, "adamw_mode": True, "betas": [0.9, 0.95], "eps": 1e-8}
    assert group["weight_decay"] == 0.1


def test_one_adamw_update_by_hand():
    """Decoupled decay, then a step of the learning rate in the direction of the gradient's sign."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 1))
    torch.nn.init.constant_(model[0].weight, 2.0), torch.nn.init.constant_(model[0].bias, 2.0)
    optimizer = build_optimizer(model, flags(learning_rate=0.5, weight_decay=0.1), NORMS)
    model(torch.tensor([[3.0, -4.0]])).sum().backward()
    optimizer.step()
    # 2 x (1 - 0.5 x 0.1) -+ 0.5 for the weight, 2 - 0.5 for the bias, which is not decayed
    assert model[0].weight.tolist()[0] == pytest.approx([1.4, 2.4]) and model[0].bias.tolist() == pytest.approx([1.5])


def test_weight_decay_spares_norms_and_biases(golden):
    model = golden.model()
    decayed, plain = parameter_groups(model, 0.1, golden.mode.norms)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.dim() == 2 for parameter in decayed["params"])
    assert all(parameter.dim() == 1 for parameter in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def test_flags_and_file_agree():
    config = read_ds_file("ds_zero2_no_offload.json")
    assert conflicts(config, flags(), 2) == []
    assert conflicts({**config, "gradient_accumulation_steps": "auto", "train_batch_size": 16}, flags(), 2) == []
    [problem] = conflicts({**config, "gradient_accumulation_steps": 8}, flags(), 2)
    assert "gradient_accumulation_steps is 8 but --gradient_accumulation_steps is 4" in problem
    [problem] = conflicts({**config, "optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, flags(), 2)
    assert "--learning_rate" in problem
    assert conflicts({**config, "fp16": {"enabled": True}}, flags(precision="bf16"), 2)


def test_choice_of_adam():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_adam("auto", True, cpu) == choose_adam("torch", True, gpu) == (False, "torch AdamW")
    assert choose_adam("auto", False, gpu) == (False, "torch AdamW")


def test_compiled_adam_where_it_can_be_built(monkeypatch):
    monkeypatch.setattr("training.optimizer.cpu_adam_problem", lambda: None)
    compiled = (True, "DeepSpeed CPU AdamW")
    assert choose_adam("auto", True, torch.device("cuda")) == compiled
    assert choose_adam("deepspeed_cpu", True, torch.device("cpu")) == compiled


def test_without_a_compiler(monkeypatch):
    """Offload goes on with torch's AdamW and says so; asking for the compiled one is refused."""
    monkeypatch.setenv("PATH", "")
    is_compiled, name = choose_adam("auto", True, torch.device("cuda"))
    assert not is_compiled and "no C++ compiler" in name
    with pytest.raises(ValueError, match="--optimizer deepspeed_cpu: no C.. compiler .*: use --optimizer torch"):
        choose_adam("deepspeed_cpu", True, torch.device("cpu"))
    [problem] = conflicts(read_ds_file("ds_zero2_no_offload.json"), flags(optimizer="deepspeed_cpu"), 1)
    assert "is for offload" in problem


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_completed_config(precision):
    config = complete_config(read_ds_file("ds_zero3_offload.json"), flags(), 4, precision)
    assert config["bf16"]["enabled"] == (precision == "bf16") and config["fp16"]["enabled"] == (precision == "fp16")
    assert config["train_batch_size"] == 8 and config["gradient_clipping"] == 1.0
    assert offloads(config) and not offloads(read_ds_file("ds_zero3_no_offload.json"))
    assert config["data_types"] == {"grad_accum_dtype": "fp32"}
    fp16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16, "hysteresis": 2}  # a scale of 0 is dynamic
    assert config["fp16"] == (fp16 if precision == "fp16" else {"enabled": False})
    assert config["train_micro_batch_size_per_gpu"] == 2 and config["gradient_accumulation_steps"] == 1
    assert config["steps_per_print"] == 2**31 and config["zero_allow_untested_optimizer"] is True
    assert config["zero_force_ds_cpu_optimizer"] is False and "checkpoint" not in config and "optimizer" not in config


def test_what_the_file_says_is_kept():
    """Kind: keys of the user's file that are lost where others are filled in; "auto" gives way to the flag."""
    file = read_ds_file("ds_zero2_no_offload.json") | {"gradient_clipping": "auto", "steps_per_print": 7}
    file |= {"fp16": {"enabled": "auto", "initial_scale_power": 9, "loss_scale_window": 50}, "bf16": {"x": 1}}
    file |= {"data_types": {"grad_accum_dtype": "bf16"}, "checkpoint": {"tag_validation": "FAIL"}}
    file |= {"optimizer": {"type": "AdamW"}}
    before = json.dumps(file)
    config = complete_config(file, flags(max_grad_norm=0.7), 4, "fp16", load_universal=True)
    assert config["gradient_clipping"] == 0.7 and config["steps_per_print"] == 7
    scale = {"loss_scale": 0, "initial_scale_power": 9, "hysteresis": 2, "loss_scale_window": 50}
    assert config["fp16"] == {"enabled": True, **scale} and config["bf16"] == {"enabled": False, "x": 1}
    assert config["data_types"] == {"grad_accum_dtype": "bf16"}
    assert "optimizer" not in config, "train.py builds it"
    assert config["checkpoint"] == {"tag_validation": "FAIL", "load_universal": True}
    assert json.dumps(file) == before, "the file's own values are not changed"


@pytest.mark.parametrize(
    "change, changes, says",
    [
        ({"optimizer": {"type": "SGD"}}, {}, "optimizer.type SGD: only AdamW is built: remove the section"),
        ({"optimizer": {"type": "Adam", "params": {"lr": "auto", "betas": [0.9, 0.95]}}}, {}, None),
        ({"optimizer": {"params": {"betas": [0.9, 0.999]}}}, {}, r"params.betas is .*: it is always \[0.9, 0.95\]"),
        ({"optimizer": {"params": {"torch_adam": True}}}, {}, "torch_adam is True: train.py builds AdamW itself"),
        ({"zero_force_ds_cpu_optimizer": True}, {}, "use --optimizer deepspeed_cpu instead"),
        ({"zero_force_ds_cpu_optimizer": False}, {}, None),
        ({"scheduler": {}}, {}, "scheduler: use --lr_scheduler_type and --warmup_ratio instead"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, {}, "bf16.enabled and fp16.enabled: choose one"),
        ({"bf16": {"enabled": True}}, {"precision": "bf16"}, None),
        ({"bf16": {"enabled": False}}, {"precision": "bf16"}, "bf16.enabled is False but --precision is bf16"),
        ({"bf16": {"enabled": True}}, {"precision": "auto"}, None),
        ({"train_batch_size": 8}, {}, "train_batch_size is 8 but batch size x accumulation x processes is 16"),
        ({"gradient_clipping": 0.5}, {}, "gradient_clipping is 0.5 but --max_grad_norm is 1.0"),
    ],
)
def test_each_conflict_is_said(change, changes, says):
    """What the file and the flags say differently, one line each; what they say alike is none."""
    problems = conflicts({**read_ds_file("ds_zero2_no_offload.json"), **change}, flags(**changes), 2)
    assert len(problems) == (says is not None)
    assert says is None or re.search(says, problems[0]), problems


def test_the_precision_that_is_wanted():
    """The flag's; where that is auto, the one that the file switches on."""
    for config, flag, wanted in (
        ({"bf16": {"enabled": True}}, "auto", "bf16"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": "auto"}}, "auto", "fp16"),
        ({"fp16": {"enabled": False}}, "auto", "auto"),
        ({"bf16": {"enabled": True}}, "fp32", "fp32"),
        ({}, "auto", "auto"),
    ):
        assert wanted_precision(config, flag) == wanted
