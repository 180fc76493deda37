#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""torch_peer.py OUT.json [--threads N] [--seconds S]: the cases of moxie_benchmarks with PyTorch, where it is installed.
torch_peer.py OUT.json --device cuda [--tokens T]: on a device, in float and with experts in bfloat16.

For each expert index_select, three linear layers and index_add, the plan given; backward by autograd. On a device in bfloat16 also
with torch.nn.functional.grouped_mm, all experts at once. The result is in the format of Google Benchmark, so that table.py takes
it beside the library's: run both on the same machine, one after the other.
"""
import argparse
import json
import statistics
import time

import torch
import torch.nn.functional
from torch.nn.functional import linear, silu

grouped_mm = getattr(torch.nn.functional, "grouped_mm", None)

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
    ("S/2-8E2A-T16", 384, 1536, 8, 2, 16),
]


def layer(x, weights, plan):
    """y = Σ w f(x) over the rows of each expert."""
    y = torch.zeros_like(x)
    for gate, up, down, (tokens, weight) in zip(*weights, plan):
        if len(tokens) > 0:
            rows = x.index_select(0, tokens).to(gate.dtype)
            h = linear(silu(linear(rows, gate)) * linear(rows, up), down)
            y.index_add_(0, tokens, h * weight)
    return y


def grouped_layer(x, weights, plan):
    """The same, a product of all experts a call."""
    gate, up, down = (w.transpose(1, 2) for w in weights)
    tokens = torch.cat([tokens for tokens, _ in plan])
    weight = torch.cat([weight for _, weight in plan])
    ends = torch.tensor([len(tokens) for tokens, _ in plan], device=x.device).cumsum(0).int()
    rows = x.index_select(0, tokens).to(gate.dtype)
    h = grouped_mm(silu(grouped_mm(rows, gate, offs=ends)) * grouped_mm(rows, up, offs=ends), down, offs=ends)
    return torch.zeros_like(x).index_add_(0, tokens, h * weight)


def make_plan(tokens, experts, top_k, device):
    """Random choices, grouped by expert."""
    chosen = torch.rand(tokens, experts, device=device).topk(top_k).indices
    weight = torch.rand(tokens, top_k, device=device)
    plan = []
    for e in range(experts):
        token, choice = (chosen == e).nonzero(as_tuple=True)
        plan.append((token, weight[token, choice].unsqueeze(1)))
    return plan


def median_seconds(step, seconds, wait):
    step()
    times = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times) < 3:
        wait()
        before = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=0, help="instead of each case's own")
    options = parser.parse_args()
    if options.threads > 0:
        torch.set_num_threads(options.threads)
    torch.manual_seed(42)
    on_device = options.device != "cpu"
    wait = torch.cuda.synchronize if on_device else lambda: None
    runs = []
    for name, dim, hidden, experts, top_k, tokens in CASES:
        tokens = options.tokens or tokens
        shapes = ((hidden, dim), (hidden, dim), (dim, hidden))
        x = torch.randn(tokens, dim, device=options.device, requires_grad=True)
        dy = torch.randn(tokens, dim, device=options.device)
        plan = make_plan(tokens, experts, top_k, options.device)
        ways = [("torch", torch.float32, layer)]
        if on_device:
            ways.append(("torch_bf16", torch.bfloat16, layer))
            if grouped_mm is not None:
                ways.append(("torch_bf16_grouped", torch.bfloat16, grouped_layer))
        for way, dtype, run in ways:
            weights = [torch.randn(experts, *shape, device=options.device).div(shape[1] ** 0.5).to(dtype) for shape in shapes]
            leaves = [[w.clone().requires_grad_() for w in ws] if run is layer else ws.requires_grad_() for ws in weights]

            def forward():
                with torch.no_grad():
                    run(x, leaves, plan)

            def forward_backward():
                run(x, leaves, plan).backward(dy)

            for which, step, factor in (("forward", forward, 6), ("forward_backward", forward_backward, 18)):
                seconds = median_seconds(step, options.seconds, wait)
                gflops = factor * tokens * top_k * dim * hidden / seconds / 1e9
                runs.append({"name": f"{which}/{name}/{way}", "real_time": seconds * 1e3, "gflops": gflops})
                print(f"{which}/{name}/{way}: {seconds * 1e3:.3f} ms, {gflops:.0f} GFLOP/s")
    with open(options.out, "w", encoding="utf-8") as file:
        json.dump({"context": {"torch": torch.__version__, "threads": torch.get_num_threads()}, "benchmarks": runs}, file, indent=1)


main()
