"""States of two processes whose files, but for state.json, are empty."""

import json
import os

from runtime import folders

STATE_FILES = (
    *("rank-0.pt", "rank-1.pt", "deepspeed/mp_rank_00_model_states.pt"),
    *(f"deepspeed/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(2)),
)


def make_state(parent, step, **changes):
    """A state whose files, but for state.json, are empty."""
    info = {"progress": {"step": step, "usual_loss": {}}, "fingerprint": {"--seed": 1, "rows": "a"}}
    info |= {"split": [2, 1, 2], "world_size": 2}
    with folders.new_folder(str(parent / f"state-step-{step}")) as scratch:
        with open(os.path.join(scratch, "state.json"), "w") as file:
            json.dump({**info, **changes}, file)
        os.mkdir(os.path.join(scratch, "deepspeed"))
        for name in STATE_FILES:
            open(os.path.join(scratch, name), "wb").close()
    return parent / f"state-step-{step}"
