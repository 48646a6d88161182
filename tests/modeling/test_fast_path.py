"""The fast path of a training step computes what the plain one does: loss and every gradient, whole tensors."""

from types import SimpleNamespace

import pytest
import torch
from reference import Golden

from benchmarks.plain import pad, plain_loss, plain_settings
from modeling import loss as loss_module
from modeling.fused_ops import MaskFromSeed, RMSNormOnCPU, SeededDropout
from modeling.gradient_checkpointing import checkpoint_layers
from rows.batches import collate
from train_types import TRAIN_TYPES

MODES = ["glm", "glm2", "glm3"]
LORA = SimpleNamespace(
    lora_dim=4,
    lora_alpha=8,
    lora_dropout=0.0,
    lora_module_name="query_key_value,dense,dense_h_to_4h,dense_4h_to_h",
)


@pytest.fixture(autouse=True)
def one_thread():
    """The models are too small for two."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def rows_of(golden):
    """The reference batch's rows, of three lengths."""
    rows = []
    for ids, labels in zip(golden.tensors["train.input_ids"], golden.tensors["train.labels"]):
        labelled = (labels != -100).nonzero()[:, 0]
        end = labelled[-1].item() + 1
        rows.append({"input_ids": ids[:end].tolist(), "runs": [(labelled[0].item(), end, -1)]})
    return rows


def build(mode_name, kind):
    """A model in training mode with what trains: all, the last layer, LoRA matrices, a prefix encoder."""
    golden = Golden(mode_name)
    torch.manual_seed(1)
    if kind.startswith("prefix"):
        model = golden.prefix_model(kind)
        model = TRAIN_TYPES["ptuning"].prepare(model, None, golden.mode)
    elif kind == "lora":
        model = TRAIN_TYPES["lora"].prepare(golden.model(), LORA, golden.mode)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    elif kind == "freeze":
        last = golden.config().num_layers - 1
        args = SimpleNamespace(freeze_module_name=f"layers.{last}.")
        model = TRAIN_TYPES["freeze"].prepare(golden.model(), args, golden.mode)
    else:
        model = golden.model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return golden, model.train()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def check_same(found, wanted, tolerance=1e-4):
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert set(found[1]) == set(wanted[1])
    # Gradients that are zero in exact arithmetic are compared to the size of the others.
    floor = 1e-6 * max(gradient.norm() for gradient in wanted[1].values())
    for name, gradient in wanted[1].items():
        error = (found[1][name] - gradient).norm() / gradient.norm().clamp(min=floor)
        assert error < tolerance, (name, error)


@pytest.mark.parametrize("kind", ["all", "freeze", "lora", "prefix_projection", "prefix_embedding"])
@pytest.mark.parametrize("mode_name", MODES)
def test_fast_step_equals_plain_step(mode_name, kind, monkeypatch):
    """Padded and packed; without checkpointing, with it, in every second layer; logits in one chunk and in many."""
    golden, model = build(mode_name, kind)
    rows = rows_of(golden)
    num_items = sum(end - start for row in rows for start, end, _ in row["runs"]) + 7  # more rows stand elsewhere
    with plain_settings(model, checkpointing=False):
        wanted = gradients(model, plain_loss(model, pad(rows, golden.config().pad_token_id), num_items))
    one_chunk, many_chunks = 2**27, 4 * golden.config().vocab_size * 10
    for interval, packed, num_bytes in (
        (None, False, many_chunks),
        (None, True, one_chunk),
        (1, False, one_chunk),
        (1, True, many_chunks),
        (2, True, one_chunk),
    ):
        if interval:
            checkpoint_layers(model, interval)
        monkeypatch.setattr(loss_module, "MAX_LOGITS_BYTES", num_bytes)
        batch = collate(rows, golden.config().pad_token_id, packed)
        check_same(gradients(model, model(**batch, num_items_in_batch=num_items).loss), wanted)


@pytest.mark.parametrize("mode_name", MODES)
def test_packed_rows_one_by_one(mode_name):
    """The gradient of a packed sequence is the sum of its rows' gradients."""
    golden, model = build(mode_name, "all")
    rows = rows_of(golden)
    parts = [gradients(model, model(**collate([row], 0), num_items_in_batch=1).loss) for row in rows]
    together = gradients(model, model(**collate(rows, 0, packed=True), num_items_in_batch=1).loss)
    summed = {name: sum(part[1][name] for part in parts) for name in together[1]}
    check_same(together, (sum(part[0] for part in parts), summed))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mode_name", MODES)
