#!/usr/bin/env bash
# What does deciding image by image add to static pruning?  From nothing to tables and pictures.
# Usage: bash scripts/study.sh yardstick|cifar100|small|full RESULT_DIR [SEEDS]
#   yardstick  ResNet-20, 32, 44 and 56 that others trained on CIFAR-10, pruned, alone and in cascades;
#              WEIGHTS_DIR (data/networks) holds resnet20*.th and so on of akamaster/pytorch_resnet_cifar10
#   cifar100   ResNet-32, width 32: all stages, with and without switches; a ResNet-20 for its cascade
#   small      the same for ResNet-20 and ResNet-14, width 16, 24x24 pixels, three seeds
#   full       the same for ResNet-32 and ResNet-20, width 64, the published epochs: for a GPU
# DATA_DIR and IMG_TYPE say where the images are (data/cifar10, png), PRECISION how to train (auto; bf16 is
# faster on CPUs with bf16 instructions).  After any interruption the same command continues.  SECONDS_A_PIECE ends the
# script when one training has run for so long, for machines that are available for a limited time.
# Uses the python on the PATH, one process at a time.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 2 ] || { sed -n 3,12p scripts/study.sh; exit 2; }
size=$1 results=$2 data=${DATA_DIR:-data/cifar10} type=${IMG_TYPE:-png} precision=${PRECISION:-auto}
width=32 pixels=32 seeds=${3:-1}
epochs=8 rate=0.02
case $size in
yardstick) ;;
cifar100)  depths=(20 32) first=12 third=4 ;;
small)     depths=(14 20) width=16 pixels=24 first=8 third=3 epochs=4 seeds=${3:-3} ;;
full)      depths=(20 32) width=64 first=200 third=100 epochs=60 ;;
*)         echo "error: study $size is unknown: use yardstick, cifar100, small or full" >&2; exit 2 ;;
esac
common=(--resize "$pixels" --img_type "$type" --data_dir "$data" --num_workers 4)
mkdir -p "$results"

resnet() {  # resnet DEPTH: what the functions below work on
    depth=$1 network="$(basename "$(realpath "$data")")/resnet$1"
}
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

first() {  # first FOLDER SEED MORE...
    local folder=$1 seed=$2; shift 2
    has "$folder" sp || run python main_sp.py --depth "$depth" "${common[@]}" --width "$width" --epochs "$first" \
        --lr 0.1 --bs 128 --precision "$precision" --seed "$seed" --result_dir "$folder" "$@" --resume
}
prune() {  # prune FOLDER MORE...
    local folder=$1 key; shift
    local settings=("img_type=$type" "data_dir=$data" num_workers=4 "result_dir=$folder" "precision=$precision" "$@")
    has "$folder" pruned || run python main_prune.py --config_path config.json "${settings[@]/#/--set=}" --resume
}
second() {  # second FOLDER SEED: to 46 and 22 % of the FLOPs, with more epochs for the smaller one
    prune "$1" "seed=$2" "depth=$depth" "width=$width" "resize=$pixels" target_flops=0.2154 max_iter=2 \
        epochs_start=0 "epochs_end=$epochs" "lr=$rate" fisher_images=2000
}
smaller() {  # smaller FOLDER SEED: from there to a tenth, for the cascade
    local from
    from=$(newest "$1/pruned" iteration_02.pt)
    prune "$1/smaller" "seed=$2" "depth=$depth" "width=$width" "resize=$pixels" target_flops=0.1 max_iter=1 \
        "epochs_start=$((epochs + 2))" "epochs_end=$((epochs + 2))" "lr=$rate" fisher_images=2000 \
        max_accuracy_drop=0.05 "checkpoint=$from"
}
newest() {  # newest FOLDER FILE
    compgen -G "$1/$network/*/$2" | sort | tail -n 1 | grep . ||
        { echo "error: $1/$network has no $2: stage 2 ended before it, as log.txt there says" >&2; return 1; }
}
third() {  # third FOLDER SEED MORE...
    local folder=$1 seed=$2; shift 2
    has "$folder" rl_pruned || run python main_rl_prune.py --depth "$depth" "${common[@]}" --epochs "$third" \
        --lr 0.01 --bs 128 --precision "$precision" --batch_norm reestimate --seed "$seed" --result_dir "$folder" "$@" --resume
}
cascade() {  # cascade FOLDER: of the networks of all depths
    local stage networks
    mapfile -t networks < <(for stage in sp/best pruned/iteration_ rl_pruned/best smaller/pruned/iteration_; do
        compgen -G "$1/${stage%/*}/${network%/*}/*/*/${stage##*/}*.pt" || true; done)
    has "$1" cascade ||
        run python main_cascade.py --depth "$depth" "${common[@]}" --result_dir "$1" --networks "${networks[@]}"
}

