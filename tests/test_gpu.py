"""What only a CUDA card shows; skipped where there is none."""

import json

import pytest
import torch
from conftest import GOLDEN_FOLDERS, ROOT
from launching import check_done, free_port, run_command
from safetensors.torch import load_file

from modes import MODES
from weights import load_base, stored_tensors

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("mode", MODES)
def test_trains_in_16_bits(mode, precision, tmp_path):
    rows = (ROOT / "data" / "spo_0.json").read_text(encoding="utf-8").splitlines()[:8]
    (tmp_path / "rows.json").write_text("\n".join(rows), encoding="utf-8")
    process = run_command(
        f"CUDA_VISIBLE_DEVICES=0 deepspeed --master_port {free_port()} train.py --train_path rows.json"
        f" --model_name_or_path {GOLDEN_FOLDERS[mode]} --mode {mode} --train_type lora --precision {precision}"
        " --max_len 300 --max_src_len 200 --num_train_epochs 2 --show_loss_step 1 --output_dir out",
        tmp_path,
        DS_ACCELERATOR="cuda",
    )
    check_done(process)
    log = [json.loads(line) for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()]
    assert len(log) == 16 and all(line["loss"] is not None for line in log)
    adapter = load_file(tmp_path / "out" / "epoch-2-step-16" / "adapter_model.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name), "nothing was trained"


def test_weights_go_straight_to_a_card(golden):
    model = load_base(golden.folder, golden.mode, golden.config(), torch.bfloat16, device="cuda")
    stored = {name: rows[:].clone() for name, _, rows in stored_tensors(golden.folder)}
    for name, parameter in model.named_parameters():
        assert parameter.is_cuda and torch.equal(parameter.cpu(), stored[name].bfloat16()), name


def test_logits_on_a_card(golden):
    model = golden.model().cuda()
    logits = model(golden.tensors["one.input_ids"].cuda()).logits.cpu()
    assert (logits - golden.tensors["one.logits"]).abs().max() < 1e-2
