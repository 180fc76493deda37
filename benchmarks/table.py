#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""table.py RESULTS.json... [PEAK.png [SCALING.png]]: medians of a run of moxie_benchmarks as a table, the library beside its
peers (torch_peer.py's results may be among the files), and the time of a layer against its number of experts, with its bound.

Run it with --benchmark_repetitions and --benchmark_enable_random_interleaving, so that all meet the same machine. The plot needs
gnuplot.
"""
import json
import math
import statistics
import subprocess
import sys

ROUTERS = {"top_k": "token choice", "expert_choice": "expert choice", "soft": "Soft MoE"}


def medians(results):
    """(pass, case) -> who -> (GFLOP/s, fraction of the peak, fraction of the bound), in the order in which they were registered."""
    values = {}
    for run in sorted(results, key=lambda run: run.get("family_index", math.inf)):
        if run.get("run_type") == "aggregate" or run.get("error_occurred"):
            continue
        which, *name = run["name"].split("/")
        who = name.pop() if name[-1] in ("eigen", "openblas", "onednn", "torch") else "moxie"
        counters = [run.get(c, math.nan) for c in ("gflops", "peak_fraction", "bound_fraction", "real_time")]
        values.setdefault((which, "/".join(name)), {}).setdefault(who, []).append(counters)
    table = {
        key: {who: [statistics.median(column) for column in zip(*runs)] for who, runs in peers.items()}
        for key, peers in values.items()
    }
    for row in table.values():
        for counters in row.values():
            if math.isnan(counters[1]) and "moxie" in row:  # against the peak that the library met
                counters[1] = counters[0] * row["moxie"][1] / row["moxie"][0]
    return table


def print_peers(table, peers):
    print("| pass | case | GFLOP/s | of peak | of bound |" + "".join(f" {p}, of peak |" for p in peers) + " moxie / best peer |")
    print("|---" * (6 + len(peers)) + "|")
    for (which, case), row in table.items():
        if "moxie" not in row:
            continue
        gflops, peak, bound, _ = row["moxie"]
        cells = [which, case, f"{gflops:.0f}", f"{peak:.2f}", f"{bound:.2f}"]
        cells += [f"{row[p][1]:.2f}" if p in row else "" for p in peers]
        best = max((row[p][1] for p in peers if p in row), default=None)
        cells.append(f"{peak / best:.2f}" if best else "")
        print("| " + " | ".join(cells) + " |")


def scaling(table):
    """pass -> router -> experts -> (ms, ms of the bound), the routers in the order of ROUTERS."""
    out = {}
    for (which, case), row in table.items():
        if case.startswith("scaling-"):
            router, experts = case.removeprefix("scaling-").split("/")
            _, _, bound, time = row["moxie"]
            out.setdefault(which, {}).setdefault(router, {})[int(experts)] = (time, time * bound)
    return {which: {r: routers[r] for r in ROUTERS if r in routers} for which, routers in out.items()}


def print_scaling(which, routers):
    print(f"\n{which}: milliseconds, and how many times the bound\n")
    print("| experts |" + "".join(f" {ROUTERS[r]} | / bound |" for r in routers))
    print("|---" * (1 + 2 * len(routers)) + "|")
    for experts in sorted({e for by_experts in routers.values() for e in by_experts}):
        cells = [str(experts)]
        for by_experts in routers.values():
            time, bound = by_experts.get(experts, (None, None))
            cells += [f"{time:.3g}", f"{time / bound:.2f}"] if time else ["", ""]
        print("| " + " | ".join(cells) + " |")


def gnuplot(script):
    subprocess.run(["gnuplot"], input=script, text=True, check=True)


def plot_peak(path, table, peers):
    rows = [(k, r) for k, r in table.items() if "moxie" in r and k[0] in ("forward", "forward_backward")]
    data = "".join(
        f'"{case}, {which.replace("_", " + ")}" ' + " ".join(str(r[p][1]) if p in r else "NaN" for p in ["moxie", *peers]) + "\n"
        for (which, case), r in rows
    )
    columns = ", ".join(f"$data using {i + 2}:xtic(1) title '{p}'" for i, p in enumerate(["moxie", *peers]))
    gnuplot(f"""set terminal pngcairo size 1400,600
set output '{path}'
set style data histograms
set style fill solid
set yrange [0:1]
set ylabel 'fraction of the multiply-add peak'
set xtics rotate by -40
set key top right
set grid ytics
$data << END
{data}END
plot {columns}
""")


def plot_scaling(path, passes):
    blocks = []
    panels = []
    for which, routers in passes.items():
        curves = []
        for color, (router, by_experts) in enumerate(routers.items(), 1):
            name = f"${which}_{router}"
            lines = "".join(f"{e} {t} {b}\n" for e, (t, b) in sorted(by_experts.items()))
            blocks.append(f"{name} << END\n{lines}END\n")
            curves.append(f"{name} using 1:2 with linespoints lc {color} pt 7 lw 2 title '{ROUTERS[router]}'")
            curves.append(f"{name} using 1:3 with lines lc {color} dt 2 title 'its bound'")
        panels.append(f"set title '{which.replace('_', ' ')}' noenhanced\nplot " + ", ".join(curves) + "\n")
    gnuplot(f"""set terminal pngcairo size 1500,500
set output '{path}'
set logscale x 2
set logscale y
set xlabel 'experts'
set xtics 8, 4
set ylabel 'milliseconds'
set key top left
set grid
{"".join(blocks)}set multiplot layout 1,{len(panels)}
{"".join(panels)}unset multiplot
""")


def main():
    files = [name for name in sys.argv[1:] if name.endswith(".json")]
    plots = [name for name in sys.argv[1:] if name.endswith(".png")]
    if not files or len(files) + len(plots) != len(sys.argv) - 1 or len(plots) > 2:
        sys.exit(__doc__)
    runs = []
    for name in files:
        with open(name, encoding="utf-8") as file:
            text = file.read()
        if not text:
            sys.exit(f"{name} is empty: did --benchmark_filter match a benchmark? --benchmark_list_tests lists them.")
        runs += json.loads(text)["benchmarks"]
    table = medians(runs)
    peers = sorted({who for row in table.values() for who in row} - {"moxie"})
    passes = scaling(table)
    table = {key: row for key, row in table.items() if not key[1].startswith("scaling-")}
    if table:
        print_peers(table, peers)
    for which, routers in passes.items():
        print_scaling(which, routers)
    if plots and table:
        plot_peak(plots[0], table, peers)
    if len(plots) > 1 and passes:
        plot_scaling(plots[1], passes)


main()
