"""What the released code fixes and what it takes from config.json, in networks of other settings than the usual ones.

Against the networks written out here in float64; test_network_rules.py has numbers of the released code.
"""

import json
import math

import pytest
import torch
from reference import GOLDEN

from checkpoints.opening import read_config
from modes import MODES

SMALL = {
    "glm": dict(
        num_layers=3, vocab_size=40, hidden_size=32, num_attention_heads=2, inner_hidden_size=48, bos_token_id=8,
        eos_token_id=9, mask_token_id=4, gmask_token_id=5,
    ),
    "glm2": dict(
        num_layers=2, padded_vocab_size=40, hidden_size=32, num_attention_heads=4, kv_channels=16, ffn_hidden_size=48,
    ),
}  # fmt: skip
SMALL["glm3"] = SMALL["glm2"]
IDS = [20, 21, 22, 5, 8, 23, 24, *range(25, 40)]  # for glm a context of 4 with [gMASK] (5), then <sop> (8)


def small_model(mode, **changes):
    """(settings, network in float64 with random weights)."""
    settings = {**SMALL[mode], **changes}
    model = MODES[mode].model_class(MODES[mode].config_class(**settings)).double().eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return settings, model


# ---------------------------------------------------------------- the networks, written out (one row of L ids)


def attention(query, key, value, visible):
    """query (L, N, D), key and value (L, G, D), visible (L, L) -> (L, N D); head h reads group h // (N / G)."""
    outputs = []
    for head in range(query.shape[1]):
        group = head // (query.shape[1] // key.shape[1])
        scores = query[:, head] @ key[:, group].T / math.sqrt(query.shape[2])
        outputs.append(scores.masked_fill(~visible, -math.inf).softmax(-1) @ value[:, group])
    return torch.cat(outputs, dim=-1)


