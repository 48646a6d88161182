"""scripts/predict_vllm.py and .sh against a stand-in that speaks vLLM's /v1/completions with token ids."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from launching import free_port, load_script
from reference import GOLDEN_FOLDERS, ROOT, Golden

import predict

MODEL = str(GOLDEN_FOLDERS["glm3"])
FLAGS = ("--max_new_tokens", "8", "--max_src_len", "64")
predict_vllm = load_script("predict_vllm")


class Server(ThreadingHTTPServer):
    """Greedy answers of the small model as token ids; requests are kept. busy: how many are refused with 503 first."""

    daemon_threads = True

    def __init__(self, busy=0, answer=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.busy = busy
        self.answer = answer or greedy
        self.requests = []
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """POST /v1/completions as vLLM 0.33 has it, without a tokenizer (--skip-tokenizer-init)."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:  # the model is asked by one at a time
            self.server.requests.append((self.path, self.headers["Content-Type"], request))
            if self.server.busy:
                self.server.busy -= 1
                status, body = 503, {"error": {"message": "The engine is paused", "type": "ServiceUnavailable"}}
            else:
                status, body = self.server.answer(request)
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


def greedy(request):
    """What vLLM answers: the ids up to and with the one that stops, an empty text, the reason."""
    if not hasattr(greedy, "model"):
        greedy.model = Golden("glm3").model()
    ids = torch.tensor([request["prompt"]])
    stop = request["stop_token_ids"]
    with torch.inference_mode():
        output = greedy.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=request["max_tokens"], do_sample=False,
            eos_token_id=stop, pad_token_id=0,
        )  # fmt: skip
    new_ids = output[0, ids.shape[1] :].tolist()
    reason = "stop" if new_ids[-1] in stop else "length"
    choice = {"text": "", "finish_reason": reason, "prompt_token_ids": request["prompt"], "token_ids": new_ids}
    return 200, {"object": "text_completion", "choices": [{"index": i, **choice} for i in range(request["n"])]}


