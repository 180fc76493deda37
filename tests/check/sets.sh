# what: golden files, laws, kernels, routers, experts and layers on the other instruction sets: AVX2, AVX-512, none, NEON by qemu
# takes: 35 minutes
# needs: g++-aarch64-linux-gnu qemu-user
sets=(avx2 scalar aarch64)
if grep -qw avx512bw /proc/cpuinfo; then sets+=(avx512); fi
build_and_test "${sets[@]}"
grep -qw avx512bw /proc/cpuinfo || skipped "AVX-512: this machine has none"
