#!/usr/bin/env bash
# Print the Python of this project's virtual environment, which is made outside the repository when it is absent.
# Its folder is named by the requirements and the Python version, so a change of either makes a new one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
version=$("$python" -c 'import sys; print(*sys.version_info[:2], sep=".")')
hash=$(cat requirements.txt requirements-dev.txt | sha256sum | cut -c1-12)
venv=${FAR_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/comfyui-far}/venv-$version-$hash

if [ ! -f "$venv/complete" ]; then
    echo "Making the virtual environment $venv (about 6 GB with torch, a few minutes) ..." >&2
    rm -rf "$venv"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-cache-dir -r requirements-dev.txt >&2
    touch "$venv/complete"
fi
echo "$venv/bin/python"
