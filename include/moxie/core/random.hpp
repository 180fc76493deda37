// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <moxie/core/matrix.hpp>
#include <moxie/core/philox.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// Counter-based random numbers: Philox4x32-10 (`core/philox.hpp`).
///
/// A number is a function of seed, stream and index only. So any thread may draw any number in any
/// order, and a program that resumes at step n draws the same numbers as one that did not stop.
/// `split(key)` gives an independent stream. `Rng` is a value; nothing advances.
class Rng {
 public:
  using Words = std::array<std::uint32_t, 4>;

  explicit Rng(std::uint64_t seed, std::uint64_t stream = 0) : seed_(seed), stream_(stream) {}

  std::uint64_t seed() const { return seed_; }
  std::uint64_t stream() const { return stream_; }

  /// The stream of a child: the same seed, a stream that depends on this one and on `key`.
  Rng split(std::uint64_t key) const { return Rng(seed_, philox::child(stream_, key)); }

  /// 128 random bits.
  Words words(std::uint64_t index) const {
    const philox::Bits b = philox::bits(seed_, stream_, index);
    return {std::uint32_t(b.low), std::uint32_t(b.low >> 32U), std::uint32_t(b.high), std::uint32_t(b.high >> 32U)};
  }
  std::uint64_t bits(std::uint64_t index) const { return philox::bits(seed_, stream_, index).low; }

  /// Uniform on [0, 1), 53 bits.
  double uniform(std::uint64_t index) const { return philox::uniform(philox::bits(seed_, stream_, index)); }

  /// Standard normal, by Box and Muller from the two halves of the counter's 128 bits.
  double normal(std::uint64_t index) const { return philox::normal(philox::bits(seed_, stream_, index)); }

  /// Uniform on {0, ..., n-1}; the bias is below n / 2^53.
  Index below(Index n, std::uint64_t index) const { return (std::min)(n - 1, Index(uniform(index) * double(n))); }

  /// Fills `m` with uniform numbers from [from, to), element (i, j) from index i·cols + j.
  template <class Scalar>
  void fill_uniform(RowView<Scalar> m, double from, double to) const {
    fill(m, [&](std::uint64_t i) { return from + (to - from) * uniform(i); });
  }
  /// Fills `m` with normal numbers of mean 0.
  template <class Scalar>
  void fill_normal(RowView<Scalar> m, double deviation = 1.0) const {
    fill(m, [&](std::uint64_t i) { return deviation * normal(i); });
  }

 private:
  template <class Scalar, class F>
  static void fill(RowView<Scalar> m, F&& f) {
    for (Index i = 0; i < m.rows(); ++i) {
      for (Index j = 0; j < m.cols(); ++j) {
        m(i, j) = static_cast<Scalar>(f(static_cast<std::uint64_t>(i * m.cols() + j)));
      }
    }
  }

  std::uint64_t seed_;
  std::uint64_t stream_;
};

/// A matrix of standard normal numbers: inputs for tests and examples.
template <class Scalar>
Matrix<Scalar> random_normal(Index rows, Index cols, const Rng& rng, double deviation = 1.0) {
  Matrix<Scalar> m(rows, cols);
  rng.fill_normal(RowView<Scalar>(m), deviation);
  return m;
}

}  // namespace moxie::inline MOXIE_NAMESPACE
