"""What only a CUDA GPU shows; skipped where there is none."""

import json

import pytest
import torch
from launching import check_done, free_port, run_command
from reference import GOLDEN_FOLDERS, ROOT
from safetensors.torch import load_file

from benchmarks.plain import pad, plain_loss, plain_settings
from checkpoints.base_weights import load_base
from checkpoints.weight_files import stored_tensors
from modes import MODES
from rows.batches import collate, to_device
from tests.modeling.test_fast_path import build, check_same, gradients, rows_of

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


def test_weights_go_straight_to_a_gpu(golden):
    model = load_base(golden.folder, golden.mode, golden.config(), torch.bfloat16, device="cuda")
    stored = {name: rows[:].clone() for name, _, rows in stored_tensors(golden.folder)}
    for name, parameter in model.named_parameters():
        assert parameter.is_cuda and torch.equal(parameter.cpu(), stored[name].bfloat16()), name


def test_logits_on_a_gpu(golden):
    model = golden.model().cuda()
    logits = model(golden.tensors["one.input_ids"].cuda()).logits.cpu()
    assert (logits - golden.tensors["one.logits"]).abs().max() < 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("kind", ["all", "lora", "prefix_embedding"])
@pytest.mark.parametrize("mode", MODES)
def test_fast_step_equals_plain_step_on_a_gpu(mode, kind, attention):
    golden, model = build(mode, kind)
    model, rows, device = model.cuda(), rows_of(golden), torch.device("cuda")
    with plain_settings(model, checkpointing=False):
        batch = {name: tensor.to(device) for name, tensor in pad(rows, 0).items()}
        wanted = gradients(model, plain_loss(model, batch, 100))
    model.config._attn_implementation = attention
    for packed in (False, True):
        batch = to_device(collate(rows, 0, packed), device)
        found = gradients(model, model(**batch, num_items_in_batch=100).loss)
        assert found[0] == pytest.approx(wanted[0], rel=1e-4)
        check_same((wanted[0], found[1]), wanted, tolerance=5e-3)  # the GPU's sums are shorter


def test_a_micro_batch_does_not_wait_for_the_gpu():
    golden, model = build("glm3", "lora")
    batch = to_device(collate(rows_of(golden), 0, packed=True), torch.device("cuda"))
    model = model.cuda()
    model(**batch, num_items_in_batch=100).loss.backward()  # the first call chooses kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch, num_items_in_batch=100).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
