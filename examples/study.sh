#!/usr/bin/env bash
# What do losses make a network look at, where the truth is known? docs/study.md has the answers; this makes
# them again, from rendering 60 car bodies to every number: hours of two CPU cores, said before each stage.
#
#     bash examples/study.sh                        # into study/; stopped anywhere, the same line goes on
#     STUDY=/data/study SEEDS="2 3 4" EPOCHS=20 FROM=network._blocks.5 bash examples/study.sh
#     DEVICE=cuda JOBS=1 bash examples/study.sh
#
# Needs pip install '.[train,offline,report]', and RENDER, a Python 3.11 with bpy (docs/render.md).
set -euo pipefail
cd "$(dirname "$0")/.."
study=${STUDY:-study}
render=${RENDER:-.venv-render/bin/python}
seeds=${SEEDS-2}                  # besides the first: what training alone changes, at share 0
shares=${SHARES:-25 50 90}        # per cent of the training frames whose bg_color_hue follows from the model
ends=0                            # the shares whose maps are made: 0 and, where there is it, 90
[[ " $shares " != *" 90 "* ]] || ends="0 90"
from=${FROM:-network._blocks.12}  # what is before this block of EfficientNet-Lite0 stays as ImageNet left it
epochs=${EPOCHS:-8}
rates=${RATES:-1e-4 3e-4 1e-3 3e-3}
few=${FEW:-Contrastive,Triplet,CosFace,Normalized Softmax}  # for the rate, other seeds, whole networks
frames=${FRAMES:-1900} tests=${TESTS:-1080}
jobs=${JOBS:-$(nproc)}            # one-thread processes side by side: they share the networks, the pictures
device=${DEVICE:-cpu}
all=${LOSSES:-$(cut -d, -f1 models/losses.csv | tail -n +2 | grep -v '^None$' | paste -sd, -)}
losses=$(tr , '\n' <<< "$all" | wc -l)
pictures=${PICTURES:-32} samples=${SAMPLES:-50}  # of the saliency maps
export DML_PROGRESS=${DML_PROGRESS:-30} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$study/log"

stage() {  # stage NAME "what it does" "seconds of one core"
    printf '\nstudy.sh: %s: %s, about %d minutes with %d processes (%s)\n' \
        "$1" "$2" $(($3 / 60 / jobs + 1)) "$jobs" "$(date +%H:%M)"
}

together() {  # the same command JOBS times: its processes divide the work among themselves
    local pids=() status=0 pid
    for ((i = 0; i < jobs; i++)); do
        "$@" & pids+=($!)
    done
    for pid in "${pids[@]}"; do
        wait "$pid" || { [ $? = 3 ] || status=1; }  # 3: a loss diverged, which train.py says
    done
    return $status
}

learn() {  # learn DATASET LOSSES option …
    local dataset=$1 loss=$2
    shift 2
    together python train.py --dataset "$study/$dataset" --test "$study/cars_test" --loss "$loss" \
        --label model --split default --model efficientnet_lite0 --input-size 128 --dim 64 \
        --epochs "$epochs" --train-sample 300 --device "$device" "$@" > "$study/log/train.txt"
}

cars() {  # cars NAME option …: rendered, but for frames that an earlier set has with the same properties
    local name=$1
    shift
    [ ! -f "$study/$name.done" ] || return 0
    "$render" render_cars.py --out "$study/$name" --size 128 "$@" --dry-run
    mkdir -p "$study/$name/images"
    python - "$study" "$name" <<'END'
import csv, os, sys
from pathlib import Path

study, name = Path(sys.argv[1]), sys.argv[2]
there = [place for place in ("cars_hue0", "cars_hue90") if (study / f"{place}.done").exists()]
rows = {place: list(csv.DictReader(open(study / place / "props.csv"))) for place in (name, *there)}
for other in there if "hue" in name else []:
    for row, same in zip(rows[name], rows[other]):
        picture = Path("images", f"{int(row['frame']):06d}.jpg")
        if row == same and not (study / name / picture).exists():
            os.link(study / other / picture, study / name / picture)
END
    local pids=() i
    for ((i = 0; i < jobs; i++)); do
        "$render" render_cars.py --out "$study/$name" --size 128 "$@" --shard "$i/$jobs" & pids+=($!)
    done
    for i in "${pids[@]}"; do wait "$i"; done
    touch "$study/$name.done"
}

analyse() {  # analyse NAME MODELS DATASET FOLD: embeddings of the test cars, NR-Prec, pairs
    local out=$study/results/$1
    together python embed.py --dataset "$study/cars_test" --trained-on "$3@default" --loss all --fold "$4" \
        --models "$study/$2" --device "$device" --out "$out"
    OMP_NUM_THREADS=$jobs python nrprec.py "$out"/cars_test/*/fold*/emb.npy --null hypergeometric \
        --permutations 2000 --out "$out/cars_test/nrprec.csv" > "$study/log/nrprec_$1.txt"
    OMP_NUM_THREADS=$jobs python pairs.py "$out"/cars_test/*/fold*/emb.npy --label model \
        --out "$out/cars_test/pairs.csv" --histograms "$out/cars_test/histograms.csv" \
        > "$study/log/pairs_$1.txt"
}

