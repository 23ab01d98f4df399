#!/bin/bash
# MQAR on one GPU in the order of importance: where ReBased and Based differ most in the paper's Figure 1 comes first.
#     bash eval/results/mqar/run.sh OUTPUT_DIR SECONDS
# Every stage takes the paper's recipe (64 epochs). What does not fit into SECONDS stays unfinished in OUTPUT_DIR/work,
# and the same command goes on from there.
out=$1
end=$(($(date +%s) + $2))
mkdir -p "$out/work"
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
left() { echo $((end - $(date +%s))); }

# Are the kernels right at these shapes? A kind of model whose are not takes the PyTorch backend, and says so.
backend_of() {
    test=tests/training/test_train_mqar.py::test_kernels_at_mqars_shapes
    if timeout 100 python3 -m pytest -q -p no:cacheprovider "$test[$1-64-1024]" "$test[$1-64-512]" "$test[$1-128-256]" \
        > "$out/work/kernels-$1.log" 2>&1; then echo triton; else echo eager; fi
}
backend_of rebased > "$out/work/rebased" &
backend_of based > "$out/work/based" &
wait
rebased=$(cat "$out/work/rebased") based=$(cat "$out/work/based")
echo "backend of ReBased and its ablation: $rebased, of Based: $based"

# stage MODELS HIDDEN LENGTH RATES SEEDS BACKEND [JOBS]
stage() {
    [ "$(left)" -gt 60 ] || return
    python3 -m training.train_mqar --no-progress --models "$1" --hidden "$2" --lengths "$3" --lrs "$4" --seeds "$5" --jobs "${7:-1}" \
        --kernel-backend "$6" --max-seconds $(($(left) - 20)) --work-dir "$out/work" --output "$out/h100.jsonl"
}

python3 -m training.train_mqar --no-progress --models rebased --hidden 64 --lengths 1024 --time-steps \
    --kernel-backend "$rebased" --output "$out/steps.jsonl"
stage rebased 64 1024 3e-3,1e-3 0,1 "$rebased" &
stage based 64 1024 3e-3,1e-3 0,1 "$based" &
wait
stage rebased 128 2048 1e-3,3e-3 0,1 "$rebased" &
stage based 128 2048 1e-3,3e-3 0,1 "$based" &
wait
stage rebased 64 512 3e-3,1e-3 0,1 "$rebased" &
stage based 64 512 3e-3,1e-3 0,1 "$based" &
wait
stage x2,normalized,gamma,gamma_beta 64 512 3e-3,1e-3 0,1 "$rebased" 2
python3 -m eval.plot_mqar "$out/h100.jsonl" --output "$out"
