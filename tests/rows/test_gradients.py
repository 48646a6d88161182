"""The objective does not depend on how rows are split over processes, micro-batches and accumulation."""

import json

import pytest
import torch
from launching import check_done, free_port, run_command
from reference import GOLDEN_FOLDERS, ROOT

from modes import MODES
from rows.batches import Split, Updates, collate
from rows.checks import Columns
from rows.encoding import encode_row
from rows.reading import read_rows

FILES = {
    "glm": "ds_zero3_no_offload.json,ds_zero2_offload.json",
    "glm3": "ds_zero2_no_offload.json,ds_zero3_offload.json",
}
NUM_ROWS = 11  # of the 12 that an update takes: one process has an empty place


def write_rows(folder):
    rows = []
    for name in ("spo_0.json", "d2q_0.json"):  # answers of very different lengths
        rows += (ROOT / "data" / name).read_text(encoding="utf-8").splitlines()[: NUM_ROWS // 2 + 1]
    path = folder / "rows.json"
    path.write_text("\n".join(rows[:NUM_ROWS]), encoding="utf-8")
    return path


def whole_batch(mode, path):
    """Loss and gradients of all rows in one batch on one process, in plain torch."""
    folder = GOLDEN_FOLDERS[mode.name]
    tokenizer = mode.tokenizer_class.from_pretrained(folder)
    rows = [
        encode_row(r["query"], r["answer"], tokenizer, mode.prompt, 300, 200) for r in read_rows([str(path)], Columns())
    ]
    model = mode.model_class.from_pretrained(folder, dtype=torch.float32).train()
    batch = collate(rows, 0)
    loss = model(**batch).loss
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.launch
@pytest.mark.parametrize("mode_name", list(FILES))
def test_gradients_equal_one_big_batch(mode_name, tmp_path):
    path = write_rows(tmp_path)
    process = run_command(
        f"PYTHONPATH={ROOT} deepspeed --num_accelerators 2 --no_local_rank --master_port {free_port()}"
        f" {ROOT}/tests/helpers/worker_gradients.py {mode_name} {GOLDEN_FOLDERS[mode_name]} {path} {tmp_path} {FILES[mode_name]}",
        tmp_path,
    )
    check_done(process)
    loss, gradients = whole_batch(MODES[mode_name], path)
    losses = json.loads((tmp_path / "losses.json").read_text())
    assert len(losses) == 6
    for name, split_loss in losses.items():
        assert split_loss == pytest.approx(loss, rel=1e-6), name
        split = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert set(split) == set(gradients)
        for parameter, gradient in gradients.items():
            error = (split[parameter] - gradient).norm() / gradient.norm().clamp(min=1e-12)
            assert error < 1e-4, (name, parameter, error)


def test_updates_cover_every_row_once():
    labels = list(range(1, NUM_ROWS + 1))
    lengths = [50] * NUM_ROWS
    for world in (1, 2, 4):
        ranks = [list(Updates(lengths, labels, Split(2, 2, world), rank, seed=7).epoch(3)) for rank in range(world)]
        assert len({tuple(len(u.micro_batches) for u in updates) for updates in ranks}) == 1
        rows = [n for updates in ranks for update in updates for batch in update.micro_batches for n in batch]
        assert sorted(rows) == list(range(NUM_ROWS))
        assert sum(update.num_labels for update in ranks[0]) == sum(labels)
