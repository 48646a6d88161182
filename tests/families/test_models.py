"""The three networks against what the released code computes (float32, CPU)."""

import pytest
import torch
from reference import GOLDEN_FOLDERS

from benchmarks.plain import plain_loss, plain_settings

PREFIXES = ["prefix_projection", "prefix_embedding"]


def largest(difference):
    return difference.abs().max().item()


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request, golden):
    return golden.model(attn_implementation=request.param)


@pytest.fixture(params=PREFIXES)
def prefix(request):
    return request.param


def relative_error(found, wanted):
    assert set(found) == set(wanted)
    return max(abs(found[name] - value) / max(value, 1e-12) for name, value in wanted.items())


def test_loss_and_every_gradient_norm(golden, model):
    model.zero_grad()
    loss = model(golden.tensors["train.input_ids"], labels=golden.tensors["train.labels"]).loss
    assert abs(loss.item() - golden.tensors["train.loss"].item()) < 1e-5
    loss.backward()
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert relative_error(norms, golden.values["grad_norms"]) < 1e-4


@torch.no_grad()
def test_logits(golden, model):
    labels = golden.tensors["train.labels"]
    logits = model(golden.tensors["train.input_ids"]).logits[:, :-1][labels[:, 1:] != -100][::2]
    assert largest(logits - golden.tensors["train.logits_label_positions"]) < 1e-4
    assert largest(model(golden.tensors["one.input_ids"]).logits - golden.tensors["one.logits"]) < 1e-4
    kept = model(golden.tensors["one.input_ids"], logits_to_keep=1).logits
    assert kept.shape[1] == 1 and largest(kept - golden.tensors["one.logits"][:, -1:]) < 1e-4


@torch.no_grad()
def test_hidden_states(golden, model):
    output = model(golden.tensors["one.input_ids"], output_hidden_states=True)
    found = torch.stack([output.hidden_states[i] for i in golden.values["one.hidden_states_layers"]], dim=1)
    assert largest(found - golden.tensors["one.hidden_states"]) < 1e-4


@torch.no_grad()
def test_long_row(golden, model):
    """Rotary angles far out: ChatGLM-6B's float16 rounding shows here."""
    ids = golden.tensors["long.input_ids"]
    assert largest(model(ids).logits[:, -1] - golden.tensors["long.last_logits"]) < 1e-4
    assert abs(model(ids, labels=golden.tensors["long.labels"]).loss - golden.tensors["long.loss"]).item() < 1e-4


