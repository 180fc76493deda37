#!/usr/bin/env bash
# Numbers out of range, pipes in the place of files, a full standard output, names with control characters, and interruptions.
#     command_line.sh DIT
set -euo pipefail
dit=$(realpath "$1")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
export OMP_NUM_THREADS=2
# Data of its own, which is read faster than the default: images of three classes, whose names would control a terminal, or are
# too long for a picture.
python3 - <<'END'
import json, struct
names = ["\u001b]0;owned\u0007\u001b[31m", "x" * 20000, "\u009b31m"]
header = json.dumps({"__metadata__": {"class.%d" % i: name for i, name in enumerate(names)},
                     "images": {"dtype": "U8", "shape": [4, 1, 28, 28], "data_offsets": [0, 3136]},
                     "labels": {"dtype": "I64", "shape": [4], "data_offsets": [3136, 3168]}}).encode()
open("data.safetensors", "wb").write(struct.pack("<Q", len(header)) + header + bytes(3136) + struct.pack("<4q", 1, 1, 2, 2))
END
small=(--data data.safetensors --dim 16 --depth 1 --heads 2 --patch 7 --experts 2 --hidden-dim 8 --shared-hidden-dim 8 --batch 4 --threads 1
  --samples-per-class 1 --sampling-steps 1)
failures=0
wrong() { echo "$*" >&2; failures=$((failures + 1)); }
# Fails at once with this status and these words.
refused() {
  local status=0 words=$1
  shift
  timeout 60 "$@" >output 2>&1 || status=$?
  if [ "$status" -eq 0 ] || [ "$status" -ge 124 ] || ! grep -qF -- "$words" output; then
    wrong "status $status, and not '$words': $*: $(tail -n 3 output)"
  fi
}

# Every number option refuses what is no number of its kind, and what its type cannot hold.
tried=0
for command in train sample analyse upcycle predict zoo; do
  "$dit" "$command" --help >help
  for option in $(grep -oE '^ *--[a-z-]+ (INT|UINT|FLOAT)' help | grep -oE -- '--[a-z-]+' | sort -u); do
    tried=$((tried + 1))
    for value in 99999999999999999999999 -99999999999999999999999 1e999 nan 0x10; do
      refused "is not a" "$dit" "$command" "$option" "$value"
    done
  done
done
[ $tried -ge 60 ] || wrong "only $tried number options were found"
for seed in -1 18446744073709551616 1e3 1.5 ""; do
  refused "$seed is not a whole number from 0 to 18446744073709551615" "$dit" train --seed "$seed"
  refused "$seed is not a whole number from 0 to 18446744073709551615" "$dit" upcycle --seed "$seed"
done
for option in --dim --depth --heads --patch --experts --top-k --hidden-dim --shared-hidden-dim --slots-per-expert --batch; do
  refused "is not a whole number from 1 to" "$dit" train $option 0
  refused "is not a whole number from 1 to" "$dit" train $option 9223372036854775807
done

# Output that does not arrive.
if [ -w /dev/full ]; then
  for command in "zoo" "--help" "train ${small[*]} --steps 0 --out full"; do
    status=0
    "$dit" $command >/dev/full 2>output || status=$?
    { [ "$status" -eq 1 ] && grep -q "standard output cannot be written" output; } || wrong "$command >/dev/full: $status"
  done
  [ -s full/samples.safetensors ] || wrong "a full standard output stopped the run"
fi

# Pipes in the place of files.
mkfifo pipe pipe.safetensors
mkdir piped
mkfifo piped/log.jsonl
refused "log.jsonl: is not a regular file" "$dit" train "${small[@]}" --steps 1 --out piped
"$dit" train "${small[@]}" --steps 2 --out run >output
cp -r run again
rm again/log.jsonl
mkfifo again/log.jsonl
refused "not a regular file" "$dit" train "${small[@]}" --steps 3 --out again --resume
refused "not a regular file" "$dit" train --steps 1 --out data --data pipe.safetensors
refused "not a regular file" "$dit" train --steps 1 --out data --start-from pipe
refused "not a regular file" "$dit" sample --checkpoint pipe --out sampled
"$dit" train --data data.safetensors --feed-forward dense --dim 16 --depth 1 --heads 2 --patch 7 --hidden-dim 8 --batch 4 \
  --samples-per-class 1 --sampling-steps 1 --threads 1 --steps 1 --out dense >output
refused "not a regular file" "$dit" upcycle --checkpoint dense/checkpoint.safetensors --out pipe
refused "not a regular file" "$dit" predict --checkpoint run/checkpoint.safetensors --input pipe --out predicted

# Such names, printed and drawn.
"$dit" train "${small[@]}" --steps 1 --out named >output 2>&1 || wrong "names: $(cat output)"
"$dit" analyse --checkpoint named/checkpoint.safetensors --samples-per-class 1 --sampling-steps 1 --out analysed >>output 2>&1 ||
  wrong "names: $(cat output)"
if LC_ALL=C grep -q $'[\x1b\x07]\|\xc2\x9b' output; then
  wrong "control characters of a class's name are in the output"
fi
grep -q "1 of 3 classes have no image, '.*owned" output || wrong "the class without an image is not named"
[ "$(wc -L <output)" -lt 500 ] || wrong "a line is as long as a class's name"
if command -v gnuplot >/dev/null; then
  for picture in named/samples.png analysed/samples.png analysed/routing_by_class.png; do
    [ -s $picture ] || wrong "no $picture: $(grep 'no ' output)"
  done
fi

# Ctrl-C while gnuplot draws, which ends it too: the command says what is missing, and with which status.
mkdir bin
printf '#!/bin/sh\ntouch "%s/drawing"\nexec sleep 60\n' "$folder" >bin/gnuplot
chmod +x bin/gnuplot
interrupted() { # what is missing, and the command, in a process group of its own
  local missing=$1 status=0
  shift
  rm -f drawing
  PATH=$folder/bin:$PATH setsid "$@" >output 2>&1 &
  local process=$!
  for _ in $(seq 600); do
    [ ! -e drawing ] || break
    sleep 0.1
  done
  kill -INT -- "-$process"
  wait $process || status=$?
  { [ $status -eq 130 ] && grep -q "interrupted: $missing was not drawn" output; } ||
    wrong "interrupted: status $status, and not '$missing was not drawn': $*: $(cat output)"
}
python=$(command -v python3)
# A shell's background processes ignore SIGINT, and so would those that they start.
heard=("$python" -c 'import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])')
interrupted samples.png "${heard[@]}" "$dit" sample --checkpoint run/checkpoint.safetensors --samples-per-class 1 --sampling-steps 1 \
  --out stopped
interrupted loss.png "${heard[@]}" "$dit" train "${small[@]}" --steps 1 --out stopped-training
interrupted samples-1.png "${heard[@]}" "$dit" train "${small[@]}" --steps 1000000 --draw-every 1 --out stopped-early
grep -q "Interrupted at step 1; --resume goes on from step 1" output || wrong "interrupted early: $(cat output)"

# Killed while gnuplot draws: nothing is left that the run would not write.
rm -f drawing
PATH=$folder/bin:$PATH setsid "$dit" train "${small[@]}" --steps 1000000 --draw-every 1 --out killed >output 2>&1 &
process=$!
for _ in $(seq 600); do
  [ ! -e drawing ] || break
  sleep 0.1
done
kill -9 -- "-$process"
{ wait $process || true; } 2>/dev/null
left=$(find killed -mindepth 1 ! -name checkpoint.safetensors ! -name log.jsonl)
[ -z "$left" ] || wrong "left over: $left"
exit $((failures > 0))
