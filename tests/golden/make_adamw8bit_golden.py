#!/usr/bin/env python3
"""Golden of AdamW with block-wise 8-bit moments: three steps over two blocks of 4096 elements.

Rerun from the project root (needs NumPy):

    python3 tests/golden/make_adamw8bit_golden.py           writes adamw8bit.safetensors here
    python3 tests/golden/make_adamw8bit_golden.py --check   compares with what is there

Written from the description of bitsandbytes' kernel (kOptimizerStatic8bit2StateBlockwise, block
256) and its dynamic maps; it shares no code with Nibble. Arithmetic is F32 and rounds after every
operation, in the order of the formulas in engine/ops/optimizer.cpp, so that codes, absmax and
masters can be compared bit for bit. Decay comes before the step, as in PyTorch and in bitsandbytes'
CPU backend.

    map.signed, map.unsigned  F32 [256]
    master, master.final      F32 [8192]
    table                     F32 [2, 2]: learning rate scale and decay of each block
    scalars                   F32 [3, 8]: lr, beta1, beta2, eps, 1 - beta1^t, 1 - beta2^t,
                              1 / tokens, clip
    norm                      F64 [3]: what the op takes for the sum of squares of the gradients
    grad                      F32 [3, 8192]
    m.codes, v.codes          U8 [3, 8192] after each step
    m.absmax, v.absmax        F32 [3, 32]
"""
import argparse
import json
import struct
import sys

import numpy as np

PATH = "tests/golden/adamw8bit.safetensors"
STEPS, BLOCK, QUANT = 3, 4096, 256
N = 2 * BLOCK
F = np.float32


def dynamic_map(signed):
    values = [F(0), F(1)]
    for i in range(7):
        cells = 2**i if signed else 2**(i + 1)
        start, step = F(0.1), F((F(1) - F(0.1)) / F(cells))

        def boundary(k):  # torch.linspace: fused multiply-add, from the nearer end
            if k < (cells + 1) // 2:
                return F(float(step) * k + float(start))
            return F(1.0 - float(step) * (cells - k))

        for j in range(cells):
            mean = F((boundary(j) + boundary(j + 1)) / F(2))
            values.append(F(F(10.0**(i - 6)) * mean))
            if signed:
                values.append(-values[-1])
    return np.sort(np.array(values, F))


SIGNED, UNSIGNED = dynamic_map(True), dynamic_map(False)


def nearest(x, table):
    """The nearest entry by midpoint, a tie the even index; NaN gives 0."""
    middle = (table[1:] + table[:-1]) * F(0.5)
    code = np.searchsorted(middle, x)  # midpoints below x; NaN sorts last
    tie = (code < 255) & (middle[np.minimum(code, 254)] == x)
    code = np.where(tie & (code % 2 == 1), code + 1, code)
    return np.where(np.isnan(x), 0, code)


def quantize(x, table, keeps_sign):
    blocks = x.reshape(-1, QUANT)
    absmax = np.abs(blocks).max(axis=1)
    code = nearest((blocks / absmax[:, None]).ravel(), table)
    if keeps_sign:
        differs = np.signbit(table[code]) != np.signbit(x)
        code = np.where(differs, code + np.where(x > 0, 1, -1), code)
    return (code % 256).astype(np.uint8), absmax


def step(master, m, v, grad, table, scalars, norm):
    lr, beta1, beta2, eps, c1, c2, inverse_tokens, clip = scalars
    factor = float(inverse_tokens)
    if clip != 0:
        coef = float(clip) / (np.sqrt(norm) * float(inverse_tokens) + 1e-6)
        factor = factor * coef if coef < 1 else factor
    g = grad * F(factor)
    old_m = SIGNED[m[0]] * np.repeat(m[1], QUANT)
    old_v = UNSIGNED[v[0]] * np.repeat(v[1], QUANT)
    new_m = beta1 * old_m + (F(1) - beta1) * g
    new_v = beta2 * old_v + (F(1) - beta2) * (g * g)
    lr_b = np.repeat(lr * table[:, 0], BLOCK)
    keep = F(1) - lr_b * np.repeat(table[:, 1], BLOCK)
    updated = master * keep - lr_b * ((new_m / c1) / (np.sqrt(new_v / c2) + eps))
    finite = np.isfinite(g)
    new_m, new_v = np.where(finite, new_m, F(0)), np.where(finite, new_v, F(0))
    return (np.where(finite, updated, master), quantize(new_m, SIGNED, True),
            quantize(new_v, UNSIGNED, False))