def decode_steps(model, ids, num_steps):
    """Logits of the last num_steps + 1 positions, the last num_steps tokens fed one by one through a cache."""
    output = model(ids[:, :-num_steps], use_cache=True)
    logits = [output.logits[:, -1:]]
    for i in range(ids.shape[1] - num_steps, ids.shape[1]):
        output = model(ids[:, i : i + 1], past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
def test_decoding_with_a_cache(golden, model):
    ids, wanted = golden.tensors["decode.input_ids"], golden.tensors["decode.logits"]
    assert largest(model(ids).logits[:, -9:] - wanted) < 1e-4
    assert largest(decode_steps(model, ids, golden.values["decode.continuation"]) - wanted) < 1e-4
    # several new tokens at once behind a cache
    output = model(ids[:, :-8], use_cache=True)
    rest = model(ids[:, -8:], past_key_values=output.past_key_values, use_cache=True).logits
    assert largest(rest - wanted[:, 1:]) < 1e-4


def test_prefix_encoder(golden, prefix):
    model = golden.prefix_model(prefix)
    loss = model(golden.tensors["train.input_ids"], labels=golden.tensors["train.labels"]).loss
    assert abs(loss.item() - golden.tensors[f"{prefix}.loss"].item()) < 1e-5
    loss.backward()
    norms = {n: p.grad.norm().item() for n, p in model.named_parameters() if "prefix_encoder" in n}
    assert relative_error(norms, golden.values[f"{prefix}.grad_norms"]) < 1e-4


@torch.no_grad()
def test_prefix_with_a_cache(golden, prefix):
    model = golden.prefix_model(prefix)
    ids = golden.tensors["decode.input_ids"]
    assert largest(decode_steps(model, ids, 8) - model(ids).logits[:, -9:]) < 1e-4


@pytest.mark.parametrize("with_prefix", [False, True])
def test_gradient_checkpointing_changes_nothing(golden, with_prefix):
    model = golden.prefix_model("prefix_projection") if with_prefix else golden.model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model.zero_grad()
        loss = model(golden.tensors["train.input_ids"], labels=golden.tensors["train.labels"]).loss
        loss.backward()
        results.append((loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-4, atol=1e-7)


def adamw_losses(golden, make_loss, dtype=torch.float32):
    """Losses of ten AdamW steps on the reference batch, on one thread, so that sums have one order."""
    settings = golden.values["adamw_losses"]
    model = golden.model(dtype=dtype).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings["lr"],
        betas=settings["betas"],
        eps=settings["eps"],
        weight_decay=settings["weight_decay"],
    )
    losses = []
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in settings["losses"]:
        loss = make_loss(model, golden.tensors["train.input_ids"], golden.tensors["train.labels"])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
        optimizer.step()
    torch.set_num_threads(num_threads)
    return losses


def own_loss(model, ids, labels):
    return model(ids, labels=labels).loss


def written_out_loss(model, ids, labels):
    """Eager attention, autograd's own operators, logits of every token."""
    with plain_settings(model, checkpointing=False):
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return plain_loss(model, batch, (labels[:, 1:] != -100).sum())


def test_ten_adamw_losses(golden):
    """Against the released code, in float32.

    The runs of glm2 and glm3 are chaotic: with the same operators in float64 the fifth loss is 3e-4 from the
    reference and the tenth 1e-2, and so is any other order of sums in float32. There the first four are compared
    closely, and the test below takes the chaos out.
    """
    differences = [
        abs(found - wanted)
        for found, wanted in zip(adamw_losses(golden, own_loss), golden.values["adamw_losses"]["losses"], strict=True)
    ]
    assert max(differences[: 10 if golden.mode.name == "glm" else 4]) < 1e-4
    assert max(differences) < 5e-2


def test_ten_adamw_losses_in_float64(golden):
    """Ten steps the plain way and ten of ours: where rounding is too small to grow, they are the same."""
    wanted = adamw_losses(golden, written_out_loss, torch.float64)
    assert adamw_losses(golden, own_loss, torch.float64) == pytest.approx(wanted, abs=1e-6)
    assert wanted[-1] < 0.9 * wanted[0]


def test_greedy_tokens(golden):
    model = golden.model()
    for row in golden.values.get("greedy", []):
        ids = torch.tensor([row["input_ids"]])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=None
        )
        assert output[0, ids.shape[1] :].tolist() == row["new_ids"]


def prompts(golden):
    """Three prompts of different lengths, and the batch of them padded on the left."""
    tokenizer = golden.tokenizer()
    texts = ["你好", "发动机水温高，风扇始终是低速转动", "a  b\tc\n\nd"]
    rows = [torch.tensor(golden.mode.prompt.encode_prompt(tokenizer, text)[0]) for text in texts]
    length = max(map(len, rows))
    batch = torch.full((len(rows), length), tokenizer.pad_token_id)
    mask = torch.zeros_like(batch)
    for i, row in enumerate(rows):
        batch[i, length - len(row) :] = row
        mask[i, length - len(row) :] = 1
    return rows, batch, mask


@pytest.mark.parametrize("with_prefix", [False, True])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beam", "no cache"])
def test_left_padded_batch_equals_single_rows(golden, settings, with_prefix):
    model = golden.prefix_model("prefix_embedding") if with_prefix else golden.model()
    rows, batch, mask = prompts(golden)
    settings = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **settings}
    together = model.generate(batch, attention_mask=mask, **settings)[:, batch.shape[1] :]
    for i, row in enumerate(rows):
        alone = model.generate(row[None], attention_mask=torch.ones_like(row[None]), **settings)[0, len(row) :]
        assert together[i].tolist() == alone.tolist()


@torch.no_grad()
def test_left_padded_logits(golden):
    model = golden.model()
    rows, batch, mask = prompts(golden)
    logits = model(batch, attention_mask=mask).logits
    for i, row in enumerate(rows):
        assert largest(logits[i, -len(row) :] - model(row[None]).logits[0]) < 1e-4


def test_sampling_returns_several_answers(golden):
    model = golden.model()
    _, batch, mask = prompts(golden)
    torch.manual_seed(0)
    output = model.generate(
        batch, attention_mask=mask, do_sample=True, num_return_sequences=2, max_new_tokens=5, pad_token_id=0
    )
    assert output.shape[0] == 6 and output.shape[1] <= batch.shape[1] + 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_16_bits_follow_float32(golden, dtype):
    logits = golden.model(dtype=dtype)(golden.tensors["one.input_ids"]).logits
    assert logits.dtype == dtype
    wanted = golden.tensors["one.logits"]
    error = (logits.float() - wanted).norm() / wanted.norm()
    assert error < (0.15 if dtype == torch.bfloat16 else 0.02)