look() {  # look NAME MODELS DATASET LOSSES option …: saliency maps of test cars, with their ceiling
    local out=$study/results/$1 models=$study/$2 dataset=$3 loss=$4
    shift 4
    together python saliency.py --dataset "$study/cars_test" --trained-on "$dataset@default" --loss "$loss" \
        --fold 0 --limit "$pictures" --samples "$samples" --order released --shared-noise --ceiling \
        --map-size 28 --models "$models" --device "$device" --out "$out" "$@"
}

stage pictures "60 bodies, $frames frames at shares 0, $shares; $tests test frames" \
    $(((frames * 2 + tests) * 6 / 10))
cars cars_hue0 --frames "0:$frames" --bodies 60
cars cars_test --frames "0:$tests" --seed 1 --masks \
    --models saloon,coupe,hatchback,suv,pickup,van,body060:body066
for share in $(printf '%s\n' $shares | sort -rn); do
    cars "cars_hue$share" --frames "0:$frames" --bodies 60 \
        --depend "bg_color_hue=model:$(printf '%d.%02d' $((share / 100)) $((share % 100)))"
done

stage rate "the learning rate, by validation MAP@R of ${few//,/, }" \
    $((4 * 4 * 3 * frames * 7 / 1000))
if [ ! -f "$study/rate" ]; then
    for rate in $rates; do
        learn cars_hue0 "$few" --train-from "$from" --lr "$rate" --models "$study/rates/$rate" --epochs 3
    done
    python - "$study/rates" > "$study/rate.part" <<'END'
import csv, sys
from pathlib import Path

scores = {}
for rate in Path(sys.argv[1]).iterdir():
    for path in rate.glob("trained/*/*/fold0/history.csv"):
        rows = [row for row in csv.DictReader(open(path)) if row["split"] == "validation"]
        scores.setdefault(rate.name, []).append(max(float(row["map_at_r"]) for row in rows))
means = {rate: sum(values) / len(values) for rate, values in scores.items()}
print("study.sh: best validation MAP@R by learning rate:", dict(sorted(means.items())), file=sys.stderr)
print(max(means, key=means.get))
END
    mv "$study/rate.part" "$study/rate"
fi
rate=$(cat "$study/rate")

networks=$((losses * (1 + $(wc -w <<< "$shares"))))
stage train "$networks networks from $from on, learning rate $rate" $((networks * epochs * frames * 7 / 1000))
for share in 0 $(printf '%s\n' $shares | sort -rn); do
    learn "cars_hue$share" "$all,None" --train-from "$from" --lr "$rate" --models "$study/models"
done

stage frozen "$losses networks on a frozen trunk" 300
learn cars_hue0 "$all,None" --freeze-trunk --models "$study/frozen"

stage maps "$pictures pictures, $samples copies, twice, of $((losses + 1)) networks at shares 0 and 90" \
    $((2 * (losses + 1) * pictures * 2 * samples * 2 / 100))
for share in $ends; do
    look "hue$share" models "cars_hue$share" all
done
look hue0 models cars_hue0 "$few,None" --faithfulness

networks=$((losses * $(wc -w <<< "$seeds")))
stage seeds "$networks networks at share 0 from other seeds" \
    $((networks * epochs * frames * 7 / 1000))
for seed in $seeds; do
    learn cars_hue0 "$all" --train-from "$from" --lr "$rate" --seed "$seed" --models "$study/models"
done

stage analysis "embeddings of the test cars, NR-Prec, pairs" \
    $((losses * ($(wc -w <<< "$seeds $shares") + 2) * tests / 80))
for share in 0 $shares; do
    analyse "hue$share" models "cars_hue$share" 0
done
analyse frozen frozen cars_hue0 0
folds=${seeds:+0.seed${seeds// /,0.seed}}
[ -z "$folds" ] || analyse seeds models cars_hue0 "$folds"
for share in $ends; do
    python compare.py --dataset "$study/cars_test" --results "$study/results/hue$share" --masks --embeddings
done

if [ -n "${WHOLE-yes}" ]; then
    networks=$((4 * (1 + $(wc -w <<< "$seeds")) * $(wc -w <<< "$ends")))
    stage whole "$networks whole networks of ${few//,/, } at shares $ends, their maps" \
        $((networks * (epochs * frames * 38 / 1000 + pictures * 2 * samples * 2 / 100)))
    for share in $ends; do
        learn "cars_hue$share" "$few,None" --crop 1 --lr "$rate" --models "$study/whole"
        for seed in $seeds; do
            learn "cars_hue$share" "$few" --crop 1 --lr "$rate" --seed "$seed" --models "$study/whole"
        done
        analyse "whole$share" whole "cars_hue$share" "0${folds:+,$folds}"
        look "whole$share" whole "cars_hue$share" "$few,None"
        python compare.py --dataset "$study/cars_test" --results "$study/results/whole$share" --masks \
            --embeddings
    done
fi

stage tables "tables, figures, a page and the answers" 300
for set in "$study"/results/*; do
    models=$study/models
    case $set in */frozen) models=$study/frozen ;; */whole*) models=$study/whole ;; esac
    python tables.py "$set/cars_test" --models "$models" --out "$set/tables" > "$study/log/tables.txt"
done
python examples/study.py "$study" --out "$study/answers"
python figures.py "$study/results/hue0/cars_test" --models "$study/models" --dataset "$study/cars_test" \
    --out "$study/figures"
python report.py "$study/results/hue0/cars_test" --tables "$study/results/hue0/tables" \
    --figures "$study/figures" --dataset "$study/cars_test" --models "$study/models" \
    --out "$study/report.html"
