#!/usr/bin/env python3
"""Goldens of a tiny llama: logits, every gradient, ten AdamW steps.

Rerun from the project root (Debian: apt install python3-torch; about three seconds):

    /usr/bin/python3 tests/golden/make_llama_goldens.py            writes tests/golden/llama/
    /usr/bin/python3 tests/golden/make_llama_goldens.py --check    compares with what is there

The model is written here a second time, in plain PyTorch, from the papers' formulas and the Hugging
Face conventions (RoPE pairs (i, i + d/2), shifted labels); it shares no code with Nibble. All sums
are F64. Weights, adapters and divisors are rounded to F32 first, so that F32, F64 and BF16 engines
start from the same numbers. One plain F32 run is stored too: it shows what F32 costs.

One directory per variant: config.json and model.safetensors in the Hugging Face layout, and
  golden.safetensors   steps.* inputs of the ten steps [10, T], I32; step 0 is the batch of every
                       logit and gradient:
                         tokens, positions (restart in each document), span_begin (first row of my
                         document), labels (Hugging Face: aligned with tokens, -100 is no label),
                         targets (what the row must predict: labels shifted within the document)
                       {full,lora}.logits [T, vocab], full.logits_f32
                       {full,lora}.grad.NAME    d(sum of losses) / d(NAME), not normalised
                       {full,lora}.final.NAME   NAME after ten steps
                       lora.init.NAME           F32; lora_a [rank, in], lora_b [out, rank]
                       rope_divisors            llama3 only
  golden.json          loss sums, label counts, per-step losses (mean over labels), gradient norms
                       (of the normalised gradient, before clipping), and the recipe
NAME is Nibble's: `blk.0.attn_q.weight`, `blk.0.attn_q.lora_a`; rows of q and k stay in Hugging Face
order. AdamW decays before the step, as PyTorch does, and only matrices; norms do not decay.
head_dim x heads (32) differs from hidden (16), two query heads share one key head.
"""
import argparse
import json
import math
import os
import struct
import sys

import numpy as np
import torch

torch.set_num_threads(1)

VOCAB, HIDDEN, FF, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 40, 16, 24, 2, 4, 2, 8
RANK, ALPHA = 4, 8
STEPS, LR, BETA1, BETA2, EPS, DECAY = 10, 1e-2, 0.9, 0.999, 1e-8, 0.01
CLIP = 5.0  # some of the ten gradient norms lie above it, some below
RMS_EPS = 1e-5
ROWS = 24

# Document lengths per step; each sums to ROWS. Lengths differ so that label counts differ.
DOCUMENTS = [[11, 8, 5], [24], [3, 21], [12, 12], [7, 9, 8], [2, 5, 17], [20, 4], [6, 6, 12],
             [16, 8], [9, 2, 13]]

