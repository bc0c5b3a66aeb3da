#!/usr/bin/env bash
# What do switches save on top of static pruning, at one point of accuracy?  From nothing to tables and pictures.
# Usage: bash scripts/study.sh small|medium|full RESULT_DIR [SEED...]
#   small    ResNet-20, width 32, 16x16 pixels, seeds 0 1 2: the comparisons
#   medium   the same network at 32x32, seed 0: the headline
#   full     ResNet-32, width 64, the published epochs, seed 0: for a GPU
# DATA_DIR and IMG_TYPE say where the images are (data/cifar10, jpg), PRECISION how products are computed (auto; bf16 on
# CPUs that have it).  Stopped at any moment, within a run too, the same command goes on; SECONDS_A_PIECE stops it by
# itself when a run has taken so long, for machines that are lent in pieces.  Seeds may run side by side, a call each.
# Uses the python on the PATH, one process at a time.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { sed -n 3,10p "$0"; exit 2; }
size=$1 results=$2 data=${DATA_DIR:-data/cifar10} type=${IMG_TYPE:-jpg} precision=${PRECISION:-auto}
# Epochs of stage 1, of each fine-tuning in stage 2 (unpruned, fully pruned), and of stage 3 and what it is compared
# with; stage 2's iterations, its last one's share of the FLOPs, and the images that the Fisher is measured on.
case $size in
small)  depth=20 width=32 pixels=16 first=20 tuning=(3 3) third=6 iterations=4 target=0.15 fisher=4000 seeds=(0 1 2) ;;
medium) depth=20 width=32 pixels=32 first=30 tuning=(3 3) third=6 iterations=4 target=0.15 fisher=4000 seeds=(0) ;;
full)   depth=32 width=64 pixels=32 first=200 tuning=(20 40) third=100 iterations=8 target=0.12 fisher=10000 seeds=(0) ;;
*)      echo "error: study $size is unknown: use small, medium or full" >&2; exit 2 ;;
esac
[ $# -eq 2 ] || seeds=("${@:3}")
competitor=${COMPETITOR:-Torch-Pruning, Taylor, global}  # the best of its importances, see benchmarks.criteria
network="$(basename "$(realpath "$data")")/resnet$depth"
images=(--data_dir "$data" --img_type "$type" --num_workers 4)
common=(--depth "$depth" --resize "$pixels" "${images[@]}" --precision "$precision" --bs 128)
mkdir -p "$results"

run() {  # run COMMAND...: in pieces where SECONDS_A_PIECE asks for it; what it took is kept
    local line="" word code=0 start=$SECONDS
    for word; do line+="$([[ $word == *" "* ]] && echo "'$word'" || echo "$word") "; done
    echo "+ $line"
    # Where Ctrl-C is ignored, as in the background of a script, a run is killed: it goes on from its last epoch, too.
    ${SECONDS_A_PIECE:+timeout --preserve-status --kill-after=60 --signal=INT "$SECONDS_A_PIECE"} "$@" || code=$?
    printf '%s\t%s\t%s\n' "$((SECONDS - start))" "$code" "$line" >> "$results/commands.tsv"
    return "$code"
}
has() { compgen -G "$1/$2/$network/*/record.json" > /dev/null; }  # has FOLDER STAGE: a run of it has reported
chosen() { dirname "$(ls "$1/$2/$network"/*/record.json | tail -n 1)" | sed 's|$|/best.pt|'; }  # of the newest of them

first() {  # first FOLDER SEED MORE...
    local folder=$1 seed=$2; shift 2
    has "$folder" sp || run python main_sp.py "${common[@]}" --width "$width" --epochs "$first" --lr 0.1 \
        --seed "$seed" --result_dir "$folder" "$@" --resume
}
second() {  # second FOLDER SEED: the cheapest iteration within one point
    has "$1" pruned || run python main_prune.py --config_path config.json --set "depth=$depth" --set "width=$width" \
        --set "resize=$pixels" --set "img_type=$type" --set "data_dir=$data" --set num_workers=4 --set "seed=$2" \
        --set "precision=$precision" --set "result_dir=$1" --set "target_flops=$target" --set "max_iter=$iterations" \
        --set "epochs_start=${tuning[0]}" --set "epochs_end=${tuning[1]}" --set "fisher_images=$fisher" --resume
}
third() {  # third FOLDER SEED MORE...
    local folder=$1 seed=$2; shift 2
    has "$folder" rl_pruned || run python main_rl_prune.py "${common[@]}" --epochs "$third" --lr 0.02 \
        --batch_norm reestimate --seed "$seed" --result_dir "$folder" "$@" --resume
}
alternatives() {  # alternatives FOLDER SEED METHOD...: of stage 3, and of stages 1 and 2
    local folder=$1 seed=$2; shift 2
    run python -m benchmarks.alternatives --dense "$(chosen "$folder" sp)" --static "$(chosen "$folder" pruned)" \
        --dynamic "$(chosen "$folder" rl_pruned)" "${images[@]}" --precision "$precision" --epochs "$third" \
        --seed "$seed" --competitor "${competitor#Torch-Pruning, }" --methods "$@" --out "$results/alternatives_$seed"
}
comparisons() {  # comparisons FOLDER SEED: what `small` adds to the three stages
    local folder=$1 seed=$2
    first "$results/reference/seed_$seed" "$seed" --gate none
    third "$results/dense_switched/seed_$seed" "$seed" --checkpoint "$(chosen "$folder" sp)"
    run python -m benchmarks.criteria --checkpoint "$(chosen "$folder" sp)" "${images[@]}" --precision "$precision" \
        --shares 0.5 0.35 0.25 0.15 --seeds 1 --epochs 2 --train_images 12000 --fisher_images 2000 --variants \
        eigendamage "eigendamage per FLOP, Tucker, refitted" "$competitor" random --out "$results/criteria_$seed"
    run python -m benchmarks.stage3_parts --checkpoint "$(chosen "$folder" pruned)" "${images[@]}" \
        --precision "$precision" --epochs 4 --train_images 12000 --seed "$seed" --out "$results/parts_$seed"
}

for seed in "${seeds[@]}"; do
    chain=$results/seed_$seed
    first "$chain" "$seed"
    second "$chain" "$seed"
    third "$chain" "$seed"
    case $size in
    small)  alternatives "$chain" "$seed" start switches "random switches" "pruned further" "blocks removed"
            comparisons "$chain" "$seed" ;;
    medium) alternatives "$chain" "$seed" start switches "random switches" Torch-Pruning ;;
    full)   alternatives "$chain" "$seed" start switches "random switches" "pruned further" "blocks removed" Torch-Pruning
    esac
done
run python -m benchmarks.study "$results"
