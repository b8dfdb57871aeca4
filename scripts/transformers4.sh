#!/usr/bin/env bash
# Print a folder that puts the 4.x line of transformers before the environment's own when it stands in PYTHONPATH.
set -euo pipefail
python=$("$(dirname "${BASH_SOURCE[0]}")/python.sh")
folder=$(dirname "$(dirname "$(dirname "$python")")")/transformers4

if [ ! -f "$folder/complete" ]; then
    echo "Installing transformers 4.x into $folder ..." >&2
    rm -rf "$folder"
    "$python" -m pip install -qq --disable-pip-version-check --no-cache-dir --target "$folder" \
        "transformers>=4.56,<5" "diffusers>=0.35,<0.36" >&2
    touch "$folder/complete"
fi
echo "$folder"