VARIANTS = {
    "tied": {"tied": True, "theta": 10000.0, "scaling": None, "seed": 11},
    "untied": {"tied": False, "theta": 10000.0, "scaling": None, "seed": 12},
    # theta 1000 and a context of 64 put the four frequencies of a head in all three cases of the
    # rule: kept, interpolated, divided.
    "llama3": {"tied": True, "theta": 1000.0, "seed": 13, "scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}},
}
# What each variant stores, to keep the whole below 400 KB: "llama3" differs from "tied" only in
# RoPE, so the gradients of q, k and their adapters carry the information.
STORES = {
    "tied": {"full.grad": None, "full.final": None, "lora.grad": None, "lora.final": None},
    "untied": {"full.grad": ["output", "token_embd", "blk.1.attn_q"],
               "full.final": ["output", "attn_q", "norm"], "lora.grad": [], "lora.final": []},
    "llama3": {"full.grad": ["attn_q", "attn_k"], "full.final": [],
               "lora.grad": ["attn_q", "attn_k"], "lora.final": []},
}

LINEARS = {  # Nibble's name: (Hugging Face name, out, in)
    "attn_q": ("self_attn.q_proj", HEADS * HEAD_DIM, HIDDEN),
    "attn_k": ("self_attn.k_proj", KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v": ("self_attn.v_proj", KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output": ("self_attn.o_proj", HIDDEN, HEADS * HEAD_DIM),
    "ffn_gate": ("mlp.gate_proj", FF, HIDDEN),
    "ffn_up": ("mlp.up_proj", FF, HIDDEN),
    "ffn_down": ("mlp.down_proj", HIDDEN, FF),
}


def hugging_face_name(name):
    fixed = {"token_embd.weight": "model.embed_tokens.weight",
             "output_norm.weight": "model.norm.weight", "output.weight": "lm_head.weight"}
    if name in fixed:
        return fixed[name]
    _, block, part, _ = name.split(".")
    inner = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    inner.update({ours: theirs for ours, (theirs, _, _) in LINEARS.items()})
    return f"model.layers.{block}.{inner[part]}.weight"


def write_safetensors(path, tensors):
    names = {np.dtype("float64"): "F64", np.dtype("float32"): "F32", np.dtype("int32"): "I32"}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, value in tensors.items():
        header[name] = {"dtype": names[value.dtype], "shape": list(value.shape),
                        "data_offsets": [offset, offset + value.nbytes]}
        offset += value.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in tensors.values():
            file.write(np.ascontiguousarray(value).tobytes())


def read_safetensors(path):
    types = {"F64": np.float64, "F32": np.float32, "I32": np.int32}
    with open(path, "rb") as file:
        data = file.read()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    header.pop("__metadata__")
    result = {}
    for name, entry in header.items():
        begin, end = (8 + size + at for at in entry["data_offsets"])
        result[name] = np.frombuffer(data[begin:end], types[entry["dtype"]]).reshape(entry["shape"])
    return result


def make_weights(random, tied):
    """All base weights by Nibble's names, rounded to F32, held in F64."""
    def matrix(rows, columns):
        return random.normal(0, 1 / math.sqrt(columns), (rows, columns))

    def norm():
        return 1 + random.normal(0, 0.2, HIDDEN)

    weights = {"token_embd.weight": random.normal(0, 0.5, (VOCAB, HIDDEN))}
    for block in range(LAYERS):
        weights[f"blk.{block}.attn_norm.weight"] = norm()
        weights[f"blk.{block}.ffn_norm.weight"] = norm()
        for name, (_, rows, columns) in LINEARS.items():
            weights[f"blk.{block}.{name}.weight"] = matrix(rows, columns)
    weights["output_norm.weight"] = norm()
    if not tied:
        weights["output.weight"] = matrix(VOCAB, HIDDEN)
    return {name: torch.from_numpy(value.astype(np.float32)).double()
            for name, value in weights.items()}


def make_adapters(random):
    adapters = {}
    for block in range(LAYERS):
        for name, (_, rows, columns) in LINEARS.items():
            bound = 1 / math.sqrt(columns)
            adapters[f"blk.{block}.{name}.lora_a"] = random.uniform(-bound, bound, (RANK, columns))
            adapters[f"blk.{block}.{name}.lora_b"] = random.normal(0, 0.1, (rows, RANK))
    return {name: torch.from_numpy(value.astype(np.float32)).double()
            for name, value in adapters.items()}


def make_batches(random):
    """The ten packed batches; a document starts with 1/5 to 3/5 without label, like a prompt."""
    columns = {name: [] for name in ("tokens", "positions", "span_begin", "labels", "targets")}
    for step, lengths in enumerate(DOCUMENTS):
        tokens = random.randint(0, VOCAB, ROWS)
        positions, begins, labels, targets = [], [], [], []
        for length in lengths:
            begin = len(positions)
            prompt = max(1, length * (step % 3 + 1) // 5)
            own = [-100 if i < prompt else int(tokens[begin + i]) for i in range(length)]
            positions += range(length)
            begins += [begin] * length
            labels += own
            targets += own[1:] + [-100]
        for name, row in zip(columns, (tokens, positions, begins, labels, targets)):
            columns[name].append(row)
    return {name: np.array(rows, np.int32) for name, rows in columns.items()}


def rope_divisors(theta, scaling):
    """Divisors of the inverse frequencies, in F32 as GGUF's rope_freqs.weight stores them."""
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    divisors = []
    for i in range(HEAD_DIM // 2):
        wavelength = 2 * math.pi * theta ** (2 * i / HEAD_DIM)
        if wavelength < context / high:
            divisors.append(1.0)
        elif wavelength > context / low:
            divisors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def rms_norm(x, weight):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + RMS_EPS))


def rotate(x, cos, sin):
    """x [rows, heads, head_dim]; pairs (i, i + head_dim / 2)."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def forward(weights, adapters, batch, theta, divisors):
    """Logits [rows, vocab] of one packed batch; adapters may be None."""
    dtype = weights["token_embd.weight"].dtype
    frequencies = torch.tensor([theta ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)],
                               dtype=torch.float64)
    if divisors is not None:
        frequencies = frequencies / torch.from_numpy(divisors).double()
    positions = torch.from_numpy(batch["positions"]).double()
    angles = (positions[:, None] * frequencies)[:, None, :]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    span = torch.from_numpy(batch["span_begin"])
    rows = torch.arange(len(span))
    visible = (rows[None, :] <= rows[:, None]) & (span[None, :] == span[:, None])

    def linear(x, block, name):
        y = x @ weights[f"blk.{block}.{name}.weight"].T
        if adapters is not None:
            down = x @ adapters[f"blk.{block}.{name}.lora_a"].T
            y = y + (ALPHA / RANK) * (down @ adapters[f"blk.{block}.{name}.lora_b"].T)
        return y

    x = weights["token_embd.weight"][torch.from_numpy(batch["tokens"]).long()]
    for block in range(LAYERS):
        normed = rms_norm(x, weights[f"blk.{block}.attn_norm.weight"])
        q = rotate(linear(normed, block, "attn_q").view(-1, HEADS, HEAD_DIM), cos, sin)
        k = rotate(linear(normed, block, "attn_k").view(-1, KV_HEADS, HEAD_DIM), cos, sin)
        v = linear(normed, block, "attn_v").view(-1, KV_HEADS, HEAD_DIM)
        k = k.repeat_interleave(HEADS // KV_HEADS, 1)
        v = v.repeat_interleave(HEADS // KV_HEADS, 1)
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(HEAD_DIM)
        shares = scores.masked_fill(~visible, -math.inf).softmax(-1)
        attended = torch.einsum("hij,jhd->ihd", shares, v).reshape(len(span), -1)
        x = x + linear(attended, block, "attn_output")
        normed = rms_norm(x, weights[f"blk.{block}.ffn_norm.weight"])
        gate = linear(normed, block, "ffn_gate")
        gated = gate * torch.sigmoid(gate) * linear(normed, block, "ffn_up")
        x = x + linear(gated, block, "ffn_down")
    head = weights.get("output.weight", weights["token_embd.weight"])
    return rms_norm(x, weights["output_norm.weight"]) @ head.T


def loss_sum(logits, targets):
    targets = torch.from_numpy(targets).long()
    rows = torch.nonzero(targets >= 0).squeeze(1)
    return -logits[rows].log_softmax(-1)[torch.arange(len(rows)), targets[rows]].sum()


def batch_of(batches, step):
    return {name: value[step] for name, value in batches.items()}


def gradients(weights, adapters, batch, variant, divisors):
    """Logits, loss sum and its gradient by name: by adapters, or by all weights without them."""
    leaves = {name: value.clone().requires_grad_() for name, value in (adapters or weights).items()}
    logits = forward(weights if adapters else leaves, leaves if adapters else None, batch,
                     variant["theta"], divisors)
    loss = loss_sum(logits, batch["targets"])
    loss.backward()
    return logits.detach(), loss.item(), {name: leaf.grad for name, leaf in leaves.items()}


def train(weights, adapters, batches, variant, divisors):
    """Ten AdamW steps by the formulas; torch.optim.AdamW walks along and must agree."""
    own = {name: value.clone() for name, value in (adapters or weights).items()}
    shadow = {name: value.clone().requires_grad_() for name, value in own.items()}
    groups = [{"params": [p for p in shadow.values() if p.dim() == 2], "weight_decay": DECAY},
              {"params": [p for p in shadow.values() if p.dim() == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=LR,
                                  betas=(BETA1, BETA2), eps=EPS)
    first = {name: torch.zeros_like(value) for name, value in own.items()}
    second = {name: torch.zeros_like(value) for name, value in own.items()}
    losses, norms = [], []
    for step in range(STEPS):
        batch = batch_of(batches, step)
        labels = int((batch["targets"] >= 0).sum())
        _, loss, grads = gradients(weights if adapters else own, own if adapters else None, batch,
                                   variant, divisors)
        norm = math.sqrt(sum((g / labels).pow(2).sum().item() for g in grads.values()))
        scale = min(1.0, CLIP / (norm + 1e-6)) / labels
        losses.append(loss / labels)
        norms.append(norm)
        for name, value in own.items():
            g = grads[name] * scale
            shadow[name].grad = g.clone()
            first[name] = BETA1 * first[name] + (1 - BETA1) * g
            second[name] = BETA2 * second[name] + (1 - BETA2) * g * g
            corrected = second[name] / (1 - BETA2 ** (step + 1))
            decayed = value * (1 - LR * DECAY) if value.dim() == 2 else value
            own[name] = decayed - LR * (first[name] / (1 - BETA1 ** (step + 1))) / (
                corrected.sqrt() + EPS)
        optimizer.step()
    for name, value in own.items():
        assert torch.allclose(value, shadow[name].detach(), rtol=0, atol=1e-13), name
    return own, losses, norms


def check_packing(weights, batch, variant, divisors, logits):
    """Packed logits are those of each document alone."""
    for begin in np.unique(batch["span_begin"]):
        rows = batch["span_begin"] == begin
        alone = {name: value[rows] for name, value in batch.items()}
        alone["span_begin"] = np.zeros_like(alone["span_begin"])
        assert torch.allclose(forward(weights, None, alone, variant["theta"], divisors),
                              logits[torch.from_numpy(rows)], rtol=0, atol=1e-12)


def config_json(variant):
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "intermediate_size": FF, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "max_position_embeddings": 128, "rms_norm_eps": RMS_EPS, "rope_theta": variant["theta"],
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": variant["tied"], "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "float32"}
    if variant["scaling"]:
        config["rope_scaling"] = variant["scaling"]
    return config


def make_variant(name):
    """All files of one variant: {"model": tensors, "golden": tensors, "json": facts}."""
    variant = VARIANTS[name]
    random = np.random.RandomState(variant["seed"])  # MT19937: the same numbers in every numpy
    weights, adapters = make_weights(random, variant["tied"]), make_adapters(random)
    batches = make_batches(random)
    divisors = rope_divisors(variant["theta"], variant["scaling"]) if variant["scaling"] else None
    batch = batch_of(batches, 0)

    golden = {f"steps.{key}": value for key, value in batches.items()}
    if divisors is not None:
        golden["rope_divisors"] = divisors
    facts = {"vocab": VOCAB, "rank": RANK, "alpha": ALPHA, "lr": LR, "beta1": BETA1, "beta2": BETA2,
             "eps": EPS, "weight_decay": DECAY, "clip": CLIP, "decay_norms": False,
             "label_counts": [int((row >= 0).sum()) for row in batches["targets"]]}
    single = {key: value.float() for key, value in weights.items()}
    logits_f32 = forward(single, None, batch, variant["theta"], divisors)
    golden["full.logits_f32"] = logits_f32.numpy()
    for key, value in adapters.items():
        golden[f"lora.init.{key}"] = value.float().numpy()

    for method, own in (("full", None), ("lora", adapters)):
        logits, loss, grads = gradients(weights, own, batch, variant, divisors)
        if method == "full":
            check_packing(weights, batch, variant, divisors, logits)
            facts["full_logits_f32_max_error"] = (logits_f32.double() - logits).abs().max().item()
        final, losses, norms = train(weights, own, batches, variant, divisors)
        golden[f"{method}.logits"] = logits.numpy()
        facts[method] = {"loss_sum": loss, "step_losses": losses, "grad_norms": norms}
        for part, tensors in (("grad", grads), ("final", final)):
            wanted = STORES[name][f"{method}.{part}"]
            for key, value in tensors.items():
                if wanted is None or any(word in key for word in wanted):
                    golden[f"{method}.{part}.{key}"] = value.numpy()
    model = {hugging_face_name(key): value.float().numpy() for key, value in weights.items()}
    return {"model": model, "golden": golden, "json": facts}


def compare(name, path, files):
    """True when the stored files hold the same tensors to the last few bits."""
    stored = json.load(open(os.path.join(path, "golden.json")))
    flat = lambda facts: np.array(facts["full"]["step_losses"] + facts["lora"]["grad_norms"])
    worst = float(np.abs(flat(stored) - flat(files["json"])).max())
    for part in ("model", "golden"):
        old = read_safetensors(os.path.join(path, part + ".safetensors"))
        if old.keys() != files[part].keys():
            print(f"{name}/{part}.safetensors: holds other tensors than the script makes")
            return False
        for key, value in files[part].items():
            error = float(np.abs(old[key].astype(np.float64) - value).max())
            if key != "full.logits_f32":  # its rounding belongs to the machine
                worst = max(worst, error)
    print(f"{name}: largest difference {worst:.1e}")
    return worst < 1e-10


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    arguments = parser.parse_args()
    root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "llama")
    good = True
    for name in VARIANTS:
        files, path = make_variant(name), os.path.join(root, name)
        if arguments.check:
            good = compare(name, path, files) and good
            continue
        os.makedirs(path, exist_ok=True)
        write_safetensors(os.path.join(path, "model.safetensors"), files["model"])
        write_safetensors(os.path.join(path, "golden.safetensors"), files["golden"])
        for file, content in (("golden", files["json"]), ("config", config_json(VARIANTS[name]))):
            with open(os.path.join(path, file + ".json"), "w") as out:
                json.dump(content, out, indent=2)
                out.write("\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
