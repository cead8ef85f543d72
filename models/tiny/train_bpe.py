#!/usr/bin/env python3
"""Trains the embedded model's tokenizer: byte-level BPE as in GPT-2 (Sennrich et al. 2016).

    python3 models/tiny/train_bpe.py [--corpus corpus.jsonl] [--vocab 1536]

Writes tokenizer.json and tokenizer_config.json beside this file. Text is cut by GPT-2's pattern,
the pieces are counted, and the most frequent adjacent pair is merged until the vocabulary is full
(ties: the smaller pair of strings). The four special tokens come first, then all 256 bytes. The
corpus is made on the spot when none is given; the usual instruction prompts are counted too, so
that they cost few tokens. Training text is ASCII, for which the pattern below is GPT-2's; the
tokenizer itself encodes any bytes.
"""
import argparse
import collections
import json
import os
import re

from make_corpus import documents

HERE = os.path.dirname(os.path.abspath(__file__))
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
PIECES = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")
PROMPT_WEIGHT = 10000  # occurrences: more than any name, so that prompt words become whole tokens
PROMPTS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n\n\n### Response: ",
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "\n\n### Input:\n\n\n### Response: ",
    "system\nuser\nassistant\n",
]


def byte_characters():
    """GPT-2's visible character for each byte."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    table = {byte: chr(byte) for byte in visible}
    table.update({byte: chr(256 + i) for i, byte in enumerate(hidden)})
    return {byte: table[byte] for byte in range(256)}


def count_pieces(texts):
    """Number of occurrences by piece; texts are ASCII."""
    counts = collections.Counter()
    for text in texts:
        counts.update(PIECES.findall(text.encode("ascii").decode()))
    return counts


def train(counts, merges_wanted):
    """The merges, best first, of pieces given as {text: count}."""
    table = byte_characters()
    words = [([table[byte] for byte in piece.encode()], count)
             for piece, count in sorted(counts.items())]
    merges = []
    while len(merges) < merges_wanted:
        pair_counts = collections.Counter()
        for symbols, count in words:
            for pair in zip(symbols, symbols[1:]):
                pair_counts[pair] += count
        if not pair_counts:
            raise SystemExit(f"train_bpe.py: the text has only {len(merges)} merges, "
                             f"{merges_wanted} were wanted; ask for a smaller --vocab")
        best = min(pair_counts, key=lambda pair: (-pair_counts[pair], pair))
        merges.append(best)
        for symbols, _ in words:
            merge_in_place(symbols, best)
    return merges


def merge_in_place(symbols, pair):
    at = 0
    while at + 1 < len(symbols):
        if (symbols[at], symbols[at + 1]) == pair:
            symbols[at:at + 2] = ["".join(pair)]
        at += 1


class Encoder:
    """Encodes ASCII text by a tokenizer.json of this script; for checks and prototypes."""

    def __init__(self, tokenizer):
        self.ids = tokenizer["model"]["vocab"]
        self.ranks = {tuple(merge.split(" ")): i
                      for i, merge in enumerate(tokenizer["model"]["merges"])}
        self.table = byte_characters()
        self.cache = {}

    def encode(self, text):
        return [token for piece in PIECES.findall(text) for token in self.piece(piece)]

    def piece(self, piece):
        if piece not in self.cache:
            symbols = [self.table[byte] for byte in piece.encode()]
            while True:
                known = [pair for pair in zip(symbols, symbols[1:]) if pair in self.ranks]
                if not known:
                    break
                merge_in_place(symbols, min(known, key=self.ranks.get))
            self.cache[piece] = [self.ids[symbol] for symbol in symbols]
        return self.cache[piece]


def tokenizer_json(merges):
    names = SPECIAL + list(byte_characters().values()) + ["".join(merge) for merge in merges]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": name, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}
                         for i, name in enumerate(SPECIAL)],
        "normalizer": None, "pre_tokenizer": byte_level, "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {name: i for i, name in enumerate(names)},
                  "merges": [" ".join(merge) for merge in merges]},
    }


def tokenizer_config(context):
    return {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False,
        "add_eos_token": False, "add_prefix_space": False, "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[0], "unk_token": None, "pad_token": SPECIAL[3],
        "clean_up_tokenization_spaces": False, "model_max_length": context,
        "added_tokens_decoder": {
            str(i): {"content": name, "lstrip": False, "normalized": False, "rstrip": False,
                     "single_word": False, "special": True} for i, name in enumerate(SPECIAL)},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", help="JSON lines of make_corpus.py")
    parser.add_argument("--vocab", type=int, default=1536)
    arguments = parser.parse_args()
    if arguments.corpus:
        with open(arguments.corpus, encoding="ascii") as file:
            texts = [json.loads(line)["text"] for line in file]
    else:
        texts = documents(40000, 1)
    counts = count_pieces(texts)
    for piece, count in count_pieces(PROMPTS).items():
        counts[piece] += PROMPT_WEIGHT * count
    merges = train(counts, arguments.vocab - 256 - len(SPECIAL))
    with open(os.path.join(HERE, "config.json"), encoding="utf-8") as file:
        context = json.load(file)["max_position_embeddings"]
    for name, content in (("tokenizer.json", tokenizer_json(merges)),
                          ("tokenizer_config.json", tokenizer_config(context))):
        with open(os.path.join(HERE, name), "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
