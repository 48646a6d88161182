"""Started by the launcher on two processes: checkpoints loaded under ZeRO-3 are compared to their files, and what each
rank read and held is measured (rank0.json, rank1.json). Arguments: folder to write in, then mode:folder of each
checkpoint, the last one the large one.

Started alone: the peak memory of a plain load. Arguments: plain, mode, folder, precision.
"""

import json
import os
import re
import sys

import torch

from checkpoints import base_weights, weight_files
from modes import MODES
from runtime.distributed import stop_distributed
from runtime.hosts import start_distributed
from training.ds_config import read_ds_file

CONFIGS = {
    "no_offload": {"stage": 3},
    "offload": read_ds_file("ds_zero3_offload.json")["zero_optimization"],
}
TWO_COPIES = {"stage": 3, "zero_hpz_partition_size": 2}  # DeepSpeed takes this once in a process


def memory(key):
    """Bytes at `key` of /proc/self/status: VmRSS is what is resident now, VmHWM the most of it since forget_peak()."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return int(re.search(rf"^{key}:\s+(\d+) kB", file.read(), re.MULTILINE)[1]) * 1024


def forget_peak():
    """Let VmHWM start again from what is resident now."""
    with open("/proc/self/clear_refs", "w", encoding="utf-8") as file:
        file.write("5")


def gathered(parameters):
    """The whole of split parameters, inside a `with`."""
    import deepspeed  # here, because a plain load does without

    return deepspeed.zero.GatheredParameters(parameters)


class Counted:
    """Stands for the rows of a stored tensor and counts the bytes that are asked for."""

    num_bytes = 0

    def __init__(self, rows):
        self.rows = rows

    def __getitem__(self, part):
        tensor = self.rows[part]
        Counted.num_bytes += tensor.nbytes
        return tensor


def count_reading():
    """From now on Counted.num_bytes grows with what is read."""
    stored_tensors = base_weights.stored_tensors

    def counted_tensors(folder):
        for name, shape, rows in stored_tensors(folder):
            yield name, shape, Counted(rows)

    base_weights.stored_tensors = counted_tensors


def load(mode_name, folder, zero, **changes):
    """(model in float32 or, where the files hold it, float16; what was measured) of a load under ZeRO-3."""
    mode = MODES[mode_name]
    dtype = torch.float16 if "large" in folder else torch.float32
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "fp16": {"enabled": dtype == torch.float16},
    }
    config = mode.config_class.from_pretrained(folder, **changes)
    before = json.dumps(ds_config)
    Counted.num_bytes = 0
    forget_peak()
    start = memory("VmRSS")
    model = base_weights.load_base(folder, mode, config, dtype, ds_config=ds_config)
    measured = {
        "peak": memory("VmHWM") - start,
        "read": Counted.num_bytes,
        "held": sum(p.ds_tensor.nbytes for p in model.parameters()),
    }
    assert json.dumps(ds_config) == before, "the configuration was changed"
    return model, measured


def compare(model, folder):
    """Every parameter, gathered, equals the files, and tied weights are one."""
    stored = {
        name: (shape, rows[:].clone())
        for name, shape, rows in weight_files.stored_tensors(folder)
        if "inv_freq" not in name
    }
    assert not model.training and next(model.parameters()).requires_grad
    for name, source in model.all_tied_weights_keys.items():
        assert model.get_parameter(name) is model.get_parameter(source)
        stored.pop(name, None)
    parameters = {name: p for name, p in model.named_parameters() if "prefix_encoder." not in name}
    assert set(parameters) == set(stored)
    with gathered(parameters.values()):
        for name, parameter in parameters.items():
            shape, wanted = stored[name]
            assert tuple(parameter.shape) == shape and torch.equal(parameter, wanted.to(parameter.dtype)), name


def check_new_prefix(mode_name, folder):
    """A new prefix is the same on all ranks though they draw differently, and is not left as it was found."""
    torch.manual_seed(torch.distributed.get_rank())
    model, _ = load(mode_name, folder, CONFIGS["no_offload"], pre_seq_len=4, prefix_projection=False)
    compare(model, folder)
    weight = model.transformer.prefix_encoder.embedding.weight
    with gathered(weight):
        weight = weight.detach().clone()
    both = [torch.empty_like(weight) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(both, weight)
    assert torch.equal(both[0], both[1]) and 0.8 < weight.std() < 1.2


def main(output_dir, *checkpoints):
    *small, large = [checkpoint.split(":", 1) for checkpoint in checkpoints]
    start_distributed(torch.device("cpu"))
    count_reading()
    for mode_name, folder in small:
        for zero in CONFIGS.values():
            model, _ = load(mode_name, folder, zero)
            compare(model, folder)
    check_new_prefix(*small[-1])
    results = {}
    for name, zero in CONFIGS.items():
        _, results[name] = load(*large, zero)
    model, results["two_copies"] = load(*small[-1], TWO_COPIES)
    compare(model, small[-1][1])
    with open(os.path.join(output_dir, f"rank{os.environ['RANK']}.json"), "w", encoding="utf-8") as file:
        json.dump(results, file)
    stop_distributed()


def measure_plain_load(mode_name, folder, dtype_name):
    """Print the peak memory of a load without ZeRO-3, in bytes above what there was before."""
    mode = MODES[mode_name]
    config = mode.config_class.from_pretrained(folder)
    base_weights.empty_model(mode, config)  # what is imported along the way does not count
    forget_peak()
    start = memory("VmRSS")
    model = base_weights.load_base(folder, mode, config, getattr(torch, dtype_name))
    print(json.dumps({"peak": memory("VmHWM") - start, "held": sum(p.nbytes for p in model.parameters())}))


if __name__ == "__main__":
    measure_plain_load(*sys.argv[2:]) if sys.argv[1] == "plain" else main(*sys.argv[1:])
