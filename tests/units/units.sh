#!/usr/bin/env bash
# Several translation units of one program keep their own code and bits, where they differ in
#   instruction set: -march=x86-64 and x86-64-v3, linked in both orders; a layer passed from one to the other does not link
#   version:         two shared libraries of two versions of the headers, in one process
# usage: units.sh WORK-FOLDER COMPILER FLAG...   (exit 77: this machine has no AVX2)
set -euo pipefail
grep -qw avx2 /proc/cpuinfo || { echo "skipped: this machine has no AVX2"; exit 77; }
here=$(cd "$(dirname "$0")" && pwd)
work=$1
compile=("${@:2}" -std=c++20 -fopenmp)
include=-I$here/../../include
mkdir -p "$work"
cd "$work"

unit() { "${compile[@]}" "$include" "-march=$2" "-DUNIT=unit_$1" -c "$here/unit.cpp" -o "$1.o"; }
unit a x86-64 & unit b x86-64-v3 & wait
"${compile[@]}" -c "$here/main.cpp" -o main.o
link() { "${compile[@]}" main.o "${@:2}" -o "$1"; ./"$1" | sort -u >"$1.txt"; }
link only_a a.o
link only_b b.o
link ab a.o b.o
link ba b.o a.o
cat only_a.txt only_b.txt >alone.txt
[ "$(wc -l <alone.txt)" -eq 2 ]
for order in ab ba; do
  cmp "$order.txt" alone.txt || { echo "linked as $order, a unit has other bits than alone"; exit 1; }
done
echo "instruction sets: each unit keeps its bits in both orders"

"${compile[@]}" "$include" -march=x86-64 -DMAKES -c "$here/passes_layer.cpp" -o makes.o
"${compile[@]}" "$include" -march=x86-64 -c "$here/passes_layer.cpp" -o takes.o
"${compile[@]}" makes.o takes.o -o alike
"${compile[@]}" "$include" -march=x86-64-v3 -c "$here/passes_layer.cpp" -o takes_v3.o
if "${compile[@]}" makes.o takes_v3.o -o mixed 2>/dev/null; then
  echo "a layer of another instruction set was linked"
  exit 1
fi
echo "instruction sets: a layer is not passed from one to the other"

# Another version: the same headers with another number, and sums that start elsewhere, so that its bits differ.
rm -rf other
cp -r "$here/../../include" other
sed -i 's/MOXIE_VERSION_MINOR .*/MOXIE_VERSION_MINOR 999/' other/moxie/version.hpp
sed -i 's/    sum\[i\]\[0\] = B(Scalar(0));/    sum[i][0] = B(Scalar(1));/' other/moxie/kernel/microkernel.hpp
library() { "${compile[@]}" "-I$2" -fPIC -shared "-DUNIT=unit_$1" "$here/unit.cpp" -o "lib$1.so"; }
library a "$here/../../include" & library b "$work/other" & wait
with() { "${compile[@]}" main.o "-L$work" "-Wl,-rpath,$work" -Wl,--no-as-needed "${@:2}" -o "$1"; ./"$1" | sort -u >"$1.txt"; }
with version_a -la
with version_b -lb
with versions_ab -la -lb
with versions_ba -lb -la
cat version_a.txt version_b.txt >alone.txt
[ "$(cut -d' ' -f2 alone.txt | sort -u | wc -l)" -eq 2 ] || { echo "the two versions do not differ"; exit 1; }
for order in versions_ab versions_ba; do
  cmp "$order.txt" alone.txt || { echo "loaded as $order, a version has other bits than alone"; exit 1; }
done
echo "versions: each library keeps its bits in both orders"
