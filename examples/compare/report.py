#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Tables and plots of `compare run` and `compare time`.

    report.py FOLDER                           writes FOLDER/report.html and its plots, from results.jsonl and times.jsonl
    report.py FOLDER --page PAGE.md            writes the tables into a page
    report.py FOLDER --page PAGE.md --check    fails if the page's tables are not those of the results

There need be no times.jsonl.

In a page a table stands between `<!-- report: KIND GROUP -->` and `<!-- end -->`; the kinds are "table", "routing",
"claims" and "bits".
A mean over seeds is followed by its range, or by ± half of its 95% interval by Student's t, with the variance between seeds
pooled over all runs of as many steps; that of a difference pairs runs of one seed, and pools what is left when each run's and each
seed's mean is taken away. The plots need gnuplot.
"""
import argparse
import html
import json
import math
import pathlib
import re
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent

# 97.5% quantiles of Student's t for 1, 2, ... degrees of freedom; beyond them the last is on the safe side.
T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
     2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


class Metric:
    def __init__(self, name, value, digits, better):
        self.name, self.value, self.digits, self.better = name, value, digits, better  # better: -1 less, 1 more, 0 neither

    def show(self, x, half=math.nan, sign=False):
        text = f"{x:+.{self.digits}f}" if sign else f"{x:.{self.digits}f}"
        return text if math.isnan(half) else f"{text} ± {half:.{self.digits}f}"

    def show_range(self, values):
        low, middle, high = (self.show(f(values)) for f in (min, statistics.fmean, max))
        return middle if low == high else f"{middle} ({low} to {high})"


def of_blocks(key, factor=1):
    """The mean over the blocks with experts; None without."""
    return lambda r: factor * statistics.fmean(b[key] for b in r["blocks"]) if r.get("blocks") else None


QUALITY = [
    Metric("validation loss", lambda r: None if r["config"]["process"] == "ddpm" else r["validation_loss"], 4, -1),
    Metric("agreement, %", lambda r: 100 * r["agreement"], 1, 1),
    Metric("Fréchet distance", lambda r: r["frechet"], 1, -1),
    Metric("precision, %", lambda r: 100 * r["precision"], 1, 1),
    Metric("recall, %", lambda r: 100 * r["recall"], 1, 1),
]
ROUTING = [
    Metric("MaxVio", of_blocks("max_violation"), 2, -1),
    Metric("entropy", of_blocks("entropy"), 3, 1),
    Metric("dead experts", lambda r: sum(b["dead_experts"] for b in r["blocks"]) if r.get("blocks") else None, 1, -1),
    Metric("dropped, %", of_blocks("dropped", 100), 1, -1),
    Metric("tokens without an expert, %", of_blocks("unserved", 100), 1, -1),
]
METRICS = {m.name: m for m in QUALITY + ROUTING}
BITS = {"bits_of_position": "position", "bits_of_timestep": "time", "bits_of_class": "class"}


class Group:
    """A group's runs, and those of other groups that stand beside them: name -> seed -> result."""

    def __init__(self, results, description):
        self.name = description["name"]
        beside = {run: here for here, run in description.get("beside", {}).items()}
        own = [run["name"] for run in description["runs"]]
        self.runs = {name: {} for name in [*beside.values(), *own]}  # the rows of the tables, in this order
        self.errors = []
        for r in results:
            name = r["name"] if r["name"] in own else beside.get(r["name"])
            if name is None:
                continue
            if "error" in r:
                self.errors.append(f"{name}, seed {seed_of(r)}: {r['error']}")
            else:
                self.runs[name][seed_of(r)] = r
        self.runs = {name: dict(sorted(by_seed.items())) for name, by_seed in self.runs.items() if by_seed}
        steps = next((r["steps"] for by_seed in self.runs.values() for r in by_seed.values()), 0)
        self.pool = Pool(results, steps)

    def values(self, metric):
        """name -> seed -> value, of the runs that have it."""
        values = {name: {s: metric.value(r) for s, r in by_seed.items()} for name, by_seed in self.runs.items()}
        return {name: v for name, v in values.items() if None not in v.values()}

    def means(self, metric):
        """name -> (mean, half of its interval)."""
        spread, freedom = self.pool.between_seeds(metric)
        return {name: (statistics.fmean(v.values()), half_interval(spread, freedom, 1 / len(v)))
                for name, v in self.values(metric).items()}

    def difference(self, metric, better, than):
        """(mean of better - than, half of its interval), over the seeds that both have; None if a run is missing."""
        values = self.values(metric)
        if better not in values or than not in values:
            return None
        differences = [x - values[than][s] for s, x in values[better].items() if s in values[than]]
        if not differences:
            return None
        left, freedom = self.pool.beside_seeds(metric)
        return statistics.fmean(differences), half_interval(left, freedom, 2 / len(differences))


