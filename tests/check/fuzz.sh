# what: the fuzzers of tests/fuzz, with the address and undefined-behaviour sanitizers: EXECUTIONS=100000 and SEED=1 unless set
# takes: 10 minutes
shopt -s nullglob
fuzzers=(tests/fuzz/*_fuzz.cpp)
[ ${#fuzzers[@]} -gt 0 ] || { echo "there is no tests/fuzz/*_fuzz.cpp" >&2; exit 1; }
mkdir -p build/check/fuzz
for fuzzer in "${fuzzers[@]}"; do
  name=$(basename "$fuzzer" .cpp)
  say "$name"
  clang++ -std=c++20 -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all "${include_flags[@]}" "$fuzzer" -lz \
    -o "build/check/fuzz/$name"
  "build/check/fuzz/$name" "${EXECUTIONS:-100000}" "${SEED:-1}"
done
