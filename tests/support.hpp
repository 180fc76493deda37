// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <contains.hpp>
#include <cstring>
#include <limits>
#include <moxie/core/matrix.hpp>
#include <moxie/core/parameters.hpp>
#include <moxie/core/random.hpp>
#include <numbers>
#include <string>
#include <vector>

/// What the tests share: the one table of tolerances, random inputs, ways to compare, and the layers written for reading.
namespace moxie::test {

/// Relative errors that tests accept, each two to five times the worst that was measured.
template <class Scalar>
struct Tolerance;
template <>
struct Tolerance<double> {
  static constexpr double sum = 2e-15;       ///< a sum of products in another order
  static constexpr double layer = 5e-15;     ///< a router, a bank or a layer, against the reference below
  static constexpr double function = 2e-14;  ///< an activation, relative to max(|f|, 1); xsimd's erf decides
};
template <>
struct Tolerance<float> {
  static constexpr double sum = 1e-6;
  static constexpr double layer = 2e-6;
  static constexpr double function = 1e-6;
};
/// Analytic gradients against central differences in double.
inline constexpr double gradient_tolerance = 1e-6;

/// Standard normal numbers that depend on (seed, rows, cols) alone.
template <class Scalar>
Matrix<Scalar> random(Index rows, Index cols, std::uint64_t seed, double deviation = 1) {
  return random_normal<Scalar>(rows, cols, Rng(seed), deviation);
}

/// Fills every tensor of a block with normal numbers, biases too.
template <class Scalar>
void randomize(Parameters<Scalar>& p, std::uint64_t seed, double deviation = 0.5) {
  std::uint64_t i = 0;
  zip([&](const TensorInfo&, RowView<Scalar> w) { Rng(seed).split(i++).fill_normal(w, deviation); }, p);
}

/// The same numbers in double.
template <class Scalar>
Matrix<double> as_double(const Matrix<Scalar>& m) {
  return m.template cast<double>();
}
template <class Scalar>
Parameters<double> as_double(const Parameters<Scalar>& p) {
  Parameters<double> out{Layout(p.layout())};
  std::copy_n(p.flat().data(), p.layout().size(), out.flat().data());
  return out;
}

/// max |a - b| / max |b|; NaN if an element is.
template <class A, class B>
double relative_error(const Matrix<A>& a, const Matrix<B>& b) {
  REQUIRE(a.rows() == b.rows());
  REQUIRE(a.cols() == b.cols());
  double difference = 0;
  double largest = 0;
  for (Index i = 0; i < a.rows(); ++i) {
    for (Index j = 0; j < a.cols(); ++j) {
      const double u = double(a(i, j));
      const double v = double(b(i, j));
      if (std::isnan(u) || std::isnan(v)) {
        return std::numeric_limits<double>::quiet_NaN();
      }
      difference = std::max(difference, std::abs(u - v));
      largest = std::max(largest, std::abs(v));
    }
  }
  return difference == 0 ? 0 : difference / largest;
}

template <class Scalar>
bool same_bits(const Matrix<Scalar>& a, const Matrix<Scalar>& b) {
  return a.rows() == b.rows() && a.cols() == b.cols() &&
         (a.size() == 0 || std::memcmp(a.data(), b.data(), std::size_t(a.size()) * sizeof(Scalar)) == 0);
}

/// What `f` says when it throws an Error; "nothing was thrown" otherwise.
template <class Error, class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing was thrown";
}

/// A matrix that says whether anything was written to it.
template <class Scalar>
Matrix<Scalar> untouched(Index rows, Index cols) {
  return Matrix<Scalar>::Constant(rows, cols, Scalar(-77));
}
template <class Scalar>
bool is_untouched(const Matrix<Scalar>& m) {
  return (m.array() == Scalar(-77)).all();
}

