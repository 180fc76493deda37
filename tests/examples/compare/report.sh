#!/usr/bin/env bash
# The intervals and verdicts of report.py, on results whose answers are known.
#     report.sh REPORT.PY
set -euo pipefail
report=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/experiment.json" <<'END'
{"base": {"process": "flow"},
 "groups": [{"name": "pair", "runs": [{"name": "a"}, {"name": "b"}], "beside": {"the other": "c"}},
            {"name": "more", "runs": [{"name": "c", "set": {"recipe": {"rate": 0.5}}}]}],
 "claims": [{"claim": "b is better", "source": "nobody", "group": "pair", "better": "b", "than": "a",
             "by": ["validation loss", "agreement, %", "Fréchet distance", "MaxVio"]}]}
END
# result NAME SEED LOSS AGREEMENT FRECHET [BLOCKS]
result() {
  printf '{"name": "%s", "group": "%s", "steps": 20, "config": {"process": "flow", ' "$1" "$([ "$1" = c ] && echo more || echo pair)"
  printf '"recipe": {"seed": %s, "rate": 0.5}, ' "$2"
  printf '"model": {"image_size": 28, "patch": 4, "dim": 10}, "expert": "swiglu", "hidden_dim": 100, "top_k": 2},'
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
  printf '{"name": "a", "group": "pair", "config": {"process": "flow", "recipe": {"seed": 3}}, "error": "step 2: not finite", "steps": 20}\n'
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
# t = 2 / sqrt(2) = 1.414 with 2 degrees of freedom: p = 1 - t / sqrt(t² + 2) = 0.2929, the largest of three.
check '| b - a | validation loss | 2 | +2.0000 ± 6.0854 | 0.293 | undecided |'
check '| b - a | agreement, % | 2 | +10.0 ± 0.0 | < 0.001 | held |'
# 0.0833 is left: t = 2 / sqrt(0.0833 / 2) = 9.798, p = 0.01026, twice that by Holm.
check '| b - a | Fréchet distance | 2 | -2.0 ± 0.9 | 0.021 | held |'
check 'Diverged: a, seed 3: step 2: not finite'
check 'Text.'
if grep -q MaxVio "$folder/page.md"; then echo "a measure that no run has" >&2; exit 1; fi
run --page "$folder/page.md" --check

printf '<!-- report: about pair -->\n<!-- end -->\n' >"$folder/other.md"
run --page "$folder/other.md"
grep -qF '| 6 | 20 |  | none |  |  |' "$folder/other.md"

# The other way round, a claim did not hold.
sed -i 's/"better": "b", "than": "a"/"better": "a", "than": "b"/' "$folder/experiment.json"
run --page "$folder/page.md"
check '| a - b | agreement, % | 2 | -10.0 ± 0.0 | < 0.001 | did not hold |'

# Times add the milliseconds, and the loss at the time when the fastest is through.
for name in a b "the other"; do
  printf '{"name": "%s", "peak_memory": 3145728, "step_milliseconds": %s}\n' "$name" "$([ "$name" = a ] && echo 1000 || echo 2000)"
done >"$folder/times.jsonl"
run --page "$folder/page.md"
check 'loss after 20 s'
check '| b | 2 | 2.00 | 1.00 | 3.00 | 2000 | 3 | 4.0000 ± 4.1079 | 9.0000 ± 1.8371 |'

# MaxVio is compared by its logarithm; what was dropped is not counted as computed: 49 patches of 2 rows of 3 x 10 x 100, a half.
cp "$folder/results.jsonl" "$folder/whole.jsonl"
block() { printf ', "blocks": [{"block": 0, "max_violation": %s, "entropy": 1, "dead_experts": 0, "dropped": %s, "unserved": 0, "bits_of_position": 1, "bits_of_timestep": 0, "bits_of_class": 0}]' "$1" "$2"; }
{
  result a 1 1 0.5 7 "$(block 0.5 0)"
  result a 2 1 0.5 7 "$(block 1.0 0)"
  result b 1 2 0.5 7 "$(block 0.25 0.5)"
  result b 2 2 0.5 7 "$(block 0.5 0.5)"
} >"$folder/results.jsonl"
run --page "$folder/page.md"
check '| a - b | MaxVio | 2 | × 2.00 (2.00 to 2.00) | < 0.001 | did not hold |'
check '| run | seeds | parameters, M | activated, M | multiply-adds, M | not dropped, M |'
check '| b | 2 | 2.00 | 1.00 | 3.00 | 2.85 |'

# A run that is no number is an error of its seed; one that diverged for all seeds leaves the claim without a verdict.
{
  result a 1 1 0.5 7
  result a 2 null 0.5 7
  result b 1 null 0.5 7
} >"$folder/results.jsonl"
printf '{"name": "cut o' >>"$folder/results.jsonl"
run --page "$folder/page.md"
check 'Diverged: a, seed 2: validation_loss is not a number; b, seed 1: validation_loss is not a number'
check '| a - b | validation loss | 0 |  |  | b diverged |'
cp "$folder/whole.jsonl" "$folder/results.jsonl"
run --page "$folder/page.md"

# What is refused: REGEX OF THE MESSAGE COMMAND...
refuses() {
  local said
  if said=$("${@:2}" 2>&1) || ! grep -q -- "$1" <<<"$said"; then
    echo "expected a refusal with '$1', not: $said" >&2
    exit 1
  fi
}
page() { printf "$1" >"$folder/other.md"; }
for marker in '<!-- report: tables pair -->' '<!-- Report: table pair -->' '<!--report: table pair-->' '<!-- report: table pair --> '; do
  page "$marker\n<!-- end -->\n"
  refuses 'this is no marker' run --page "$folder/other.md" --check
done
page '<!-- report: table pair -->\n\nText.\n'
refuses 'has no end' run --page "$folder/other.md"
page '<!-- report: table pair -->\n<!-- report: claims pair -->\n<!-- end -->\n'
refuses 'before the end of the one before' run --page "$folder/other.md"
page 'Text.\n<!-- end -->\n'
refuses 'an end without a marker' run --page "$folder/other.md"
page 'Text.\n'
refuses 'no marker' run --page "$folder/other.md" --check
page '<!-- report: table nobody -->\n<!-- end -->\n'
refuses 'no result of this group' run --page "$folder/other.md"
page '<!-- report: table pair -->\n<!-- end -->\n\nA loss of 4.0000, in code `0.1234`, and 0.9999.\n'
run --page "$folder/other.md"
refuses 'no table has 0.9999$' run --page "$folder/other.md" --check
result a 1 9 0.5 7 >>"$folder/results.jsonl"
refuses "two lines of 'a', seed 1" run
sed 's/"rate": 0.5/"rate": 0.1/' "$folder/whole.jsonl" >"$folder/results.jsonl"
refuses "'c', seed 1, has other options" run
sed '1s/"steps": 20/"steps": 30/' "$folder/whole.jsonl" >"$folder/results.jsonl"
refuses 'different steps' run
sed '1s/"data": "none"/"data": "some"/' "$folder/whole.jsonl" >"$folder/results.jsonl"
refuses 'different data' run
sed 's/"name": "c"/"name": "d"/' "$folder/whole.jsonl" >"$folder/results.jsonl"
refuses "no run 'd'" run
printf '[1]\n' >"$folder/results.jsonl"
refuses 'line 1 is not a result' run
sed 's/"name": "a"/"name": "a\\nsystem"/' "$folder/whole.jsonl" >"$folder/results.jsonl"
refuses 'control characters' run
rm "$folder/results.jsonl"
mkfifo "$folder/results.jsonl"
refuses 'results.jsonl: is not a regular file' timeout 60 python3 "$report" "$folder"
