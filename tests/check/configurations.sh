# what: layers of random configurations against the naive layer: CONFIGURATIONS=100000 unless set, 20000 of them with sanitizers
# takes: 15 minutes
mkdir -p build/check
source=(tests/layer/random_configurations_test.cpp tests/main.cpp)
export OMP_WAIT_POLICY=passive
say "all of them"
g++ -std=c++20 -O1 -fopenmp "${include_flags[@]}" "${source[@]}" -o build/check/configurations
MOXIE_CONFIGURATIONS=${CONFIGURATIONS:-100000} build/check/configurations
say "with sanitizers"
clang++ -std=c++20 -O1 -g1 -fopenmp -fsanitize=address,undefined -fno-sanitize-recover=all \
  -fsanitize-ignorelist=tests/sanitizers.ignore "${include_flags[@]}" "${source[@]}" -o build/check/configurations_asan
LSAN_OPTIONS=suppressions=tests/lsan.supp:print_suppressions=0 build/check/configurations_asan
