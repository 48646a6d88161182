"""CONTRIBUTING's "Add a family", done: a causal family that is no GLM, a folder and a name in a table, runs through the
commands."""

import json
import shutil

import pytest
import torch
from launching import check_done, free_port, run_command
from reference import GOLDEN_FOLDERS, ROOT
from safetensors.torch import load_file

pytestmark = pytest.mark.launch

FOLDER = ROOT / "tests" / "families" / "tinylm"
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The toolkit with the family in it, a base as transformers itself saves it, and rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tree = tmp_path_factory.mktemp("toolkit")
    for path in ROOT.iterdir():
        if path.is_dir() and (any(path.glob("*.py")) or path.name == "configs") and path.name != "tests":
            (tree / path.name).symlink_to(path)
        elif path.suffix == ".py":
            shutil.copy(path, tree)
    (tree / "tinylm").symlink_to(FOLDER)
    table = (tree / "modes.py").read_text(encoding="utf-8")
    before = 'FOLDERS = ("glm1", "glm2", "glm3")'
    assert table.count(before) == 1 and before in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (tree / "modes.py").write_text(table.replace(before, 'FOLDERS = ("glm1", "glm2", "glm3", "tinylm")'), "utf-8")

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1280, max_position_embeddings=512, pad_token_id=0, initializer_range=0.1, **SIZES)
    LlamaForCausalLM(config).save_pretrained(tree / "base")
    shutil.copy(GOLDEN_FOLDERS["glm2"] / "tokenizer.model", tree / "base")
    rows = (ROOT / "data" / "spo_0.json").read_text(encoding="utf-8").splitlines()[:6]
    (tree / "rows.json").write_text("\n".join(rows), encoding="utf-8")
    return tree


def train(tree, output_dir, flags, start="python"):
    """Run train.py on the family's base."""
    return run_command(
        f"{start} train.py --train_path rows.json --model_name_or_path base --output_dir {output_dir} --max_len 200"
        f" --max_src_len 100 --per_device_train_batch_size 3 --show_loss_step 1 --learning_rate 1e-2 {flags}",
        tree,
    )


def logits_of_transformers(folder):
    """What transformers' own class makes of a folder."""
    from transformers import LlamaForCausalLM

    with torch.no_grad():
        return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.arange(3, 40)[None]).logits


def test_freeze_saves_what_transformers_opens(tree):
    process = train(tree, "frozen", "--train_type freeze --freeze_module_name layers.2. --precision fp32")
    check_done(process)
    saved, base = (load_file(tree / name / "model.safetensors") for name in ("frozen/epoch-1-step-2", "base"))
    changed = {name for name in base if not torch.equal(saved[name], base[name])}
    assert saved.keys() == base.keys() and changed == {name for name in base if ".layers.2." in name}
    assert not torch.equal(
        logits_of_transformers(tree / "frozen" / "epoch-1-step-2"), logits_of_transformers(tree / "base")
    )


def test_all_under_zero3_takes_the_steps_of_one_process(tree):
    """Rows and weights split over two processes: the same losses, and weights that transformers opens."""
    flags, logs = "--train_type all --num_train_epochs 3 --precision fp32", []
    launcher = f"deepspeed --num_accelerators 2 --master_port {free_port()}"
    for name, start, split in (
        ("one", "python", "--per_device_train_batch_size 6 --eval_path rows.json"),
        ("two", launcher, "--per_device_train_batch_size 3 --ds_file ds_zero3_no_offload.json"),
    ):
        check_done(train(tree, name, f"{flags} {split}", start))
        lines = (tree / name / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
        logs.append([json.loads(line)["loss"] for line in lines])
    assert len(logs[0]) == 3 and logs[0][0] > logs[0][-1] and logs[0] == pytest.approx(logs[1], rel=1e-4)
    one, two = (logits_of_transformers(tree / name / "epoch-3-step-3") for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=2e-2, atol=2e-2)


def test_lora_is_merged_and_answers(tree):
    check_done(
        train(tree, "adapter", "--train_type lora --lora_dim 4 --lora_module_name q_proj,down_proj --precision fp32")
    )
    adapter = tree / "adapter" / "epoch-1-step-2"
    assert {name.split(".")[-3] for name in load_file(adapter / "adapter_model.safetensors")} == {"q_proj", "down_proj"}
    check_done(run_command(f"python merge_lora.py --model_dir {adapter}", tree))
    merged = tree / "adapter" / "epoch-1-step-2-merged"
    check = json.loads((merged / "run.json").read_text("utf-8"))["merge_check"]
    assert check["max_difference"] < 1e-3 * check["max_logit"] and check["adapter_effect"] > 1e-3
    for name in (adapter, merged):
        command = f"python predict.py --model_path {name} --test_path rows.json --max_new_tokens 5 --precision fp32"
        check_done(run_command(f"{command} --output_path {name.name}.jsonl", tree))
    answers = [(tree / f"{name.name}.jsonl").read_text("utf-8") for name in (adapter, merged)]
    assert len(answers[0].splitlines()) == 6
    assert [json.loads(line)["prediction"] for line in answers[0].splitlines()] == [
        json.loads(line)["prediction"] for line in answers[1].splitlines()
    ]


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--packing", "--packing: TinyLM does not keep rows of one sequence apart here: remove it"),
        ("--train_type ptuning", "--train_type ptuning: TinyLM has no prefix encoder here: use freeze or lora or all"),
        ("--lora_module_name query_key_value", "choose from down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj"),
        ("--train_type freeze --freeze_module_name layers.27.", "this model has layers.0. to layers.2."),
        ("--mode glm3", "--mode glm3: config.json of base is of tinylm: change --mode or"),
    ],
)
def test_what_it_has_not_is_refused_by_name(tree, flags, says):
    process = train(tree, "refused", flags)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert says in process.stderr and not (tree / "refused").exists()


def test_its_numbers_are_those_of_transformers(tree, monkeypatch):
    """Logits of a batch padded on the left, and losses of supervised tokens, against transformers' own class."""
    from transformers import LlamaForCausalLM

    monkeypatch.syspath_prepend(str(FOLDER.parent))
    from tinylm import FAMILY

    stock = LlamaForCausalLM.from_pretrained(tree / "base", dtype=torch.float32).eval()
    config = FAMILY.config_class.from_pretrained(tree / "base")
    ours = FAMILY.model_class.from_pretrained(tree / "base", config=config, dtype=torch.float32).eval()
    ids = torch.randint(3, 1280, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    labels = ids.clone()
    labels[:, :5] = -100
    with torch.no_grad():
        found = ours(input_ids=ids, attention_mask=mask).logits
        alone = stock(input_ids=ids[:1, 3:]).logits
        torch.testing.assert_close(found[:1, 3:], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[1:], stock(input_ids=ids[1:]).logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            ours(input_ids=ids, labels=labels).loss, stock(input_ids=ids, labels=labels).loss, rtol=1e-5, atol=1e-5
        )
