#!/usr/bin/env bash
# A run killed at ten random moments and resumed leaves the adapter of a run that was not, bit for
# bit; so do other thread counts, storage rungs and splits into microbatches that keep the order.
. "$(dirname "$0")/lib.sh"
RANDOM=7

now_ms() { echo $((${EPOCHREALTIME/[.,]/} / 1000)); }
long="--steps 60 --save-every 2"
begin=$(now_ms)
train "$scratch/long" $long
whole=$(($(now_ms) - begin))
check "an uninterrupted run" test -f "$scratch/long/adapter.gguf"

# The program itself is the job, so that the signal reaches it wherever it is. The moments are
# fractions of what a whole run takes, which sanitizers and a busy machine make many times longer.
kills=0 starts=0
while [ "$kills" -lt 10 ] && [ "$starts" -lt 60 ]; do
  starts=$((starts + 1))
  "$nibble" finetune --model tiny --data models/tiny/instructions.jsonl --out "$scratch/killed" \
    --rank 4 --batch 4 --lr 1e-3 --eval-split 5% --threads 2 --resume $long >/dev/null 2>>"$scratch/starts.err" &
  job=$!
  pause=$((whole * (RANDOM % 600) / 1000))
  sleep "$(printf '%d.%03d' $((pause / 1000)) $((pause % 1000)))"
  kill -9 "$job" 2>/dev/null
  status=0
  wait "$job" 2>/dev/null || status=$?
  [ "$status" = 137 ] && kills=$((kills + 1))
  # A run that came to its end is done once more from the start.
  [ -f "$scratch/killed/adapter.gguf" ] && [ "$kills" -lt 10 ] && rm -rf "$scratch/killed"
done
check "killed $kills times in $starts starts" test "$kills" = 10
check "some starts went on from a checkpoint" grep -q "resume     at step [1-9]" "$scratch/starts.err"
train "$scratch/killed" --resume $long
check "and resumed: same adapter" same "$scratch/long" "$scratch/killed"
check "the resumed log has every step once" test \
  "$(grep -c '"type":"step"' "$scratch/killed/log.jsonl")" = 60

train "$scratch/whole"
for threads in 1 3; do
  train "$scratch/threads$threads" --threads "$threads"
  check "$threads threads: same adapter" same "$scratch/whole" "$scratch/threads$threads"
done
for storage in cheap attention block cheap:1+store block:1+cheap store,offload:inputs \
    block,offload:gate store,stream:1 block,offload:inputs,stream:2; do
  train "$scratch/$storage" --storage "$storage"
  check "storage $storage: same adapter" same "$scratch/whole" "$scratch/$storage"
done
# From about the least that the run can do with to nearly everything, in the CPU's bytes.
train "$scratch/on-cpu" --backend cpu
for memory in 6M 7M 8M 10M 12M 14M; do
  train "$scratch/$memory" --backend cpu --memory $memory
  check "--memory $memory: same adapter" same "$scratch/on-cpu" "$scratch/$memory"
done
# Moments in 8 bits: in part on the host, and resumed under another cap.
small="--optimizer adamw8bit --backend cpu"
train "$scratch/small" $small
for memory in 5500K "6600K --storage attention"; do
  train "$scratch/small$memory" $small --memory $memory
  check "8-bit moments, --memory $memory: some are on the host" grep -q "optimizer pages" "$scratch/small$memory.err"
  check "8-bit moments, --memory $memory: same adapter" same "$scratch/small" "$scratch/small$memory"
done
train "$scratch/small-resumed" $small --steps 24 --save-every 12 --keep-checkpoints 9
rm "$scratch/small-resumed/checkpoints/step-000024.gguf"
train "$scratch/small-resumed" $small --resume --memory 5500K
check "8-bit moments go on from a checkpoint" grep -q "resume     at step 12" "$scratch/small-resumed.err"
check "under another cap: same adapter" same "$scratch/small" "$scratch/small-resumed"
check "8-bit moments change the result" test "$(cmp -s "$scratch/on-cpu/adapter.gguf" "$scratch/small/adapter.gguf"; echo $?)" = 1
other=("$nibble" finetune --model tiny --data models/tiny/instructions.jsonl --rank 4 --batch 4 --steps 24
  --lr 1e-3 --eval-split 5% --threads 2 --resume --out)
