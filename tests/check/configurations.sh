# what: layers of random configurations against the naive layer: CONFIGURATIONS=100000 unless set
# takes: 10 minutes
mkdir -p build/check
g++ -std=c++20 -O1 -fopenmp "${include_flags[@]}" tests/layer/random_configurations_test.cpp tests/main.cpp -o build/check/configurations
MOXIE_CONFIGURATIONS=${CONFIGURATIONS:-100000} OMP_WAIT_POLICY=passive build/check/configurations
