#!/usr/bin/env bash
# Flags that make results wrong are refused, each by an #error that names the way out; with that macro the header compiles.
#     fast_math.sh COMPILER [FLAG...]
set -euo pipefail
file=$(mktemp --suffix=.cpp)
trap 'rm -f "$file"' EXIT
echo '#include <moxie/config.hpp>' >"$file"
flags=(-ffast-math -ffinite-math-only)
# clang does not tell these.
case $1 in *clang*) ;; *) flags+=("-fassociative-math -fno-signed-zeros -fno-trapping-math" -freciprocal-math) ;; esac
"$@" -fsyntax-only "$file"
for flag in "${flags[@]}"; do
  read -ra words <<<"$flag"
  if message=$("$@" "${words[@]}" -fsyntax-only "$file" 2>&1); then
    echo "$flag is not refused" >&2
    exit 1
  fi
  if [[ $message != *MOXIE_ALLOW_FAST_MATH* ]]; then
    printf '%s is refused by another error:\n%s\n' "$flag" "$message" >&2
    exit 1
  fi
  "$@" "${words[@]}" -DMOXIE_ALLOW_FAST_MATH -fsyntax-only "$file"
done
