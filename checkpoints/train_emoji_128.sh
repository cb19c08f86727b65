#!/usr/bin/env bash
# Trains the 128-pixel emoji model from nothing. Give the folder of the emoji set (metadata.jsonl + pictures); run in a virtual environment.
#   checkpoints/train_emoji_128.sh PATH_TO_EMOJI_FOLDER [STEPS]
# Each of the three commands goes on where it was stopped, so the script can be stopped and started again at any time. STEPS are those of the
# UNet, of which the last 400 bring the learning rate to zero: a run that has ended goes on from there when it is given more.
# The text encoder is that of checkpoints/emoji; nothing is downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?give the folder of the emoji set}
steps=${2:-20000}
# keep memory between steps instead of asking for it anew, and in pages of 2 MB (glibc only)
export MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_MMAP_THRESHOLD_=33554432 GLIBC_TUNABLES=glibc.malloc.hugetlb=1
accelerate launch train_autoencoder.py --config configs/autoencoder/emoji-128.yaml data.folder="$data"
accelerate launch cache_latents.py --config configs/ldm/emoji-128.yaml data.folder="$data"
accelerate launch train_ldm.py --config configs/ldm/emoji-128.yaml data.folder="$data" trainer.steps="$steps"
echo "the model is in runs/emoji-128-ldm/model"
