#!/usr/bin/env bash
# Print a folder that puts other versions of libraries before the environment's own when it stands in PYTHONPATH.
# usage: scripts/other_versions.sh "transformers>=4.56,<5" "diffusers>=0.35,<0.36"
set -euo pipefail
python=$("$(dirname "${BASH_SOURCE[0]}")/python.sh")
venv=$(dirname "$(dirname "$python")")
folder=$(dirname "$venv")/versions-$(printf '%s\n' "$(basename "$venv")" "$@" | sha256sum | cut -c1-12)

if [ ! -f "$folder/complete" ]; then
    echo "Installing $* into $folder ..." >&2
    rm -rf "$folder"
    "$python" -m pip install -qq --disable-pip-version-check --no-cache-dir --target "$folder" "$@" >&2
    touch "$folder/complete"
fi
echo "$folder"
