// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/kernel/instruction_set.hpp>

namespace {

namespace kernel = moxie::kernel;

TEST_CASE("instruction set: the program's is that of its kernels, and the machine offers no less") {
  const kernel::InstructionSet built = kernel::built_for();
  CHECK(!built.name.empty());
  CHECK(built.vector_bits == 32 * int(kernel::Batch<float>::size));
  const kernel::InstructionSet machine = kernel::machine_offers();
  CHECK(machine.vector_bits >= built.vector_bits);
  CHECK(machine.fused_multiply_add >= built.fused_multiply_add);
#if defined(MOXIE_SCALAR_KERNELS)
  CHECK(built.vector_bits == 32);
  CHECK(built.name == "scalar");
#elif defined(__AVX512BW__)
  CHECK(machine == built);
  CHECK(built.vector_bits == 512);
#elif defined(__AVX2__) && defined(__FMA__)
  CHECK(built.vector_bits == 256);
  CHECK(built.fused_multiply_add);
#elif defined(__x86_64__) && !defined(__AVX__)
  CHECK(built.vector_bits == 128);
  CHECK(!built.fused_multiply_add);
  CHECK((__builtin_cpu_supports("avx2") != 0) == (machine != built));
#endif
}

}  // namespace
