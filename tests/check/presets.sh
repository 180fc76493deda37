# what: core and layers by clang++ without sanitizers; every header alone, and the benchmarks, by clang++ and g++
# takes: 12 minutes
# needs: libbenchmark-dev libopenblas-dev libdnnl-dev ocl-icd-opencl-dev
build_and_test clang
build dev -DMOXIE_CHECK_HEADERS=ON -DMOXIE_BUILD_BENCHMARKS=ON -- --target moxie_headers moxie_cuda_headers moxie_benchmarks cuda_layers
