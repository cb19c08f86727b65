#!/usr/bin/env bash
# Trains the 128-pixel emoji model from scratch, from the folder of the emoji set (metadata.jsonl + pictures). Run it in a virtual environment.
#   checkpoints/train_emoji_128.sh PATH_TO_EMOJI_FOLDER [STEPS]
# Each of the three commands resumes where it was stopped, so you can stop the script and start it again at any time. STEPS are those of the
# UNet. In the last 400 the learning rate decreases to zero; with more STEPS, a finished run continues.
# The text encoder is that of checkpoints/emoji; nothing is downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?usage: checkpoints/train_emoji_128.sh PATH_TO_EMOJI_FOLDER [STEPS]}
steps=${2:-20000}
# keep memory between steps instead of allocating it again, in pages of 2 MB (only glibc)
export MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_MMAP_THRESHOLD_=33554432 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
stipple train-autoencoder --config configs/autoencoder/emoji-128.yaml data.folder="$data"
stipple cache --config configs/ldm/emoji-128.yaml data.folder="$data"
stipple train --config configs/ldm/emoji-128.yaml data.folder="$data" trainer.steps="$steps"
echo "the model is in runs/emoji-128-ldm/model"
