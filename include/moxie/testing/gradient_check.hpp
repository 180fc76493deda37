// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <moxie/core/exec.hpp>
#include <moxie/core/parameters.hpp>
#include <moxie/core/random.hpp>
#include <moxie/routing/plan.hpp>
#include <moxie/routing/tokens.hpp>
#include <sstream>
#include <string>
#include <type_traits>
#include <vector>

/// Checks for routers, experts and layers of one's own. They return values and depend on no test framework.
namespace moxie::inline MOXIE_NAMESPACE::testing {

struct GradientOptions {
  /// h of the difference quotient. Rounding contributes about 1e-16 |f| / h, truncation h⁴ |f⁽⁵⁾| / 30.
  double step = 1e-4;
  /// Elements to check in each tensor, drawn with `rng`; 0 checks all of them.
  Index max_elements = 0;
  Rng rng{0};
};

/// What a check found in one tensor.
struct GradientReport {
  std::string tensor;
  double error = 0;  ///< the worst relative error, at (row, col)
  Index row = 0;
  Index col = 0;
  double analytic = 0;
  double numeric = 0;
  Index checked = 0;
  Index skipped = 0;  ///< elements that could not be compared, because moving them changes the selection

  /// Nothing was skipped, and no element is worse than `tolerance` (or NaN).
  bool passes(double tolerance) const { return skipped == 0 && error <= tolerance; }
  /// "gate.weight(2,3): analytic 0.5, numeric 0.25, relative error 0.5 (12 checked, 0 skipped)".
  std::string message() const {
    std::ostringstream out;
    out << tensor << "(" << row << "," << col << "): analytic " << analytic << ", numeric " << numeric << ", relative error "
        << error << " (" << checked << " checked, " << skipped << " skipped)";
    return out.str();
  }
};

/// Compares an analytic gradient with central differences of fourth order,
///
///     n = (8 (f(v+h) - f(v-h)) - (f(v+2h) - f(v-2h))) / 12h,   error = |a - n| / max(|a|, |n|, root mean square of all n)
///
/// (0 where a = n), so that elements far below the tensor's own scale are not measured against rounding.
///
/// `f()` is the function of the present contents of `variables`, which are moved one element at a time and put back. Where it
/// returns NaN the element is counted as skipped: a function with a selection inside says so where the selection is another
/// one. Throws ShapeError if `analytic` has another shape. Costs 4 calls an element.
template <class F>
GradientReport check_gradient(F&& f, RowView<double> variables, RowView<const double> analytic,
                              const GradientOptions& options = {}, std::string name = "variables") {
  moxie::expect_shape("check_gradient", "analytic", analytic, variables.rows(), variables.cols());
  GradientReport report;
  report.tensor = std::move(name);
  const Index size = variables.size();
  const bool all = options.max_elements <= 0 || options.max_elements >= size;
  struct Element {
    Index row, col;
    double numeric;
  };
  std::vector<Element> elements;
  double squares = 0;
  for (Index i = 0; i < (all ? size : options.max_elements); ++i) {
    const Index flat = all ? i : options.rng.below(size, std::uint64_t(i));
    const Index row = flat / variables.cols();
    const Index col = flat % variables.cols();
    double& v = variables(row, col);
    const double kept = v;
    const auto difference = [&](double h) {  // f(v+h) - f(v-h)
      v = kept + h;
      const double above = f();
      v = kept - h;
      const double below = f();
      v = kept;
      return above - below;
    };
    const double h = options.step;
    const double numeric = (8 * difference(h) - difference(2 * h)) / (12 * h);
    if (std::isnan(numeric)) {
      ++report.skipped;
      continue;
    }
    elements.push_back({row, col, numeric});
    squares += numeric * numeric;
  }
  report.checked = Index(elements.size());
  const double scale = elements.empty() ? 0 : std::sqrt(squares / double(elements.size()));
  report.error = -1;
  for (const Element& e : elements) {
    const double a = analytic(e.row, e.col);
    const double error =
        a == e.numeric ? 0 : (std::abs)(a - e.numeric) / (std::max)({(std::abs)(a), (std::abs)(e.numeric), scale});
    if (!(error <= report.error)) {  // a NaN is the worst
      report.error = error;
      report.row = e.row;
      report.col = e.col;
      report.analytic = a;
      report.numeric = e.numeric;
    }
    if (std::isnan(error)) {
      break;
    }
  }
  report.error = elements.empty() ? 0 : report.error;
  return report;
}

namespace detail {

// Loops of their own instead of Eigen's expressions, which all translation units of a program share.

/// A matrix of f(a, b, ...) for every element of equally large matrices.
template <class Scalar, class F, class... In>
Matrix<Scalar> element_wise(F&& f, RowView<const std::type_identity_t<Scalar>> first, const In&... rest) {
  Matrix<Scalar> out(first.rows(), first.cols());
  for (Index i = 0; i < first.rows(); ++i) {
    for (Index j = 0; j < first.cols(); ++j) {
      out(i, j) = f(first(i, j), rest(i, j)...);
    }
  }
  return out;
}
template <class Scalar>
Matrix<Scalar> copy_of(RowView<const std::type_identity_t<Scalar>> m) {
  return element_wise<Scalar>([](Scalar v) { return v; }, m);
}
template <class Scalar>
Matrix<Scalar> filled(Index rows, Index cols, Scalar value) {
  Matrix<Scalar> out(rows, cols);
  std::fill_n(out.data(), out.size(), value);
  return out;
}
/// Σ a b, element by element.
inline double inner(RowView<const double> a, RowView<const double> b) {
  double sum = 0;
  for (Index i = 0; i < a.rows(); ++i) {
    for (Index j = 0; j < a.cols(); ++j) {
      sum += a(i, j) * b(i, j);
    }
  }
  return sum;
}

/// Whether two plans assign the same tokens to the same experts.
template <class Scalar>
bool same_selection(const SparsePlan<Scalar>& a, const SparsePlan<Scalar>& b) {
  return std::ranges::equal(a.expert_starts(), b.expert_starts()) && std::ranges::equal(a.token(), b.token());
}
template <class Scalar>
bool same_selection(const DensePlan<Scalar>& /*a*/, const DensePlan<Scalar>& /*b*/) {
  return true;
}

/// The plan of a tape; of one that shows none, nothing that could differ.
struct NoPlan {};
inline bool same_selection(const NoPlan& /*a*/, const NoPlan& /*b*/) { return true; }
template <class Tape>
auto plan_of(const Tape& tape) {
  if constexpr (requires { tape.plan(); }) {
    return tape.plan();
  } else {
    return NoPlan{};
  }
}

}  // namespace detail

/// The gradients of a whole layer against differences of loss = ⟨y, dy⟩ + balance_loss: of x, of the condition, the gate's own
/// input and given weights if there are any, then of every parameter tensor that a gradient trains, one report each.
///
/// The layer's own parameters are used and stay as they are. Backward takes what was selected as constant, so a layer with
/// top-k is compared only where moving an element by 2h leaves the plan as it is; other elements are counted as skipped (choose
/// a smaller step or another input). Where the tape shows no plan (`AnyLayer`, a block around a layer), nothing is skipped, and
/// a selection that changes is an error. Throws what forward and backward throw.
template <class Layer>
std::vector<GradientReport> check_layer_gradients(const Layer& layer, const Tokens<double>& in, RowView<const double> dy,
                                                  const Exec& exec = {}, const GradientOptions& options = {}) {
  Matrix<double> x = detail::copy_of<double>(in.x);
  Matrix<double> condition = detail::copy_of<double>(in.condition);
  Matrix<double> dcondition(condition.rows(), condition.cols());
  Matrix<double> gate_x = in.gate_x.eigen();
  Matrix<double> dgate_x(gate_x.rows(), gate_x.cols());
  Matrix<double> weight = in.weight.eigen();
  Matrix<double> dweight(weight.rows(), weight.cols());
  Tokens<double> moved = in;
  moved.x = x;
  moved.condition = condition;
  moved.gate_x = gate_x;
  moved.weight = weight;
  Parameters<double> parameters = layer.parameters();
  Parameters<double> grads = parameters.zeros_like();
  Matrix<double> y(x.rows(), x.cols());
  Matrix<double> dx(x.rows(), x.cols());
  auto tape = layer.make_tape(x.rows());
  layer.forward(parameters, moved, y, tape, exec);
  TokensGradient<double> din(dx, dcondition);
  din.gate_x = dgate_x;
  din.weight = dweight;
  layer.backward(parameters, moved, dy, {din, grads}, tape, exec);

  const auto plan = detail::plan_of(tape);
  const auto loss = [&] {
    layer.forward(parameters, moved, y, tape, exec);
    return detail::same_selection(plan, detail::plan_of(tape)) ? detail::inner(y, dy) + tape.balance_loss()
                                                               : std::numeric_limits<double>::quiet_NaN();
  };
  std::vector<GradientReport> reports{check_gradient(loss, x, dx, options, "x")};
  if (condition.rows() != 0) {
    reports.push_back(check_gradient(loss, condition, dcondition, options, "condition"));
  }
  if (gate_x.cols() != 0) {
    reports.push_back(check_gradient(loss, gate_x, dgate_x, options, "gate_x"));
  }
  if (weight.cols() != 0) {
    reports.push_back(check_gradient(loss, weight, dweight, options, "weight"));
  }
  zip(
      [&](const TensorInfo& info, RowView<double> value, RowView<double> gradient) {
        if (info.trained == Trained::by_gradient) {
          reports.push_back(check_gradient(loss, value, gradient, options, info.name));
        }
      },
      parameters, grads);
  return reports;
}

/// The report with the largest error; one with skipped elements counts as worse than any without.
inline GradientReport worst(const std::vector<GradientReport>& reports) {
  const auto rank = [](const GradientReport& r) {
    return r.skipped > 0 || std::isnan(r.error) ? std::numeric_limits<double>::infinity() : r.error;
  };
  const auto found = std::ranges::max_element(reports, [&](const auto& a, const auto& b) { return rank(a) < rank(b); });
  return found == reports.end() ? GradientReport{} : *found;
}

}  // namespace moxie::inline MOXIE_NAMESPACE::testing
