#!/bin/sh
# The second model of docs/recipe.md: another UNet (two layers a block at half the width, attention with
# convolutions for projections, v-prediction) on the base's autoencoder and text encoder. In the project's folder:
#   sh docs/recipe-study/second/make.sh && target/debug/palettist train docs/recipe-study/second/train.toml
# leaves it in runs/second/model.
set -eu
here=docs/recipe-study/second
mkdir -p runs
cp -r examples/base runs/second-model
rm runs/second-model/unet/*.safetensors
cp $here/unet.json runs/second-model/unet/config.json
cp $here/scheduler.json runs/second-model/scheduler/scheduler_config.json
