# what: core and layers by clang++ without sanitizers, with them what takes minutes then and the host build of the CUDA backend; every header alone, and the benchmarks, by clang++ and g++
# takes: 20 minutes
# needs: libbenchmark-dev libopenblas-dev libdnnl-dev ocl-icd-opencl-dev
build_and_test clang
build_and_test asan-ubsan -- -DMOXIE_TEST_EXCEPT= \
  "-DMOXIE_TEST_ROOMS=cuda;kernel/gemm;layer/every_router;layer/top_k_moe;io/safetensors_header"
build dev -DMOXIE_CHECK_HEADERS=ON -DMOXIE_BUILD_BENCHMARKS=ON -- --target moxie_headers moxie_cuda_headers moxie_benchmarks cuda_layers
