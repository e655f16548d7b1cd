#!/usr/bin/env bash
# The whole two-step analysis of 14 losses, to report.html:
#
#     bash examples/analyse.sh                      # of the networks of docs/study.md, whose arrays are shipped
#     bash examples/analyse.sh examples/cars        # 14 losses trained on a frozen trunk first, in minutes
#     bash examples/analyse.sh my_renders           # any folder with images/ and props.csv, perhaps masks/
#     LABEL=shape PICTURES=50 SAMPLES=50 bash examples/analyse.sh my_renders
#
# Every step is one command that can be copied. Stopped anywhere, the same line goes on where it was.
# What the steps print is in results/<dataset>/log/; while one runs, the newest line of it is shown.
set -euo pipefail
if [ $# -gt 0 ] && [ ! -d "$1" ]; then
    echo "analyse.sh: '$1' is no folder; give one of pictures, or none for the shipped arrays" >&2
    exit 2
fi
dataset=${1:+$(cd "$1" && pwd)}
cd "$(dirname "$0")/.."
study=examples/study      # without a folder: the arrays that it ships, nothing is trained
dataset=${dataset:-$study/cars_test}
pictures=${PICTURES:-6}   # held-out pictures of each fold that get saliency maps
samples=${SAMPLES:-20}    # noisy copies of each
epochs=${EPOCHS:-20}
label=${LABEL:-model}      # the property that the losses are trained on
fold=${FOLD:-all}
models=${MODELS:-models}
permutations=${PERMUTATIONS:-2000}
[ $# -gt 0 ] || models=$study/models permutations=${PERMUTATIONS:-1200}
out=${RESULTS:-results}
results=$out/$(basename "$dataset")
mkdir -p "$results/log"
export DML_PROGRESS=2     # a step writes how far it is into its log every so many seconds

number=0
steps=$(($# > 0 ? 10 : 7))
ticker=
trap '[ -z "$ticker" ] || kill "$ticker" 2> /dev/null || true' EXIT

watch() {  # watch "what the step does" log: how long it runs and the newest line of its log, cut at the margin
    local seconds=0 line
    while sleep 1 > /dev/null 2>&1; do
        seconds=$((seconds + 1))
        line=$(tail -n 1 "$2" 2> /dev/null | tr '\r' '\n' | tail -n 1) || true
        if [ -t 1 ]; then
            printf '\r\033[?7l%2d/%d  %4d s  %s · %s\033[K\033[?7h' "$number" "$steps" "$seconds" "$line" "$1"
        elif [ $((seconds % 10)) = 0 ]; then
            printf 'analyse.sh: step %d, %d s: %s\n' "$number" "$seconds" "$line" >&2
        fi
    done
}

step() {  # step "what it does" command …
    local what started=$SECONDS log status=0
    number=$((number + 1))
    what=$1
    shift
    log=$results/log/$number-$(basename "$2" .py).txt
    : > "$log"
    printf '%2d/%d  %-58s' "$number" "$steps" "$what"
    watch "$what" "$log" &
    ticker=$!
    "$@" > "$log" 2>&1 || status=$?
    kill "$ticker" 2> /dev/null || true
    wait "$ticker" 2> /dev/null || true
    ticker=
    [ ! -t 1 ] || printf '\r%2d/%d  %-58s\033[K' "$number" "$steps" "$what"
    if [ "$status" = 3 ]; then  # train.py: some losses diverged, the others go on
        grep diverged "$log" >&2 || true
    elif [ "$status" != 0 ]; then
        printf 'failed\n'
        tail -n 5 "$log" >&2
        echo "analyse.sh: stopped in step $number: $*" >&2
        exit 1
    fi
    printf '%4d s\n' $((SECONDS - started))
}

if [ $# -gt 0 ]; then
    step "14 losses and the untrained layer, on one frozen trunk" \
        python train.py --dataset "$dataset" --model efficientnet_lite0 --dim 128 --freeze-trunk --loss all,None \
        --fold "$fold" --epochs "$epochs" --label "$label" --models "$models"
    step "embeddings of the held-out pictures" \
        python embed.py --dataset "$dataset" --loss all --fold "$fold" --models "$models" --out "$out"
else
    python examples/study.py "$study" --check || exit
    cp -R "$study/results/hue0/cars_test/." "$results"
    step "saliency maps of four of its pictures, made now" \
        python saliency.py --dataset "$dataset" --model efficientnet_lite0 --limit 4 --samples "$samples" \
        --order released --out "$results/four.npy" --gallery "$results/four.png"
fi
step "NR-Prec of every property" \
    python nrprec.py "$results"/*/fold*/emb.npy --null hypergeometric --permutations "$permutations" \
    --out "$results/nrprec.csv"
step "pair histograms, JSD, Recall@K, MAP@R" \
    python pairs.py "$results"/*/fold*/emb.npy --label "$label" --out "$results/pairs.csv" \
    --histograms "$results/histograms.csv"
if [ $# -gt 0 ]; then
    step "saliency maps of $pictures pictures a fold, twice for the ceiling" \
        python saliency.py --dataset "$dataset" --loss all --fold "$fold" --models "$models" --limit "$pictures" \
        --samples "$samples" --order released --shared-noise --ceiling --out "$out"
    step "sanity check: maps of one network with layers randomised" \
        python saliency.py --dataset "$dataset" --loss Triplet --fold "${fold/all/0}" --models "$models" \
        --limit "$pictures" --samples "$samples" --order released --shared-noise --ceiling --out "$out" --randomise 4
fi
masks=()
[ ! -d "$dataset/masks" ] || masks=(--masks)
step "agreement of maps, masks and embeddings" \
    python compare.py --dataset "$dataset" --results "$out" ${masks[@]+"${masks[@]}"} --embeddings
step "tables" \
    python tables.py "$results" --models "$models" --out "$results/tables"
step "figures" \
    python figures.py "$results" --models "$models" --dataset "$dataset" --out "$results/figures"
step "report" \
    python report.py "$results" --tables "$results/tables" --figures "$results/figures" --dataset "$dataset" \
    --models "$models" --out "$results/report.html"
echo
cat "$results/log/$number-report.txt"