def test_peft_wraps_the_named_layers(golden):
    from peft import LoraConfig, get_peft_model

    model = golden.model()
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets))
    layers = model.config.num_layers
    assert sum("lora_A" in name for name, _ in wrapped.named_parameters()) == 4 * layers
    ids = golden.tensors["one.input_ids"]
    loss = wrapped(input_ids=ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)
    generated = wrapped.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, pad_token_id=0)
    assert generated.shape[1] > ids.shape[1]


def test_loss_is_a_sum_over_given_items(golden):
    model = golden.model()
    ids, labels = golden.tensors["train.input_ids"], golden.tensors["train.labels"]
    count = (labels[:, 1:] != -100).sum().item()
    mean = model(ids, labels=labels).loss.item()
    assert model(ids, labels=labels, num_items_in_batch=1).loss.item() == pytest.approx(mean * count, rel=1e-6)
    nothing = model(ids, labels=torch.full_like(labels, -100), num_items_in_batch=5).loss
    nothing.backward()
    assert nothing.item() == 0.0
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in model.parameters())


def test_saved_checkpoint_has_released_names(golden, tmp_path):
    import json

    from checkpoints.released_files import save_config
    from checkpoints.weight_files import write_weights

    model = golden.model(dtype=torch.float16)
    write_weights(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}, tmp_path, max_shard_size="300KB"
    )
    save_config(model.config, tmp_path, torch.float16)
    with open(f"{golden.folder}/pytorch_model.bin.index.json") as file:
        released = {name for name in json.load(file)["weight_map"] if not name.endswith("inv_freq")}
    with open(tmp_path / "model.safetensors.index.json") as file:
        assert set(json.load(file)["weight_map"]) == released
    with open(f"{golden.folder}/config.json") as file:
        released_config = json.load(file)
    with open(tmp_path / "config.json") as file:
        config = json.load(file)
    skipped = {"architectures", "transformers_version", "_name_or_path"}
    assert {k: config.get(k) for k in released_config if k not in skipped} == {
        k: v for k, v in released_config.items() if k not in skipped
    }
    again = golden.mode.model_class.from_pretrained(tmp_path, dtype=torch.float16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_hub_name_is_read_from_the_hub_cache(golden, tmp_path, monkeypatch):
    """The layout that a download leaves; nothing is fetched."""
    import huggingface_hub.constants

    from checkpoints.base_weights import check_weights
    from checkpoints.opening import resolve_folder

    snapshot = tmp_path / "models--THUDM--some-model" / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--THUDM--some-model" / "refs").mkdir()
    (tmp_path / "models--THUDM--some-model" / "refs" / "main").write_text("0123abc")
    for path in GOLDEN_FOLDERS[golden.mode.name].iterdir():
        (snapshot / path.name).symlink_to(path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = resolve_folder("THUDM/some-model")
    assert folder == str(snapshot)
    (snapshot / "golden.safetensors").unlink()  # not a weight file of the model
    assert check_weights(resolve_folder("THUDM/some-model"), golden.mode, golden.config())
    with pytest.raises(ValueError, match="THUDM/other: cannot be fetched from the hub"):
        resolve_folder("THUDM/other")


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mode_name", ["glm2", "glm3"])
@torch.no_grad()
def test_dropout_of_attention(mode_name, implementation):
    """config.json's attention_dropout: in training alone, and drawn anew each time; no release has it."""
    from reference import Golden

    golden = Golden(mode_name)
    ids = golden.tensors["one.input_ids"]
    plain = golden.model(attn_implementation=implementation)(ids).logits
    model = golden.model(attn_implementation=implementation, attention_dropout=0.5)
    assert torch.equal(model(ids).logits, plain)
    torch.manual_seed(0)
    first, second = (model.train()(ids).logits for _ in range(2))
    assert largest(first - plain) > 0.01 and largest(first - second) > 0.01


def test_each_row_has_its_own_dropout_of_the_prefix():
    """Without a cache as many draws as rows; with one a single prefix, made once, that all rows share."""
    from types import SimpleNamespace

    from reference import Golden

    model = Golden("glm3").prefix_model("prefix_embedding").train().transformer
    prefix = model.prefix_keys_values(3, None, torch.float32)
    assert prefix.shape[1] == 3 and not torch.equal(prefix[:, 0], prefix[:, 1])
    cache = SimpleNamespace()
    prefix = model.prefix_keys_values(3, cache, torch.float32)
    assert torch.equal(prefix[:, 0], prefix[:, 2]) and cache.prefix_keys_values.shape[1] == 1
    assert torch.equal(model.prefix_keys_values(2, cache, torch.float32)[:, 1], prefix[:, 0])