def test_a_packed_row_does_not_see_another(mode_name, implementation):
    golden, _ = build(mode_name, "all")
    model = golden.model(attn_implementation=implementation)
    rows = rows_of(golden)
    batch = collate(rows, 0, packed=True)
    with torch.no_grad():
        packed = model(batch["input_ids"], row_lengths=batch["row_lengths"]).logits[0].split(batch["row_lengths"])
        for row, logits in zip(rows, packed):
            alone = model(torch.tensor([row["input_ids"]])).logits[0]
            torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 0.25, 65536.0])
@pytest.mark.parametrize("trains", ["hidden", "weight", "both"])
def test_loss_under_outer_scaling(scale, trains, monkeypatch):
    """LinearCrossEntropy against torch's cross entropy, in one chunk and several."""
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(23, 16), torch.randn(50, 16), torch.randint(50, (23,))
    results = []
    for make_loss in (
        lambda h, w: torch.nn.functional.cross_entropy(h @ w.T, targets, reduction="sum"),
        lambda h, w: loss_module.LinearCrossEntropy.apply(h, w, targets, True).sum(),
    ):
        for num_rows in (1000, 5):
            monkeypatch.setattr(loss_module, "MAX_LOGITS_BYTES", num_rows * 50 * 4)
            h = hidden.clone().requires_grad_(trains != "weight")
            w = weight.clone().requires_grad_(trains != "hidden")
            loss = make_loss(h, w)
            (loss * scale / 3).backward()
            results.append((loss.detach(), h.grad, w.grad))
    for result in results[1:]:
        for found, wanted in zip(result, results[0]):
            assert (found is None) == (wanted is None)
            if wanted is not None:
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * scale)


def test_loss_makes_no_gradient_when_none_is_asked():
    layer = loss_module.OutputLayer(8, 20)
    with torch.no_grad():
        loss = layer(torch.randn(4, 8), torch.randint(20, (4,)))
    assert not loss.requires_grad and loss.dtype == torch.float32
    layer.requires_grad_(False)
    assert not layer(torch.randn(4, 8), torch.randint(20, (4,))).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_in_16_bits_is_float32(dtype):
    """The softmax is made in float32: loss and gradients of 16-bit inputs are as near as 16 bits allow."""
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(600, 32), torch.randn(300, 32) * 0.3, torch.randint(300, (600,))
    values = []
    for kind in (torch.float32, dtype):
        h, w = hidden.to(dtype).to(kind).requires_grad_(), weight.to(dtype).to(kind).requires_grad_()
        loss = loss_module.LinearCrossEntropy.apply(h, w, targets, True).sum()
        assert loss.dtype == torch.float32
        (loss / 600).backward()
        values.append((loss.detach(), h.grad.float(), w.grad.float()))
    assert values[1][0].item() == pytest.approx(values[0][0].item(), rel=1e-3)
    for found, wanted in zip(values[1][1:], values[0][1:]):
        assert (found - wanted).norm() / wanted.norm() < 0.02


class Saved:
    """Counts what autograd keeps for the backward pass."""

    def __enter__(self):
        self.sizes = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args):
        self.hooks.__exit__(*args)

    def pack(self, tensor):
        self.sizes.append(tensor.numel())
        return tensor


