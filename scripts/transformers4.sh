#!/usr/bin/env bash
# Print a folder that puts the 4.x line of transformers before the environment's own when it stands in PYTHONPATH.
exec "$(dirname "${BASH_SOURCE[0]}")/other_versions.sh" "transformers>=4.56,<5" "diffusers>=0.35,<0.36"
