"""Learning rate, weight decay and the DeepSpeed configuration."""

import math
from types import SimpleNamespace

import pytest
import torch

from ds_config import complete_config, conflicts, offloads, read_ds_file
from optimizer import build_optimizer, build_scheduler, choose_adam, learning_rate_factor, parameter_groups


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


def test_scheduler_sets_every_update():
    optimizer = build_optimizer(torch.nn.Linear(2, 2), flags())
    scheduler = build_scheduler(optimizer, flags(), num_steps=10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1e-3 * learning_rate_factor(step, 2, 10, "cosine") for step in range(10)])
    assert math.isclose(max(rates), 1e-3)


def test_weight_decay_spares_norms_and_biases(golden):
    model = golden.model()
    decayed, plain = parameter_groups(model, 0.1)
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
    cpu, card = torch.device("cpu"), torch.device("cuda")
    assert choose_adam("auto", True, cpu) == choose_adam("torch", True, card) == (False, "torch AdamW")
    assert choose_adam("auto", False, card) == (False, "torch AdamW")


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
    if precision == "fp16":
        assert config["fp16"]["loss_scale"] == 0, "0 is dynamic"
