#!/usr/bin/env bash
# Makes the environment and installs this package in it, editable, with the exact versions of constraints.txt.
# Usage: bash environment_setup.sh [NAME]
#   with conda     the conda environment NAME (default: the active one if this script made it, else "sana")
#   without conda  a virtual environment in .venv, NAME or not
# Nothing is installed outside that environment. When it is complete already, this returns at once. Progress goes to
# standard error; the one line on standard output is the environment's Python: python="$(bash environment_setup.sh)".
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

extras="train,metrics,demo,serve,quant,dev" # all: the tests cover all of it
stamp_name=".sana-setup"

say() { echo "environment_setup.sh: $*" >&2; }
supported() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; }
version() { "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null; }

# The first supported Python on the PATH. A command may exist and yet not run (a version manager's shim).
find_python() {
    local candidate found="none"
    for candidate in python3.11 python3.12 python3 python; do
        if supported "$candidate"; then
            command -v "$candidate"
            return
        fi
        if [[ "$found" == none ]] && version "$candidate" >/dev/null; then
            found="$(version "$candidate") at $(command -v "$candidate")"
        fi
    done
    say "Python 3.11 or 3.12 is needed, found $found; install one and run this again."
    exit 2
}

conda_prefix() { conda env list | awk -v name="$1" '$1 == name { print $NF }'; }

if command -v conda >/dev/null; then
    name="${1:-sana}"
    if [[ $# -eq 0 && -f "${CONDA_PREFIX:-}/$stamp_name" ]]; then
        prefix="$CONDA_PREFIX"
    else
        prefix="$(conda_prefix "$name")"
    fi
    if [[ -z "$prefix" ]]; then
        say "creating the conda environment $name"
        conda create --yes --name "$name" python=3.11 pip >&2
        prefix="$(conda_prefix "$name")"
    fi
else
    prefix="$PWD/.venv"
    if ! [[ -x "$prefix/bin/python" ]] || ! version "$prefix/bin/python" >/dev/null; then
        python="$(find_python)"
        say "creating a virtual environment in .venv with $python"
        "$python" -m venv --clear "$prefix" >&2
    fi
fi

python="$prefix/bin/python"
if ! supported "$python"; then
    say "Python 3.11 or 3.12 is needed, found $(version "$python" || echo none) at $python; remove that environment and run this again."
    exit 2
fi

# Complete means: this checkout, with these requirements, was installed by this Python.
stamp="$(version "$python") $PWD $extras $(cat pyproject.toml constraints.txt | sha256sum)"
if [[ "$(cat "$prefix/$stamp_name" 2>/dev/null)" != "$stamp" ]]; then
    say "installing sana[$extras] in $prefix; the first time this downloads several GB"
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip --default-pip >&2
    quiet=()
    [[ -t 2 ]] || quiet=(--quiet) # a log needs no progress bars and no list of what is there already
    "$python" -m pip install "${quiet[@]}" --editable ".[$extras]" --constraint constraints.txt >&2
    echo "$stamp" >"$prefix/$stamp_name"
    say "done"
fi
echo "$python"
