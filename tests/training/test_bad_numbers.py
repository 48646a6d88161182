"""Numbers gone bad: spikes, updates left out, rows and modules behind a loss that is not finite."""

import math
import random
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

import utils
from checkpoints import progress as checkpoints_progress
from checkpoints.progress import Progress
from rows.batches import Update
from runtime.exits import BadNumbersError
from training import bad_numbers
from training.setup import Setup


def losses(number, seed=0):
    """Losses as of a run: falling, with noise."""
    noise = random.Random(seed)
    return [1 + 4 * math.exp(-n / 100) + noise.gauss(0, 0.15) for n in range(number)]


def test_noise_is_no_spike():
    for seed in range(20):
        usual = checkpoints_progress.LossAverage()
        assert not any(usual.is_spike(loss) for loss in losses(1000, seed))


def test_a_spike_is_found_and_forgotten():
    usual = checkpoints_progress.LossAverage()
    found = [n for n, loss in enumerate(losses(500)) if usual.is_spike(loss + 6 * (n in (120, 121, 300)))]
    assert found == [120, 121, 300]
    assert usual.mean == pytest.approx(1, abs=0.2)
    usual = checkpoints_progress.LossAverage()
    assert not any(usual.is_spike(loss + 6 * (n == 5)) for n, loss in enumerate(losses(30))), "too early to tell"


def test_progress_goes_through_json():
    import json

    progress = Progress()
    for loss in (3.5, 2.25):
        progress.count(loss, 7, 20, is_applied=loss > 3)
        progress.usual_loss.is_spike(loss)
    again = Progress.from_info(json.loads(json.dumps({"progress": asdict(progress)})))
    assert again == progress and (again.step, again.num_applied, again.num_skipped) == (2, 1, 1)
    assert again.window_loss == 5.75 and (again.window_labels, again.num_tokens) == (14, 40)
    again.count(1.0, 1, 1, is_applied=True)
    assert again.num_skipped == 0
    assert Progress.from_info(None) == Progress()


def test_the_best_value():
    progress = Progress()
    found = []
    for step, value in enumerate([3.0, 2.0, 2.5, float("nan"), 1.5, None, 1.5]):
        progress.step = step
        found.append(progress.is_best("loss", value))
    assert found == [True, True, False, False, True, False, False]
    assert (progress.best_value, progress.best_step, progress.num_worse) == (1.5, 4, 2)
    assert [Progress(best_value=2.0).is_best("f1", value) for value in (1.0, 2.0, 3.0)] == [False, False, True]


@pytest.mark.parametrize(
    "precision, advice",
    [("fp16", "the loss scale is down to 2: use --precision bf16"), ("bf16", "lower --learning_rate")],
)
def test_many_updates_left_out(precision, advice):
    bad_numbers.check_skipped(bad_numbers.MAX_SKIPPED - 1, 40, precision, 2.0)
    with pytest.raises(BadNumbersError, match=f"step 40: the gradients of 16 updates in a row .*{advice}"):
        bad_numbers.check_skipped(bad_numbers.MAX_SKIPPED, 40, precision, 2.0)


def setup_of(precision):
    return Setup(torch.device("cpu"), precision, {}, rank=0, world=1, group=None)


