#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Tables and plots of `compare run` and `compare time`.

    report.py FOLDER                           writes FOLDER/report.html and its plots, from results.jsonl and times.jsonl
    report.py FOLDER --page PAGE.md            writes the tables into a page
    report.py FOLDER --page PAGE.md --check    fails if the page's tables are not those of the results, or its text has a number
                                               with a point that no table has

There need be no times.jsonl.

In a page a table stands between `<!-- report: KIND GROUP -->` and `<!-- end -->`; the kinds are "about", "table",
"routing", "claims" and "bits".
A mean over seeds is followed by its range, or by ± half of its 95% interval by Student's t, with the variance between seeds
pooled over all runs of as many steps; that of a difference pairs runs of one seed, and pools what is left when each run's and each
seed's mean is taken away. MaxVio is compared by its logarithm: a ratio, and the ends of its interval. A verdict needs p < 0.05 after
Holm's correction for all claims of the experiment. The plots need gnuplot.
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
    def __init__(self, name, value, digits, better, ratio=False):
        self.name, self.value, self.digits, self.better = name, value, digits, better  # better: -1 less, 1 more, 0 neither
        self.ratio = ratio  # compared by logarithms

    def show(self, x, half=math.nan, sign=False):
        text = f"{x:+.{self.digits}f}" if sign else f"{x:.{self.digits}f}"
        return text if math.isnan(half) else f"{text} ± {half:.{self.digits}f}"

    def show_difference(self, x, half):
        if not self.ratio:
            return self.show(x, half, sign=True)
        text = f"× {math.exp(x):.{self.digits}f}"
        return text if math.isnan(half) else f"{text} ({math.exp(x - half):.{self.digits}f} to {math.exp(x + half):.{self.digits}f})"

    def compared(self, result):
        """What differences are of; None where there is nothing to compare."""
        x = self.value(result)
        return x if x is None or not self.ratio else math.log(x) if x > 0 else None

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
    Metric("MaxVio", of_blocks("max_violation"), 2, -1, ratio=True),
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
        steps = {r["steps"] for r in results if r["group"] == self.name}
        if len(steps) > 1:
            sys.exit(f"report.py: the runs of '{self.name}' have different steps: {sorted(steps)}")
        beside = {run: here for here, run in description.get("beside", {}).items()}
        own = [run["name"] for run in description["runs"]]
        self.runs = {name: {} for name in [*beside.values(), *own]}  # the rows of the tables, in this order
        self.errors = []
        for r in results:
            name = r["name"] if r["name"] in own else beside.get(r["name"])
            if name is None:
                continue
            if "error" in r:
                self.errors.append((name, f"{name}, seed {seed_of(r)}: {r['error']}"))
            else:
                self.runs[name][seed_of(r)] = r
        self.runs = {name: dict(sorted(by_seed.items())) for name, by_seed in self.runs.items() if by_seed}
        self.pool = Pool(results, next(iter(steps), 0))

    def diverged(self):
        return "; ".join(message for _, message in self.errors)

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
        """The mean of better - than over the seeds that both have, half of its interval, p that there is none, and how many seeds
        these are; None if a run is missing or has nothing to compare."""
        values = [{s: metric.compared(r) for s, r in self.runs.get(name, {}).items()} for name in (better, than)]
        differences = [x - values[1][s] for s, x in values[0].items() if s in values[1] and None not in (x, values[1][s])]
        if not differences:
            return None
        left, freedom = self.pool.beside_seeds(metric)
        mean, half = statistics.fmean(differences), half_interval(left, freedom, 2 / len(differences))
        if math.isnan(half):
            return mean, half, 1.0, len(differences)
        deviation = math.sqrt(left / freedom * 2 / len(differences))
        t = abs(mean) / deviation if deviation > 0 else math.inf if mean else 0.0
        return mean, half, outside(t, freedom), len(differences)


class Pool:
    """All runs of as many steps: what deviations are estimated by."""

    def __init__(self, results, steps):
        self.runs = {}
        for r in results:
            if r["steps"] == steps and "error" not in r:
                self.runs.setdefault(r["name"], {})[seed_of(r)] = r

    def values(self, value):
        values = [{s: value(r) for s, r in by_seed.items()} for by_seed in self.runs.values()]
        return [v for v in values if None not in v.values() and len(v) > 1]

    def between_seeds(self, metric):
        """Squares of the deviations from each run's mean, and degrees of freedom."""
        values = self.values(metric.value)
        return (sum((len(v) - 1) * statistics.variance(v.values()) for v in values), sum(len(v) - 1 for v in values))

    def beside_seeds(self, metric):
        """The same from each run's and each seed's mean, of the runs that have all seeds that most have."""
        values = self.values(metric.compared)
        if not values:
            return 0, 0
        sets = [tuple(sorted(v)) for v in values]
        seeds = max(sets, key=lambda s: (sets.count(s), len(s)))
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


