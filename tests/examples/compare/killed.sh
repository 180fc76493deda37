#!/usr/bin/env bash
# Runs that are killed at random moments, and go on each time, end with the results of undisturbed ones.
#     killed.sh COMPARE
set -euo pipefail
compare=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/experiment.json" <<'END'
{"measures": {"every": 50, "validation": 100, "samples": 20, "sampling_steps": "2", "classifier_steps": 10},
 "base": {"model": {"patch": 7, "dim": 16, "depth": 2, "heads": 2}, "feed_forward": "shared", "experts": 3, "hidden_dim": 8,
          "shared_hidden_dim": 8, "recipe": {"batch": 4}},
 "groups": [{"name": "small", "steps": 100, "seeds": [1, 2],
             "runs": [{"name": "shared"}, {"name": "dense", "set": {"feed_forward": "dense"}}]}]}
END
run() { "$compare" run --experiment "$folder/experiment.json" --threads 1 "$@" >"$folder/output" 2>&1; }

lines() { if [ -e "$folder/killed/results.jsonl" ]; then wc -l <"$folder/killed/results.jsonl"; else echo 0; fi; }
# Killed before the first result, and later: whatever is there is whole, and nothing finished is lost.
for finished in 0 1 2; do
  "$compare" run --experiment "$folder/experiment.json" --threads 1 --out "$folder/killed" >"$folder/output" 2>&1 &
  until [ "$(lines)" -ge "$finished" ]; do sleep 0.01; done
  sleep "0.0$((RANDOM % 10))"
  kill -9 $!
  { wait $! && { echo "ended before it was killed" >&2; exit 1; }; } 2>/dev/null
  [ "$(lines)" -ge "$finished" ]
  echo "killed after $(lines) results"
done
run --out "$folder/killed" || { cat "$folder/output"; exit 1; }
run --out "$folder/undisturbed" || { cat "$folder/output"; exit 1; }
[ "$(wc -l <"$folder/undisturbed/results.jsonl")" -eq 4 ]
cmp "$folder/killed/results.jsonl" "$folder/undisturbed/results.jsonl"
cmp "$folder/killed/classifier.safetensors" "$folder/undisturbed/classifier.safetensors"
if compgen -G "$folder/killed/.moxie-*" || compgen -G "$folder/killed/*.part"; then
  echo "files of saves that were cut off are left" >&2
  exit 1
fi
echo "the same results, byte for byte"

# Finished runs are not trained again.
run --out "$folder/killed"
grep -q "^0 of 4 runs are left" "$folder/output"
if grep -q "^== " "$folder/output"; then
  echo "a finished run was begun again" >&2
  exit 1
fi
# Another experiment's results are not mixed with these.
sed -i 's/"hidden_dim": 8/"hidden_dim": 12/' "$folder/experiment.json"
if run --out "$folder/killed"; then
  echo "results of other options were not refused" >&2
  exit 1
fi
grep -q "with other options" "$folder/output"
[ "$(wc -l <"$folder/killed/results.jsonl")" -eq 4 ]
# Nor those that another classifier judged.
sed -i 's/"hidden_dim": 12/"hidden_dim": 8/' "$folder/experiment.json"
sed -i 's/"classifier_accuracy":[0-9.e-]*/"classifier_accuracy":0.125/' "$folder/killed/results.jsonl"
if run --out "$folder/killed"; then
  echo "results by another classifier were not refused" >&2
  exit 1
fi
grep -q "judged by another classifier, which knew 12.5" "$folder/output"

# Numbers out of range, pipes in the place of files, and a full standard output.
refused() { # its words, and the command
  local words=$1 status=0
  shift
  timeout 60 "$@" >"$folder/output" 2>&1 || status=$?
  { [ $status -ne 0 ] && [ $status -ne 124 ] && grep -qF -- "$words" "$folder/output"; } ||
    { echo "status $status, and not '$words': $*" >&2; cat "$folder/output" >&2; exit 1; }
}
for value in 0 -1 1.5 99999999999999999999 nan; do
  refused "--rounds: $value is not a whole number from 1 to" "$compare" time --rounds $value
done
refused "--threads: -1 is not a whole number from 0 to" "$compare" run --threads -1
mkfifo "$folder/pipe"
refused "pipe: is not a regular file" "$compare" cost --experiment "$folder/pipe"
mkdir "$folder/piped"
mkfifo "$folder/piped/results.jsonl"
refused "results.jsonl: is not a regular file" "$compare" run --experiment "$folder/experiment.json" --out "$folder/piped"
if [ -w /dev/full ]; then
  status=0
  "$compare" cost --experiment "$folder/experiment.json" >/dev/full 2>"$folder/output" || status=$?
  [ $status -eq 1 ]
  grep -q "standard output cannot be written" "$folder/output"
fi
