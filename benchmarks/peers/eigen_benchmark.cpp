// SPDX-License-Identifier: MIT
#include <peers/per_expert.hpp>

namespace {

/// Eigen's product, with Eigen's own threads.
struct EigenGemm {
  void operator()(moxie::bench::Factor a, moxie::bench::Factor b, float beta, moxie::RowView<float> c) const {
    const auto into = [&](const auto& product) {
      if (beta == 0) {
        c.eigen().noalias() = product;
      } else {
        c.eigen().noalias() += product;
      }
    };
    if (a.transposed) {
      into(a.matrix.eigen().transpose() * b.matrix.eigen());
    } else if (b.transposed) {
      into(a.matrix.eigen() * b.matrix.eigen().transpose());
    } else {
      into(a.matrix.eigen() * b.matrix.eigen());
    }
  }
};

const moxie::bench::Register registration([](const moxie::Exec& exec) {
  Eigen::setNbThreads(exec.thread_count());
  moxie::bench::add_peer<EigenGemm>("eigen", exec);
});

}  // namespace
