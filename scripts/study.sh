#!/usr/bin/env bash
# What do switches save on top of static pruning, at one point of accuracy?  From nothing to tables and pictures.
# Usage: bash scripts/study.sh small|medium|full RESULT_DIR [SEEDS]
#   small    ResNet-20, width 32, 16x16 pixels, three seeds: the comparisons
#   medium   the same network at 32x32, one seed, pruned in one step: the headline
#   full     ResNet-32, width 64, the published epochs, one seed: for a GPU
# DATA_DIR and IMG_TYPE say where the images are (data/cifar10, jpg), PRECISION how to train (auto; bf16 pays on CPUs
# that multiply it).  Stopped at any moment, within a run too, the same command goes on; SECONDS_A_PIECE stops a run by
# itself after so long, for machines that are lent in pieces.
# Uses the python on the PATH, one process at a time.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { sed -n 3,10p "$0"; exit 2; }
size=$1 results=$2 data=${DATA_DIR:-data/cifar10} type=${IMG_TYPE:-jpg} precision=${PRECISION:-auto}
at=()  # where the switches end: the fewest FLOPs within one point
flops=0.12 fisher=10000 rate=0.02
case $size in
small)  depth=20 width=32 pixels=16 first=20 iterations=4 tuning=2 last_tuning=4 third=6 seeds=${3:-3}
        at=(--target_computation 0.8) ;;  # so that all alternatives are compared at as many executed FLOPs
medium) depth=20 width=32 pixels=32 first=20 iterations=1 tuning=4 last_tuning=4 third=6 seeds=${3:-1}
        flops=0.22 fisher=3000 rate=0.01 ;;
full)   depth=32 width=64 pixels=32 first=200 iterations=8 tuning=20 last_tuning=40 third=100 seeds=${3:-1} ;;
*)      echo "error: study $size is unknown: use small, medium or full" >&2; exit 2 ;;
esac
network="$(basename "$(realpath "$data")")/resnet$depth"
common=(--depth "$depth" --resize "$pixels" --img_type "$type" --data_dir "$data" --num_workers 4
    --precision "$precision")
mkdir -p "$results"

run() {  # run COMMAND...: in pieces where SECONDS_A_PIECE asks for it; what it took is kept for the tables
    local line="" word code=0 start=$SECONDS
    for word; do line+="$([[ $word == *" "* ]] && echo "'$word'" || echo "$word") "; done
    echo "+ $line"
    # Where Ctrl-C is ignored, as in the background of a script, a run is killed: it goes on from its last epoch, too.
    ${SECONDS_A_PIECE:+timeout --preserve-status --kill-after=60 --signal=INT "$SECONDS_A_PIECE"} "$@" || code=$?
    printf '%s\t%s\n' "$((SECONDS - start))" "$line" >> "$results/commands.tsv"
    return "$code"
}
has() { compgen -G "$1/$2/$network/*/record.json" > /dev/null; }  # has FOLDER STAGE: a run of it has reported
chosen() { compgen -G "$1/$2/$network/*/record.json" | sort | tail -n 1 | sed 's|record.json$|best.pt|'; }  # the newest

first() {  # first FOLDER SEED MORE...
    local folder=$1 seed=$2; shift 2
    has "$folder" sp || run python main_sp.py "${common[@]}" --width "$width" --epochs "$first" --lr 0.1 --bs 128 \
        --seed "$seed" --result_dir "$folder" "$@" --resume
}
second() {  # second FOLDER SEED: the cheapest within one point
    has "$1" pruned || run python main_prune.py --config_path config.json --set "depth=$depth" --set "width=$width" \
        --set "resize=$pixels" --set "img_type=$type" --set "data_dir=$data" --set num_workers=4 --set "seed=$2" \
        --set "result_dir=$1" --set "precision=$precision" --set "target_flops=$flops" --set "max_iter=$iterations" \
        --set "fisher_images=$fisher" --set "epochs_start=$tuning" --set "epochs_end=$last_tuning" --resume
}
third() {  # third FOLDER SEED MORE...
    local folder=$1 seed=$2; shift 2
    has "$folder" rl_pruned || run python main_rl_prune.py "${common[@]}" --epochs "$third" --lr "$rate" --bs 128 \
        --batch_norm reestimate --seed "$seed" --result_dir "$folder" "$@" --resume
}

for ((seed = 0; seed < seeds; seed++)); do
    chain=$results/seed_$seed
    first "$chain" "$seed"
    second "$chain" "$seed"
    third "$chain" "$seed" "${at[@]}"
    if [ "$size" != medium ]; then
        first "$results/reference/seed_$seed" "$seed" --gate none
        second "$results/reference/seed_$seed" "$seed"
        third "$results/dense_switched/seed_$seed" "$seed" --checkpoint "$(chosen "$chain" sp)"
    fi
    run python -m benchmarks.alternatives --dense "$(chosen "$chain" sp)" --static "$(chosen "$chain" pruned)" \
        --dynamic "$(chosen "$chain" rl_pruned)" --data_dir "$data" --img_type "$type" \
        --precision "$precision" --epochs "$third" --lr "$rate" --seed "$seed" --out "$results/alternatives_$seed"
done
if [ "$size" != medium ]; then
    run python -m benchmarks.criteria --checkpoint "$(chosen "$results/seed_0" sp)" \
        --data_dir "$data" --img_type "$type" --precision "$precision" --shares 0.5 0.35 0.25 0.15 --seeds "$seeds" \
        --epochs 2 --train_images 20000 --out "$results/criteria" \
        --variants eigendamage "best forms, refitted" "Torch-Pruning, Hessian, global" random
fi
run python -m benchmarks.study "$results"
