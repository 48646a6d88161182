"""Networks of known shape with random weights: no files are needed."""

import torch

from modes import MODES
from rows.encoding import Run

SMALL = {"num_layers": 8, "hidden_size": 512, "num_attention_heads": 4}
SMALL_GLM2 = {
    **SMALL,
    "padded_vocab_size": 65024,
    "ffn_hidden_size": 1712,
    "kv_channels": 128,
    "multi_query_group_num": 2,
}
TINY = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
TINY_GLM2 = {
    **TINY,
    "padded_vocab_size": 65024,
    "ffn_hidden_size": 48,
    "kv_channels": 16,
    "multi_query_group_num": 1,
}
# small: the real vocabulary and an eighth of the width, for a CPU; tiny: to see that a benchmark runs. 6b: the
# released shapes, which are the defaults of the configuration classes.
PRESETS = {
    "tiny": {"glm": {**TINY, "vocab_size": 130528, "inner_hidden_size": 64}, "glm2": TINY_GLM2, "glm3": TINY_GLM2},
    "small": {
        "glm": {**SMALL, "vocab_size": 130528, "inner_hidden_size": 2048},
        "glm2": SMALL_GLM2,
        "glm3": SMALL_GLM2,
    },
    "6b": {"glm": {}, "glm2": {}, "glm3": {}},
}


def preset_config(preset, mode_name, **changes):
    """The configuration of a preset."""
    return MODES[mode_name].config_class(**PRESETS[preset][mode_name], **changes)


def random_model(preset, mode_name, dtype, device, **changes):
    """A model of a preset, its weights drawn on the device in their final dtype, with a fixed seed."""
    with torch.device("meta"):
        model = MODES[mode_name].model_class(preset_config(preset, mode_name, **changes))
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def random_rows(config, lengths, num_labels, seed=0):
    """Rows of random ordinary ids in the form of encoded rows; ChatGLM-6B's have their [gMASK] and <sop>."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for length, labels in zip(lengths, num_labels):
        ids = torch.randint(100, 60000, (length,), generator=generator).tolist()
        if getattr(config, "gmask_token_id", None) is not None:  # the two marks stand in front of the answer
            ids[length - labels - 2 : length - labels] = [config.gmask_token_id, config.bos_token_id]
        rows.append({"input_ids": ids, "runs": [Run(length - labels, length)]})
    return rows
