#!/bin/bash
# Train MQAR on every GPU of the machine, from a list whose first lines tell most.
#     bash eval/results/mqar/run.sh OUTPUT_DIR SECONDS [RUNS]
# RUNS is a file like runs.txt, which stands beside this script and is the default. Every run takes the paper's recipe.
# A worker takes the next line of the list that fits into the time that is left, by the estimate of its first column. A
# run that is cut off stays in OUTPUT_DIR/work, and the same command goes on from there. Runs that
# OUTPUT_DIR/results.jsonl holds are not trained again, so that with
#     cat eval/results/mqar/{figure-1,printed,peers,triton-*}.jsonl > OUTPUT_DIR/results.jsonl
# before it, this script trains what is missing here.
#
# WORKERS=3 gives each GPU three workers. It pays for short runs, which spend most of their time with compiling.
# LONGEST=90 leaves out lines whose estimate is more than 90 seconds.
# PYTHON=... is the interpreter, and MORE="..." options for every run.
out=$1
end=$(($(date +%s) + $2))
list=${3:-$(dirname "$0")/runs.txt}
rm -rf "$out/taken"
mkdir -p "$out/taken"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

# The lines that results.jsonl does not have whole yet. Lines with an output of their own are left to the command itself.
cat > "$out/left.py" <<'END'
import itertools, json, re, sys
from pathlib import Path

results, done = Path(sys.argv[2]), set()
for line in results.read_text().splitlines() if results.exists() else ():
    try:
        run = json.loads(line)
    except ValueError:  # cut off by a kill
        continue
    if run.get("stopped") != "deadline":
        done.add(re.sub(r"-p\d+-", "-", run["name"].split("-e")[0]))
for line in Path(sys.argv[1]).read_text().splitlines():
    words = line.split()
    if not words or words[0] == "#":
        continue
    runs = itertools.product(*(word.split(",") for word in words[1:6]))
    names = {f"{model}-h{hidden}-l{length}-lr{float(rate):g}-s{seed}" for model, hidden, length, rate, seed in runs}
    if "--output" in words or not names <= done:
        print(line)
END
left_runs=$(${PYTHON:-python3} "$out/left.py" "$list" "$out/results.jsonl")

# worker GPU: takes one line after another that no other worker has, until none is left that fits
worker() {
    number=0
    while read -r seconds models hidden length rates seeds more; do
        number=$((number + 1))
        left=$((end - $(date +%s)))
        [ $left -gt 30 ] || return
        [ "$seconds" -le "${LONGEST:-100000}" ] && [ "$seconds" -le $left ] || continue
        mkdir "$out/taken/$number" 2>/dev/null || continue
        # shellcheck disable=SC2086  # options are words
        CUDA_VISIBLE_DEVICES=$1 ${PYTHON:-python3} -m modeling_rebased.training.train_mqar --no-progress \
            --models "$models" --hidden "$hidden" --lengths "$length" --lrs "$rates" --seeds "$seeds" \
            --kernel-backend triton --max-seconds $((left - 15)) --work-dir "$out/work" \
            --output "$out/results.jsonl" $MORE ${more//OUT/$out} </dev/null
    done <<<"$left_runs"
}

for gpu in ${GPUS:-$(nvidia-smi --query-gpu=index --format=csv,noheader)}; do
    for _ in $(seq "${WORKERS:-1}"); do
        worker "$gpu" &
        sleep 0.1 # the first line goes to the first worker
    done
done
wait
