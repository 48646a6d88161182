"""Layers whose activations are computed again in the backward pass instead of kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

from functools import partial


def checkpoint_layers(model: PreTrainedModel, interval: int = 1) -> None:
    """Keep only the inputs of layers and compute the rest again in the backward pass (Chen et al. 2016,
    arXiv:1604.06174): in every `interval`-th of the layers that gradients flow through.

    Below the lowest trained layer nothing is kept for a backward pass anyway. That is why the layers are set here:
    transformers' own switch also makes the embeddings require gradients, which then flow through frozen layers.
    """
    from torch.utils.checkpoint import checkpoint
    from transformers.modeling_layers import GradientCheckpointingLayer

    below = [model.get_input_embeddings().weight]
    below += [parameter for name, parameter in model.named_parameters() if "prefix_encoder." in name]
    flows, number = any(parameter.requires_grad for parameter in below), 0
    layers: Any = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        flows = flows or any(parameter.requires_grad for parameter in layer.parameters())
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        layer.gradient_checkpointing = flows and number % interval == 0
        number += flows
