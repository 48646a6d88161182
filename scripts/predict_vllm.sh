#!/usr/bin/env bash
# Answer rows with vLLM: makes its environment once, starts its server on a merged or released checkpoint of ChatGLM2-6B
# or ChatGLM3-6B, sends the rows, stops the server. Flags are those of scripts/predict_vllm.py; docs/vllm.md has more.
#   bash scripts/predict_vllm.sh --model_path output-glm3/epoch-2-step-720-merged --test_path data/spo_1.json
#   VLLM_FLAGS="--dtype bfloat16 --tensor-parallel-size 2" bash scripts/predict_vllm.sh ...   (more flags of vllm serve)
set -euo pipefail
VLLM_VERSION=0.33.0
VLLM_VENV=${VLLM_VENV:-.venv-vllm}
VLLM_FLAGS=${VLLM_FLAGS:-}
START_SECONDS=1800
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "predict_vllm.sh: error: $1" >&2
    exit 2
}

# The toolkit's environment: the active one, else .venv, as setup.sh has it.
source scripts/environment.sh
if ! has_environment && [ -f .venv/bin/activate ]; then
    source .venv/bin/activate
fi
command -v python >/dev/null \
    || fail "python: not found: activate the toolkit's environment (bash scripts/quickstart.sh makes .venv)"

for word in "$@"; do
    case "$word" in
        --url | --url=* | --check)
            fail "$word: is for a server that runs already: use scripts/predict_vllm.py, or remove this flag" ;;
    esac
done

# Everything that can be wrong with flags, rows and checkpoint shows before anything is installed or started.
model=$(python scripts/predict_vllm.py "$@" --check) || exit $?
case "$model" in
    /*) ;;
    *) echo "$model"; exit 0 ;;  # --help
esac

stamp=$VLLM_VENV/.vllm-$VLLM_VERSION
if [ ! -e "$stamp" ]; then
    command -v nvidia-smi >/dev/null \
        || fail "nvidia-smi: not found, and vLLM $VLLM_VERSION needs an NVIDIA GPU: use predict.py"
    is_good='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))'
    for base in python3 python3.14 python3.13 python3.12 python3.11 none; do
        if command -v "$base" >/dev/null && "$base" -c "$is_good" 2>/dev/null; then
            break
        fi
    done
    [ "$base" != none ] || fail "python3: vLLM $VLLM_VERSION needs Python 3.11 to 3.14 with venv: install one of them"
    echo "making $VLLM_VENV with vllm $VLLM_VERSION (several GB)" >&2
    "$base" -m venv "$VLLM_VENV"
    echo '*' > "$VLLM_VENV/.gitignore"
    "$VLLM_VENV/bin/python" -m pip install --quiet --disable-pip-version-check "vllm==$VLLM_VERSION" \
        || fail "pip: could not install vllm==$VLLM_VERSION into $VLLM_VENV: see the lines above, then start again"
    touch "$stamp"
fi

log=$(mktemp "${TMPDIR:-/tmp}/vllm-XXXXXX.log")
url=http://127.0.0.1:$(python -c 'from runtime.distributed import free_port; print(free_port())')
server=
stop_server() {
    trap '' INT TERM HUP
    [ -n "$server" ] || return 0
    kill -TERM "$server" 2>/dev/null || true
    for _ in $(seq 60); do
        kill -0 "$server" 2>/dev/null || break
        sleep 0.5
    done
    kill -KILL -- "-$server" 2>/dev/null || true  # its group: nothing of it keeps a GPU
    wait "$server" 2>/dev/null || true
}
trap stop_server EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP  # under nohup it stays ignored

# The tokenizer stays here, so the server has none. Not every base has the two keys; they are right for all.
echo "starting vLLM on $model, log: $log" >&2
VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 setsid "$VLLM_VENV/bin/vllm" serve "$model" \
    --host 127.0.0.1 --port "${url##*:}" --skip-tokenizer-init \
    --hf-overrides '{"architectures": ["ChatGLMModel"], "original_rope": true}' \
    $VLLM_FLAGS >"$log" 2>&1 </dev/null &
server=$!
SECONDS=0

is_ready='import sys, urllib.request as r; r.build_opener(r.ProxyHandler({})).open(sys.argv[1] + "/health", timeout=5)'
until python -c "$is_ready" "$url" 2>/dev/null; do
    if ! kill -0 "$server" 2>/dev/null; then
        tail -n 20 "$log" >&2
        fail "vllm serve: ended before it was ready: see the lines above and $log"
    fi
    [ "$SECONDS" -lt "$START_SECONDS" ] || fail "vllm serve: not ready after $START_SECONDS s: see $log"
    sleep 1
done

python scripts/predict_vllm.py "$@" --url "$url"
