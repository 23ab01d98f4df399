#!/bin/bash
# The runs in h100.jsonl, checkpoint.jsonl and steps.jsonl, in the order of their importance, on one GPU:
#     bash eval/results/mqar/run.sh OUTPUT_DIR SECONDS
# What does not fit into SECONDS is left out; runs that were stopped say so in their line.
out=$1
end=$(($(date +%s) + $2))
work=$(mktemp -d)
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
left() { echo $((end - $(date +%s))); }

# Are the kernels right at these shapes? If not, everything below takes the PyTorch backend.
backend=auto
timeout 100 python3 -m pytest -q -p no:cacheprovider tests/training/test_train_mqar.py -k kernels_at > "$out/kernels.log" 2>&1 || backend=eager
echo "backend $backend"
tail -n 3 "$out/kernels.log"
train="python3 -m training.train_mqar --no-progress --kernel-backend $backend"

# The checkpoint that ships: hidden size 128, length 256. And the tests of the fast path. Both beside the compiler.
$train --models rebased --hidden 128 --lengths 256 --lrs 1e-3,3e-3 --epochs 20 --stop-at 0.999 --no-compile \
    --max-seconds 100 --work-dir "$work/checkpoint" --output "$out/checkpoint.jsonl" --save "$work/models" > "$work/checkpoint.log" 2>&1 &
timeout 150 python3 -m pytest -q -p no:cacheprovider tests/training/test_fused_loss.py tests/eval/test_mqar.py \
    tests/training/test_train_mqar.py -m gpu -k "not kernels_at" > "$out/tests.log" 2>&1 &

# Length 1,024, hidden size 64: ReBased against Based.
$train --models rebased,based --hidden 64 --lengths 1024 --lrs 1e-3,3e-3,1e-2 --race 3 --epochs 20 --jobs 2 \
    --max-seconds $(($(left) - 30)) --work-dir "$work/runs" --output "$out/h100.jsonl" 2>&1
wait
tail -n 5 "$work/checkpoint.log" "$out/tests.log"
tar czf "$out/checkpoint.tgz" -C "$work" models

# A step by itself, nothing else running.
[ "$(left)" -gt 45 ] && timeout 60 $train --models rebased --hidden 64 --lengths 1024 --time-steps --output "$out/steps.jsonl" > "$work/steps.log" 2>&1
tail -n 40 "$work/steps.log"

# Length 512, hidden size 64: the same, then the parts of the normalisation at the rate that did best most often.
[ "$(left)" -gt 40 ] && $train --models rebased,based --hidden 64 --lengths 512 --lrs 1e-3,3e-3,1e-2 --race 3 --epochs 20 --jobs 2 \
    --max-seconds $(($(left) - 15)) --work-dir "$work/runs" --output "$out/h100.jsonl" 2>&1
[ "$(left)" -gt 40 ] && $train --models x2,normalized,gamma,gamma_beta --hidden 64 --lengths 512 --lrs 3e-3 --epochs 20 --jobs 2 \
    --max-seconds $(($(left) - 15)) --work-dir "$work/runs" --output "$out/h100.jsonl" 2>&1
# The newest two of the runs that did not end, to go on from.
[ -d "$work/runs" ] && (cd "$work/runs" && tar czf "$out/unfinished.tgz" $(ls -t | head -n 2))
ls -la "$out"
