#!/bin/bash
# Train the language models of docs/results.md on every GPU of the machine, and measure each.
#     bash eval/results/language_models/run.sh OUTPUT_DIR [MODEL:SEED ...]
# It needs data/corpus from modeling_rebased.training.prepare_corpus. A GPU takes the next model that no other GPU has. For
# each it tries three learning rates for 300 steps, trains with the rate of the lowest held-out loss, and measures the
# result. What is finished is left as it is, so the same command goes on where it was stopped. OUTPUT_DIR gets
#     results/MODEL.json, sweep.csv      what language_models measured, and the held-out loss at each rate
#     MODEL-SEED/final                   the model
#
# PYTHON=... is the interpreter, STEPS=N the length of a run (6200: 406 million tokens), RATES="..." the rates,
# SWEEP_STEPS=N the length of a trial, TRAIN="..." and MEASURE="..." options for every training and measurement.
# MEASURE=--speed also times each model. Its figures are right only if nothing else runs on the machine (GPUS=0).
# Gated DeltaNet and RWKV-7 need flash-linear-attention. Mamba-2 also needs mamba-ssm and causal-conv1d.
out=$1
shift
models=${*:-rebased:0 based:0 softmax:0 hybrid:0 gated-deltanet:0 mamba2:0 rwkv7:0 rebased:1 based:1 softmax:1}
recipe=training/language_models.yaml
python=${PYTHON:-python3}
rm -rf "$out/taken"
mkdir -p "$out/taken" "$out/results" "$out/rates"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=true

# train NAME FOLDER OPTIONS: the peers are not compiled, so they take the same batch in two halves
train() {
    local config=150m-$1 batch="" folder=$2
    case $1 in
        gated-deltanet | mamba2 | rwkv7)
            config=configuration/peers/$config
            batch="--per_device_train_batch_size 16 --gradient_accumulation_steps 2"
            ;;
    esac
    [ -n "$CONFIGS" ] && config=$CONFIGS-$1 # a trial with small models
    # shellcheck disable=SC2086  # options are words
    $python -m modeling_rebased.training.train_lm $recipe --config "$config" --output_dir "$folder" $batch \
        --disable_tqdm true "${@:3}" $TRAIN
}

# sweep NAME: writes the best rate to rates/NAME
sweep() {
    local rate loss
    for rate in ${RATES:-5e-4 1e-3 2e-3}; do
        grep -q "^$1,$rate," "$out/results/sweep.csv" 2>/dev/null && continue
        train "$1" "$out/sweep/$1-$rate" --learning_rate "$rate" --max_steps "${SWEEP_STEPS:-300}" --save_strategy no || return
        loss=$($python -c "import json, sys; print(json.load(open(sys.argv[1]))['eval_loss'])" \
            "$out/sweep/$1-$rate/final/training_figures.json") || return
        echo "$1,$rate,${SWEEP_STEPS:-300},$loss" >>"$out/results/sweep.csv"
        rm -rf "$out/sweep/$1-$rate"
    done
    grep "^$1," "$out/results/sweep.csv" | sort -t, -k4,4g | head -n 1 | cut -d, -f2 >"$out/rates/$1"
}

worker() {
    local model name seed label
    for model in $models; do
        mkdir "$out/taken/$model" 2>/dev/null || continue
        name=${model%%:*}
        seed=${model##*:}
        label=${name/-/_}
        [ "$seed" = 0 ] || label="$label, seed $seed"
        [ -e "$out/results/$label.json" ] && continue
        # two seeds of one model share its rate; the second waits for it
        if mkdir "$out/taken/rate-$name" 2>/dev/null; then
            [ -s "$out/rates/$name" ] || sweep "$name" || touch "$out/rates/$name.failed"
        fi
        until [ -s "$out/rates/$name" ] || [ -e "$out/rates/$name.failed" ]; do sleep 5; done
        [ -s "$out/rates/$name" ] || continue
        train "$name" "$out/$name-$seed" --seed "$seed" --learning_rate "$(cat "$out/rates/$name")" \
            --max_steps "${STEPS:-6200}" || continue
        # shellcheck disable=SC2086
        $python -m modeling_rebased.eval.language_models --models "$label=$out/$name-$seed/final" \
            --heldout data/corpus/heldout --shards data/corpus/train --output "$out/results" $MEASURE
    done
}

rm -f "$out"/rates/*.failed
for gpu in ${GPUS:-$(nvidia-smi --query-gpu=index --format=csv,noheader)}; do
    CUDA_VISIBLE_DEVICES=$gpu worker >>"$out/gpu-$gpu.log" 2>&1 &
done
wait
$python -m modeling_rebased.eval.plot_language_models "$out/results"
