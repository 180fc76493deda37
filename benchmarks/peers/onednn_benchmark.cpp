// SPDX-License-Identifier: MIT
#include <dnnl.h>

#include <peers/per_expert.hpp>

namespace {

/// oneDNN's sgemm, with the threads of OpenMP.
struct OneDnnGemm {
  void operator()(moxie::bench::Factor a, moxie::bench::Factor b, float beta, moxie::RowView<float> c) const {
    dnnl_sgemm(a.transposed ? 'T' : 'N', b.transposed ? 'T' : 'N', c.rows(), c.cols(),
               a.transposed ? a.matrix.rows() : a.matrix.cols(), 1, a.matrix.data(), a.matrix.stride(), b.matrix.data(),
               b.matrix.stride(), beta, c.data(), c.stride());
  }
};

const moxie::bench::Register registration([](const moxie::Exec& exec) { moxie::bench::add_peer<OneDnnGemm>("onednn", exec); });

}  // namespace