further() {  # further TO FROM FLOPS EPOCHS [STEPS]: the network that was pruned last, from its folder to another
    local from
    from=$(newest "$folder/$2" iteration_01.pt)
    prune "$folder/$1" "${given[@]}" "checkpoint=$from" "round_to=${5:-8}" \
        "target_flops=$3" max_iter=1 "epochs_start=$4" "epochs_end=$4"
}

yardstick() {  # yardstick FOLDER SEED
    local folder=$1 seed=$2 functions=() given target iterations least most
    for depth in 20 32 44 56; do
        resnet "$depth"
        functions+=("examples/cifar_resnet.py:resnet$depth")
        # The middle of the family halved and not trained further, its ends fine-tuned.
        target=0.5 iterations=1 least=0 most=0
        case $depth in 20) least=12 most=15 ;; 56) target=0.25 iterations=2 least=2 most=12 ;; esac
        given=("network=${functions[-1]}" 'mean=[0.485,0.456,0.406]' 'std=[0.229,0.224,0.225]' val_fraction=0
            max_accuracy_drop=0.3 lr=0.01 fisher_images=2000 "seed=$seed")
        prune "$folder" "${given[@]}" "checkpoint=$(echo "${WEIGHTS_DIR:-data/networks}/resnet$depth"*.th)" \
            "target_flops=$target" "max_iter=$iterations" "epochs_start=$least" "epochs_end=$most"
        # The ends once more, to one eighth: the largest from one half, the smallest from one quarter in finer steps.
        case $depth in
        20) further quarter pruned 0.25 14
            further smaller quarter/pruned 0.125 14 ;;
        56) further smaller pruned 0.125 8
            further forty pruned 0.4 8 16  # these two are not offered to the cascades
            further sixteenth smaller/pruned 0.06 8 ;;
        esac
    done
    [ -e "$folder/study.json" ] || run python -m benchmarks.study "$folder" "$folder/quarter" "$folder/smaller" \
        --data_dir "$data" --img_type "$type" --network "${functions[@]}" --out "$folder"
}

if [ "$size" = yardstick ]; then
    folders=()
    for ((seed = 0; seed < seeds; seed++)); do
        folders+=("$results/seed_$seed")
        yardstick "${folders[-1]}" "$seed"
    done
    [ "$seeds" = 1 ] || run python -m benchmarks.study --seeds "${folders[@]}" --out "$results"
    exit
fi
for ((seed = 0; seed < seeds; seed++)); do
    for gate in none rnn; do
        chain=$results/gate_$gate/seed_$seed
        own=("${depths[@]}")
        [ "$gate" = none ] || own=("${depths[-1]}")
        for one in "${own[@]}"; do
            resnet "$one"
            first "$chain" "$seed" --gate "$gate"
            second "$chain" "$seed"
        done
        smaller "$chain" "$seed"
        [ "$gate" = none ] || third "$chain" "$seed"
        cascade "$chain"
        [ -e "$chain/study/study.json" ] || run python -m benchmarks.study "$chain" "$chain/smaller" \
            --data_dir "$data" --img_type "$type" --depth "${own[@]}" --resize "$pixels" --out "$chain/study"
    done
done