def outside(t, freedom):
    """P(|T| > t) of Student's t, by the finite sums for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    if math.isinf(t):
        return 0.0
    angle = math.atan(t / math.sqrt(freedom))
    term, total = (math.cos(angle), 0.0) if freedom % 2 else (1.0, 0.0)
    for k in range(2 + freedom % 2, freedom + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k - 1) / k
    inside = math.sin(angle) * total
    return 1 - ((angle + inside) * 2 / math.pi if freedom % 2 else inside)


def corrected(p):
    """Holm's adjusted p of tests that are made together."""
    order = sorted(range(len(p)), key=p.__getitem__)
    out, largest = [1.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, p[i] * (len(p) - rank)))
        out[i] = largest
    return out


def not_dropped(result):
    """The multiply-adds of an image without those of choices that were dropped."""
    dropped = sum(b["dropped"] for b in result.get("blocks") or [])
    if dropped == 0:
        return result["multiply_adds"]
    c = result["config"]
    patches = (c["model"]["image_size"] // c["model"]["patch"]) ** 2
    row = (3 if "glu" in c["expert"] else 2) * c["model"]["dim"] * c["hidden_dim"]
    return result["multiply_adds"] - dropped * patches * c["top_k"] * row


def loss_at(result, seconds, milliseconds):
    """The validation loss after so many seconds of steps, between the validations by a straight line."""
    curve = [(steps * milliseconds / 1e3, loss) for steps, loss in result["validation"]]
    for (a, before), (b, after) in zip(curve, curve[1:]):
        if a <= seconds <= b:
            return before + (after - before) * (seconds - a) / (b - a)
    return curve[-1][1] if math.isclose(seconds, curve[-1][0]) else None


def metrics_of(group, times):
    """Those that the group has values of; with `times` (name -> milliseconds a step), the loss after the same time too."""
    metrics = list(QUALITY)
    if times:
        same = min(r["steps"] * times[name] / 1e3 for name, by_seed in group.runs.items() for r in by_seed.values())
        of_name = {id(r): name for name, by_seed in group.runs.items() for r in by_seed.values()}
        metrics.insert(1, Metric(f"loss after {same:.0f} s",
                                 lambda r: loss_at(r, same, times[of_name[id(r)]]) if id(r) in of_name else None, 4, -1))
    return [m for m in metrics if group.values(m)]


def table(group, timed):
    """Rows of cells, the first of them the headings. `timed`: name -> line of times.jsonl."""
    timed = timed if set(group.runs) <= set(timed) else {}
    times = {name: timed[name]["step_milliseconds"] for name in group.runs if timed}
    metrics = metrics_of(group, times)
    dropping = any(not_dropped(r) < r["multiply_adds"] for by_seed in group.runs.values() for r in by_seed.values())
    heads = ["run", "seeds", "parameters, M", "activated, M", "multiply-adds, M"] + (["not dropped, M"] if dropping else [])
    heads += ["ms a step", "memory, MiB"] if times else []
    rows = [heads + [m.name for m in metrics]]
    means = [group.means(m) for m in metrics]
    for name, by_seed in group.runs.items():
        one = next(iter(by_seed.values()))
        row = [name, str(len(by_seed))]
        row += [f"{one[key] / 1e6:.2f}" for key in ("parameters", "activated_parameters", "multiply_adds")]
        if dropping:
            row.append(f"{statistics.fmean(map(not_dropped, by_seed.values())) / 1e6:.2f}")
        row += [f"{times[name]:.0f}", f"{timed[name].get('peak_memory', 0) / 2**20:.0f}"] if times else []
        rows.append(row + [m.show(*mean[name]) if name in mean else "" for m, mean in zip(metrics, means)])
    return rows


def routing(group):
    rows = [["run", *(m.name for m in ROUTING)]]
    values = [group.values(m) for m in ROUTING]
    for name in group.runs:
        if name in values[0]:
            rows.append([name, *(m.show_range(v[name].values()) for m, v in zip(ROUTING, values))])
    return rows


def tests(groups, experiment):
    """[(group, claim, metric, difference or None, adjusted p)], of all claims."""
    by_name = {group.name: group for group in groups}
    made = []
    for claim in experiment.get("claims", []):
        for name in claim.get("by", ["validation loss"]):
            if claim["group"] in by_name and name in METRICS:
                group = by_name[claim["group"]]
                made.append((group, claim, METRICS[name], group.difference(METRICS[name], claim["better"], claim["than"])))
    found = [i for i, test in enumerate(made) if test[3] is not None]
    p = dict(zip(found, corrected([made[i][3][2] for i in found])))
    return [(*test, p.get(i)) for i, test in enumerate(made)]


def claims(group, all_tests):
    rows = [["claim", "of", "compared", "measure", "seeds", "difference", "p (Holm)", ""]]
    for of, claim, metric, found, p in all_tests:
        if of is not group:
            continue
        row = [claim["claim"], claim["source"], f"{claim['better']} - {claim['than']}", metric.name]
        if found is None:
            lost = [name for name in (claim["better"], claim["than"]) if name in dict(group.errors) and name not in group.runs]
            rows += [row + ["0", "", "", f"{lost[0]} diverged"]] if lost else []
            continue
        mean, half, _, seeds = found
        better = mean * metric.better > 0
        verdict = "undecided" if p >= 0.05 else "held" if better else "did not hold"
        rows.append(row + [str(seeds), metric.show_difference(mean, half), "< 0.001" if p < 0.001 else f"{p:.3f}", verdict])
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


def about(group):
    """What the group's runs have in common."""
    all_runs = [r for by_seed in group.runs.values() for r in by_seed.values()]
    known = lambda key, show: ", ".join(dict.fromkeys(show(r[key]) for r in all_runs if key in r))
    return [["runs", "steps", "images a step", "data", "the classifier knows, %", "built for"],
            [str(len(all_runs)), known("steps", str), known("config", lambda c: str(c["recipe"].get("batch", ""))),
             known("data", lambda d: d.split(" from ")[0]), known("classifier_accuracy", lambda x: f"{100 * x:.2f}"),
             known("instructions", str)]]


def tables(group, all_tests, times):
    """kind -> rows of cells, the first of them the headings."""
    return {"about": about(group), "table": table(group, times), "claims": claims(group, all_tests), "routing": routing(group), "bits": bits(group)}


def markdown(rows):
    safe = lambda cell: re.sub(r"<(?=[a-zA-Z/!])", "&lt;", cell).replace("|", "\\|")
    lines = ["| " + " | ".join(safe(cell) for cell in row) + " |" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)


def html_table(rows):
    line = lambda row, tag: "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
    return "<table>\n" + "\n".join([line(rows[0], "th")] + [line(row, "td") for row in rows[1:]]) + "\n</table>"


def gnuplot(path, size, script):
    """An SVG of the script's plots."""
    text = f"set terminal svg size {size} dynamic background 'white' font 'sans,12'\nset output {quoted(str(path))}\nset grid\n{script}"
    subprocess.run(["gnuplot"], input=text, text=True, check=True)


def colour(i):
    """The same for a run in every plot."""
    tones = ["000000", "9400d3", "009e73", "56b4e9", "e69f00", "0072b2", "d55e00", "cc79a7", "999999", "8b4513"]
    return f"lc rgb '#{tones[i % len(tones)]}'"


def quoted(name):
    return "'" + name.replace("'", "''") + "'"


def plot_curves(path, group, timed):
    """Validation loss by steps, and by seconds where the steps were timed."""
    panels = [("steps", dict.fromkeys(group.runs, 1.0))]
    if set(group.runs) <= set(timed):
        panels.append(("seconds", {name: timed[name]["step_milliseconds"] / 1e3 for name in group.runs}))
    script = f"set multiplot layout 1,{len(panels)}\nset ylabel 'validation loss'\nset key below maxrows 3\n"
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
            curves.append(f"$r{i} using 1:2:3 with yerrorlines {colour(i)} pt 7 ps 0.4 title {quoted(name)} noenhanced")
        later = [x for losses in last for x in losses]
        top = statistics.quantiles(later, n=10)[7] if len(later) > 10 else max(later)
        script += f"set xlabel '{axis}'\nset yrange [{min(later) * 0.995}:{top * 1.02}]\nplot " + ", ".join(curves) + "\n"
    gnuplot(path, "1300,560", script + "unset multiplot\n")


def plot_means(path, groups, metrics):
    """A row of panels for each group: the runs' means with their intervals."""
    script = f"set multiplot layout {len(groups)},{len(metrics)}\nset offsets 0.5, 0.5, 0, 0\nunset key\n"
    for g, group in enumerate(groups):
        for m, metric in enumerate(metrics):
            means = group.means(metric)
            lines = [f"{i} {x} {0 if math.isnan(h) else h}" for i, (x, h) in enumerate(means.values())]
            tics = ", ".join(f"{quoted(name)} {i}" for i, name in enumerate(means))
            if not lines:
                script += "set multiplot next\n"
                continue
            script += f"$p{g}_{m} << END\n" + "\n".join(lines) + "\nEND\n"
            script += f"set title {quoted(group.name + ': ' + metric.name)} noenhanced\n"
            script += f"set xtics ({tics}) rotate by -25 noenhanced\n"
            script += f"plot $p{g}_{m} using 1:2:3 with yerrorbars lc 1 pt 7\n"
    gnuplot(path, f"{480 * len(metrics)},{320 * len(groups)}", script + "unset multiplot\n")


def plot_bits(path, group):
    places = {name: i for i, name in enumerate(group.runs)}
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
            curves.append(f"$b{m}_{i} using 1:2:3:4 with yerrorlines {colour(places[name])} pt 7 ps 0.5 title {quoted(name)} noenhanced")
        script += f"set ylabel 'bits of {what}'\nset yrange [0:*]\nplot " + ", ".join(curves) + "\n"
    gnuplot(path, "1500,420", script + "unset multiplot\n")


def plot_all(folder, groups, times):
    """The plots of what there is, by file name."""
    first, *others = (group for group in groups if group.runs)
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


def write_report(folder, groups, all_tests, times, origin):
    parts = ["<!doctype html><meta charset='utf-8'><title>Feed-forwards at equal compute</title>", f"<style>{STYLE}</style>",
             "<h1>Feed-forwards at equal compute</h1>", f"<p>{html.escape(origin)}</p>"]
    plots = plot_all(folder, groups, times)
    for name in plots:
        parts.append(re.sub(r"^.*?(?=<svg)", "", (folder / name).read_text(encoding="utf-8"), flags=re.S))
    for group in groups:
        parts.append(f"<h2>{html.escape(group.name)}</h2>")
        for rows in tables(group, all_tests, times).values():
            parts += [html_table(rows)] if len(rows) > 1 else []
        parts += [f"<p>Diverged: {html.escape(group.diverged())}</p>"] if group.errors else []
    (folder / "report.html").write_text("\n".join(parts) + "\n", encoding="utf-8")


MARKER = re.compile(r"<!-- report: (about|table|routing|claims|bits) (.*?) -->")


def filled(page, groups, all_tests, times):
    """The page's text with its tables written anew."""
    by_name = {group.name: group for group in groups}
    out, begun = [], None
    for number, line in enumerate(page.splitlines(), 1):
        wrong = lambda what: sys.exit(f"report.py: line {number} of the page: {what}: {line}")
        marker = MARKER.fullmatch(line)
        if marker:
            if begun:
                wrong("a marker before the end of the one before")
            kind, name = begun = marker.groups()
            if name not in by_name:
                wrong("there is no result of this group")
            group = by_name[name]
            out += [line, markdown(tables(group, all_tests, times)[kind])]
            if kind == "table" and group.errors:
                out += ["", "Diverged: " + html.escape(group.diverged(), quote=False)]
        elif line == "<!-- end -->":
            if not begun:
                wrong("an end without a marker")
            begun = None
            out.append(line)
        elif re.search(r"<!--\s*(report|end)", line, flags=re.I):
            wrong("this is no marker")
        elif not begun:
            out.append(line)
    if begun:
        sys.exit(f"report.py: the page's '{' '.join(begun)}' has no end")
    if not any(MARKER.fullmatch(line) for line in out):
        sys.exit("report.py: the page has no marker")
    return "\n".join(out) + "\n"


def numbers_without_a_table(page):
    """Numbers with a point in the page's text, beside code, that none of its tables has."""
    lines = page.splitlines()
    known = set(re.findall(r"\d+\.\d+", "\n".join(line for line in lines if line.startswith("|"))))
    text = "\n".join(line for line in lines if not line.startswith(("|", "    ")))
    return [x for x in re.findall(r"\d+\.\d+", re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)) if x not in known]


