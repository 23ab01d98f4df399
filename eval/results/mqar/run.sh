#!/bin/bash
# MQAR on every GPU of the machine, the most telling first: the cells where the paper's ReBased and Based differ.
#     bash eval/results/mqar/run.sh OUTPUT_DIR SECONDS [RUNS]
# RUNS is a file of lines like those below, taken instead of them. Every run takes the paper's recipe (64 epochs). What
# does not fit into SECONDS stays unfinished in OUTPUT_DIR/work, and the same command goes on from there. Runs that
# OUTPUT_DIR/results.jsonl holds are not trained again, so that with
#     cat eval/results/mqar/triton-*.jsonl > OUTPUT_DIR/results.jsonl
# before it, it trains what is missing here.
out=$1
end=$(($(date +%s) + $2))
rm -rf "$out/taken"
mkdir -p "$out/taken"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

# models, hidden size, length, rates, seeds: one process, so runs of a line share a GPU and what is compiled
runs=$(cat "${3:-/dev/stdin}" <<'LINES'
rebased 128 2048 1e-2 0
based 128 2048 1e-2 0
rebased 128 2048 3e-3 0
based 128 2048 3e-3 0
rebased 128 2048 1e-2 1
based 128 2048 1e-2 1
rebased 128 2048 3e-3 1
based 128 2048 3e-3 1
rebased 64 1024 1e-2,3e-3 0,1
based 64 1024 1e-2,3e-3 0,1
rebased 64 512 3e-3,1e-2 0,1
based 64 512 3e-3,1e-2 0,1
gamma_beta 64 512 3e-3,1e-2 0,1
gamma 64 512 3e-3,1e-2 0,1
normalized 64 512 3e-3,1e-2 0,1
x2 64 512 3e-3,1e-2 0,1
rebased 128 2048 1e-3 0,1
based 128 2048 1e-3 0,1
rebased_3_heads 64 2048 3e-3 0
based_3_heads 64 2048 3e-3 0
rebased_3_heads 64 1024 3e-3 0,1
based_3_heads 64 1024 3e-3 0,1
LINES
)

# worker GPU: takes the first line that no other worker has, until none is left or the time is over
worker() {
    number=0
    while read -r models hidden length rates seeds; do
        number=$((number + 1))
        left=$((end - $(date +%s)))
        [ $left -gt 60 ] || return
        mkdir "$out/taken/$number" 2>/dev/null || continue
        CUDA_VISIBLE_DEVICES=$1 python3 -m modeling_rebased.training.train_mqar --no-progress --models "$models" --hidden "$hidden" \
            --lengths "$length" --lrs "$rates" --seeds "$seeds" --kernel-backend triton --max-seconds $((left - 20)) \
            --work-dir "$out/work" --output "$out/results.jsonl" </dev/null
    done <<<"$runs"
}

for gpu in $(nvidia-smi --query-gpu=index --format=csv,noheader); do
    worker "$gpu" &
done
wait
python3 -m modeling_rebased.eval.plot_mqar "$out/results.jsonl" --output "$out"
