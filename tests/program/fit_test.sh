#!/usr/bin/env bash
# What is planned is what is allocated, to the byte, on the device and on the host: 30 pairs of a
# model with its recipe and a cap. Further arguments go to every command: --backend cuda.
. "$(dirname "$0")/lib.sh"
shift
where=("$@")

shape() {  # shape FILE HIDDEN FFN LAYERS HEADS KV_HEADS VOCABULARY
  cat >"$scratch/$1.json" <<SHAPE
{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": $2, "intermediate_size": $3,
 "num_hidden_layers": $4, "num_attention_heads": $5, "num_key_value_heads": $6, "vocab_size": $7,
 "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "tie_word_embeddings": false}
SHAPE
}
shape narrow 128 384 6 4 2 1000
shape deep 64 192 24 2 1 512
shape wide 512 1024 2 8 8 4096

field() { grep -o "\"$1\":[0-9]*" | head -n 1 | cut -d: -f2; }
# equal FLAG...: the program's own count against the plan.
equal() {
  local row
  row=$("$nibble" bench train --json --steps 1 --peak-seconds 0 --threads 2 --storage auto "${where[@]}" "$@" 2>"$errors") ||
    { cat "$errors"; return 1; }
  [ "$(field peak_bytes <<<"$row")" = "$(field planned_bytes <<<"$row")" ] &&
    [ "$(field pinned_bytes <<<"$row")" = "$(field planned_pinned_bytes <<<"$row")" ]
}
planned() {  # planned CAP FLAG...: bytes of the plan and the device's context
  local cap=$1 row
  shift
  row=$("$nibble" fit --json --steps 1 --memory "$cap" "${where[@]}" "$@" 2>"$errors")
  echo $(($(field total_bytes <<<"$row") + $(field context_bytes <<<"$row")))
}
# Caps from the least that a recipe takes to everything stored. Recipes run side by side.
recipe() {  # recipe NAME FLAG...
  local name=$1 least most cap share
  shift
  errors="$scratch/$name.err"
  least=$(planned 1M "$@") most=$(planned 16G "$@")
  for share in 0 10 25 50 75 100; do
    cap=$((least + (most - least) * share / 100))
    check "$name, $cap bytes" equal --memory "$cap" "$@"
  done >"$scratch/$name.out"
}
recipe "rank 8" --model "random:$scratch/narrow.json" --rank 8 --batch 2 --seq 128 &
recipe "rank 64" --model "random:$scratch/narrow.json" --rank 64 --batch 1 --seq 256 &
recipe "many blocks" --model "random:$scratch/deep.json" --rank 4 --batch 4 --seq 128 &
recipe "unquantized" --model "random:$scratch/wide.json" --method lora --rank 4 --batch 1 --seq 256 &
recipe "full" --model "random:$scratch/narrow.json" --method full --batch 1 --seq 256 &
wait
cat "$scratch"/*.out
check "30 pairs" test "$(cat "$scratch"/*.out | grep -c "^ok")" = 30
finish