class Pool:
    """All runs of as many steps: what deviations are estimated by."""

    def __init__(self, results, steps):
        self.runs = {}
        for r in results:
            if r["steps"] == steps and "error" not in r:
                self.runs.setdefault(r["name"], {})[seed_of(r)] = r

    def values(self, metric):
        values = [{s: metric.value(r) for s, r in by_seed.items()} for by_seed in self.runs.values()]
        return [v for v in values if None not in v.values() and len(v) > 1]

    def between_seeds(self, metric):
        """Squares of the deviations from each run's mean, and degrees of freedom."""
        values = self.values(metric)
        return (sum((len(v) - 1) * statistics.variance(v.values()) for v in values), sum(len(v) - 1 for v in values))

    def beside_seeds(self, metric):
        """The same from each run's and each seed's mean, of the runs that have all seeds that most have."""
        values = self.values(metric)
        if not values:
            return 0, 0
        seeds = max((tuple(sorted(v)) for v in values), key=lambda s: (len(s), [tuple(sorted(v)) for v in values].count(s)))
        table = [[v[s] for s in seeds] for v in values if set(seeds) <= set(v)]
        rows = [statistics.fmean(row) for row in table]
        columns = [statistics.fmean(column) for column in zip(*table)]
        all_of_it = statistics.fmean(rows)
        left = sum((x - rows[i] - columns[j] + all_of_it) ** 2 for i, row in enumerate(table) for j, x in enumerate(row))
        return left, (len(rows) - 1) * (len(seeds) - 1)


def seed_of(result):
    return result["config"]["recipe"]["seed"]


def half_interval(squares, freedom, share):
    """Of a mean whose variance is `share` of squares / freedom; NaN without a degree of freedom."""
    return T[min(freedom, len(T)) - 1] * math.sqrt(squares / freedom * share) if freedom >= 1 else math.nan


def loss_at(result, seconds, milliseconds):
    """The validation loss after so many seconds of steps, between the validations by a straight line."""
    curve = [(steps * milliseconds / 1e3, loss) for steps, loss in result["validation"]]
    for (a, before), (b, after) in zip(curve, curve[1:]):
        if a <= seconds <= b:
            return before + (after - before) * (seconds - a) / (b - a)
    return curve[-1][1] if math.isclose(seconds, curve[-1][0]) else None


def table(group, timed):
    """Rows of cells, the first of them the headings. `timed`: name -> line of times.jsonl."""
    timed = timed if set(group.runs) <= set(timed) else {}
    times = {name: timed[name]["step_milliseconds"] for name in group.runs if timed}
    metrics = list(QUALITY)
    if times:
        same = min(r["steps"] * times[name] / 1e3 for name, by_seed in group.runs.items() for r in by_seed.values())
        of_name = {id(r): name for name, by_seed in group.runs.items() for r in by_seed.values()}
        metrics.insert(1, Metric(f"loss after {same:.0f} s", lambda r: loss_at(r, same, times[of_name[id(r)]]), 4, -1))
    metrics = [m for m in metrics if group.values(m)]
    heads = ["run", "seeds", "parameters, M", "activated, M", "multiply-adds, M"] + (["ms a step", "memory, MiB"] if times else [])
    rows = [heads + [m.name for m in metrics]]
    means = [group.means(m) for m in metrics]
    for name, by_seed in group.runs.items():
        one = next(iter(by_seed.values()))
        row = [name, str(len(by_seed))]
        row += [f"{one[key] / 1e6:.2f}" for key in ("parameters", "activated_parameters", "multiply_adds")]
        row += [f"{times[name]:.0f}", f"{timed[name]['peak_memory'] / 2**20:.0f}"] if times else []
        rows.append(row + [m.show(*mean[name]) if name in mean else "" for m, mean in zip(metrics, means)])
    return rows


def routing(group):
    rows = [["run", *(m.name for m in ROUTING)]]
    values = [group.values(m) for m in ROUTING]
    for name in group.runs:
        if name in values[0]:
            rows.append([name, *(m.show_range(v[name].values()) for m, v in zip(ROUTING, values))])
    return rows


def verdict(metric, difference, half):
    if math.isnan(half) or abs(difference) <= half:
        return "undecided"
    return "held" if difference * metric.better > 0 else "did not hold"


