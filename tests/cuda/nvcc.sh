#!/usr/bin/env bash
# The device's layers with nvcc:
#     nvcc.sh BUILD build GOLDEN TEST...  compiles them for MOXIE_CUDA_ARCHITECTURES (90), warnings as errors, and links
#                                         them with the object of golden_verify, and with those of tests; these know no CUDA
#     nvcc.sh BUILD run                   runs both
#     nvcc.sh BUILD bench                 compiles benchmarks/cuda/cuda_layers.cpp, and runs it where there is a device
# Exits with 77, skipped, where there is no nvcc ($NVCC, or in the PATH), no cuBLAS beside it, or no device.
set -euo pipefail
source=$(cd "$(dirname "$0")/../.." && pwd)
build=$1 what=$2
shift 2
nvcc=${NVCC:-$(command -v nvcc || true)}
if [ -z "$nvcc" ]; then
  echo "skipped: there is no nvcc"
  exit 77
fi
need_device() {
  if ! command -v nvidia-smi >/dev/null || ! nvidia-smi -L | grep -q GPU; then
    echo "skipped: there is no device"
    exit 77
  fi
}
if [ "$what" = run ]; then
  need_device
  "$build/device_tests" --no-colors
  for scalar in double float; do
    "$build/device_golden" --backend cuda --scalar "$scalar" "$source"/tests/golden/*.safetensors
  done
  exit
fi

"$nvcc" --version | grep release
mkdir -p "$build"
# Where nvcc itself says that it lives (the one in the PATH may be a script that calls it): a toolkit, or a folder of its packages
# from PyPI.
touch "$build/nothing.cu"
root=$("$nvcc" -dryrun "$build/nothing.cu" 2>&1 | sed -n 's/^#$ TOP=//p')
root=$(cd "$root" && pwd -P)
flags=(-std=c++20 -O2 --threads 0 -Werror all-warnings -Xcompiler -Wall,-Wextra,-Werror -I"$source/include")
for folder in "$root"/include "$root"/include/cccl "$root"/../{cublas,cuda_runtime,cuda_cccl}/include; do
  if [ -d "$folder" ]; then flags+=(-isystem "$folder"); fi
done
read -ra architectures <<<"${MOXIE_CUDA_ARCHITECTURES:-90}"
for a in "${architectures[@]}"; do
  flags+=(-gencode "arch=compute_$a,code=sm_$a")
done
library() {
  find -L "$root"/lib* "$root"/targets "$root"/../{cublas,cuda_runtime}/lib /usr/lib/*-linux-gnu -maxdepth 3 -name "$1" 2>/dev/null |
    head -1 || true
}
cublas=$(library 'libcublas.so*')
runtime=$(library 'libcudart_static.a')
if [ -z "$cublas" ] || [ -z "$runtime" ]; then
  echo "skipped: there is nvcc, but no libcublas and libcudart in its toolkit, $root"
  exit 77
fi
libraries=(-L"$(dirname "$runtime")" -L"$(dirname "$cublas")" "-l:$(basename "$cublas")" -Xlinker "-rpath=$(dirname "$cublas")")
if [ "$what" = bench ]; then
  "$nvcc" "${flags[@]}" -x cu "$source/benchmarks/cuda/cuda_layers.cpp" -o "$build/cuda_layers" "${libraries[@]}"
  need_device
  exec "$build/cuda_layers"
fi
"$nvcc" "${flags[@]}" -x cu -c "$source/tests/cuda/device_layer.cpp" -o "$build/device_layer.o"
libraries+=(-Xcompiler -fopenmp)
"$nvcc" "$build/device_layer.o" "$1" -o "$build/device_golden" "${libraries[@]}"
"$nvcc" "$build/device_layer.o" "${@:2}" -o "$build/device_tests" "${libraries[@]}"
echo "compiled and linked for ${architectures[*]}"
