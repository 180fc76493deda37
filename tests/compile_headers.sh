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

# The text of each file comes as an argument of its own, so that xargs can keep the cores busy.
printf '%s\0' "$@" | xargs -0 -P "$(nproc)" -I{} bash -c '"${@:2}" -fsyntax-only -x c++ - <<<"#include <$1>" || { echo "in $1"; exit 1; }' \
  compile_headers {} "${command[@]}"
