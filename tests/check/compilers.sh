# what: the lessons, compiled and run with g++ -O0 -O1 -O3 and clang++ -O0 -O2
# takes: 12 minutes
lessons=(examples/0[0-69]_*.cpp)
bash tests/compile_and_run.sh "-O0 -O1 -O3" g++ -std=c++20 -fopenmp "${include_flags[@]}" -- "${lessons[@]}"
bash tests/compile_and_run.sh "-O0 -O2" clang++ -std=c++20 -fopenmp "${include_flags[@]}" -- "${lessons[@]}"