def text_of(path):
    """The text of a regular file; a pipe, which would be waited for, is refused."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: is not a regular file")
    return path.read_text(encoding="utf-8")


def lines_of(path):
    """The objects of a file of JSON lines; a last one that was cut off is left out, as `compare run` does."""
    text = text_of(path)
    objects = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            if number == text.count("\n") + 1:
                break
            raise
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ValueError(f"{path}: line {number} is not a result")
        if any(ord(c) < 32 for c in entry["name"]):
            raise ValueError(f"{path}: line {number} has a name with control characters")
        objects.append(entry)
    return objects


def part_of(asked, found):
    """Whether all that is asked for is found."""
    if isinstance(asked, dict):
        return isinstance(found, dict) and all(part_of(value, found.get(key)) for key, value in asked.items())
    return asked == found


def checked(results, experiment):
    """The results of the experiment's runs, those with a measure that is no number as errors. Raises ValueError for a line of
    other options, two of a run and seed, or several measures or data sets."""
    asked = {}
    for group in experiment["groups"]:
        for run in group["runs"]:
            asked[run["name"]] = (group["name"], run.get("set", {}))
    seen, out = set(), []
    for r in results:
        try:
            key = (r["name"], seed_of(r))
            r["steps"], r["group"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"a line of '{r['name']}' has no {error}") from None
        if key in seen:
            raise ValueError(f"there are two lines of '{key[0]}', seed {key[1]}")
        seen.add(key)
        if r["name"] not in asked:
            raise ValueError(f"the experiment has no run '{r['name']}'")
        group, options = asked[r["name"]]
        base = json.loads(json.dumps(experiment.get("base", {})))
        if r["group"] != group or not part_of(merged(base, options), r["config"]):
            raise ValueError(f"'{key[0]}', seed {key[1]}, has other options than the experiment's")
        numbers = ("validation_loss", "agreement", "frechet", "precision", "recall")
        bad = [n for n in numbers if "error" not in r and not isinstance(r.get(n), (int, float))]
        out.append({**r, "error": f"{bad[0]} is not a number"} if bad else r)
    for field in ("measures", "data", "classifier_accuracy"):
        if len({json.dumps(r.get(field), sort_keys=True) for r in out if "error" not in r}) > 1:
            raise ValueError(f"the lines are of different {field}")
    return out


def merged(base, patch):
    """RFC 7396."""
    for key, value in patch.items():
        base[key] = merged(base[key] if isinstance(base.get(key), dict) else {}, value) if isinstance(value, dict) else value
    return base


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="of results.jsonl and times.jsonl")
    parser.add_argument("--experiment", type=pathlib.Path, default=HERE / "comparison.json")
    parser.add_argument("--page", type=pathlib.Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    try:
        experiment = json.loads(text_of(options.experiment))
        results = checked(lines_of(options.folder / "results.jsonl"), experiment)
        timed = options.folder / "times.jsonl"
        times = {t["name"]: t for t in lines_of(timed)} if timed.exists() else {}
        unknown = {m for c in experiment.get("claims", []) for m in c.get("by", [])} - set(METRICS)
        if unknown:
            raise ValueError(f"a claim is by {sorted(unknown)}, which is no measure: {', '.join(METRICS)}")
    except (OSError, ValueError) as error:
        sys.exit(f"report.py: {error}")
    groups = [group for group in (Group(results, g) for g in experiment["groups"]) if group.runs or group.errors]
    if not any(group.runs for group in groups):
        sys.exit(f"report.py: {options.folder / 'results.jsonl'} has no result of {options.experiment}")
    all_tests = tests(groups, experiment)
    if options.page is None:
        write_report(options.folder, groups, all_tests, times, results[0]["data"])
        print(f"Report: {options.folder / 'report.html'}")
        return
    old = text_of(options.page)
    new = filled(old, groups, all_tests, times)
    if options.check:
        if new != old:
            sys.exit(f"{options.page}: its tables are not those of {options.folder}")
        if numbers_without_a_table(old):
            sys.exit(f"{options.page}: no table has {', '.join(numbers_without_a_table(old))}")
        return
    options.page.write_text(new, encoding="utf-8")


main()
