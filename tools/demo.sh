#!/usr/bin/env bash
# From a fresh clone to a finetuned model: installs what is missing, builds, and teaches the
# embedded 1.3 M parameter model to answer questions. Ends with the command for your own model.
set -euo pipefail
cd "$(dirname "$0")/.."
. tools/setup.sh
begin=$SECONDS
install_packages
configure build
echo "Building (log in build/build.log)"
ninja -C build tools/nibble gguf-convert/gguf-convert >build/build.log 2>&1 || {
  tail -n 40 build/build.log
  exit 1
}
echo "Built in $((SECONDS - begin)) s"
run=runs/demo
build/tools/nibble finetune --model tiny --data models/tiny/instructions.jsonl \
  --sample-prompts models/tiny/heldout.jsonl --out "$run" --overwrite \
  --rank 16 --lr 2e-3 --batch 16 --steps 150 --eval-split 5%
echo "The demo took $((SECONDS - begin)) s. Now your own model (a directory or .gguf file) and rows:"
echo "  build/tools/nibble finetune --model PATH/TO/MODEL --data YOUR_ROWS.jsonl --out runs/mine"
