#!/usr/bin/env bash
# The rows of the README's GPU table: tools/gpu_bench.sh SHAPES [BUILD_DIRECTORY]
# SHAPES holds NAME.json, the config.json of each model shape; weights are drawn. JSON lines go to
# standard output, one a row, with every kernel of the step. PEAK is for how many seconds the product
# runs that the first row is held against (default 20; the others: 1 second); KERNELS=sm80 measures
# without newer cards' kernels.
set -uo pipefail
shapes=$1
nibble=${2:-build}/tools/nibble
peak=${PEAK:-20}
train() {  # train SHAPE BATCH SEQUENCE RANK STORAGE STEPS FLAG...
  local shape=$1 batch=$2 sequence=$3 rank=$4 storage=$5 steps=$6
  shift 6
  "$nibble" bench train --model "random:$shapes/$shape.json" --batch "$batch" --seq "$sequence" \
    --rank "$rank" --storage "$storage" --steps "$steps" --kernels "${KERNELS:-auto}" \
    --peak-seconds "$peak" --ops --json "$@"
  peak=1
}
train llama3-8b 2 2048 16 auto 20 --memory 24GiB
train llama3-8b 2 2048 16 store 20 --method lora
train llama2-7b 4 2048 64 block 10 --memory 10.65GiB
train llama2-7b 1 512 64 store 40 --memory 9.4GiB
train llama3.2-1b 2 2048 16 store 40
train smollm2-135m 4 512 16 store 100
train llama3-8b 1 16384 16 block 6 --memory 13.4GiB
"$nibble" bench decode --model "random:$shapes/llama2-7b.json" --tokens 128 --ops --json \
  --kernels "${KERNELS:-auto}" --peak-seconds 1
