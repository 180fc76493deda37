// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <moxie/core/matrix.hpp>
#include <numbers>

namespace moxie {

/// Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
///
/// A number is a function of (seed, stream, index) alone, so any thread may draw any of them in any order, and a program that
/// is resumed at step n draws what it would have drawn. `split(key)` gives an independent stream. A value type; nothing
/// advances.
class Rng {
 public:
  using Words = std::array<std::uint32_t, 4>;

  explicit Rng(std::uint64_t seed, std::uint64_t stream = 0) : seed_(seed), stream_(stream) {}

  std::uint64_t seed() const { return seed_; }
  std::uint64_t stream() const { return stream_; }

  /// The stream of a child: the same seed, a stream that depends on this one and on `key`.
  Rng split(std::uint64_t key) const { return Rng(seed_, mix(stream_ + mix(key + 1))); }

  /// 128 random bits.
  Words words(std::uint64_t index) const {
    Words c{low(index), high(index), low(stream_), high(stream_)};
    std::uint32_t k0 = low(seed_);
    std::uint32_t k1 = high(seed_);
    for (int round = 0; round < 10; ++round) {
      const std::uint64_t p0 = std::uint64_t{0xD2511F53} * c[0];
      const std::uint64_t p1 = std::uint64_t{0xCD9E8D57} * c[2];
      c = {high(p1) ^ c[1] ^ k0, low(p1), high(p0) ^ c[3] ^ k1, low(p0)};
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    return c;
  }
  std::uint64_t bits(std::uint64_t index) const {
    const Words w = words(index);
    return (std::uint64_t{w[1]} << 32U) | w[0];
  }

  /// Uniform on [0, 1), 53 bits.
  double uniform(std::uint64_t index) const { return double(bits(index) >> 11U) * 0x1p-53; }

  /// Standard normal, by Box and Muller from the two halves of the counter's 128 bits.
  double normal(std::uint64_t index) const {
    const Words w = words(index);
    const double u = (double(((std::uint64_t{w[1]} << 32U) | w[0]) >> 11U) + 0.5) * 0x1p-53;  // in (0, 1)
    const double v = double(((std::uint64_t{w[3]} << 32U) | w[2]) >> 11U) * 0x1p-53;
    return std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * std::numbers::pi * v);
  }

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
  static std::uint32_t low(std::uint64_t x) { return static_cast<std::uint32_t>(x); }
  static std::uint32_t high(std::uint64_t x) { return static_cast<std::uint32_t>(x >> 32U); }
  // The finaliser of SplitMix64.
  static std::uint64_t mix(std::uint64_t x) {
    x = (x ^ (x >> 30U)) * 0xBF58476D1CE4E5B9ULL;
    x = (x ^ (x >> 27U)) * 0x94D049BB133111EBULL;
    return x ^ (x >> 31U);
  }
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

}  // namespace moxie