@pytest.mark.parametrize("mode_name", MODES)
def test_frozen_layers_keep_no_activations(mode_name):
    """Below the lowest trained layer nothing is kept, and nothing is computed twice."""
    golden, model = build(mode_name, "freeze")
    layers = [module for module in model.modules() if type(module).__name__ == "GLMBlock"]
    kept, calls = [], []
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda m, a, n=number: calls.append(n))
    batch = collate(rows_of(golden), 0)
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_layers(model)
        calls.clear()
        with Saved() as saved:
            first = layers[-1].register_forward_pre_hook(lambda m, a: kept.append(len(saved.sizes)))
            loss = model(**batch).loss
            first.remove()
        assert kept.pop() == 0
        loss.backward()
        assert calls.count(0) == 1
        assert [layer.gradient_checkpointing for layer in layers] == [False] * (len(layers) - 1) + [checkpointing]
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize(
    "kind, interval, wanted",
    [
        ("all", 1, lambda n: True),
        ("all", 3, lambda n: n % 3 == 0),
        ("prefix_embedding", 1, lambda n: True),
        ("lora", 2, lambda n: n % 2 == 0),
    ],
)
def test_which_layers_are_recomputed(kind, interval, wanted):
    _, model = build("glm3", kind)
    checkpoint_layers(model, interval)
    layers = [module for module in model.modules() if type(module).__name__ == "GLMBlock"]
    assert [layer.gradient_checkpointing for layer in layers] == [wanted(n) for n in range(len(layers))]


