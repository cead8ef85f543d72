#!/usr/bin/env python3
"""An adapter that Nibble trained, in PEFT: does it do there what it does here?

`nibble finetune` leaves a PEFT directory in RUN/adapter. It is loaded by the peft library over the
same base in transformers, and both programs continue the same prompts. What PEFT alone says without
the adapter is compared too: an adapter that changes nothing would prove nothing.

With the model in the tree, and the Hugging Face directory that gguf-convert makes of it:

    build/gguf-convert/gguf-convert models/tiny/model.gguf tiny-hf --type f32
    build/tools/nibble finetune -m tiny-hf -d models/tiny/instructions.jsonl --method lora \\
        --steps 20 --lr 2e-3 -o tiny-run
    python3 tests/peers/adapter_agreement.py --nibble build/tools/nibble --model tiny-hf \\
        --adapter tiny-run/adapter --prompts models/tiny/heldout.jsonl

The base may be a GGUF file as well, of types that the `gguf` package decodes (NF4 it does not).
tests/peers/README.md names the packages. Exit status 0: they agree.
"""
import argparse
import json
import sys

import peer

PROMPTS = ["The capital of France is", "Once upon a time", "Q: What is 2 + 2?\nA:",
           "SELECT name FROM", "My favourite colour"]


def read_prompts(path, count):
    """Row "prompt", or "instruction", or "text" of the first `count` rows."""
    prompts = []
    with open(path, encoding="utf-8") as rows:
        for line in rows:
            row = json.loads(line)
            keys = ("prompt", "instruction", "text")
            found = next((row[key] for key in keys if row.get(key)), "")
            if found and len(prompts) < count:
                prompts.append(found)
    if not prompts:
        raise SystemExit(f'{path}: no row has "prompt", "instruction" or "text"')
    return prompts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="base: Hugging Face directory or GGUF file")
    parser.add_argument("--adapter", required=True, help="PEFT directory")
    parser.add_argument("--nibble", required=True, help="the program")
    parser.add_argument("--prompts", help=".jsonl with prompt, instruction or text")
    parser.add_argument("--count", type=int, default=5, help="of prompts from --prompts")
    parser.add_argument("--tokens", type=int, default=32, help="per prompt")
    parser.add_argument("--threads", type=int, default=2, help="of nibble")
    options = parser.parse_args()
    from peft import PeftModel

    print(peer.versions("peft", "transformers", "gguf", "tokenizers", "numpy"), flush=True)
    prompts = read_prompts(options.prompts, options.count) if options.prompts else PROMPTS
    tokenizer = peer.load_tokenizer(options.model)
    base = peer.load_model(options.model)
    # Nibble's own answers first without the adapter: what follows is then the adapter's doing.
    plain = peer.Comparison()
    answers = peer.nibble_generate(options.nibble, options.model, prompts, options.tokens,
                                   options.threads)
    ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    for prompt, prompt_ids, answer in zip(prompts, ids, answers):
        plain.add(repr(prompt[:32]), answer, peer.answer_logprobs(base, prompt_ids, answer["ids"]))
    print("base:", plain.summary(), flush=True)

    model = PeftModel.from_pretrained(base, options.adapter).eval()
    adapted = peer.Comparison()
    effect = 0.0
    answers = peer.nibble_generate(options.nibble, options.model, prompts, options.tokens,
                                   options.threads, ["--adapter", options.adapter])
    for prompt, prompt_ids, answer in zip(prompts, ids, answers):
        logprobs = peer.answer_logprobs(model, prompt_ids, answer["ids"])
        print(adapted.add(repr(prompt[:32]), answer, logprobs), flush=True)
        with model.disable_adapter():
            without = peer.answer_logprobs(model, prompt_ids, answer["ids"])
        chosen = [range(len(answer["ids"])), answer["ids"]]
        effect = max(effect, float((logprobs[chosen] - without[chosen]).abs().max()))
    print("adapter:", adapted.summary())
    print(f"largest change that the adapter makes to a log-probability: {effect:.3f}")
    passed = plain.passed() and adapted.passed()
    if effect < 10 * peer.TOLERANCE:
        print("the adapter changes too little to be a test; train it longer")
        passed = False
    print("agreement" if passed else "DISAGREEMENT")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
