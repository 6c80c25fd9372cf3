#!/bin/sh
# Runs the lines of a list one after another and appends what they reach to a table; what the table has is left out, so a
# stopped study goes on with the same command.
#
#   docs/recipe-study/study.sh LIST TABLE [PALETTIST]     in the project's folder; PALETTIST: target/debug/palettist
#
# A line of LIST: name | steps | seed | config | changes to the config. With 0 steps palettes are made without training.
# A line of TABLE: name, steps, seed, validation loss, the float model's, dB of the outputs from float's, seconds of
# processor time, the command.
set -u
list=$1 table=$2 palettist=${3:-target/debug/palettist}
out=$(mktemp -d) || exit 1
trap 'rm -rf "$out"' EXIT
tab=$(printf '\t')
while IFS='|' read -r name steps seed config changes; do
  name=$(echo $name) steps=$(echo $steps) seed=$(echo $seed) config=$(echo $config)
  case $name in '' | \#*) continue ;; esac
  grep -q "^$name$tab$steps$tab$seed$tab" "$table" 2>/dev/null && continue
  rm -rf "$out/run"
  set -- $changes
  short="output_dir=$out/run data.cache_dir=runs/cache seed=$seed validation.every_n_steps=0 checkpoint.checkpointing_steps=0 export.coreml=false"
  train="train $config train.max_train_steps=$steps"
  # Without training: the palettes that a run starts from. A run of one step whose learning rates are as good as zero, said
  # last, after the line's own.
  [ "$steps" = 0 ] && short="$short train.max_train_steps=1 train.lr_scheduler=constant train.learning_rate=1e-20 \
palettize.palette_learning_rate=1e-20 palettize.freeze_fraction=1.0"
  /usr/bin/time -f '%U %S' -o "$out/time" "$palettist" $train "$@" $short >"$out/log" 2>&1 ||
    { echo "$name: $(tail -n 1 "$out/log")" >&2; continue; }
  palettes=$(ls "$out"/run/*.palettes.safetensors)
  model=$(sed -n 's/^pretrained_model_name_or_path = "\(.*\)".*/\1/p' "$config")
  "$palettist" evaluate "$model" --config "$config" --palettes "$palettes" --json >"$out/measured" 2>>"$out/log" ||
    { echo "$name: $(tail -n 1 "$out/log")" >&2; continue; }
  number() { sed -n "s/.*\"$1\": *\([-0-9.e]*\).*/\1/p" "$out/measured"; }
  processor=$(awk '{ printf "%.0f", $1 + $2 }' "$out/time")
  printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\tpalettist %s seed=%s%s\n' "$name" "$steps" "$seed" "$(number palettized)" \
    "$(number float)" "$(number snr_db)" "$processor" "$train" "$seed" "$changes" >>"$table"
done <"$list"
