#!/usr/bin/env bash
# Memory that runs out under a resumed run, by a limit of its address space: from the least that the
# program starts with to enough. One line says what could not be had, or the run is planned again
# around it; what was saved before stays, and the run that goes on ends with the same adapter.
. "$(dirname "$0")/lib.sh"

limited() {  # limited KIB COMMAND...
  ulimit -v "$1" || exit 99
  shift
  exec "$@"
}
if ! (limited $((16 << 20)) "$nibble" --version) >/dev/null 2>&1; then
  echo "skipped: address space cannot be limited (a sanitizer takes all of it)"
  exit 0
fi
run=(finetune --model tiny --data models/tiny/instructions.jsonl --rank 4 --batch 96 --micro-batch 96
  --steps 2 --save-every 1 --lr 1e-3 --eval-split 5% --threads 2 --backend cpu)

"$nibble" "${run[@]}" --out "$scratch/whole" >"$scratch/out" 2>"$scratch/err"
check "an undisturbed run, planned with everything stored" grep -q "storage store," "$scratch/err"
cp -r "$scratch/whole" "$scratch/half"
rm -r "$scratch"/half/checkpoints/step-000002.gguf "$scratch"/half/{adapter,adapter.gguf,loss.png}

one_line() { [ "$(grep -c "^nibble: " "$1")" = 1 ] && ! grep -q "terminate\|Assert" "$1"; }
intact() { cmp "$scratch/half/checkpoints/step-000001.gguf" "$1/checkpoints/step-000001.gguf"; }
no_leftovers() { [ -z "$(find "$1" -name '.*')" ]; }

started=0 refused=0 replanned=0 done=0 too_little=0
for ((limit = 16 << 10; limit < 1 << 20 && done < 3; limit += 6 << 10)); do
  (limited $limit "$nibble" --version) >/dev/null 2>&1 || continue
  started=$((started + 1))
  try=$scratch/try
  rm -rf "$try"
  cp -r "$scratch/half" "$try"
  status=0
  (limited $limit "$nibble" "${run[@]}" --out "$try" --resume) >"$scratch/out" 2>"$scratch/err" || status=$?
  planned_again=$(grep -c "^re-planned: " "$scratch/err")
  case $status in
    0)
      [ "$planned_again" = 1 ] && replanned=$((replanned + 1)) || done=$((done + 1))
      check "$((limit >> 10)) MiB: done, planned again $planned_again times: same adapter" same "$scratch/whole" "$try"
      ;;
    1)
      refused=$((refused + 1))
      check "$((limit >> 10)) MiB: $(grep "^nibble: " "$scratch/err" | cut -c 1-120)" one_line "$scratch/err"
      check "$((limit >> 10)) MiB: the checkpoint is intact" intact "$try"
      check "$((limit >> 10)) MiB: nothing half written" no_leftovers "$try"
      if grep -q "^run        " "$scratch/err"; then  # it got past reserving: the log may be cut
        "$nibble" "${run[@]}" --out "$try" --resume >"$scratch/out" 2>&1
        check "$((limit >> 10)) MiB: and the run goes on" same "$scratch/whole" "$try"
      else
        check "$((limit >> 10)) MiB: the run directory is as it was" diff -r "$scratch/half" "$try"
        grep -q "does not fit" "$scratch/err" && too_little=$limit
      fi
      ;;
    *) check "$((limit >> 10)) MiB: status $status is 0 or 1" false ;;
  esac
done
rm -rf "$try"
cp -r "$scratch/half" "$try"
overwrites() { (limited "$too_little" "$nibble" "${run[@]}" --out "$try" --overwrite); }
check "what does not fit any more is planned again and refused" exits 1 "^re-planned: .* were planned, now " overwrites
check "with the plan's lines" grep -q "does not fit, .* too much" "$scratch/err"
check "and overwrites nothing" diff -r "$scratch/half" "$try"
check "limits below, around and above what the run takes ($started: $refused, $replanned, $done)" \
  test "$refused" -gt 3 -a "$replanned" -gt 0 -a "$done" = 3
finish
