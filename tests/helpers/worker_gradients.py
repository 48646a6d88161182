"""Started by the launcher on two processes: full gradients of one update under every ZeRO stage and split, saved by
rank 0. Arguments: mode, folder of the checkpoint, rows file, folder to write in."""

import json
import os
import sys
from types import SimpleNamespace

import deepspeed
import torch

from modes import MODES
from rows.batches import Split, Updates, collate
from rows.checks import Columns
from rows.encoding import encode_row
from rows.reading import read_rows
from runtime.distributed import stop_distributed
from runtime.hosts import start_distributed
from train_types import TRAIN_TYPES
from training.ds_config import complete_config, read_ds_file
from training.optimizer import build_optimizer


def main(mode_name, folder, rows_path, output_dir):
    device = torch.device("cpu")
    start_distributed(device)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    mode = MODES[mode_name]
    tokenizer = mode.tokenizer_class.from_pretrained(folder)
    rows = [
        encode_row(r["query"], r["answer"], tokenizer, mode.prompt, 300, 200) for r in read_rows([rows_path], Columns())
    ]
    lengths = [len(row["input_ids"]) for row in rows]
    num_labels = [run.num_labels for row in rows for run in row["runs"]]
    flags = {
        "max_grad_norm": 0.0,
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "optimizer": "torch",
        "precision": "fp32",
    }
    summary = {}
    for ds_file in sys.argv[5].split(","):
        for batch_size, accumulation, pack_to in ((1, 6, None), (3, 2, None), (2, 3, 400)):
            args = SimpleNamespace(
                per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, **flags
            )
            config = complete_config(read_ds_file(ds_file), args, world, "fp32")
            model = mode.model_class.from_pretrained(folder, dtype=torch.float32)
            model = TRAIN_TYPES["all"].prepare(model, args, mode)
            optimizer = build_optimizer(model, args, mode.norms)
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
            engine.train()
            [update] = Updates(lengths, num_labels, Split(batch_size, accumulation, world), rank, 1, pack_to).epoch(0)
            total = torch.zeros(())
            for i, numbers in enumerate(update.micro_batches):
                engine.set_gradient_accumulation_boundary(i == len(update.micro_batches) - 1)
                batch = collate([rows[n] for n in numbers], 0, packed=pack_to is not None)
                loss = engine(**batch, num_items_in_batch=update.num_labels / world).loss
                engine.backward(loss, scale_wrt_gas=False)
                total += loss.detach() / world
            torch.distributed.all_reduce(total)
            gradients = {
                name: deepspeed.utils.safe_get_full_grad(parameter).clone()
                for name, parameter in engine.module.named_parameters()
            }
            name = f"{ds_file.removesuffix('.json')}-{batch_size}"
            summary[name] = total.item()
            if rank == 0:
                torch.save(gradients, os.path.join(output_dir, f"{name}.pt"))
            engine.destroy()
    if rank == 0:
        with open(os.path.join(output_dir, "losses.json"), "w") as file:
            json.dump(summary, file)
    stop_distributed()


if __name__ == "__main__":
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")][:4])