def gradients(rng):
    """Rows of 256 elements that share an absmax: ordinary ones, and one for each special case."""
    g = rng.standard_normal((STEPS, N // QUANT, QUANT)).astype(F)
    g *= (F(10)**np.linspace(-6, 2, N // QUANT)[::-1]).astype(F)[:, None]
    g[:, 1] = 0
    g[0, 2] = 0  # then ordinary
    g[:, 3] *= F(1e-9)  # tiny of both signs beside one that is not
    g[:, 3, 77] = 1
    g[1, 4, 10], g[1, 4, 20], g[1, 4, 30] = np.nan, np.inf, -np.inf
    g[2, 5] = np.nan
    g[:, 6] *= F(10)**rng.uniform(-12, 0, (STEPS, QUANT)).astype(F)
    g[:, 7] = g[:, 0] * F(1e-41)  # moments and absmax below the normal numbers
    g[:, 8] = g[:, 0] * F(1e-22)  # the second moments alone
    # m = g / 2 in the first step: all midpoints of the map, and 1 as absmax.
    g[0, 9] = np.append(SIGNED[1:] + SIGNED[:-1], F(2))
    g[:, 10, ::3] = F(-0.0)
    g[:, 11] = F(-0.0)
    g[:, 12:16] = 0  # a segment's padding
    return g.reshape(STEPS, N)


def golden():
    rng = np.random.RandomState(8)  # a frozen stream
    t = {"map.signed": SIGNED, "map.unsigned": UNSIGNED}
    t["grad"] = gradients(rng)
    t["master"] = rng.standard_normal(N).astype(F)
    t["table"] = np.array([[1, 0.01], [0.5, 0]], F)
    t["scalars"] = np.array([[1e-2, 0.5, 0.5, 1e-8, 0.5, 0.5, 1, 0],
                             [2e-2, 0.9, 0.999, 1e-8, 1 - 0.9**2, 1 - 0.999**2, 1 / 37, 1.5],
                             [1e-2, 0.9, 0.999, 1e-8, 1 - 0.9**3, 1 - 0.999**3, 1 / 5, 0.1]], F)
    t["norm"] = np.array([9.0, 25.0, 49.0])  # no clip, below it, clipped
    empty = (np.zeros(N, np.uint8), np.zeros(N // QUANT, F))
    master, m, v = t["master"], empty, empty
    kept = {"m.codes": [], "m.absmax": [], "v.codes": [], "v.absmax": []}
    with np.errstate(all="ignore"):
        for i in range(STEPS):
            master, m, v = step(master, m, v, t["grad"][i], t["table"], t["scalars"][i],
                                t["norm"][i])
            for name, value in zip(kept, (*m, *v)):
                kept[name].append(value)
    t["master.final"] = master
    return t | {name: np.stack(values) for name, values in kept.items()}


def check_cases(t):
    """What the rows are there for happens."""
    m, v = t["m.codes"].reshape(STEPS, -1, QUANT), t["v.codes"].reshape(STEPS, -1, QUANT)
    assert (m[:, 1] == 255).all() and (v[:, 1] == 0).all() and (t["m.absmax"][:, 1] == 0).all()
    assert (m[:, 3] == 126).sum() > 100 and (m[:, 3] == 127).sum() > 100
    assert (m[1, 4, 10:31:10] == 127).all() and (v[1, 4, 10:31:10] == 0).all()
    assert t["m.absmax"][2, 5] == 0
    assert 0 < t["m.absmax"][1, 7] < 2.0**-128 and t["v.absmax"][1, 7] == 0
    assert 0 < t["v.absmax"][1, 8] < 2.0**-126
    assert t["m.absmax"][0, 9] == 1 and (m[0, 9, :255] % 2 == 0).all()
    assert (m[0, 10, ::3] == 126).all() and (m[0, 11] == 0).all()
    assert np.isfinite(t["master.final"]).all()


def safetensors(tensors):
    names = {"float32": "F32", "float64": "F64", "uint8": "U8"}
    header, data = {}, b""
    for name, value in tensors.items():
        raw = np.ascontiguousarray(value).tobytes()
        header[name] = {"dtype": names[str(value.dtype)], "shape": list(value.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    tensors = golden()
    check_cases(tensors)
    data = safetensors(tensors)
    if args.check:
        with open(PATH, "rb") as file:
            same = file.read() == data
        print(PATH, "is what this script makes" if same else "differs from what this script makes")
        return 0 if same else 1
    with open(PATH, "wb") as file:
        file.write(data)
    print(f"{PATH}: {len(data)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
