#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""torch_peer.py OUT.json [--threads N] [--seconds S]: the cases of moxie_benchmarks with PyTorch, where it is installed.

For each expert index_select, three linear layers and index_add, the plan given; backward by autograd. The result is in the format
of Google Benchmark, so that table.py takes it beside the library's: run both on the same machine, one after the other.
"""
import argparse
import json
import statistics
import time

import torch
from torch.nn.functional import linear, silu

# benchmarks/cases.hpp: name, dim, hidden, experts, top_k, tokens
CASES = [
    ("S/2-8E2A", 384, 1536, 8, 2, 4096),
    ("B/2-8E2A", 768, 3072, 8, 2, 2048),
    ("S/2-16E2A", 384, 1536, 16, 2, 4096),
    ("XL/2-8E2A", 1152, 4608, 8, 2, 1024),
    ("S/2-64E2A", 384, 1536, 64, 2, 4096),
    ("fine-64E8A", 768, 384, 64, 8, 2048),
    ("S/2-8E2A-T256", 384, 1536, 8, 2, 256),
    ("S/2-8E2A-T64", 384, 1536, 8, 2, 64),
]


def layer(x, weights, plan):
    """y = Σ w f(x) over the rows of each expert."""
    y = torch.zeros_like(x)
    for (gate, up, down), (tokens, weight) in zip(weights, plan):
        if len(tokens) > 0:
            rows = x.index_select(0, tokens)
            h = linear(silu(linear(rows, gate)) * linear(rows, up), down)
            y.index_add_(0, tokens, h * weight)
    return y


def make_plan(tokens, experts, top_k):
    """Random choices, grouped by expert."""
    chosen = torch.rand(tokens, experts).topk(top_k).indices
    weight = torch.rand(tokens, top_k)
    plan = []
    for e in range(experts):
        token, choice = (chosen == e).nonzero(as_tuple=True)
        plan.append((token, weight[token, choice].unsqueeze(1)))
    return plan


def median_seconds(step, seconds):
    step()
    times = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 3:
        before = time.perf_counter()
        step()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    if options.threads > 0:
        torch.set_num_threads(options.threads)
    torch.manual_seed(42)
    runs = []
    for name, dim, hidden, experts, top_k, tokens in CASES:
        shapes = ((hidden, dim), (hidden, dim), (dim, hidden))
        weights = [[(torch.randn(shape) / shape[1] ** 0.5).requires_grad_() for shape in shapes] for _ in range(experts)]
        x = torch.randn(tokens, dim, requires_grad=True)
        dy = torch.randn(tokens, dim)
        plan = make_plan(tokens, experts, top_k)

        def forward():
            with torch.no_grad():
                layer(x, weights, plan)

        def forward_backward():
            layer(x, weights, plan).backward(dy)

        for which, step, factor in (("forward", forward, 6), ("forward_backward", forward_backward, 18)):
            seconds = median_seconds(step, options.seconds)
            gflops = factor * tokens * top_k * dim * hidden / seconds / 1e9
            runs.append({"name": f"{which}/{name}/torch", "real_time": seconds * 1e3, "gflops": gflops})
            print(f"{which}/{name}/torch: {seconds * 1e3:.2f} ms, {gflops:.0f} GFLOP/s")
    with open(options.out, "w", encoding="utf-8") as file:
        json.dump({"context": {"torch": torch.__version__, "threads": torch.get_num_threads()}, "benchmarks": runs}, file, indent=1)


main()
