"""Numbers that the released code takes from elsewhere than one would think: the rotary rule, the residual factor.

Expected logits are of the released code (tests/golden/network_rules.safetensors), other values are computed here.
"""

import json

import pytest
import torch
from reference import GOLDEN, GOLDEN_FOLDERS
from safetensors import safe_open
from safetensors.torch import load_file

from glm1.modeling_chatglm import GLMBlock
from glm2.modeling_chatglm import rotary_angles
from modes import MODES

RULES = GOLDEN / "network_rules.safetensors"


@pytest.mark.parametrize("mode, ratio", [("glm2", 16), ("glm3", 50)])
def test_long_releases_have_the_logits_of_the_released_code(mode, ratio):
    """rope_ratio divides the positions of ChatGLM2-6B-32k and multiplies the base of ChatGLM3-6B-32k."""
    tensors, family = load_file(RULES), MODES[mode]
    config = family.config_class.from_pretrained(GOLDEN_FOLDERS[mode], rope_ratio=ratio)
    model = family.model_class.from_pretrained(GOLDEN_FOLDERS[mode], config=config, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=tensors[f"{mode}.input_ids"].long()).logits[:, ::5]
    torch.testing.assert_close(logits, tensors[f"{mode}.logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 4.0, 50.0])
@pytest.mark.parametrize("mode", ["glm2", "glm3"])
def test_angles_of_other_ratios(mode, ratio):
    """cos and sin against float64, with the rule written out for each position and pair."""
    config = MODES[mode].config_class(rope_ratio=ratio, kv_channels=16)
    positions = torch.tensor([[0, 1, 7, 100, 2000]])
    cos, sin = rotary_angles(positions, config, torch.float32)
    base, divisor = (10000.0, ratio) if mode == "glm2" else (10000.0 * ratio, 1.0)
    for place, position in enumerate(positions[0].tolist()):
        for pair in range(4):
            angle = torch.tensor(position / divisor * base ** (-2 * pair / 8), dtype=torch.float64)
            assert abs(cos[0, 0, place, pair].item() - angle.cos().item()) < 2e-4
            assert abs(sin[0, 0, place, pair].item() - angle.sin().item()) < 2e-4


def test_a_glm_of_three_layers_has_the_logits_of_the_released_code():
    """The residual factor is sqrt(2 x 28) whatever the number of layers is."""
    with safe_open(RULES, framework="pt") as file:
        values = json.loads(file.metadata()["glm.config"])
    tensors = load_file(RULES)
    model = MODES["glm"].model_class(MODES["glm"].config_class(**values)).float().eval()
    state = {name: tensor.float() for name, tensor in tensors.items() if name.startswith("transformer.")}
    state["lm_head.weight"] = state["transformer.word_embeddings.weight"]
    model.load_state_dict({name: tensor for name, tensor in state.items() if not name.endswith("inv_freq")})
    with torch.no_grad():
        logits = model(input_ids=tensors["glm.input_ids"].long()).logits[:, ::5]
    torch.testing.assert_close(logits, tensors["glm.logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_layers", [1, 2, 28, 40])
def test_a_glm_block_with_zero_weights_scales_its_norms(num_layers):
    """With attention and MLP at zero a block is a n2, n2 the norm of a n1: a = sqrt(56) for any number of layers."""
    config = MODES["glm"].config_class(
        num_layers=num_layers, hidden_size=16, num_attention_heads=2, inner_hidden_size=32, vocab_size=64
    )
    block = GLMBlock(config, 0).double()
    for name, parameter in block.named_parameters():
        if "layernorm" not in name:
            torch.nn.init.zeros_(parameter)
    hidden = torch.randn(1, 3, 16, dtype=torch.float64)
    ones = torch.ones(1, 1, 3, 8, dtype=torch.float64)
    out = block(hidden, None, (ones, 0 * ones))

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()

    torch.testing.assert_close(out, 56**0.5 * norm(56**0.5 * norm(hidden)), atol=1e-9, rtol=0)
