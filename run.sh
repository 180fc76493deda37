#!/usr/bin/env bash
# The project's commands, from a fresh clone on:
#   ./run.sh demo [ARGUMENT...]   trains the diffusion transformer and draws (the arguments go to `dit train`)
#   ./run.sh test                 builds with g++, with clang++ and sanitizers, and without OpenMP, and runs the tests
#   ./run.sh bench [ARGUMENT...]  compares with other libraries (the arguments go to moxie_benchmarks)
#   ./run.sh compare [ARGUMENT...]  trains one model with every feed-forward: --quick, --out FOLDER, --experiment FILE, --threads N
#   ./run.sh check [PART...]      what takes longer than test: all parts, or those named; --list says what they are
#   ./run.sh cuda                 tests and measures the CUDA backend: by nvcc and on a device, where they are
# On Debian and its relatives what is missing is installed first.
set -euo pipefail
cd "$(dirname "$0")"

need=(g++ cmake ninja-build libeigen3-dev libxsimd-dev nlohmann-json3-dev libcli11-dev zlib1g-dev)
need_demo=(gnuplot-nox dataset-fashion-mnist libjs-vega)
need_bench=(libbenchmark-dev libopenblas-dev libdnnl-dev ocl-icd-opencl-dev gnuplot-nox python3)
need_test=(doctest-dev clang libclang-rt-dev libomp-dev libthrust-dev python3)
want_test=(libjs-vega chromium)  # without them the tests of the report are skipped
out=out/demo

# For what compiles without CMake; /usr/include/eigen3 is Debian's.
include_flags=(-Iinclude -Iexamples -Itests -isystem /usr/include/eigen3)

say() { printf '\n== %s\n' "$*"; }

install_missing() {
  if ! command -v apt-get >/dev/null; then
    if ! command -v g++ >/dev/null || ! command -v cmake >/dev/null || ! command -v ninja >/dev/null; then
      echo "This is not a Debian. Please install what these packages of Debian 12 hold: $*" >&2
      exit 1
    fi
    return
  fi
  local missing=() package
  for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  local as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
      echo "Please run as root: apt-get install --no-install-recommends ${missing[*]}" >&2
      exit 1
    fi
    as_root=(sudo)
  fi
  say "installing ${missing[*]}"
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
}

# build PRESET [CMAKE ARGUMENT...] [-- BUILD ARGUMENT...]
build() {
  local preset=$1 options=()
  shift
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    options+=("$1")
    shift
  done
  say "building $preset"
  cmake --preset "$preset" "${options[@]}" >/dev/null
  cmake --build --preset "$preset" -j "$(nproc)" "${@:2}"
}