def claims(group, experiment):
    rows = [["claim", "of", "compared", "measure", "difference", ""]]
    for claim in experiment.get("claims", []):
        if claim["group"] != group.name:
            continue
        for name in claim.get("by", ["validation loss", "Fréchet distance"]):
            metric = METRICS[name]
            found = group.difference(metric, claim["better"], claim["than"])
            if found is not None:
                rows.append([claim["claim"], claim["source"], f"{claim['better']} - {claim['than']}", name,
                             metric.show(*found, sign=True), verdict(metric, *found)])
    return rows


def bits(group):
    rows = [["run", "block", *(f"bits of {name}" for name in BITS.values())]]
    for name, by_seed in group.runs.items():
        results = [r for r in by_seed.values() if r.get("blocks")]
        for i, block in enumerate(results[0]["blocks"] if results else []):
            values = [[r["blocks"][i][key] for r in results] for key in BITS]
            cells = [f"{statistics.fmean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in values]
            rows.append([name, str(block["block"] + 1), *cells])
    return rows


def tables(group, experiment, times):
    """kind -> rows of cells, the first of them the headings."""
    return {"table": table(group, times), "claims": claims(group, experiment), "routing": routing(group), "bits": bits(group)}


def markdown(rows):
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)


def html_table(rows):
    line = lambda row, tag: "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
    return "<table>\n" + "\n".join([line(rows[0], "th")] + [line(row, "td") for row in rows[1:]]) + "\n</table>"


def gnuplot(path, size, script):
    """An SVG of the script's plots."""
    text = f"set terminal svg size {size} dynamic background 'white' font 'sans,12'\nset output '{path}'\nset grid\n{script}"
    subprocess.run(["gnuplot"], input=text, text=True, check=True)


def quoted(name):
    return "'" + name.replace("'", "''") + "'"


def plot_curves(path, group, timed):
    """Validation loss by steps, and by seconds where the steps were timed."""
    panels = [("steps", dict.fromkeys(group.runs, 1.0))]
    if set(group.runs) <= set(timed):
        panels.append(("seconds", {name: timed[name]["step_milliseconds"] / 1e3 for name in group.runs}))
    script = f"set multiplot layout 1,{len(panels)}\nset ylabel 'validation loss'\nset key top right\n"
    for axis, scale in panels:
        curves = []
        last = []
        for i, (name, by_seed) in enumerate(group.runs.items()):
            lines = []
            for points in zip(*(r["validation"] for r in by_seed.values())):
                losses = [loss for _, loss in points]
                half = half_interval(sum((x - statistics.fmean(losses)) ** 2 for x in losses), len(losses) - 1, 1 / len(losses))
                last.append(losses)
                lines.append(f"{points[0][0] * scale[name]} {statistics.fmean(losses)} {0 if math.isnan(half) else half}")
            script += f"$r{i} << END\n" + "\n".join(lines) + "\nEND\n"
            curves.append(f"$r{i} using 1:2:3 with yerrorlines lc {i + 1} pt 7 ps 0.4 title {quoted(name)} noenhanced")
        later = [x for losses in last for x in losses]
        top = statistics.quantiles(later, n=10)[7] if len(later) > 10 else max(later)
        script += f"set xlabel '{axis}'\nset yrange [{min(later) * 0.995}:{top * 1.02}]\nplot " + ", ".join(curves) + "\n"
    gnuplot(path, "1300,480", script + "unset multiplot\n")


def plot_means(path, groups, metrics):
    """A row of panels for each group: the runs' means with their intervals."""
    script = f"set multiplot layout {len(groups)},{len(metrics)}\nset xtics rotate by -25\nset offsets 0.5, 0.5, 0, 0\nunset key\n"
    for g, group in enumerate(groups):
        for m, metric in enumerate(metrics):
            means = group.means(metric)
            lines = [f'{i} {x} {0 if math.isnan(h) else h} "{name}"' for i, (name, (x, h)) in enumerate(means.items())]
            if not lines:
                script += "set multiplot next\n"
                continue
            script += f"$p{g}_{m} << END\n" + "\n".join(lines) + "\nEND\n"
            script += f"set title {quoted(group.name + ': ' + metric.name)} noenhanced\n"
            script += f"plot $p{g}_{m} using 1:2:3:xtic(4) with yerrorbars lc 1 pt 7\n"
    gnuplot(path, f"{480 * len(metrics)},{320 * len(groups)}", script + "unset multiplot\n")


