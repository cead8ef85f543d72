#!/usr/bin/env bash
# What goes wrong is said in one line with the right exit status, and nothing is lost.
. "$(dirname "$0")/lib.sh"
rows=models/tiny/instructions.jsonl
finetune=("$nibble" finetune --model tiny --out "$scratch/run")

check "an unknown flag suggests the nearest" exits 2 "did you mean --rank" "${finetune[@]}" --data $rows --rnak 4
check "an unknown command suggests the nearest" exits 2 "did you mean nibble finetune" "$nibble" finetun
check "a missing flag" exits 2 "--data" "$nibble" finetune --model tiny
check "a missing model" exits 1 "no such file" "$nibble" finetune --model nowhere.gguf --data $rows --out "$scratch/run"
check "a missing data file" exits 1 "nowhere.jsonl" "${finetune[@]}" --data nowhere.jsonl
check "an unknown backend says what there is" exits 1 "cpu" "${finetune[@]}" --data $rows --backend tpu
check "an unknown set of kernels is refused" exits 2 "sm80" "${finetune[@]}" --data $rows --kernels sm70
check "an unknown optimizer is refused with those there are" exits 2 "adamw,adamw8bit" "${finetune[@]}" --data $rows --optimizer sgd
check "help names the optimizers" grep -q "adamw | adamw8bit" <("$nibble" finetune --help)
check "devices lists the CPU" sh -c "'$nibble' devices | grep -q '^cpu '"
if "$nibble" devices | grep -q '^cuda:'; then
  check "a device that is not there" exits 1 "there is no CUDA device 99" "${finetune[@]}" --data $rows --backend cuda:99
else
  check "without a GPU the reason is said" exits 1 "CUDA is not available: " "${finetune[@]}" --data $rows --backend cuda
fi
check "unknown targets say what there is" exits 1 "q_proj" "${finetune[@]}" --data $rows --targets nothing
check "a quantized model cannot be trained in full" exits 1 "gguf-convert" "${finetune[@]}" --data $rows --method full
check "a run that does not fit says so first" exits 1 "does not fit" "${finetune[@]}" --data $rows --memory 1M
check "and writes nothing" test ! -e "$scratch/run"
check "sizes are parsed or refused" exits 1 "is not a size" "${finetune[@]}" --data $rows --memory lots

printf '{"instruction": "a", "output": "b"}\n{"instruction": "a"}\nnot json\n' >"$scratch/bad.jsonl"
check "a bad row names file, line and field" exits 1 'bad.jsonl:2: .*"output" is missing' "${finetune[@]}" --data "$scratch/bad.jsonl"
check "bad rows can be skipped and are counted" exits 0 "2 bad rows skipped" "${finetune[@]}" --data "$scratch/bad.jsonl" --skip-bad --eval-split 0 --dry-run
: >"$scratch/empty.jsonl"
echo "no" >"$scratch/rows.txt"
check "an empty file" exits 1 "empty.jsonl" "${finetune[@]}" --data "$scratch/empty.jsonl"

check "dry run" exits 0 "EOS is trained: yes" "${finetune[@]}" --data $rows --dry-run
check "a dry run writes nothing" test ! -e "$scratch/run"
check "a short run" "${finetune[@]}" --data $rows --steps 2 --rank 2 --batch 2 2>/dev/null >"$scratch/report"
check "ends with the answers" grep -q "after" "$scratch/report"
check "allocates what was planned" grep -q "equal to the byte" "$scratch/report"
check "a picture" test -s "$scratch/run/loss.png"
check "a directory in use is refused" exits 1 "is not empty" "${finetune[@]}" --data $rows --steps 2
check "resume and overwrite exclude each other" exits 2 "xclude" "${finetune[@]}" --data $rows --resume --overwrite
check "resume needs a directory" exits 1 "needs --out" "$nibble" finetune --model tiny --data $rows --resume
check "steps between losses are positive" exits 2 "eval-every" "${finetune[@]}" --data $rows --eval-every 0
check "more steps than there is room to plan" exits 1 "fewer --steps" "${finetune[@]}" --data $rows --steps 1000000000000 --dry-run
check "more epochs than there is room to plan" exits 1 "--epochs" "${finetune[@]}" --data $rows --epochs 1e300 --dry-run
check "an adapter to start from is not overwritten" exits 1 "would delete" "${finetune[@]}" --data $rows --overwrite --adapter "$scratch/run/adapter"
check "and is still there" test -s "$scratch/run/adapter/adapter_model.safetensors"
check "resume without a checkpoint says so" exits 0 "no checkpoint" "$nibble" finetune --model tiny --data $rows --steps 1 --rank 2 --batch 2 --out "$scratch/new" --resume

