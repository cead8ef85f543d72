#!/usr/bin/env python3
"""AdamW with 8-bit moments: bitsandbytes on a GPU against the NumPy twin of Nibble's op.

The twin (tests/golden/make_adamw8bit_golden.py) is what Nibble's CPU and CUDA kernels are held to
bit for bit, so that comparing it compares them. Both take 20 steps over 1,048,576 values whose
gradients span four orders of magnitude. After each step bitsandbytes is given the twin's state:
differences are those of one step.

    python3 tests/peers/adamw8bit_agreement.py [--device cuda]

tests/peers/README.md names the packages; bitsandbytes 0.50.2 needs torch 2. Exit status 0: of no
moment do more than ten codes of a step differ, none by more than one, absmax by at most 3e-7.
"""
import argparse
import importlib.util
import sys

import bitsandbytes
import bitsandbytes.functional
import numpy as np
import torch

VALUES, STEPS = 1 << 20, 20


def load_twin():
    path = "tests/golden/make_adamw8bit_golden.py"
    spec = importlib.util.spec_from_file_location("twin", path)
    twin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(twin)
    return twin


def on_host(tensor):
    return tensor.detach().cpu().numpy().ravel()


def compare(name, ours, theirs):
    """Codes that differ, by how much at most, and the largest relative difference of absmax."""
    apart = np.abs(ours[0].astype(int) - on_host(theirs[0]).astype(int))
    absmax = np.abs(on_host(theirs[1]) / np.maximum(ours[1], 1e-38) - 1).max()
    return name, int((apart > 0).sum()), int(apart.max()), float(absmax)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    twin = load_twin()
    twin.N = VALUES
    print(f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}, {device}")
    for signed, table in ((True, twin.SIGNED), (False, twin.UNSIGNED)):
        theirs = on_host(bitsandbytes.functional.create_dynamic_map(signed=signed))
        if not np.array_equal(theirs.astype(np.float32), table):
            print("the maps differ")
            return 1
    rng = np.random.RandomState(1)
    master = rng.standard_normal(VALUES).astype(np.float32)
    empty = (np.zeros(VALUES, np.uint8), np.zeros(VALUES // twin.QUANT, np.float32))
    m, v = empty, empty
    parameter = torch.nn.Parameter(torch.from_numpy(master.copy()).to(device))
    optimizer = bitsandbytes.optim.AdamW8bit([parameter], lr=1e-2, weight_decay=0.01)
    table = np.tile(np.array([[1, 0.01]], np.float32), (VALUES // twin.BLOCK, 1))
    worst = {"m": (0, 0, 0.0), "v": (0, 0, 0.0)}
    for k in range(1, STEPS + 1):
        scale = 10 ** rng.uniform(-4, 0, VALUES)
        gradient = (rng.standard_normal(VALUES) * scale).astype(np.float32)
        parameter.grad = torch.from_numpy(gradient.copy()).to(device)
        optimizer.step()
        scalars = np.array([1e-2, 0.9, 0.999, 1e-8, 1 - 0.9**k, 1 - 0.999**k, 1, 0], np.float32)
        master, m, v = twin.step(master, m, v, gradient, table, scalars, 1.0)
        state = optimizer.state[parameter]
        pairs = (("m", m, (state["state1"], state["absmax1"])),
                 ("v", v, (state["state2"], state["absmax2"])))
        for name, ours, theirs in pairs:
            _, codes, most, absmax = compare(name, ours, theirs)
            worst[name] = tuple(np.maximum(worst[name], (codes, most, absmax)))
            theirs[0].copy_(torch.from_numpy(ours[0]).view(theirs[0].shape))
            theirs[1].copy_(torch.from_numpy(ours[1]).view(theirs[1].shape))
        parameter.data.copy_(torch.from_numpy(master))
    for name, (codes, most, absmax) in worst.items():
        print(f"{name}: at most {codes:.0f} of {VALUES:,} codes of a step differ, by at most "
              f"{most:.0f}; absmax by at most {absmax:.1e}")
    good = all(codes <= 10 and most <= 1 and absmax <= 3e-7 for codes, most, absmax in worst.values())
    print("agree" if good else "DIFFER")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
