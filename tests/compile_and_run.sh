#!/usr/bin/env bash
# Compiles each source at each level of optimisation, and runs it, from a folder of its own.
# usage: compile_and_run.sh "LEVEL..." COMPILER FLAG... -- SOURCE...
set -euo pipefail

levels=$1
shift
command=()
while [ "$1" != -- ]; do
  command+=("$1")
  shift
done
shift
[ $# -gt 0 ] || { echo "no sources" >&2; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export OMP_WAIT_POLICY=passive

for source in "$@"; do
  for level in $levels; do
    echo "${command[0]} $level $source"
    "${command[@]}" "$level" "$source" -o "$folder/program"
    (cd "$folder" && ./program >output) || { cat "$folder/output"; echo "exit status of $source at $level is not 0" >&2; exit 1; }
  done
done
