#!/usr/bin/env bash
# The intervals and verdicts of report.py, on results whose answers are known.
#     report.sh REPORT.PY
set -euo pipefail
report=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/experiment.json" <<'END'
{"groups": [{"name": "pair", "runs": [{"name": "a"}, {"name": "b"}], "beside": {"the other": "c"}},
            {"name": "more", "runs": [{"name": "c"}]}],
 "claims": [{"claim": "b is better", "source": "nobody", "group": "pair", "better": "b", "than": "a",
             "by": ["validation loss", "agreement, %", "Fréchet distance", "MaxVio"]}]}
END
# result NAME SEED LOSS AGREEMENT FRECHET [BLOCKS]
result() {
  printf '{"name": "%s", "group": "any", "steps": 20, "config": {"process": "flow", "recipe": {"seed": %s}},' "$1" "$2"
  printf '"validation": [[10, 9], [20, %s]], "validation_loss": %s, "agreement": %s, "frechet": %s,' "$3" "$3" "$4" "$5"
  printf '"precision": 0.5, "recall": 0.25, "parameters": 2e6, "activated_parameters": 1e6, "multiply_adds": 3e6,'
  printf '"data": "none"%s}\n' "${6:-}"
}
{
  result a 1 1 0.50 7
  result a 2 3 0.51 8
  result b 1 2 0.60 5
  result b 2 6 0.61 6
  result c 1 4 0.30 9
  result c 2 4 0.31 9.5
  printf '{"name": "a", "config": {"recipe": {"seed": 3}}, "error": "step 2: not finite", "steps": 20}\n'
} >"$folder/results.jsonl"
printf '# Page\n\n<!-- report: table pair -->\nold\n<!-- end -->\n\nText.\n<!-- report: claims pair -->\n<!-- end -->\n' >"$folder/page.md"

check() { grep -qF -- "$1" "$folder/page.md" || { echo "not in the page: $1" >&2; cat "$folder/page.md" >&2; exit 1; }; }
run() { python3 "$report" "$folder" --experiment "$folder/experiment.json" "$@"; }
if run --page "$folder/page.md" --check 2>/dev/null; then echo "an old page was not noticed" >&2; exit 1; fi
run --page "$folder/page.md"
# Within runs the squares of the losses are 2, 8 and 0 of 3 degrees of freedom: 3.182 sqrt(10 / 3 / 2) = 4.1079.
check '| a | 2 | 2.00 | 1.00 | 3.00 | 2.0000 ± 4.1079 | 50.5 ± 1.6 | 7.5 ± 1.4'
check '| the other | 2 | 2.00 | 1.00 | 3.00 | 4.0000 ± 4.1079 |'
# Without the runs' and the seeds' means 4 is left in 2 degrees of freedom: 4.303 sqrt(4 / 2 * 2 / 2) = 6.085.
check '| b - a | validation loss | +2.0000 ± 6.0854 | undecided |'
check '| b - a | agreement, % | +10.0 ± 0.0 | held |'
check '| b - a | Fréchet distance | -2.0 ± 0.9 | held |'
check 'Diverged: a, seed 3: step 2: not finite'
check 'Text.'
if grep -q MaxVio "$folder/page.md"; then echo "a measure that no run has" >&2; exit 1; fi
run --page "$folder/page.md" --check

# The other way round, a claim did not hold.
sed -i 's/"better": "b", "than": "a"/"better": "a", "than": "b"/' "$folder/experiment.json"
run --page "$folder/page.md"
check '| a - b | agreement, % | -10.0 ± 0.0 | did not hold |'

# Times add the milliseconds, and the loss at the time when the fastest is through.
for name in a b "the other"; do
  printf '{"name": "%s", "peak_memory": 3145728, "step_milliseconds": %s}\n' "$name" "$([ "$name" = a ] && echo 1000 || echo 2000)"
done >"$folder/times.jsonl"
run --page "$folder/page.md"
check 'loss after 20 s'
check '| b | 2 | 2.00 | 1.00 | 3.00 | 2000 | 3 | 4.0000 ± 4.1079 | 9.0000 ± 1.8371 |'