def glm_logits(settings, weights, ids):
    """ChatGLM-6B: `sqrt(2 x 28)` times the normalised value goes past each half of a block."""
    length, heads, hidden = len(ids), settings["num_attention_heads"], settings["hidden_size"]
    context, mask, size = ids.index(8), ids.index(5), hidden // heads
    places, epsilon = torch.arange(length), settings.get("layernorm_epsilon", 1e-5)
    rows = torch.stack((places.clamp(max=context - 1), (places - context + 1).clamp(min=0)))
    rows[0, context:] = mask
    frequencies = (1 / 10000 ** (torch.arange(0, size // 2, 2).float() / (size // 2))).half()
    angles = (rows[..., None].half() * frequencies).half().float()  # 2 L D/4
    turns = torch.complex(angles.cos().half().double(), angles.sin().half().double())
    visible = (places[None] <= places[:, None]) | (places < context)[None]

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, (hidden,), weights[f"{name}.weight"], weights[f"{name}.bias"], epsilon)

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def turn(x):
        halves = []
        for half, turned_by in zip(x.chunk(2, dim=-1), turns):
            turned = torch.complex(*half.chunk(2, dim=-1)) * turned_by[:, None]
            halves += [turned.real, turned.imag]
        return torch.cat(halves, dim=-1)

    x = weights["transformer.word_embeddings.weight"][ids]
    for number in range(settings["num_layers"]):
        name = f"transformer.layers.{number}"
        normed = norm(x, f"{name}.input_layernorm")
        query, key, value = (
            linear(normed, f"{name}.attention.query_key_value").view(length, heads, 3 * size).chunk(3, dim=-1)
        )
        attended = attention(turn(query), turn(key), value, visible)
        x = math.sqrt(2 * 28) * normed + linear(attended, f"{name}.attention.dense")
        normed = norm(x, f"{name}.post_attention_layernorm")
        inner = torch.nn.functional.gelu(linear(normed, f"{name}.mlp.dense_h_to_4h"), approximate="tanh")
        x = math.sqrt(2 * 28) * normed + linear(inner, f"{name}.mlp.dense_4h_to_h")
    return norm(x, "transformer.final_layernorm") @ weights["lm_head.weight"].T


def glm2_logits(settings, weights, ids, base, divisor):
    """ChatGLM2-6B and ChatGLM3-6B, with the base of the rotary angles and what positions are divided by."""
    length, heads, size = len(ids), settings["num_attention_heads"], settings["kv_channels"]
    groups = settings.get("multi_query_group_num", 2) if settings.get("multi_query_attention", True) else heads
    rotary, epsilon = size // 2, settings.get("layernorm_epsilon", 1e-5)
    exponents = torch.arange(0, rotary, 2).double() / rotary
    angles = (torch.arange(length).double() / divisor)[:, None] / base**exponents  # L R/2
    turns = torch.polar(torch.ones_like(angles), angles)
    visible = torch.ones(length, length).tril().bool()

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weights[f"{name}.weight"]

    def turn(x):
        pairs = torch.view_as_complex(x[..., :rotary].unflatten(-1, (-1, 2)).contiguous()) * turns[:, None]
        return torch.cat((torch.view_as_real(pairs).flatten(-2), x[..., rotary:]), dim=-1)

    x = weights["transformer.embedding.word_embeddings.weight"][ids]
    for number in range(settings["num_layers"]):
        name = f"transformer.encoder.layers.{number}"
        fused = norm(x, f"{name}.input_layernorm") @ weights[f"{name}.self_attention.query_key_value.weight"].T
        fused = fused + weights.get(f"{name}.self_attention.query_key_value.bias", 0)
        query, key, value = fused.view(length, -1, size).split((heads, groups, groups), dim=1)
        attended = attention(turn(query), turn(key), value, visible)
        x = x + attended @ weights[f"{name}.self_attention.dense.weight"].T
        normed = norm(x, f"{name}.post_attention_layernorm")
        gate, up = (normed @ weights[f"{name}.mlp.dense_h_to_4h.weight"].T).chunk(2, dim=-1)
        x = x + (gate * gate.sigmoid() * up) @ weights[f"{name}.mlp.dense_4h_to_h.weight"].T
    return norm(x, "transformer.encoder.final_layernorm") @ weights["transformer.output_layer.weight"].T


RULES = {"glm2": lambda ratio: (10000, ratio), "glm3": lambda ratio: (10000 * ratio, 1)}


def logits_of(mode, settings, weights, ids):
    """Logits (L, V) of a network written out."""
    if mode == "glm":
        return glm_logits(settings, weights, ids)
    return glm2_logits(settings, weights, ids, *RULES[mode](settings.get("rope_ratio", 1)))


# ---------------------------------------------------------------- settings that make another network


NETWORKS = [
    ("glm", {"num_layers": 1}),
    ("glm", {"num_layers": 3}),
    ("glm", {"num_layers": 28}),
    ("glm", {"num_layers": 30}),
    ("glm", {"layernorm_epsilon": 0.01, "tie_word_embeddings": False}),
    *[(mode, {"rope_ratio": ratio}) for mode in ("glm2", "glm3") for ratio in (1, 16, 50, 0.5)],
    ("glm2", {"kv_channels": 8, "multi_query_group_num": 1}),  # as wide as hidden_size
    ("glm2", {"kv_channels": 12, "num_layers": 5}),
    ("glm2", {"layernorm_epsilon": 0.01}),
    ("glm3", {"multi_query_attention": False}),
    ("glm3", {"add_qkv_bias": False, "multi_query_group_num": 4}),
]


@pytest.mark.parametrize("mode, changes", NETWORKS)
@torch.no_grad()
def test_networks_of_other_settings(mode, changes):
    """Of a kind: what the released code fixes is no setting (28 layers), what it takes from config.json is one.

    Whole logits. Our angles are float32 for every dtype, hence the tolerance.
    """
    settings, model = small_model(mode, **changes)
    wanted = logits_of(mode, settings, model.state_dict(), IDS)
    found = model(torch.tensor([IDS])).logits[0]
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


NEUTRAL = [  # how the released code computes, not what
    ("glm2", "apply_query_key_layer_scaling", False),
    ("glm2", "attention_softmax_in_fp32", False),
    ("glm2", "bias_dropout_fusion", False),
    ("glm3", "seq_length", 64),
    ("glm", "max_sequence_length", 64),
    ("glm", "rope_ratio", 1),
]


@pytest.mark.parametrize("mode, name, value", NEUTRAL)
@torch.no_grad()
def test_settings_that_change_nothing(mode, name, value):
    (_, model), (_, other) = small_model(mode), small_model(mode, **{name: value})
    assert torch.equal(model(torch.tensor([IDS])).logits, other(torch.tensor([IDS])).logits)


@pytest.mark.parametrize("mode", MODES)
def test_the_prefix_is_dropped_out_at_the_released_share(mode):
    """0.1 in every release, whatever the dropouts of config.json are."""
    changes = {} if mode == "glm" else {"attention_dropout": 0.3}
    _, model = small_model(mode, pre_seq_len=2, **changes)
    assert model.transformer.prefix_encoder.dropout.p == 0.1


REFUSED = [  # every key of config.json that makes another network than this code computes
    *[("glm2", name, value) for name, value in (
        ("rmsnorm", False), ("post_layer_norm", False), ("apply_residual_connection_post_layernorm", True),
        ("fp32_residual_connection", True), ("add_bias_linear", True), ("interleaved_qkv", True),
        ("tie_word_embeddings", True), ("hidden_dropout", 0.1), ("original_rope", False), ("rotary_percent", 1.0),
        ("multi_query_group_num", 3), ("multi_query_attention", "false"), ("add_qkv_bias", None),
        ("kv_channels", None), ("layernorm_epsilon", "1e-5"),
    )],
    *[("glm", name, value) for name, value in (
        ("position_encoding_2d", False), ("rope_ratio", 16), ("hidden_dropout", 0.1), ("attention_dropout", 0.1),
        ("num_attention_heads", 3), ("num_attention_heads", 16), ("tie_word_embeddings", "no"),
    )],
    *[(mode, name, value) for mode in MODES for name, value in (
        ("quantization_bit", 4), ("quantization_config", {"bits": 4}), ("rope_scaling", {"type": "dynamic"}),
        ("rope_theta", 500000), ("rope_parameters", {"rope_theta": 1.0}), ("partial_rotary_factor", 0.5),
        ("prefix_projection", "false"),
    )],
]  # fmt: skip


@pytest.mark.parametrize("mode, name, value", REFUSED)
def test_settings_of_other_networks_are_refused_by_name(mode, name, value, tmp_path):
    released = json.loads((GOLDEN / MODES[mode].package / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**released, name: value}))
    with pytest.raises(ValueError, match=rf"/config\.json: {name} = ") as error:
        read_config(str(tmp_path), MODES[mode])
    assert "\n" not in str(error.value)
