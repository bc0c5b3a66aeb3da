#!/usr/bin/env bash
# The three stages and a cascade on scikit-learn's handwritten digits: a few minutes on two CPU cores.
# Usage: bash scripts/demo.sh [folder for data and results, demo by default]
source "$(dirname "$0")/environment.sh"
use_environment requirements.txt scripts/requirements.txt
folder=${1:-demo}
data=$folder/digits
results=$folder/results
if [ ! -d "$data" ]; then
    rm -rf "$data.part"
    python scripts/digits.py "$data.part"
    mv "$data.part" "$data"
fi

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

say "Stage 1: train network and switches (main_sp.py)"
python main_sp.py --network resnet --depth 14 --width 32 --epochs 20 --lr 0.1 --bs 64 --num_workers 2 \
    --momentum 0.9 --weight_decay 0.0005 --img_type png --resize 16 --no_flip --val_fraction 0.2 \
    --result_dir "$results" --data_dir "$data"

say "Stage 2: prune statically (main_prune.py)"
python main_prune.py --config_path config.json \
    --set depth=14 --set width=32 --set resize=16 --set "data_dir=$data" --set "result_dir=$results" \
    --set batch_size=64 --set num_workers=2 --set epochs_start=2 --set epochs_end=4 --set prune_ratio=0.5 \
    --set max_iter=3 --set max_accuracy_drop=0.01

say "Stage 3: teach the switches to skip (main_rl_prune.py)"
python main_rl_prune.py --network resnet --depth 14 --epochs 16 --lr 0.001 --bs 64 --num_workers 2 \
    --momentum 0.9 --weight_decay 0.0005 --img_type png --resize 16 \
    --result_dir "$results" --data_dir "$data" --alpha 1 --gamma 1 --rl_weight 0.1 --max_accuracy_drop 0.03

say "A cascade of the networks that the stages left (main_cascade.py)"
python main_cascade.py --depth 14 --num_workers 2 --resize 16 --result_dir "$results" --data_dir "$data" \
    --max_accuracy_drop 0.01
