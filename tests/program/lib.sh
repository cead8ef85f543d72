# Shared by the tests of the programs: a scratch directory, small training runs on the embedded
# model, and checks that say what they wanted.
set -uo pipefail
nibble=$1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failures=0

check() {  # check NAME COMMAND...: the command must succeed
  local name=$1
  shift
  if "$@"; then echo "ok       $name"; else echo "FAILED   $name"; failures=$((failures + 1)); fi
}
exits() {  # exits CODE PATTERN COMMAND...: exit status and a pattern on standard error
  local code=$1 pattern=$2 status=0
  shift 2
  "$@" >"$scratch/out" 2>"$scratch/err" || status=$?
  [ "$status" = "$code" ] || { echo "  exit status $status, wanted $code"; tail -n 3 "$scratch/err"; return 1; }
  grep -q -- "$pattern" "$scratch/err" || { echo "  no \"$pattern\" in:"; tail -n 3 "$scratch/err"; return 1; }
}
same() { cmp "$1/adapter.gguf" "$2/adapter.gguf" && cmp "$1/adapter/adapter_model.safetensors" "$2/adapter/adapter_model.safetensors"; }
train() {  # train DIRECTORY FLAG...
  local out=$1
  shift
  "$nibble" finetune --model tiny --data models/tiny/instructions.jsonl --out "$out" --rank 4 \
    --batch 4 --steps 24 --lr 1e-3 --eval-split 5% --threads 2 "$@" >"$out.out" 2>"$out.err"
}
finish() { [ "$failures" = 0 ]; exit $?; }
