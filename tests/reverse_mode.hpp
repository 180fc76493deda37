// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <vector>

/// Reverse-mode differentiation of programs that are written for reading: every operation on a `Var` is recorded, `gradients`
/// walks back. It knows the derivatives of a dozen functions and nothing of layers.
namespace moxie::test {

class Var {
 public:
  Var() : Var(0.0) {}
  Var(double value) : value_(value) {}  // a constant

  static Var variable(double value) { return Var(value, {}, {}); }
  double value() const { return value_; }

  friend Var operator+(const Var& a, const Var& b) { return {a.value_ + b.value_, {a, 1}, {b, 1}}; }
  friend Var operator-(const Var& a, const Var& b) { return {a.value_ - b.value_, {a, 1}, {b, -1}}; }
  friend Var operator*(const Var& a, const Var& b) { return {a.value_ * b.value_, {a, b.value_}, {b, a.value_}}; }
  friend Var operator/(const Var& a, const Var& b) {
    return {a.value_ / b.value_, {a, 1 / b.value_}, {b, -a.value_ / (b.value_ * b.value_)}};
  }
  friend Var operator-(const Var& a) { return {-a.value_, {a, -1}, {}}; }
  Var& operator+=(const Var& b) { return *this = *this + b; }
  friend Var exp(const Var& a) { return {std::exp(a.value_), {a, std::exp(a.value_)}, {}}; }
  friend Var log(const Var& a) { return {std::log(a.value_), {a, 1 / a.value_}, {}}; }
  friend Var sqrt(const Var& a) { return {std::sqrt(a.value_), {a, 0.5 / std::sqrt(a.value_)}, {}}; }
  friend Var tanh(const Var& a) { return {std::tanh(a.value_), {a, 1 - std::tanh(a.value_) * std::tanh(a.value_)}, {}}; }
  friend Var erf(const Var& a) {
    return {std::erf(a.value_), {a, 2 / std::sqrt(std::acos(-1.0)) * std::exp(-a.value_ * a.value_)}, {}};
  }
  /// max(a, 0), with derivative 0 at 0.
  friend Var relu(const Var& a) { return {std::fmax(a.value_, 0.0), {a, a.value_ > 0 ? 1.0 : 0.0}, {}}; }

  /// Forgets everything that was recorded; older variables are dead.
  static void restart() { tape().clear(); }
  /// ∂this/∂ of everything recorded, by position; `of` looks one up.
  std::vector<double> gradients() const {
    std::vector<double> g(tape().size(), 0.0);
    if (node_ >= 0) {
      g[std::size_t(node_)] = 1;
    }
    for (std::size_t i = g.size(); i-- > 0;) {
      for (const Edge& edge : tape()[i].edges) {
        if (edge.node >= 0 && g[i] != 0) {
          g[std::size_t(edge.node)] += g[i] * edge.derivative;
        }
      }
    }
    return g;
  }
  /// The same sums of absolute values: how large the terms are that a gradient is the sum of, so that rounding is a part of it.
  std::vector<double> magnitudes() const {
    std::vector<double> g(tape().size(), 0.0);
    if (node_ >= 0) {
      g[std::size_t(node_)] = 1;
    }
    for (std::size_t i = g.size(); i-- > 0;) {
      for (const Edge& edge : tape()[i].edges) {
        if (edge.node >= 0) {
          g[std::size_t(edge.node)] += g[i] * std::abs(edge.derivative);
        }
      }
    }
    return g;
  }
  double of(const std::vector<double>& gradients) const { return node_ < 0 ? 0 : gradients[std::size_t(node_)]; }

 private:
  struct Edge {
    Edge() = default;
    Edge(const Var& v, double d) : node(v.node_), derivative(d) {}
    long node = -1;
    double derivative = 0;
  };
  struct Node {
    Edge edges[2];
  };
  static std::vector<Node>& tape() {
    static std::vector<Node> nodes;
    return nodes;
  }

  Var(double value, const Edge& a, const Edge& b) : value_(value), node_(long(tape().size())) { tape().push_back({{a, b}}); }

  double value_;
  long node_ = -1;
};

}  // namespace moxie::test