# build_and_test PRESET... [-- CMAKE ARGUMENT...]: one run over the trees of all presets, hence one summary.
build_and_test() {
  local preset presets=()
  while [ $# -gt 0 ] && [ "$1" != -- ]; do
    presets+=("$1")
    shift
  done
  local options=("${@:2}")
  set -- "${presets[@]}"
  for preset in "$@"; do
    build "$preset" -DMOXIE_TEST_UNITS="$(nproc)" "${options[@]}"
  done
  say "testing $*"
  echo "subdirs($*)" >build/CTestTestfile.cmake
  ctest --test-dir build -j "$(nproc)" --timeout 1800 --output-on-failure --no-tests=error
}

# A part of check says with it that something could not be tried here: the part then ends, and counts as not done.
skipped() {
  echo "SKIPPED: $*"
  exit 77
}

# about KEY PART: what a part of check says of itself in its first lines: what, takes, needs
about() { sed -n "s/^# $1: //p" "tests/check/$2.sh"; }

case ${1:-} in
  demo)
    install_missing "${need[@]}" "${need_demo[@]}"
    build release -DMOXIE_BUILD_TESTS=OFF -- --target dit
    say "training"
    export OMP_WAIT_POLICY=passive  # on a machine that others use too, threads that spin wait for threads that do not run
    build/release/examples/dit/dit train --out "$out" "${@:2}"
    say "pictures"
    ls "$out"/*.png
    ;;
  compare)
    folder='' experiment=examples/compare/comparison.json quick=() threads=() rounds=10
    shift
    while [ $# -gt 0 ]; do
      case $1 in
        --quick) quick=(--quick) rounds=3; shift ;;
        --out) folder=${2:?--out needs a folder}; shift 2 ;;
        --experiment) experiment=${2:?--experiment needs a file}; shift 2 ;;
        --threads) threads=(--threads "${2:?--threads needs a number}"); shift 2 ;;
        *) echo "./run.sh compare takes --quick, --out FOLDER, --experiment FILE and --threads N, not $1" >&2; exit 2 ;;
      esac
    done
    : "${folder:=out/compare${quick:+-quick}}"
    install_missing "${need[@]}" dataset-fashion-mnist gnuplot-nox python3
    build release -DMOXIE_BUILD_TESTS=OFF -- --target compare
    say "comparing"
    export OMP_WAIT_POLICY=passive
    both=(--experiment "$experiment" --out "$folder" "${threads[@]}")
    build/release/examples/compare/compare run "${both[@]}" "${quick[@]}"
    # Of runs that are not measured yet; delete times.jsonl to measure anew.
    [ -e "$folder/times.jsonl" ] || build/release/examples/compare/compare time "${both[@]}" --rounds "$rounds"
    python3 examples/compare/report.py "$folder" --experiment "$experiment"
    ;;
  test)
    install_missing "${need[@]}" "${need_test[@]}"
    (install_missing "${want_test[@]}") || say "no browser: the report is not opened"
    # Every header alone, and the benchmarks, compile in `check presets`.
    build_and_test dev asan-ubsan no-openmp -- -DMOXIE_CHECK_HEADERS=OFF -DMOXIE_BUILD_BENCHMARKS=OFF
    ;;
  check)
    parts=(functions portable fuzz presets configurations compilers versions planted sets)
    shift
    if [ "${1:-}" = --list ]; then
      for part in "${parts[@]}"; do printf '%-15s %s\n%-15s takes about %s on 2 quiet cores (an estimate)\n' "$part" "$(about what "$part")" '' "$(about takes "$part")"; done
      exit
    fi
    [ $# -eq 0 ] || parts=("$@")
    for part in "${parts[@]}"; do
      [ -e "tests/check/$part.sh" ] || { echo "check has no part '$part': ./run.sh check --list" >&2; exit 2; }
    done
    not_done=()
    for part in "${parts[@]}"; do
      say "check: $part: $(about what "$part") (about $(about takes "$part") on 2 quiet cores, an estimate)"
      status=0
      ./run.sh check-part "$part" || status=$?
      case $status in
        0) ;;
        77) not_done+=("$part (in part skipped)") ;;
        *) not_done+=("$part (failed)") ;;
      esac
    done
    if [ ${#not_done[@]} -gt 0 ]; then
      say "check: not done: ${not_done[*]}"
      exit 1
    fi
    say "check: all of ${parts[*]} passed"
    ;;
  check-part)  # of check, in a process of its own
    read -ra needs <<<"$(about needs "$2")"
    install_missing "${need[@]}" "${need_test[@]}" "${needs[@]}"
    source "tests/check/$2.sh"
    ;;
  bench)
    install_missing "${need[@]}" "${need_bench[@]}"
    build release -DMOXIE_BUILD_TESTS=OFF -- --target moxie_benchmarks
    say "measuring"
    mkdir -p out/bench
    build/release/benchmarks/moxie_benchmarks --benchmark_repetitions=5 --benchmark_min_time=0.2 \
      --benchmark_enable_random_interleaving=true --benchmark_out=out/bench/results.json "${@:2}"
    python3 benchmarks/table.py out/bench/results.json out/bench/peak.png out/bench/scaling.png | tee out/bench/table.md
    ;;
  cuda)
    install_missing "${need[@]}" "${need_test[@]}"
    export MOXIE_CUDA_ARCHITECTURES=${MOXIE_CUDA_ARCHITECTURES:-80 90 100}
    build dev -- --target cuda_tests cuda_lanes_tests cuda_layers
    say "testing"
    ctest --test-dir build/dev -R '^cuda\.' --output-on-failure --no-tests=error
    say "measuring"
    mkdir -p out/cuda
    { build/dev/benchmarks/cuda_layers; bash tests/cuda/nvcc.sh build/dev/tests/nvcc bench || [ $? -eq 77 ]; } | tee out/cuda/table.md
    ;;
  *)
    sed -n '2,9s/^# \?//p' "$0" >&2
    exit 2
    ;;
esac
