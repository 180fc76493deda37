// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/kernel/scheduler.hpp>

namespace moxie::inline MOXIE_NAMESPACE::kernel {

/// Computes `product(i)` for i = 0, ..., count-1.
template <class Scalar, class Arch = DefaultArch, class F>
void grouped_gemm(Index count, const F& product, const Exec& exec) {
  using P = decltype(product(Index{0}));
  static_assert(std::is_same_v<typename P::Scalar, Scalar>);
  TaskGraph<Scalar, typename P::Element, Arch> graph;
  graph.add(count, product);
  graph.run(exec);
}

/// One product: C = A B + bias, or C += A B + bias.
template <class Scalar, class Arch = DefaultArch>
void gemm(const Product<Scalar>& product, const Exec& exec) {
  grouped_gemm<Scalar, Arch>(
      1, [&](Index /*i*/) { return product; }, exec);
}

}  // namespace moxie::inline MOXIE_NAMESPACE::kernel