check "a run's config.json makes the same run" "$nibble" finetune --config "$scratch/run/config.json" --out "$scratch/again" >/dev/null 2>&1
check "bit for bit" same "$scratch/run" "$scratch/again"
printf '{"instruction": "a", "output": "b"}\n{"instruction": "c", "output": "d"}\n' >"$scratch/two.jsonl"
check "flags given beside a config replace its lists" exits 0 "alpaca rows: 2," "$nibble" finetune --config "$scratch/run/config.json" --data "$scratch/two.jsonl" --out "$scratch/b" --dry-run
check "no limit of the gradient norm" exits 0 "" "${finetune[@]}" --data "$scratch/two.jsonl" --out "$scratch/unclipped" --steps 1 --rank 2 --clip 0
check "survives its config.json" exits 0 "" "$nibble" finetune --config "$scratch/unclipped/config.json" --out "$scratch/unclipped2"
check "as it was" grep -q '"clip": 0' "$scratch/unclipped2/config.json"
printf '{"text": "日本語の文章です。"}\n{"text": "🎉 👩‍🚀 é ü ß"}\n' >"$scratch/characters.jsonl"
check "characters of several bytes train" exits 0 "held out" "${finetune[@]}" --data "$scratch/characters.jsonl" --out "$scratch/characters" --steps 2 --rank 2
check "a config that is not JSON" exits 2 "rows.txt" "$nibble" finetune --config "$scratch/rows.txt"

check "generate with the adapter" "$nibble" generate -m tiny --adapter "$scratch/run/adapter" -p "The cow says" -n 4 2>/dev/null >"$scratch/text"
seq -f 'The cow says hello and walks over the green field number %g.' 6 >"$scratch/turns"
chat() { "$nibble" chat -m tiny -c "$1" -n 8 <"$scratch/turns"; }
check "a chat forgets its oldest turns where the context is full" exits 0 "forgot the oldest turns" chat 128
check "and says when one message alone is too long" exits 0 "does not fit the context" chat 16
check "generate as JSON" grep -q '"logprobs"' <("$nibble" generate -m tiny -p "The cow" -n 4 --json 2>/dev/null)
check "tokens of a text" grep -q '"ids"' <("$nibble" tokens -m tiny --text "The cow" --json)
check "rows as the trainer sees them" grep -q "EOS is trained in 296 rows" <("$nibble" tokens -m tiny --data $rows)
check "inspect a model" grep -q '"kind":"model"' <("$nibble" inspect tiny --json)
check "inspect an adapter" grep -q "LoRA adapter, 28 linears" <("$nibble" inspect "$scratch/run/adapter.gguf")
check "fit as JSON" grep -q '"fits":true' <("$nibble" fit --model tiny --data $rows --json 2>/dev/null)
check "the plan as a picture" exits 0 "storage cheap" "$nibble" fit --model tiny --data $rows --storage cheap --picture "$scratch/plan.png"
check "which is a PNG" test "$(head -c 8 "$scratch/plan.png" | od -An -tx1 | tr -d ' \n')" = 89504e470d0a1a0a
check "a picture that cannot be written" exits 1 "nowhere/plan.png" "$nibble" fit --model tiny --data $rows --picture "$scratch/nowhere/plan.png"
check "is said in one line" test "$(grep -c plan.png "$scratch/err")" = 1
# What a refusal offers, run through fit.
"$nibble" finetune --model tiny --data $rows --rank 64 --memory 14M 2>"$scratch/offers" >"$scratch/out"
grep -o "nibble finetune .*" "$scratch/offers" | sed 's/^nibble finetune/fit/' >"$scratch/lines"
check "a run that does not fit offers others" test -s "$scratch/lines"
while read -r line; do
  # shellcheck disable=SC2086
  check "an offer fits: $line" exits 0 "storage" "$nibble" $line
done <"$scratch/lines"
# Planning for a card that need not be there takes libnibble-cuda alone.
if [ -e "$(dirname "$nibble")/../backends/cuda/libnibble-cuda.so" ]; then
  cat >"$scratch/shape.json" <<'SHAPE'
{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
 "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
 "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": false}
SHAPE
  card=("$nibble" fit --model "random:$scratch/shape.json" --card rtx4090 --seq 2048 --batch 2 --steps 10)
  check "a card that is not there is planned for" grep -q "tokens/s predicted" <("${card[@]}" 2>/dev/null)
  check "what may not leave for the host stays" exits 0 "storage cheap:[0-9]*+store," "${card[@]}" --host-memory 100M
  page_locked() { grep -o '"pinned_lines":{[^}]*}' | grep -o ':[0-9]\+' | tr -d : | awk '{ sum += $1 } END { printf "%.0f\n", sum }'; }
  for host in 104857600 1572864000 4294967296; do
    locked=$("${card[@]}" --memory 10GiB --host-memory $host --json 2>/dev/null | page_locked)
    check "$locked bytes are page-locked of $host" test "$locked" -le $host
  done
  # Nothing that is asked for and fits may be much faster than what is chosen.
  rate() { grep -o '"tokens_per_s":[0-9]*' | head -n 1 | cut -d: -f2; }
  for cap in 8GiB 12GiB; do
    chosen=$("${card[@]}" --memory $cap --host-memory 60GiB --json 2>/dev/null | rate)
    for storage in block block,stream:8 attention,offload:attention,stream:16 block,offload:gate,stream:16 \
        cheap,offload:inputs+gate+up,stream:24 cheap,offload:up cheap:16+store,offload:gate store,stream:32; do
      forced=$("${card[@]}" --memory $cap --host-memory 60GiB --storage $storage --json 2>/dev/null |
        grep '"fits":true' | rate)
      check "$cap: $chosen tokens/s, ${forced:-none} with $storage" test $((100 * ${forced:-0})) -le $((103 * chosen))
    done
  done
else
  echo "skipped: --card: libnibble-cuda is not built"
fi
check "version" grep -q "^nibble [0-9]" <("$nibble" --version)
finish