def plot_bits(path, group):
    runs = {n: list(r.values()) for n, r in group.runs.items() if all(x.get("blocks") for x in r.values())}
    script = f"set multiplot layout 1,{len(BITS)}\nset xlabel 'block'\nset xtics 1\nset key below\n"
    for m, (key, what) in enumerate(BITS.items()):
        curves = []
        for i, (name, results) in enumerate(runs.items()):
            lines = []
            for blocks in zip(*(r["blocks"] for r in results)):
                v = [b[key] for b in blocks]
                lines.append(f"{blocks[0]['block'] + 1} {statistics.fmean(v)} {min(v)} {max(v)}")
            script += f"$b{m}_{i} << END\n" + "\n".join(lines) + "\nEND\n"
            curves.append(f"$b{m}_{i} using 1:2:3:4 with yerrorlines lc {i + 2} pt 7 ps 0.5 title {quoted(name)} noenhanced")
        script += f"set ylabel 'bits of {what}'\nset yrange [0:*]\nplot " + ", ".join(curves) + "\n"
    gnuplot(path, "1500,420", script + "unset multiplot\n")


def plot_all(folder, groups, times):
    """The plots of what there is, by file name."""
    first, *others = groups
    plots = {"curves.svg": lambda p: plot_curves(p, first, times),
             "means.svg": lambda p: plot_means(p, [first], QUALITY[:3])}
    if any(r.get("blocks") for by_seed in first.runs.values() for r in by_seed.values()):
        plots["bits.svg"] = lambda p: plot_bits(p, first)
    if others:
        plots["ablations.svg"] = lambda p: plot_means(p, others, QUALITY[:3])
    for name, plot in plots.items():
        plot(folder / name)
    return list(plots)


STYLE = """body{font:15px sans-serif;margin:2em auto;max-width:1500px}table{border-collapse:collapse;margin:1em 0}
td,th{border:1px solid #ccc;padding:.2em .5em;text-align:left}svg{max-width:100%;height:auto}"""


def write_report(folder, groups, experiment, times, origin):
    parts = ["<!doctype html><meta charset='utf-8'><title>Feed-forwards at equal compute</title>", f"<style>{STYLE}</style>",
             "<h1>Feed-forwards at equal compute</h1>", f"<p>{html.escape(origin)}</p>"]
    plots = plot_all(folder, groups, times)
    for name in plots:
        parts.append(re.sub(r"^.*?(?=<svg)", "", (folder / name).read_text(encoding="utf-8"), flags=re.S))
    for group in groups:
        parts.append(f"<h2>{html.escape(group.name)}</h2>")
        for rows in tables(group, experiment, times).values():
            parts += [html_table(rows)] if len(rows) > 1 else []
        parts += [f"<p>{html.escape(error)}</p>" for error in group.errors]
    (folder / "report.html").write_text("\n".join(parts) + "\n", encoding="utf-8")


def filled(page, groups, experiment, times):
    """The page's text with its tables written anew."""
    by_name = {group.name: group for group in groups}

    def block(match):
        kind, name = match.group(1), match.group(2)
        if name not in by_name:
            sys.exit(f"there is no result of a group '{name}'")
        group = by_name[name]
        text = markdown(tables(group, experiment, times)[kind])
        if kind == "table" and group.errors:
            text += "\n\nDiverged: " + "; ".join(group.errors)
        return f"<!-- report: {kind} {name} -->\n{text}\n<!-- end -->"

    return re.sub(r"<!-- report: (table|routing|claims|bits) (.*?) -->\n.*?<!-- end -->", block, page, flags=re.S)


def lines_of(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="of results.jsonl and times.jsonl")
    parser.add_argument("--experiment", type=pathlib.Path, default=HERE / "comparison.json")
    parser.add_argument("--page", type=pathlib.Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    try:
        experiment = json.loads(options.experiment.read_text(encoding="utf-8"))
        results = lines_of(options.folder / "results.jsonl")
        timed = options.folder / "times.jsonl"
        times = {t["name"]: t for t in lines_of(timed)} if timed.exists() else {}
    except (OSError, ValueError) as error:
        sys.exit(f"report.py: {error}")
    groups = [group for group in (Group(results, g) for g in experiment["groups"]) if group.runs]
    if not groups:
        sys.exit(f"report.py: {options.folder / 'results.jsonl'} has no result of {options.experiment}")
    if options.page is None:
        write_report(options.folder, groups, experiment, times, results[0]["data"])
        print(f"Report: {options.folder / 'report.html'}")
        return
    old = options.page.read_text(encoding="utf-8")
    new = filled(old, groups, experiment, times)
    if options.check:
        if new != old:
            sys.exit(f"{options.page}: its tables are not those of {options.folder}")
        return
    options.page.write_text(new, encoding="utf-8")


main()
