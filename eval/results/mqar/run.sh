#!/bin/bash
# MQAR on one GPU in the order of importance: where ReBased and Based differ most in the paper's Figure 1 comes first.
#     bash eval/results/mqar/run.sh OUTPUT_DIR SECONDS
# Every stage takes the paper's recipe (64 epochs). What does not fit into SECONDS stays unfinished in OUTPUT_DIR/work,
# and the same command goes on from there.
out=$1
end=$(($(date +%s) + $2))
mkdir -p "$out"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

# stage MODELS HIDDEN LENGTH RATES SEEDS: kinds of model compile at once and train one after another
stage() {
    left=$((end - $(date +%s)))
    [ $left -gt 60 ] || return
    python3 -m training.train_mqar --no-progress --models "$1" --hidden "$2" --lengths "$3" --lrs "$4" --seeds "$5" \
        --jobs 4 --take-turns --max-seconds $((left - 20)) --work-dir "$out/work" --output "$out/results.jsonl" \
        --save "$out/models"
}

stage rebased,based 64 1024 3e-3,1e-2 0,1
stage rebased_3_heads,based_3_heads 64 1024 3e-3 0,1
stage rebased,based 128 2048 3e-3,1e-2 0,1
stage rebased,based 64 512 3e-3,1e-3 0,1
stage x2,normalized,gamma,gamma_beta 64 512 3e-3 0,1
stage rebased_3_heads 64 2048 3e-3 0,1
python3 -m eval.plot_mqar "$out/results.jsonl" --output "$out"