check "another optimizer is refused by name" exits 1 'optimizer was "adamw", is "adamw8bit"' \
  "${other[@]}" "$scratch/whole" $small
mkdir -p "$scratch/foreign"
cp -r "$scratch/whole/checkpoints" "$scratch/foreign"
check "and so is its checkpoint alone" exits 1 "the run needs I8.*of another recipe" \
  "${other[@]}" "$scratch/foreign" $small

train "$scratch/dropout" --dropout 0.1
train "$scratch/dropout-block" --dropout 0.1 --storage block
check "dropout is drawn again when recomputed" same "$scratch/dropout" "$scratch/dropout-block"
check "dropout changes the result" test "$(cmp -s "$scratch/whole/adapter.gguf" "$scratch/dropout/adapter.gguf"; echo $?)" = 1

train "$scratch/longer" --steps 12
train "$scratch/longer" --steps 12 --resume
check "resuming a finished run changes nothing" test -f "$scratch/longer/adapter.gguf"
check "another recipe is refused by name" exits 1 "lr was 0.001, is 0.01" \
  "$nibble" finetune --model tiny --data models/tiny/instructions.jsonl --out "$scratch/longer" --rank 4 \
  --batch 4 --steps 12 --lr 1e-2 --eval-split 5% --threads 2 --resume

cp models/tiny/instructions.jsonl "$scratch/rows.jsonl"
changing=("$nibble" finetune --model tiny --data "$scratch/rows.jsonl" --out "$scratch/changing" --rank 4
  --batch 2 --steps 1 --threads 2)
"${changing[@]}" >/dev/null 2>&1
echo '{"instruction": "Say no.", "output": "No."}' >>"$scratch/rows.jsonl"
check "other rows under the same name are refused" exits 1 "data has other rows" "${changing[@]}" --resume

# An adapter to start from: the loss before training is that adapter's loss.
train "$scratch/second" --adapter "$scratch/whole/adapter" --steps 2
last=$(grep '"type":"eval"' "$scratch/whole/log.jsonl" | tail -n 1 | grep -o '"eval_loss":[0-9.e-]*')
first=$(grep '"type":"eval"' "$scratch/second/log.jsonl" | head -n 1 | grep -o '"eval_loss":[0-9.e-]*')
check "step 0 from an adapter is that adapter's loss ($first)" test "$first" = "$last"
train "$scratch/third" --adapter "$scratch/whole/adapter.gguf" --steps 2
first=$(grep '"type":"eval"' "$scratch/third/log.jsonl" | head -n 1 | grep -o '"eval_loss":[0-9.e-]*')
check "and from its GGUF form ($first)" test "$first" = "$last"

# Ctrl-C: a checkpoint and status 130, then on to the same end.
train "$scratch/interrupted" --steps 24 --save-every 1000 &
job=$!
for _ in $(seq 3000); do  # until it trains
  grep -q '"type":"step"' "$scratch/interrupted/log.jsonl" 2>/dev/null && break
  kill -0 "$job" 2>/dev/null || break
  sleep 0.1
done
pkill -INT -P "$job"
wait "$job"
status=$?
if [ "$status" = 130 ]; then
  check "Ctrl-C leaves a checkpoint" ls "$scratch"/interrupted/checkpoints/step-*.gguf
  train "$scratch/interrupted" --save-every 1000 --resume
  check "and goes on from it" grep -q "resume     at step [1-9]" "$scratch/interrupted.err"
else
  echo "skipped: the run ended before it was interrupted (status $status)"
fi
check "interrupted and resumed: same adapter" same "$scratch/whole" "$scratch/interrupted"
finish
