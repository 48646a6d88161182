"""AdamW over the trained weights, and the learning rate over the updates."""

import math
import shutil

from runtime.exits import UserError

ADAM = {"betas": [0.9, 0.95], "eps": 1e-8}  # what no flag changes


def parameter_groups(model, weight_decay, norms):
    """Trained parameters in two groups: decayed, and (norms, biases) not. norms: parts of the names of norms."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # By name: ZeRO-3 flattens what it holds, so the dimension does not tell.
            is_plain = name.endswith(".bias") or any(part in name for part in norms)
            (plain if is_plain else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def cpu_adam_problem():
    """Why DeepSpeed's CPU Adam cannot be built here, or None. Builds it (once for a machine)."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    if shutil.which("c++") is None and shutil.which("g++") is None:
        return "no C++ compiler (install g++)"
    if shutil.which("ninja") is None:
        return "no ninja (pip install ninja)"
    try:
        CPUAdamBuilder().load(verbose=False)
    except Exception as error:  # whatever a compiler can get wrong
        return f"it does not build: {type(error).__name__}"
    return None


def choose_adam(wanted, offload, device):
    """(use DeepSpeed's compiled CPU Adam?, what to call it) for `--optimizer`; asked before weights are read.

    auto: the compiled one where optimizer state is offloaded from a GPU and it can be built.
    """
    if wanted == "deepspeed_cpu" or (wanted == "auto" and offload and device.type == "cuda"):
        problem = cpu_adam_problem()
        if problem is None:
            return True, "DeepSpeed CPU AdamW"
        if wanted == "deepspeed_cpu":
            raise UserError(f"--optimizer deepspeed_cpu: {problem}: use --optimizer torch")
        return False, f"torch AdamW on the CPU, slower than DeepSpeed's ({problem})"
    return False, "torch AdamW"


def build_optimizer(model, args, norms, is_compiled=False):
    """AdamW over the trained weights: torch's, or DeepSpeed's compiled one for the CPU."""
    groups = parameter_groups(model, args.weight_decay, norms)
    if is_compiled:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=args.learning_rate, adamw_mode=True, **ADAM)
    from torch.optim import AdamW

    return AdamW(groups, lr=args.learning_rate, fused=True, **ADAM)


def learning_rate_factor(step, num_warmup_steps, num_steps, kind):
    """Factor on --learning_rate for update `step` (from 0): linear warm-up to 1, then `kind` towards 0."""
    if step < num_warmup_steps:
        return (step + 1) / (num_warmup_steps + 1)
    progress = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    if kind == "linear":
        return max(0.0, 1.0 - progress)
    return 1.0


def build_scheduler(optimizer, args, num_steps):
    """LambdaLR over the updates; warm-up takes `--warmup_ratio` of them."""
    from torch.optim.lr_scheduler import LambdaLR

    num_warmup_steps = math.ceil(num_steps * args.warmup_ratio)
    return LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, num_warmup_steps, num_steps, args.lr_scheduler_type)
    )
