#!/usr/bin/env bash
# A training that is killed at ten random moments, and goes on each time, ends with the checkpoint of an undisturbed one.
#     killed.sh DIT
set -euo pipefail
dit=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
small=(--dim 16 --depth 2 --heads 2 --patch 7 --experts 3 --hidden-dim 8 --shared-hidden-dim 8 --batch 4 --threads 1
  --checkpoint-every 3 --samples-per-class 2 --sampling-steps 1)

# Data of its own: what an untrained model draws.
"$dit" train --out "$folder/data" "${small[@]}" --steps 0 >/dev/null
command=("$dit" train --data "$folder/data/samples.safetensors" "${small[@]}")
train() { "${command[@]}" "$@" >"$folder/output" 2>&1; }

for round in 1 2 3 4 5 6 7 8 9 10; do
  "${command[@]}" --out "$folder/killed" --resume --steps 1000000000 >"$folder/output" 2>&1 &
  sleep "$((RANDOM % 2)).$((RANDOM % 10))$((RANDOM % 10))"
  kill -9 $!
  wait $! 2>/dev/null && { echo "round $round: ended before it was killed" >&2; exit 1; }
  # Killed before the first checkpoint, or in the middle of writing one: whatever is there has to be whole.
  if [ -e "$folder/killed/checkpoint.safetensors" ]; then
    train --out "$folder/killed" --resume --steps 0 || { cat "$folder/output" >&2; exit 1; }
  fi
done
steps=$(sed -n 's/^Going on from step //p' "$folder/output")
echo "killed ten times, $steps steps done"
[ "$steps" -gt 10 ]

# The checkpoint knows the options that decide what is computed.
if "$dit" train --data "$folder/data/samples.safetensors" --out "$folder/killed" --resume --dim 32 2>"$folder/output"; then
  echo "another width was not refused" >&2
  exit 1
fi
grep -q -- "--dim is 16 there, 32 here" "$folder/output"
"$dit" train --data "$folder/data/samples.safetensors" --out "$folder/killed" --resume --steps $((steps + 5)) --threads 1 \
  --samples-per-class 2 --sampling-steps 1 >"$folder/output"
train --out "$folder/undisturbed" --steps $((steps + 5))
cmp "$folder/killed/checkpoint.safetensors" "$folder/undisturbed/checkpoint.safetensors"
[ "$(wc -l <"$folder/killed/log.jsonl")" -eq $((steps + 5)) ]
if compgen -G "$folder/killed/.moxie-*" || compgen -G "$folder/killed/*.part"; then
  echo "files of saves that were cut off are left" >&2
  exit 1
fi
echo "the same checkpoint, byte for byte"

# A model of ten classes goes on with data of two.
"$dit" sample --checkpoint "$folder/killed/checkpoint.safetensors" --classes 0,1 --out "$folder/two" --sampling-steps 1 \
  --samples-per-class 2 >/dev/null
few=("$dit" train --data "$folder/two/samples.safetensors" --out "$folder/few" --samples-per-class 1 --sampling-steps 1)
"${few[@]}" --start-from "$folder/killed/checkpoint.safetensors" --batch 4 --steps 1 >/dev/null
"${few[@]}" --resume --steps 2 >"$folder/output"
grep -q "Going on from step 1" "$folder/output"

# Selection biases are the model's, and stay when its weights are started from.
biased=("$dit" train --data "$folder/two/samples.safetensors" --samples-per-class 1 --sampling-steps 1 --batch 2 --steps 1)
"${biased[@]}" --bias-rate 0.001 --out "$folder/biased" >/dev/null
"${biased[@]}" --start-from "$folder/biased/checkpoint.safetensors" --out "$folder/again" >/dev/null

# --model shapes a model once; the data's images and classes stay.
named=("$dit" train --model DiT-S/8 --data "$folder/two/samples.safetensors" --out "$folder/named" --patch 14 --depth 1
  --samples-per-class 1 --sampling-steps 1 --batch 2)
"${named[@]}" --steps 1 >/dev/null
"${named[@]}" --resume --steps 2 >"$folder/output"
grep -q "Going on from step 1" "$folder/output"
