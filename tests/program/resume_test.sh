#!/usr/bin/env bash
# A run killed at ten random moments and resumed leaves the adapter of a run that was not, bit for
# bit; so do other thread counts, storage rungs and splits into microbatches that keep the order.
. "$(dirname "$0")/lib.sh"
RANDOM=7

long="--steps 60 --save-every 2"
train "$scratch/long" $long
check "an uninterrupted run" test -f "$scratch/long/adapter.gguf"

# The program itself is the job, so that the signal reaches it wherever it is.
kills=0 starts=0
while [ "$kills" -lt 10 ] && [ "$starts" -lt 60 ]; do
  starts=$((starts + 1))
  "$nibble" finetune --model tiny --data models/tiny/instructions.jsonl --out "$scratch/killed" \
    --rank 4 --batch 4 --lr 1e-3 --eval-split 5% --threads 2 --resume $long >/dev/null 2>&1 &
  job=$!
  sleep "0.$((RANDOM % 7))$((RANDOM % 10))"
  if kill -9 "$job" 2>/dev/null; then kills=$((kills + 1)); fi
  wait "$job" 2>/dev/null
  # A run that came to its end is done once more from the start.
  [ -f "$scratch/killed/adapter.gguf" ] && [ "$kills" -lt 10 ] && rm -rf "$scratch/killed"
done
check "killed $kills times in $starts starts" test "$kills" = 10
train "$scratch/killed" --resume $long
check "and resumed: same adapter" same "$scratch/long" "$scratch/killed"
check "the resumed log has every step once" test \
  "$(grep -c '"type":"step"' "$scratch/killed/log.jsonl")" = 60

train "$scratch/whole"
for threads in 1 3; do
  train "$scratch/threads$threads" --threads "$threads"
  check "$threads threads: same adapter" same "$scratch/whole" "$scratch/threads$threads"
done
for rung in cheap block; do
  train "$scratch/$rung" --storage "$rung"
  check "storage $rung: same adapter" same "$scratch/whole" "$scratch/$rung"
done
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
sleep 0.6
pkill -INT -P "$job"
wait "$job"
status=$?
if [ "$status" = 130 ]; then
  check "Ctrl-C leaves a checkpoint" ls "$scratch"/interrupted/checkpoints/step-*.gguf
  train "$scratch/interrupted" --save-every 1000 --resume
else
  echo "skipped: the run ended before it was interrupted (status $status)"
fi
check "interrupted and resumed: same adapter" same "$scratch/whole" "$scratch/interrupted"
finish
