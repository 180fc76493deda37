#!/usr/bin/env bash
# Compiles every header alone, without output. usage: compile_headers.sh COMPILER FLAG... -- HEADER...
set -euo pipefail

command=()
while [ "$1" != -- ]; do
  command+=("$1")
  shift
done
shift
[ $# -gt 0 ] || { echo "no headers"; exit 1; }

check='"${@:2}" -fsyntax-only -x c++ - <<<"#include <$1>" || { echo "in $1"; exit 1; }'
printf '%s\0' "$@" | xargs -0 -P "$(nproc)" -I{} bash -c "$check" compile_headers {} "${command[@]}"