@pytest.fixture
def serve(monkeypatch):
    """Start stand-ins; they end with the test."""
    monkeypatch.setattr(predict_vllm, "PAUSES", (0.05, 0.05, 0.05))
    servers = []

    def start(**kwargs):
        servers.append(Server(**kwargs))
        threading.Thread(target=servers[-1].serve_forever, args=(0.05,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.json"
    lines = (ROOT / "data" / "spo_1.json").read_text(encoding="utf-8").splitlines()[:5]
    without_answer = '{"instruction": "说", "input": "你好"}'
    path.write_text("\n".join([*lines, without_answer]), encoding="utf-8")
    return str(path)


def flags(rows, output, *more, model=MODEL):
    return ["--model_path", str(model), "--test_path", rows, "--output_path", str(output), *FLAGS, *more]


def fails(capsys, says, *argv):
    """The script ends with code 2 and one line that says it; main's ValueError is what the script makes a line of."""
    try:
        with pytest.raises(SystemExit) as stop:
            predict_vllm.main([str(word) for word in argv])
        assert stop.value.code == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("predict_vllm.py: error: ")
    except ValueError as error:
        line = str(error)
    assert says in line and "\n" not in line, line


def test_output_is_that_of_predict(serve, rows, tmp_path, capsys):
    server = serve()
    predict.main(flags(rows, tmp_path / "ours.jsonl"))
    predict_vllm.main(flags(rows, tmp_path / "vllm.jsonl", "--url", server.url))
    ours, theirs = ((tmp_path / name).read_text(encoding="utf-8") for name in ("ours.jsonl", "vllm.jsonl"))
    assert ours == theirs and ours.count("\n") == 6 and "source_tokens_cut" in ours
    assert not list(tmp_path.glob("*.partial"))
    assert {path for path, _, _ in server.requests} == {"/v1/completions"}
    assert {kind for _, kind, _ in server.requests} == {"application/json"}
    request = next(r for _, _, r in server.requests if len(r["prompt"]) < 20)
    golden = Golden("glm3")
    tokenizer, prompt = golden.tokenizer(), golden.mode.prompt
    assert request == {
        "prompt": prompt.encode_prompt(tokenizer, "说你好")[0],
        "max_tokens": 8,
        "n": 1,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "stop_token_ids": prompt.stop_ids(tokenizer),
        "return_token_ids": True,
    }


def test_the_answer_ends_at_the_id_that_stops(serve, rows, tmp_path):
    golden = Golden("glm3")
    tokenizer = golden.tokenizer()
    said = golden.mode.prompt.encode_answer(tokenizer, "你好")
    stop = golden.mode.prompt.stop_ids(tokenizer)[1]

    def answer(request):
        ids = ([*said, stop], said)
        return 200, {"choices": [{"index": i, "text": "", "token_ids": ids[i]} for i in range(request["n"])]}

    server = serve(answer=answer)
    more = ("--do_sample", "--num_return_sequences", "2", "--top_p", "0.5", "--seed", "7", "--url", server.url)
    predict_vllm.main(flags(rows, tmp_path / "p.jsonl", *more))
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(line["predictions"] == ["你好", "你好"] and line["stopped"] == [True, False] for line in lines)
    requests = [request for _, _, request in server.requests]
    assert {request["seed"] for request in requests} == set(range(7, 13))
    assert {(r["temperature"], r["top_p"], r["top_k"], r["n"]) for r in requests} == {(0.8, 0.5, 0, 2)}


def test_a_busy_server_is_asked_again(serve, rows, tmp_path):
    server = serve(busy=3)
    predict_vllm.main(flags(rows, tmp_path / "p.jsonl", "--url", server.url))
    assert len((tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()) == 6
    assert len(server.requests) == 9


@pytest.mark.parametrize(
    "answer, says",
    [
        ((503, {"error": {"message": "paused"}}), "answered 503"),
        ((400, {"error": {"message": "too long"}}), "(too long)"),
        ((404, ["Not Found"]), "Not Found"),
        ((200, []), "is not JSON"),
        ((200, {"choices": []}), "has no answer"),
        ((200, {"choices": [{"text": "你好", "token_ids": None}]}), "has no token_ids"),
    ],
    ids=["busy for good", "bad request", "not vllm", "no object", "no choice", "no ids"],
)
def test_other_answers_are_one_line(serve, rows, tmp_path, capsys, answer, says):
    server = serve(answer=lambda request: answer)
    fails(capsys, says, *flags(rows, tmp_path / "p.jsonl", "--url", server.url))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def test_a_server_that_is_gone_is_one_line(serve, rows, tmp_path, capsys):
    fails(capsys, "is the server up?", *flags(rows, tmp_path / "p.jsonl", "--url", f"http://127.0.0.1:{free_port()}"))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]


def with_run(folder, **run):
    """A folder that says what it holds."""
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def with_ratio(folder, mode, ratio, run=None):
    """A checkpoint with a rope_ratio, released or, with a run.json, saved."""
    shutil.copytree(GOLDEN_FOLDERS[mode], folder, ignore=shutil.ignore_patterns("golden.*"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_ratio": ratio}))
    if run:
        (folder / "run.json").write_text(json.dumps(run))
    return folder


def bad_folders(tmp_path):
    """(folder, what the error says of it)."""
    base = {"base_model": str(tmp_path / "moved away")}
    saved = {"mode": "glm2", "weights": "whole"}
    return [
        (GOLDEN_FOLDERS["glm"], "is of glm, and vLLM knows glm2 and glm3 only: use predict.py"),
        (with_run(tmp_path / "glm", mode="glm", weights="adapter", **base), "is of glm"),
        (with_run(tmp_path / "lora", mode="glm3", weights="adapter", **base), "merge it first (python merge_lora.py"),
        (with_run(tmp_path / "prefix", mode="glm2", weights="prefix", **base), "use predict.py"),
        (with_ratio(tmp_path / "32k", "glm2", 16), "rope_ratio = 16 in config.json: vLLM computes something else"),
        (with_ratio(tmp_path / "merged", "glm2", 16, saved), "with 1 only: use predict.py"),
        (tmp_path / "none", "no such folder"),
        (tmp_path, "no config.json"),
    ]


def test_folders_that_vllm_cannot_read_are_refused(rows, tmp_path, capsys):
    for folder, says in bad_folders(tmp_path):
        fails(capsys, f"--model_path {folder}: ", *flags(rows, tmp_path / "p.jsonl", model=folder))
        fails(capsys, says, *flags(rows, tmp_path / "p.jsonl", model=folder))


def test_a_rope_ratio_that_vllm_computes_as_released(tmp_path):
    """vLLM multiplies the base of every family by it, which is ChatGLM3's rule; 1 is the same in both."""
    for mode, ratio in (("glm3", 50), ("glm2", 1.0)):
        for run in (None, {"mode": mode, "weights": "whole"}):
            folder = with_ratio(tmp_path / f"{mode}-{run is None}", mode, ratio, run)
            args = predict_vllm.parser().parse_args(["--model_path", str(folder), "--test_path", "x"])
            assert predict_vllm.folder_problems(args) == []


@pytest.mark.parametrize(
    "more, says",
    [
        (("--url", "localhost:8000"), "--url localhost:8000"),
        (("--url", "http://127.0.0.1:x"), "--url http://127.0.0.1:x"),
        (("--url", "http://127.0.0.1:8000/v1"), "write it like http"),
        (("--num_requests", "0"), "--num_requests 0"),
        (("--max_new_tokens", "8180"), "--max_new_tokens 8180: does not fit, with --max_src_len 64"),
        (("--top_p", "0.5"), "--top_p: needs --do_sample"),
        (("--num_return_sequences", "2"), "add --do_sample"),
        (("--num_beams", "2"), "--num_beams"),
        (("--mode", "glm2"), "--mode glm2"),
    ],
)
def test_flags_that_make_no_sense(rows, tmp_path, capsys, more, says):
    fails(capsys, says, *flags(rows, tmp_path / "p.jsonl", *more))


# The shell script, with a stand-in for the vllm command.


def run_script(tmp_path, *argv, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "predict_vllm.sh"), *map(str, argv)],
        env={
            **os.environ,
            "VIRTUAL_ENV": sys.prefix,
            "VLLM_VENV": str(tmp_path / "venv"),
            "TMPDIR": str(tmp_path),
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_script_refuses_before_anything_is_installed(rows, tmp_path):
    folder, merge_first = bad_folders(tmp_path)[2]
    for prog, says, argv in (
        ("predict_vllm.py", f"--model_path {GOLDEN_FOLDERS['glm']}: is of glm", {"model": GOLDEN_FOLDERS["glm"]}),
        ("predict_vllm.py", merge_first, {"model": folder}),
        ("predict_vllm.sh", "--url: is for a server that runs already", {}),
    ):
        more = () if argv else ("--url", "http://127.0.0.1:8000")
        process = run_script(tmp_path, *flags(rows, tmp_path / "p.jsonl", *more, **argv))
        assert process.returncode == 2 and process.stdout == ""
        [line] = process.stderr.splitlines()
        assert line.startswith(f"{prog}: error: ") and says in line
    assert not (tmp_path / "venv").exists()


STAND_IN = """#!{python}
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def reply(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.reply(b"")

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.reply(json.dumps(dict(choices=[dict(token_ids=[2])])).encode())

    def log_message(self, *args):
        pass

with open({seen!r}, "w") as file:
    json.dump(dict(pid=os.getpid(), argv=sys.argv[1:]), file)
if os.environ.get("BROKEN"):
    sys.exit("CUDA out of memory")
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path):
    """An environment that looks installed; returns the file in which its vllm says how it was started."""
    version = (ROOT / "scripts" / "predict_vllm.sh").read_text(encoding="utf-8").split("VLLM_VERSION=")[1].split()[0]
    command = tmp_path / "venv" / "bin" / "vllm"
    command.parent.mkdir(parents=True)
    (tmp_path / "venv" / f".vllm-{version}").touch()
    command.write_text(STAND_IN.format(python=sys.executable, seen=str(tmp_path / "seen.json")))
    command.chmod(0o755)
    return tmp_path / "seen.json"


def test_script_starts_and_stops_the_server(stand_in, rows, tmp_path):
    model = tmp_path / "my model"
    shutil.copytree(MODEL, model)
    process = run_script(tmp_path, *flags(rows, tmp_path / "p.jsonl", model=model), VLLM_FLAGS="--dtype bfloat16")
    assert process.returncode == 0, process.stderr
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["index"] for line in lines] == list(range(6)) and all(line["stopped"] for line in lines)
    seen = json.loads(stand_in.read_text())
    assert seen["argv"][:2] == ["serve", str(model)] and seen["argv"][-2:] == ["--dtype", "bfloat16"]
    assert "--skip-tokenizer-init" in seen["argv"] and "--trust-remote-code" not in seen["argv"]
    overrides = json.loads(seen["argv"][seen["argv"].index("--hf-overrides") + 1])
    assert overrides == {"architectures": ["ChatGLMModel"], "original_rope": True}
    with pytest.raises(ProcessLookupError):
        os.kill(seen["pid"], 0)


def test_script_says_why_the_server_did_not_start(stand_in, rows, tmp_path):
    process = run_script(tmp_path, *flags(rows, tmp_path / "p.jsonl"), BROKEN="1")
    assert process.returncode == 2
    *_, why, error = process.stderr.splitlines()
    assert why == "CUDA out of memory" and error.startswith("predict_vllm.sh: error: vllm serve: ended before")
    assert not (tmp_path / "p.jsonl").exists()


def test_the_page_says_what_the_script_does():
    """Its commands parse, both languages have the same, and flags and version of the server are the script's."""
    script = (ROOT / "scripts" / "predict_vllm.sh").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", page, re.S)
    assert blocks[: len(blocks) // 2] == blocks[len(blocks) // 2 :] and len(blocks) == 6
    commands = [shlex.split(line) for block in blocks for line in block.splitlines()]
    for words in commands:
        for index, word in enumerate(words):
            if word.startswith("scripts/predict_vllm."):
                assert (ROOT / word).exists()
                predict_vllm.parser().parse_args(words[index + 1 :])
    served = next(words for words in commands if "serve" in words)
    for word in served[served.index("--skip-tokenizer-init") :]:
        assert word in script
    assert script.split("VLLM_VERSION=")[1].split()[0] in page.split("pip install vllm==")[1].split()[0]