@pytest.mark.parametrize("mode_name", ["glm2", "glm3"])
@pytest.mark.parametrize("kind", ["all", "prefix_embedding"])
def test_causal_attention_gets_no_mask(mode_name, kind, monkeypatch):
    """The kernel is asked for its own causal rule, with keys that are not repeated."""
    golden, model = build(mode_name, kind)
    seen = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, **kwargs):
        seen.append((kwargs.get("attn_mask"), kwargs.get("is_causal"), kwargs.get("enable_gqa"), key.shape[1]))
        assert query.shape[2] == key.shape[2]
        return kernel(query, key, value, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    for packed in (False, True):
        model(**collate(rows_of(golden), 0, packed))
    assert len(seen) >= 5 and set(seen) == {(None, True, True, golden.config().num_key_value_heads)}


@pytest.mark.parametrize("kind", ["all", "prefix_embedding"])
@pytest.mark.parametrize("mode_name", MODES)
def test_flex_attention_sees_the_same(mode_name, kind, monkeypatch):
    """Forward only, uncompiled: a CPU has no backward pass for it (tests/test_gpu.py has)."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
    from transformers.integrations import flex_attention as library

    masks = []

    def uncompiled(query, key, value, training=False, **kwargs):
        masks.append(kwargs["block_mask"])
        return flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr(library, "compile_friendly_flex_attention", uncompiled)
    golden, model = build(mode_name, kind)
    for packed in (False, True):
        batch = collate(rows_of(golden), 0, packed)
        with torch.no_grad():
            wanted = model(**batch).loss.item()
            assert not masks
            model.config._attn_implementation = "flex_attention"
            assert model(**batch).loss.item() == pytest.approx(wanted, rel=1e-5)
        assert masks and all(isinstance(mask, BlockMask) for mask in masks)
        masks.clear()
        model.config._attn_implementation = "sdpa"


@pytest.mark.parametrize("p", [0.1, 0.25, 0.9])
def test_dropout_of_lora(p):
    """The gradient has the forward's mask; what is kept is 1 / (1 - p) as large, so that the mean stays; about p go."""
    torch.manual_seed(3)
    layer, hidden = SeededDropout(p).train(), torch.ones(101, 997, requires_grad=True)
    output = layer(hidden)
    output.sum().backward()
    assert torch.equal(hidden.grad, output.detach())
    values = output.detach().unique().tolist()
    assert values == pytest.approx([0, 1 / (1 - p)])
    assert (output == 0).float().mean().item() == pytest.approx(p, abs=0.006)
    assert output.mean().item() == pytest.approx(1, abs=0.01 / (1 - p))
    assert (output[:, 1:] == 0).ne(output[:, :-1] == 0).any() and not torch.equal(output[0], output[1])
    with torch.no_grad():
        other = layer(hidden)
        assert not torch.equal(other, output), "each forward draws anew"
        torch.manual_seed(3)
        assert torch.equal(layer(hidden), output), "from torch's seed"
        assert torch.equal(layer.eval()(hidden), hidden) and torch.equal(SeededDropout(0.0).train()(hidden), hidden)


def test_dropout_by_autograd():
    """Twice as much comes from outside: twice the gradient; no gradient for p and seed."""
    hidden = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: MaskFromSeed.apply(x, 0.4, 17), (hidden,))
    mask = MaskFromSeed.times_mask(torch.ones(5, 7, dtype=torch.float64), 0.4, 17)
    torch.testing.assert_close(MaskFromSeed.apply(hidden, 0.4, 17), hidden * mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_norm_on_a_cpu(dtype):
    """Against the formula x / sqrt(mean(x^2) + eps) * weight, and its gradients by autograd."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 5, 8, dtype=torch.float64), 1 + 0.1 * torch.randn(8, dtype=torch.float64)
    results = []
    for norm in (
        lambda x, w: RMSNormOnCPU.apply(x, w, 0.5),
        lambda x, w: x * (x.square().mean(-1, keepdim=True) + 0.5).rsqrt() * w,
    ):
        kind = dtype if not results else torch.float64
        x, w = (tensor.to(dtype).to(kind).requires_grad_() for tensor in (hidden, weight))
        output = norm(x, w)
        (output * torch.arange(80.0).view(2, 5, 8)).sum().backward()
        results.append([tensor.double() for tensor in (output.detach(), x.grad, w.grad)])
    tolerance = dict(rtol=1e-10, atol=1e-10) if dtype == torch.float64 else dict(rtol=0.02, atol=0.5)
    for found, wanted in zip(*results):
        torch.testing.assert_close(found, wanted, **tolerance)
    frozen = torch.ones(8)
    RMSNormOnCPU.apply(torch.randn(3, 8, requires_grad=True), frozen, 1e-5).sum().backward()
    assert frozen.grad is None


@pytest.mark.parametrize("mode_name", MODES)
def test_flags_of_lora_reach_the_layers(mode_name):
    """Kind: a flag that every fixture leaves at its default. Rank, alpha / rank, and the dropout of each layer."""
    flags = dict(lora_dim=4, lora_alpha=10, lora_dropout=0.25, lora_module_name="query_key_value,dense_4h_to_h")
    golden = Golden(mode_name)
    model = TRAIN_TYPES["lora"].prepare(golden.model(), SimpleNamespace(**flags), golden.mode)
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert {name.rpartition(".")[2] for name in layers} == {"query_key_value", "dense_4h_to_h"}
    assert len(layers) == 2 * golden.config().num_layers
    for layer in layers.values():
        assert layer.scaling == {"default": 2.5} and layer.r == {"default": 4}
        assert {type(part) for part in layer.lora_dropout.values()} == {SeededDropout}
        assert [part.p for part in layer.lora_dropout.values()] == [0.25]
    config = model.peft_config["default"]
    found = (config.r, config.lora_alpha, config.lora_dropout, config.bias, config.task_type)
    assert found == (4, 10, 0.25, "none", "CAUSAL_LM")
    trained = {name.split(".")[-3] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"lora_A", "lora_B"}


@pytest.mark.parametrize("mode_name", MODES)
def test_dropout_of_the_prefix(mode_name):
    """The released prefix encoder drops a tenth while it trains, and nothing afterwards."""
    golden = Golden(mode_name)
    encoder = golden.prefix_model("prefix_embedding").transformer.prefix_encoder
    torch.nn.init.constant_(encoder.embedding.weight, 1.0)
    torch.manual_seed(0)
    made = encoder.train()(64, torch.float32)
    assert made.unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert (made == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert encoder.eval()(2, torch.float32).unique().tolist() == [1.0]


def test_a_new_prefix_has_the_bounds_of_linear_layers():
    """Uniform within +- 1 / sqrt(inputs), as torch makes them; the table is standard normal."""
    from modeling.prefix_encoder import PrefixEncoder

    torch.manual_seed(0)
    sizes = dict(pre_seq_len=64, num_hidden_layers=2, prefix_projection=True, hidden_size=400)
    encoder = PrefixEncoder(SimpleNamespace(**sizes), num_heads=2, head_size=8, embedding_size=64)
    torch.nn.init.constant_(encoder.embedding.weight, 7.0)  # torch has drawn it already
    encoder.reset_parameters()
    for layer, inputs in ((encoder.trans[0], 64), (encoder.trans[2], 400)):
        for parameter in (layer.weight, layer.bias):
            most = parameter.abs().max().item()
            assert 0.9 * inputs**-0.5 < most <= inputs**-0.5
            assert parameter.min() < 0 < parameter.max()
    assert encoder.embedding.weight.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("mode_name, ratio, divisor, base", [("glm2", 16, 16, 1e4), ("glm3", 50, 1, 5e5)])
def test_rope_ratio(mode_name, ratio, divisor, base):
    """glm2 divides positions by it (ChatGLM2-6B-32k has 16), glm3 multiplies the base (ChatGLM3-6B-32k has 50)."""
    from glm2.modeling_chatglm import rotary_angles

    config = Golden(mode_name).config(rope_ratio=ratio)
    positions = torch.tensor([[0, 1, 7, 300]])
    cos, sin = rotary_angles(positions, config, torch.float64)
    size = config.kv_channels // 2
    wanted = torch.tensor([[p / divisor / base ** (2 * i / size) for i in range(size // 2)] for p in (0, 1, 7, 300)])
    assert cos.shape == (1, 1, 4, size // 2)
    torch.testing.assert_close(cos[0, 0], wanted.cos().double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(sin[0, 0], wanted.sin().double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "trains, num_rows, wanted",
    [("hidden", 5, 5), ("weight", 5, 2), ("hidden", 1000, 23), ("no", 5, 5), ("hidden", 0.5, 1)],
)
def test_logits_that_exist_at_one_time(trains, num_rows, wanted, monkeypatch):
    """MAX_LOGITS_BYTES of float32, a quarter of it where the output layer trains; the rows are shared out evenly."""
    monkeypatch.setattr(loss_module, "MAX_LOGITS_BYTES", int(num_rows * 50 * 4))
    shapes, empty = [], torch.empty
    monkeypatch.setattr(loss_module.torch, "empty", lambda *size, **more: shapes.append(size) or empty(*size, **more))
    hidden = torch.randn(23, 16).requires_grad_(trains == "hidden")
    weight = torch.randn(50, 16).requires_grad_(trains == "weight")
    loss_module.LinearCrossEntropy.apply(hidden, weight, torch.randint(50, (23,)), True)
    assert shapes == [(wanted, 50)]


def test_the_gradient_of_many_float16_rows_does_not_overflow():
    """600 rows that all want the same token: their sum is beyond 65504, the mean is not."""
    hidden = torch.full((600, 4), 200.0, dtype=torch.float16)
    weight = torch.zeros(3, 4, dtype=torch.float16, requires_grad=True)
    loss = loss_module.LinearCrossEntropy.apply(hidden, weight, torch.zeros(600, dtype=torch.long), True).sum()
    (loss / 600).backward()
    assert loss.item() == pytest.approx(600 * 1.0986123, rel=1e-5)  # log 3
    wanted = torch.tensor([-400 / 3, 200 / 3, 200 / 3])[:, None].expand(3, 4)
    torch.testing.assert_close(weight.grad.float(), wanted, rtol=2e-3, atol=0)


def test_targets_are_the_next_tokens():
    """By hand: position n predicts token n + 1; what no label follows, and the last position, predict nothing."""
    labels = torch.tensor([[-100, 3, -100, 5], [7, -100, -100, -100]])
    assert loss_module.label_positions(labels).tolist() == [0, 2]
    layer = loss_module.OutputLayer(2, 9)
    torch.manual_seed(0)
    hidden = torch.randn(2, 4, 2)
    rows = layer(hidden[0, [0, 2]])
    wanted = torch.nn.functional.cross_entropy(rows, torch.tensor([3, 5]), reduction="none")
    for positions in (None, torch.tensor([0, 2])):
        torch.testing.assert_close(loss_module.token_losses(hidden, labels, layer, positions), wanted)


OBJECTIVES = {  # of the losses of the tokens
    "sum": lambda losses: losses.sum() / 7,
    "expanded by hand": lambda losses: (losses * torch.ones(()).expand(len(losses))).sum(),
    "weighted": lambda losses: (losses * torch.linspace(0, 2, len(losses), dtype=losses.dtype)).sum(),
    "focal": lambda losses: ((1 - (-losses).exp()) ** 2 * losses).mean(),
    "one token": lambda losses: losses[3],
    "of some": lambda losses: losses[losses > 2].sum(),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("num_rows", [1000, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_any_objective_of_the_token_losses_has_its_gradient(name, num_rows, dtype, monkeypatch):
    """Against torch's own operators in float64: losses, and the gradients of hidden states and of the weight."""
    monkeypatch.setattr(loss_module, "MAX_LOGITS_BYTES", num_rows * 50 * 4)
    torch.manual_seed(0)
    hidden, weight, targets = (
        torch.randn(23, 16).to(dtype),
        (torch.randn(50, 16) / 4).to(dtype),
        torch.randint(50, (23,)),
    )
    h, w = (tensor.double().requires_grad_() for tensor in (hidden, weight))
    wanted = torch.nn.functional.cross_entropy(h @ w.T, targets, reduction="none")
    OBJECTIVES[name](wanted).backward()
    layer = loss_module.OutputLayer(16, 50).to(dtype)
    layer.weight.data = weight
    hidden.requires_grad_()
    losses = layer(hidden, targets)
    assert losses.dtype == torch.promote_types(dtype, torch.float32) and losses.shape == (23,)
    OBJECTIVES[name](losses).backward()
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for found, exact in ((losses, wanted), (hidden.grad, h.grad), (layer.weight.grad, w.grad)):
        assert (found.double() - exact).norm() <= bound * exact.norm()


def test_no_token_has_no_loss_and_no_gradient():
    layer, hidden = loss_module.OutputLayer(4, 9), torch.zeros(0, 4, requires_grad=True)
    losses = layer(hidden, torch.zeros(0, dtype=torch.long))
    assert losses.shape == (0,) and losses.sum() == 0
    (losses.sum() / 3).backward()
    assert hidden.grad.shape == (0, 4) and not layer.weight.grad.any()


def test_every_layer_is_recomputed_unless_an_interval_is_given():
    _, model = build("glm3", "all")
    checkpoint_layers(model)
    layers = [module for module in model.modules() if type(module).__name__ == "GLMBlock"]
    assert len(layers) > 1 and all(layer.gradient_checkpointing for layer in layers)


def test_layers_above_trained_embeddings_are_recomputed():
    """Where the embeddings alone train, gradients flow through every layer."""
    args = SimpleNamespace(freeze_module_name="embedding.")
    golden = Golden("glm3")
    model = TRAIN_TYPES["freeze"].prepare(golden.model(), args, golden.mode)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "transformer.embedding.word_embeddings.weight"
    ]
    checkpoint_layers(model)
    layers = [module for module in model.modules() if type(module).__name__ == "GLMBlock"]
    assert all(layer.gradient_checkpointing for layer in layers)


