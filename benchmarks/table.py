#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""table.py RESULTS.json [PLOT.png]: medians of a run of moxie_benchmarks as a table, the library beside its peers.

Run it with --benchmark_repetitions and --benchmark_enable_random_interleaving, so that all meet the same machine. The plot needs
gnuplot.
"""
import json
import statistics
import subprocess
import sys


def medians(results):
    """(pass, case) -> who -> (GFLOP/s, fraction of the peak, fraction of the bound)."""
    values = {}
    for run in results["benchmarks"]:
        if run.get("run_type") == "aggregate" or run.get("error_occurred"):
            continue
        which, *name = run["name"].removesuffix("/real_time").split("/")
        who = name.pop() if name[-1] in ("eigen", "openblas", "onednn") else "moxie"
        counters = [run[c] for c in ("gflops", "peak_fraction", "bound_fraction")]
        values.setdefault((which, "/".join(name)), {}).setdefault(who, []).append(counters)
    return {
        key: {who: [statistics.median(column) for column in zip(*runs)] for who, runs in peers.items()}
        for key, peers in values.items()
    }


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    with open(sys.argv[1], encoding="utf-8") as file:
        table = medians(json.load(file))
    peers = sorted({who for row in table.values() for who in row} - {"moxie"})
    print("| pass | case | GFLOP/s | of peak | of bound |" + "".join(f" {p}, of peak |" for p in peers) + " moxie / best peer |")
    print("|---" * (6 + len(peers)) + "|")
    for (which, case), row in table.items():
        if "moxie" not in row:
            continue
        gflops, peak, bound = row["moxie"]
        cells = [which, case, f"{gflops:.0f}", f"{peak:.2f}", f"{bound:.2f}"]
        cells += [f"{row[p][1]:.2f}" if p in row else "" for p in peers]
        best = max((row[p][1] for p in peers if p in row), default=None)
        cells.append(f"{peak / best:.2f}" if best else "")
        print("| " + " | ".join(cells) + " |")
    if len(sys.argv) == 3:
        rows = [(k, r) for k, r in table.items() if "moxie" in r and k[0] in ("forward", "forward_backward")]
        data = "".join(
            f'"{case}, {which.replace("_", " + ")}" ' + " ".join(str(r[p][1]) if p in r else "NaN" for p in ["moxie", *peers]) + "\n"
            for (which, case), r in rows
        )
        columns = ", ".join(f"$data using {i + 2}:xtic(1) title '{p}'" for i, p in enumerate(["moxie", *peers]))
        script = f"""set terminal pngcairo size 1400,600
set output '{sys.argv[2]}'
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
"""
        subprocess.run(["gnuplot"], input=script, text=True, check=True)


main()
