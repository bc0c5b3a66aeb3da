#!/usr/bin/env bash
# The three stages at full size (ResNet-32, width 64), for a GPU.  Interrupted at any point, the same command goes on.
# Usage: bash scripts/full_size.sh DATA_DIR RESULT_DIR [IMG_TYPE] [EPOCHS of stage 1] [EPOCHS of stage 3]
# Uses the python on the PATH.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1 results=$2 type=${3:-png} first=${4:-200} third=${5:-100}
stage="$(basename "$(realpath "$data")")/resnet32"

resume() { compgen -G "$results/$1/$stage/*/last.pt" > /dev/null && echo --resume || true; }
finished() { grep -q "\"checkpoint\": \"$1/$stage/" "$results/results.json" 2> /dev/null; }  # it has a row in the table

finished sp || python main_sp.py --network resnet --depth 32 --epochs "$first" --lr 0.1 --bs 128 --num_workers 16 \
    --momentum 0.9 --weight_decay 0.0005 --img_type "$type" --resize 32 --result_dir "$results" --data_dir "$data" \
    $(resume sp)
finished pruned || python main_prune.py --config_path config.json --set "img_type=$type" \
    --set "result_dir=$results" --set "data_dir=$data" $(resume pruned)
finished rl_pruned || python main_rl_prune.py --network resnet --depth 32 --epochs "$third" --lr 0.001 --bs 256 \
    --num_workers 16 --momentum 0.9 --weight_decay 0.0005 --img_type "$type" --resize 32 --result_dir "$results" \
    --data_dir "$data" --alpha 0.1 --gamma 1 --rl_weight 0.1 $(resume rl_pruned)
cat "$results/results.md"