/// The equations of the layers over plain vectors in double, one token at a time, nothing shared with the library's kernels.
namespace reference {

using Vector = Eigen::VectorXd;

inline Matrix<double> tensor(const Parameters<double>& p, const std::string& name) { return p[name].eigen(); }
inline Vector vector(const Parameters<double>& p, const std::string& name) { return p[name].eigen().row(0).transpose(); }

inline Vector softmax(const Vector& z) {
  const Vector e = (z.array() - z.maxCoeff()).exp();
  return e / e.sum();
}

/// The K best indices, best first, ties to the lower one.
inline std::vector<Index> top_k(const Vector& score, Index k) {
  std::vector<Index> order(std::size_t(score.size()));
  for (std::size_t i = 0; i < order.size(); ++i) {
    order[i] = Index(i);
  }
  std::stable_sort(order.begin(), order.end(), [&](Index a, Index b) { return score(a) > score(b); });
  order.resize(std::size_t(k));
  return order;
}

inline double silu(double x) { return x / (1 + std::exp(-x)); }
inline double gelu_erf(double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }
inline double gelu_tanh(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x)));
}

/// (silu(x Wgᵀ) ⊙ x Wuᵀ) Wdᵀ with the tensors "prefix.gate_proj.weight" and so on.
inline Vector swiglu(const Parameters<double>& p, const std::string& prefix, const Vector& x) {
  const Vector gate = tensor(p, prefix + "gate_proj.weight") * x;
  const Vector up = tensor(p, prefix + "up_proj.weight") * x;
  return tensor(p, prefix + "down_proj.weight") * gate.unaryExpr(&silu).cwiseProduct(up);
}

inline Vector mlp(const Parameters<double>& p, const std::string& prefix, const Vector& x, double (*activation)(double)) {
  const Vector before = tensor(p, prefix + "fc1.weight") * x + vector(p, prefix + "fc1.bias");
  return tensor(p, prefix + "fc2.weight") * before.unaryExpr(activation) + vector(p, prefix + "fc2.bias");
}

/// The weights (T,E) of the gate, zero for experts that were not chosen.
inline Matrix<double> top_k_weights(const Matrix<double>& x, const Matrix<double>& gate, Index k, bool select_first,
                                    bool normalize, double scale) {
  Matrix<double> weights = Matrix<double>::Zero(x.rows(), gate.rows());
  for (Index t = 0; t < x.rows(); ++t) {
    const Vector z = gate * x.row(t).transpose();
    const Vector s = softmax(z);
    const std::vector<Index> chosen = top_k(select_first ? z : s, k);
    double sum = 0;
    for (const Index e : chosen) {
      sum += s(e);
    }
    for (const Index e : chosen) {
      weights(t, e) = scale * s(e) / (normalize || select_first ? sum : 1);
    }
  }
  return weights;
}

/// y_t = Σ_e w_te f_e(x_t); `expert(e, x)` is f_e.
template <class F>
Matrix<double> mixture(const Matrix<double>& x, const Matrix<double>& weights, F&& expert) {
  Matrix<double> y = Matrix<double>::Zero(x.rows(), x.cols());
  for (Index t = 0; t < x.rows(); ++t) {
    for (Index e = 0; e < weights.cols(); ++e) {
      if (weights(t, e) != 0) {
        y.row(t) += weights(t, e) * expert(e, Vector(x.row(t).transpose())).transpose();
      }
    }
  }
  return y;
}

/// Soft MoE of one sequence: logits (L,N) given, slot n belongs to expert n / slots_per_expert.
template <class F>
Matrix<double> soft_mixture(const Matrix<double>& x, const Matrix<double>& logits, Index slots_per_expert, F&& expert) {
  Matrix<double> slots_out(logits.cols(), x.cols());
  for (Index n = 0; n < logits.cols(); ++n) {
    const Vector d = softmax(logits.col(n));
    slots_out.row(n) = expert(n / slots_per_expert, Vector(x.transpose() * d)).transpose();
  }
  Matrix<double> y(x.rows(), x.cols());
  for (Index t = 0; t < x.rows(); ++t) {
    y.row(t) = softmax(logits.row(t).transpose()).transpose() * slots_out;
  }
  return y;
}

/// v / √(Σ v² + 1e-6) for every row.
inline Matrix<double> l2norm(const Matrix<double>& v) {
  Matrix<double> out = v;
  for (Index i = 0; i < v.rows(); ++i) {
    out.row(i) /= std::sqrt(v.row(i).squaredNorm() + 1e-6);
  }
  return out;
}

}  // namespace reference
}  // namespace moxie::test
