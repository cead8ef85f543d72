#!/usr/bin/env python3
"""Seconds from the start of `nibble finetune` to its first printed loss, an NF4 file in page cache.

The file costs no download: it has the tensors, types and offsets that `gguf-convert --type nf4`
writes for a shape (a Hugging Face config.json), with drawn values. Matrices of one shape share
their bytes, rows of the BF16 embedding and head repeat after 256, norms are one. Metadata and
tokenizer are those of a small NF4 file; unused tokens fill the vocabulary up. Llama-3-8B: 5.7 GB.

    gguf-convert SmolLM2-135M-Instruct.Q4_1.gguf small.gguf     # see smollm2_agreement.py
    python3 tests/peers/start_time.py --work W --shape llama3-8b.json --small small.gguf \\
        --nibble build/tools/nibble --backend cuda

makes W/llama3-8b.gguf and times three runs over 17 short rows: 16 make the only step, one is held
out. Two lines have a loss: that of the held-out row and, after the answers before training, that of
step 1, at which a run is killed. Before each run the file is read; how long that took shows that it
was in the page cache. Flags after `--` go to `nibble finetune`; --blocks N is for a trial.
"""
import argparse
import json
import os
import random
import re
import statistics
import struct
import subprocess
import time

BLOCK, GROUP, ALIGNMENT = 64, 256, 32  # weights of an absmax, absmaxes of a scale, bytes
ABSMAX, SPREAD = 0.05, 0.02  # each absmax lies within ABSMAX +- SPREAD
DRAWN_ROWS = 256  # of the embedding and the head; a vocabulary is a multiple of them
F32, I8, BF16 = 0, 24, 30  # ggml's numbers for tensor types
SHAPE_KEYS = {"block_count": "num_hidden_layers", "context_length": "max_position_embeddings",
              "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
              "attention.head_count": "num_attention_heads", "vocab_size": "vocab_size",
              "attention.head_count_kv": "num_key_value_heads", "rope.freq_base": "rope_theta",
              "attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.dimension_count": "head"}


def string(text):
    """As GGUF stores it."""
    return struct.pack("<Q", len(text)) + text.encode()


def metadata(path, shape):
    """Number of keys in the NF4 file at `path`, and their bytes, changed to `shape`."""
    with open(path, "rb") as file:
        data = bytearray(file.read())
    if string("nibble.quant.type") not in data:
        raise SystemExit(f"{path} is not what gguf-convert --type nf4 writes")
    del data[data.index(string("token_embd.weight")):]  # the tensors, of which it is the first

    def value(key):  # behind the key and its type
        return data.index(string(key)) + len(string(key)) + 4

    for key, name in SHAPE_KEYS.items():
        form = "<f" if isinstance(shape[name], float) else "<I"
        struct.pack_into(form, data, value(f"llama.{key}"), shape[name])
    for key, more in (("token_type", lambda i: struct.pack("<i", 5)),  # 5: not used
                      ("tokens", lambda i: string(f"<unused {i}>"))):
        at = value(f"tokenizer.ggml.{key}") + 4  # behind the type of the items
        count, = struct.unpack_from("<Q", data, at)
        end = at + 8
        for _ in range(count):
            end += 4 if key == "token_type" else 8 + struct.unpack_from("<Q", data, end)[0]
        data[end:end] = b"".join(more(i) for i in range(count, shape["vocab_size"]))
        struct.pack_into("<Q", data, at, max(count, shape["vocab_size"]))
    return struct.unpack_from("<Q", data, 16)[0], data[24:]


