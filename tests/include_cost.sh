#!/usr/bin/env bash
# What an include costs: the time to compile a file that has nothing else, median of five.
# usage: include_cost.sh [COMPILER [FLAG...]], by default g++ -O2
set -euo pipefail

if [ $# -eq 0 ]; then
  set -- g++ -O2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
eigen=${EIGEN_INCLUDE:-/usr/include/eigen3}
TIMEFORMAT=%R

cost() {
  for _ in 1 2 3 4 5; do
    { time "${compile[@]}" -x c++ - -c -o /dev/null <<<"#include <$1>"; } 2>&1
  done | sort -n | sed -n 3p
}

compile=("$@" -std=c++20 "-I$root/include" -isystem "$eigen")
"${compile[@]}" -x c++ - -c -o /dev/null <<<"#include <moxie/moxie.hpp>"  # read everything from disk once, and check it compiles
reference=$(cost Eigen/Dense)
umbrella=$(cost moxie/moxie.hpp)
printf '<Eigen/Dense>     %s s\n<moxie/moxie.hpp> %s s, %s times as much\n' "$reference" "$umbrella" \
  "$(awk "BEGIN { printf \"%.2f\", $umbrella / $reference }")"
