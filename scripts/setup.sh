# Sourced by the other scripts: a Python 3.10 or newer with the pinned packages, in .venv unless a virtual
# environment, or one of conda's other than base, is active.
#   source scripts/setup.sh [requirements file]
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=${1:-requirements.txt}
source scripts/environment.sh

find_python() {
    local name
    for name in python3 python python3.13 python3.12 python3.11 python3.10; do
        if command -v "$name" >/dev/null && "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "error: no Python 3.10 or newer with venv found: install one (for example: apt install python3-venv)" >&2
    return 1
}

if ! has_environment; then
    if [ ! -x .venv/bin/python ]; then
        python=$(find_python) || exit 2
        echo "making .venv with $("$python" --version)"
        "$python" -m venv .venv || exit 2
    fi
    source .venv/bin/activate
fi

# Installed once for each state of the requirements files.
prefix=$(python -c 'import sys; print(sys.prefix)')
stamp="$prefix/.chatglm-$(cat requirements*.txt "$requirements" | cksum | cut -d' ' -f1)-$(basename "$requirements" .txt)"
if [ ! -e "$stamp" ]; then
    echo "installing $requirements into $prefix"
    quiet=--quiet
    if [ -t 1 ]; then quiet=; fi # pip shows its progress
    python -m pip install $quiet --disable-pip-version-check -r "$requirements" || exit 2
    touch "$stamp"
else
    echo "environment: $prefix"
fi
