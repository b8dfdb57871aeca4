#!/usr/bin/env bash
# The whole command line on real photos with masks, on a tiny model with random weights: does every stage work here?
# usage: scripts/try_photos.sh PHOTOS OUT
# PHOTOS holds the folders corgi, chow and class_prior with NAME.jpg and NAME.mask.png; OUT is made.
set -euo pipefail
photos=$(realpath "$1")
out=$(realpath -m "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$(scripts/python.sh)
far() { "$python" -m far_train "$@"; }

for folder in corgi chow class_prior; do
    far extract --photos "$photos/$folder" --out "$out/subjects/$folder"
done
far fuse --concept "<corgi-dog>" dog "$out/subjects/corgi" --concept "<chow-dog>" dog "$out/subjects/chow" \
    --prior dog "$out/subjects/class_prior" --size 128 --count 64 --out "$out/dataset"
"$python" -m far_train.mini.tiny "$out/tiny-base"
far train --base "$out/tiny-base" --dataset "$out/dataset" --out "$out/run" --steps 40 --sample-every 20 --sample-steps 5
far inspect --weights "$out/run/weights.safetensors"
far export --weights "$out/run/weights.safetensors" --name two-dogs --out "$out/export"
far generate --base "$out/tiny-base" --weights "$out/run/weights.safetensors" --sampling-steps 10 \
    --prompt "a photo of a <corgi-dog> dog and a <chow-dog> dog on a beach" --count 2 --out "$out/pictures"
echo "Look at $out/dataset/contact-sheet.jpg; the pictures are noise, since the model is random."