class Model(torch.nn.Module):
    """Two layers; the loss of a row that begins with 0 is infinite, by the second one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Identity(), torch.nn.LayerNorm(2)

    def forward(self, input_ids, labels, label_positions):
        hidden = self.first(torch.stack([input_ids[:, :2].float()] * 1))
        hidden = self.second(hidden / (input_ids[:, :1] != 0 if len(input_ids) else 1))
        return SimpleNamespace(token_losses=hidden)


class Rows(list):
    """Encoded rows with their places."""

    def place(self, n):
        return f"rows.json:{n + 1}"


def test_rows_and_module_are_named(monkeypatch):
    monkeypatch.setattr(bad_numbers, "gather", lambda value: [value])
    rows = Rows({"input_ids": [n % 3, 5, 6], "runs": [(1, 3, -1)]} for n in range(6))
    update = Update([[0, 1], [2], [3]], [0, 1, 2, 3], 8)
    with pytest.raises(BadNumbersError) as error:
        bad_numbers.explain_bad_loss(Model(), update, rows, 7, 9, setup_of("fp16"))
    text = str(error.value)
    assert text.startswith(
        "step 7: the loss is not finite, the update was not applied; rows rows.json:1, rows.json:4; "
    )
    assert "first output that is not finite: second" in text and "--precision bf16" in text
    with pytest.raises(
        BadNumbersError, match="rows rows.json:2, rows.json:3; each alone and without dropout is finite"
    ):
        bad_numbers.explain_bad_loss(Model(), Update([[1, 2]], [1, 2], 8), rows, 7, 9, setup_of("fp32"))
    model = Model()
    model.second.weight.data[0] = float("nan")
    with pytest.raises(BadNumbersError, match="the weight second.weight is not finite: the base checkpoint is damaged"):
        bad_numbers.explain_bad_loss(model, Update([[1]], [1], 8), rows, 7, 9, setup_of("fp32"))


def test_few_rows_are_named():
    assert utils.name_rows(["a", "b"]) == "a, b"
    assert utils.name_rows([str(n) for n in range(8)]) == "0, 1, 2, 3, 4, 5, 6, 7"
    assert utils.name_rows([str(n) for n in range(12)]) == "0, 1, 2, 3, 4, 5, 6, 7 and 4 more"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_weight_is_found_in_this_ranks_part(value):
    """Under ZeRO-3 the parameter itself is empty: what this rank holds is beside it."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert bad_numbers.bad_weight(model) is None
    split = model[1].weight
    split.ds_tensor = torch.tensor([1.0, 1.0])
    assert bad_numbers.bad_weight(model) is None
    split.ds_tensor[1] = value
    assert bad_numbers.bad_weight(model) == "1.weight"
    with torch.no_grad():
        model[0].bias[1] = value
    assert bad_numbers.bad_weight(model) == "0.bias"


def test_what_is_far_above_the_usual_loss():
    """Both measures count: six deviations and half as much again; at most so, it is none, and becomes usual."""
    for variance, loss, is_spike in (
        (0.0, 3.0, False),
        (0.01, 3.01, True),
        (0.01, 2.99, False),
        (0.25, 4.9, False),
        (0.25, 5.1, True),
    ):
        usual = checkpoints_progress.LossAverage(count=50, mean=2.0, variance=variance)
        assert usual.is_spike(loss) == is_spike
        assert (usual.count, usual.mean) == ((50, 2.0) if is_spike else (51, pytest.approx(2 + 0.02 * (loss - 2))))
    for count, is_spike in ((19, False), (20, True)):
        assert checkpoints_progress.LossAverage(count=count, mean=2.0).is_spike(9.0) == is_spike
    usual = checkpoints_progress.LossAverage()
    for loss in (3.0, 5.0, 4.0):  # few: their plain mean and variance
        usual.is_spike(loss)
    assert (usual.count, usual.mean, usual.variance) == (3, 4.0, pytest.approx(2 / 3))


class Odd(torch.nn.Module):
    """Modules whose outputs are pairs, None and whole numbers; all are finite, the loss is not."""

    def __init__(self):
        super().__init__()
        self.part = torch.nn.Identity()
        self.part.forward = lambda hidden: (hidden, None, torch.ones(2, dtype=torch.long))

    def forward(self, input_ids, **batch):
        hidden, *_ = self.part(input_ids.float())
        return SimpleNamespace(token_losses=hidden * float("inf"))


def test_a_loss_that_no_module_explains(monkeypatch):
    """Only the rows are named then."""
    monkeypatch.setattr(bad_numbers, "gather", lambda value: [value])
    rows = Rows({"input_ids": [5, 6], "runs": [(1, 2, -1)]} for _ in range(3))
    with pytest.raises(BadNumbersError) as error:
        bad_numbers.explain_bad_loss(Odd(), Update([[0, 2]], [0, 2], 2), rows, 7, 9, setup_of("fp32"))
    said = "rows rows.json:1, rows.json:3: lower --learning_rate, or look at these rows"
    assert str(error.value) == f"step 7: the loss is not finite, the update was not applied; {said}"