def tensors(shape):
    """(name, extents from the fastest, type, bytes, how often they follow each other), in order."""
    hidden, feed_forward = shape["hidden_size"], shape["intermediate_size"]
    kv = shape["head"] * shape["num_key_value_heads"]
    matrices = {"attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
                "attn_output": (hidden, hidden), "ffn_gate": (feed_forward, hidden),
                "ffn_up": (feed_forward, hidden), "ffn_down": (hidden, feed_forward)}
    draw, planes = random.Random(0), {}
    for rows, cols in matrices.values():
        blocks = rows * cols // BLOCK
        groups = -(-blocks // GROUP)
        planes[rows, cols] = [
            (".codes", (cols // 2, rows), I8, draw.randbytes(rows * cols // 2), 1),
            (".absmax", (blocks,), I8, draw.randbytes(blocks), 1),
            (".absmax_scale", (groups,), F32, struct.pack("<f", SPREAD) * groups, 1),
            (".absmax_offset", (1,), F32, struct.pack("<f", ABSMAX), 1)]
    norm = (hidden,), F32, struct.pack("<f", 1) * hidden, 1

    def bf16():  # magnitudes of 2^-7 to 2^-5: the high byte has the sign and half of the exponent
        drawn = bytearray(2 * DRAWN_ROWS * hidden)
        drawn[0::2] = draw.randbytes(DRAWN_ROWS * hidden)
        drawn[1::2] = bytes(draw.choices(b"\x3c\xbc", k=DRAWN_ROWS * hidden))
        return (hidden, shape["vocab_size"]), BF16, drawn, shape["vocab_size"] // DRAWN_ROWS

    yield "token_embd.weight", *bf16()
    for block in range(shape["num_hidden_layers"]):
        for member, matrix in matrices.items():
            if member in ("attn_q", "ffn_gate"):
                yield f"blk.{block}.{member.split('_')[0]}_norm.weight", *norm
            for suffix, *plane in planes[matrix]:
                yield f"blk.{block}.{member}.weight{suffix}", *plane
    yield "output_norm.weight", *norm
    if not shape["tie_word_embeddings"]:
        yield "output.weight", *bf16()


def write_model(path, shape, small):
    keys, encoded = metadata(small, shape)
    infos, data, offset = [], [], 0
    for name, extents, kind, piece, times in tensors(shape):
        infos.append(string(name) + struct.pack(f"<I{len(extents)}QIQ", len(extents), *extents,
                                                kind, offset))
        padding = bytes(-len(piece) * times % ALIGNMENT)
        data += [piece] * times + [padding]
        offset += len(piece) * times + len(padding)
    header = b"".join([b"GGUF", struct.pack("<IQQ", 3, len(infos), keys), encoded, *infos])
    with open(path, "wb") as file:
        file.writelines([header, bytes(-len(header) % ALIGNMENT), *data])
        file.flush()
        os.fsync(file.fileno())  # or the first run shares the disk with what is still unwritten


def read_seconds(path):
    begin, piece = time.perf_counter(), bytearray(1 << 24)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(piece):
            pass
    return time.perf_counter() - begin


def loss_seconds(command):
    """{beginning of a line with a loss: seconds from the start}, up to the first step."""
    found, output, begin = {}, "", time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in child.stdout:
        seconds = time.perf_counter() - begin
        output += f"{seconds:8.3f}  {line}"
        if re.search(r"\bloss \d+\.\d", line):
            found[line.split("  ")[0]] = seconds
        if line.startswith("step 1/"):
            break
    child.kill()
    child.wait()
    print(output, end="", flush=True)
    if "step 1/1" not in found:
        raise SystemExit(f"{' '.join(command)} ended before the loss of its first step")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("work", "shape", "small", "nibble", "backend"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--blocks", type=int, help="fewer than the shape has")
    parser.add_argument("more", nargs="*", help="flags of nibble finetune, after --")
    options = parser.parse_args()
    with open(options.shape, encoding="utf-8") as file:
        shape = json.load(file)
    shape["num_hidden_layers"] = options.blocks or shape["num_hidden_layers"]
    shape["head"] = shape["hidden_size"] // shape["num_attention_heads"]
    os.makedirs(options.work, exist_ok=True)
    model = f"{options.work}/{os.path.basename(options.shape).removesuffix('.json')}.gguf"
    begin = time.perf_counter()
    write_model(model, shape, options.small)
    print(f"{model}: {os.path.getsize(model):,} bytes in {time.perf_counter() - begin:.1f} s")
    with open(f"{options.work}/rows.jsonl", "w", encoding="utf-8") as file:
        for i in range(1, 18):
            print(json.dumps({"prompt": f"{i} and {i} is", "completion": f" {2 * i}."}), file=file)
    command = [options.nibble, "finetune", "-m", model, "-d", f"{options.work}/rows.jsonl",
               "--eval-split", "1", "--steps", "1", "--rank", "16", "--backend", options.backend,
               "-o", f"{options.work}/run", "--overwrite", *options.more]
    runs = []
    for _ in range(3):
        print(f"{model}: read in {read_seconds(model):.2f} s")
        runs.append(loss_seconds(command))
    for line in runs[0]:
        times = [run[line] for run in runs]
        print(f"{line}: {', '.join(f'{t:.2f}' for t in times)} s from the start, "
              f"median {statistics.median(times):.2f} s")


if __name__ == "__main__":
    main()