def test_an_adapter_has_the_precision_of_its_network():
    """peft would make its matrices float32; the engine decides the precision."""
    golden = Golden("glm3")
    model = TRAIN_TYPES["lora"].prepare(golden.model(torch.bfloat16), LORA, golden.mode)
    found = {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name}
    assert found == {torch.bfloat16}


@pytest.mark.parametrize("is_training, wanted", [(True, 0.3), (False, 0.0)])
def test_dropout_of_attention_is_the_layers_own(is_training, wanted, monkeypatch):
    from modeling import attention

    asked, dropout = [], torch.nn.functional.dropout
    monkeypatch.setattr(
        attention.F, "dropout", lambda x, p=0.5, training=True: asked.append(p) or dropout(x, p, training)
    )
    config = SimpleNamespace(_attn_implementation="eager")
    layer = SimpleNamespace(
        config=config, training=is_training, attention_dropout=0.3, scaling=1.0, num_key_value_groups=1
    )
    attention.attend(layer, *torch.randn(3, 1, 2, 4, 8), None)
    assert asked == [wanted]


def test_a_mask_of_four_dimensions_is_taken_as_it_is():
    from modeling.attention import visible_mask

    cpu, own = torch.device("cpu"), torch.tensor([[[[True, False], [True, True]]]])
    assert visible_mask(2, 0, 1, own, None, cpu).tolist() == [[[[True, True, False], [True, True, True]]]]
    assert visible_mask(2, 0, 1, None, None, cpu).tolist() == [[[[True, True, False], [True, True, True]]]]
    padded = visible_mask(2, 0, 0, torch.tensor([[0, 1]]), None, cpu)
    assert padded.tolist() == [[[[False, False], [False, True]]]]
