// SPDX-License-Identifier: MIT
#include <cblas.h>

#include <peers/per_expert.hpp>

namespace {

struct OpenBlasGemm {
  void operator()(moxie::bench::Factor a, moxie::bench::Factor b, float beta, moxie::RowView<float> c) const {
    const auto size = [](moxie::Index n) { return static_cast<blasint>(n); };
    cblas_sgemm(CblasRowMajor, a.transposed ? CblasTrans : CblasNoTrans, b.transposed ? CblasTrans : CblasNoTrans,
                size(c.rows()), size(c.cols()), size(a.transposed ? a.matrix.rows() : a.matrix.cols()), 1, a.matrix.data(),
                size(a.matrix.stride()), b.matrix.data(), size(b.matrix.stride()), beta, c.data(), size(c.stride()));
  }
};

const moxie::bench::Register registration([](const moxie::Exec& exec) {
  openblas_set_num_threads(exec.thread_count());
  moxie::bench::add_peer<OpenBlasGemm>("openblas", exec);
});

}  // namespace
