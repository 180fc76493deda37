// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <moxie/core/parameters.hpp>
#include <moxie/core/random.hpp>
#include <moxie/exchange/combine.hpp>
#include <moxie/exchange/dispatch.hpp>
#include <moxie/expert/bank.hpp>
#include <moxie/routing/plan.hpp>
#include <moxie/routing/tokens.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <numeric>
#include <span>
#include <sstream>
#include <string>
#include <vector>

/// What has to hold for every plan, bank of experts and layer, as functions to run on types of one's own:
///
///     for (const LawResult& law : check_layer_laws(layer, x)) { assert(law.holds); }
///
/// They return values and depend on no test framework.
namespace moxie::inline MOXIE_NAMESPACE::testing {

struct LawResult {
  std::string law;
  bool holds = false;
  double error = 0;     ///< what was measured, relative; 0 or 1 where the law asks for equal bits
  std::string message;  ///< empty if it holds
};

struct LawOptions {
  Exec exec = {};
  /// Draws parameters, gradients and permutations.
  Rng rng{0};
  /// Largest relative error where sums are taken in another order; 0: a thousand times the scalar's epsilon.
  double tolerance = 0;
  /// Thread counts whose results must be bit-identical.
  std::vector<int> threads = {1, 2, 7};
  /// False for a router that looks at a token's position.
  bool permute_tokens = true;
  /// False for a router that needs sequences of one length.
  bool mask_tokens = true;
  /// How many allocations the program has made so far. Without it the law of no allocations is not checked.
  std::function<std::size_t()> allocations = {};
};

namespace detail {

template <class Scalar>
double tolerance(const LawOptions& options) {
  return options.tolerance > 0 ? options.tolerance : 1e3 * double(std::numeric_limits<Scalar>::epsilon());
}

/// A law about a measured error, which must not exceed `tolerance`; NaN does not hold.
inline LawResult measured(std::string law, double error, double tolerance) {
  LawResult result{std::move(law), error <= tolerance, error, {}};
  if (!result.holds) {
    std::ostringstream out;
    out << result.law << ": the error is " << error << ", expected at most " << tolerance;
    result.message = out.str();
  }
  return result;
}

/// A law that holds or does not.
inline LawResult stated(std::string law, bool holds, const std::string& why_not) {
  LawResult result{std::move(law), holds, holds ? 0.0 : 1.0, {}};
  if (!holds) {
    result.message = result.law + ": " + why_not;
  }
  return result;
}

/// The larger error; NaN is the largest.
inline double worse(double a, double b) { return std::isnan(a) || std::isnan(b) ? a + b : (std::max)(a, b); }

template <class Scalar>
bool same_bits(RowView<const Scalar> a, RowView<const Scalar> b) {
  if (a.rows() != b.rows() || a.cols() != b.cols()) {
    return false;
  }
  for (Index i = 0; a.cols() > 0 && i < a.rows(); ++i) {
    if (std::memcmp(a.row(i), b.row(i), std::size_t(a.cols()) * sizeof(Scalar)) != 0) {
      return false;
    }
  }
  return true;
}

/// The rows of m in that order.
template <class Scalar>
Matrix<Scalar> rows_at(const std::vector<Index>& order, RowView<const std::type_identity_t<Scalar>> m) {
  Matrix<Scalar> out(Index(order.size()), m.cols());
  for (std::size_t i = 0; i < order.size(); ++i) {
    std::copy_n(m.row(order[i]), m.cols(), out.data() + Index(i) * m.cols());
  }
  return out;
}

/// max |a - b| / max |b|, NaN if an element is; 0 if both are zero.
template <class Scalar>
double distance(RowView<const Scalar> a, RowView<const Scalar> b) {
  double difference = 0;
  double largest = 0;
  for (Index i = 0; i < a.rows(); ++i) {
    for (Index j = 0; j < a.cols(); ++j) {
      const double u = double(a(i, j));
      const double v = double(b(i, j));
      if (std::isnan(u) || std::isnan(v)) {
        return std::numeric_limits<double>::quiet_NaN();
      }
      difference = (std::max)(difference, (std::abs)(u - v));
      largest = (std::max)(largest, (std::abs)(v));
    }
  }
  return difference == 0 ? 0 : difference / largest;
}

/// |⟨a, b⟩ - ⟨c, d⟩| / (|a| |b|).
template <class Scalar>
double adjoint_error(const Matrix<Scalar>& a, const Matrix<Scalar>& b, const Matrix<Scalar>& c, const Matrix<Scalar>& d) {
  const auto dot = [](const Matrix<Scalar>& u, const Matrix<Scalar>& v) {
    double sum = 0;
    for (Index i = 0; i < u.size(); ++i) {
      sum += double(u.data()[i]) * double(v.data()[i]);
    }
    return sum;
  };
  const double scale = std::sqrt(dot(a, a) * dot(b, b));
  return scale == 0 ? 0 : (std::abs)(dot(a, b) - dot(c, d)) / scale;
}

template <class Scalar>
Matrix<Scalar> difference(const Matrix<Scalar>& a, const Matrix<Scalar>& b) {
  return element_wise<Scalar>([](Scalar u, Scalar v) { return u - v; }, a, b);
}

/// All elements of a block of parameters, gaps included.
template <class Scalar>
std::span<Scalar> elements(Parameters<Scalar>& p) {
  return {p.flat().data(), std::size_t(p.layout().size())};
}

/// The rows that a dispatch stands for, as a matrix.
template <class Scalar>
Matrix<Scalar> gathered(const GroupedRows<Scalar>& rows) {
  Matrix<Scalar> m(rows.count(), rows.rows.cols());
  for (Index r = 0; r < rows.count(); ++r) {
    std::copy_n(rows.row(r), m.cols(), m.data() + r * m.cols());
  }
  return m;
}

/// All that a step of a layer computes.
template <class Scalar>
struct Step {
  Matrix<Scalar> y, dx, dcondition;
  Parameters<Scalar> grads;
  double balance_loss;
};

/// One forward and backward on a fresh tape; dx starts as NaN, gradients as zero.
template <class Layer, class Scalar = typename Layer::Scalar>
Step<Scalar> step(const Layer& layer, const Tokens<Scalar>& in, RowView<const std::type_identity_t<Scalar>> dy,
                  const Exec& exec, Keep keep = Keep::activations) {
  constexpr Scalar nan = std::numeric_limits<Scalar>::quiet_NaN();
  const Matrix<Scalar> rows = filled(in.x.rows(), in.x.cols(), nan);
  Step<Scalar> s{rows, rows, filled(in.condition.rows(), in.condition.cols(), nan), layer.parameters().zeros_like(), 0};
  auto tape = layer.make_tape(in.count(), keep);
  layer.forward(in, s.y, tape, exec);
  layer.backward(in, dy, {s.dx, s.dcondition}, s.grads, tape, exec);
  s.balance_loss = tape.balance_loss();
  return s;
}

template <class Scalar>
bool same_bits(const Step<Scalar>& a, const Step<Scalar>& b) {
  bool same = same_bits<Scalar>(a.y, b.y) && same_bits<Scalar>(a.dx, b.dx) && same_bits<Scalar>(a.dcondition, b.dcondition) &&
              std::memcmp(&a.balance_loss, &b.balance_loss, sizeof(double)) == 0;
  zip([&](const TensorInfo&, RowView<const Scalar> u, RowView<const Scalar> v) { same = same && same_bits(u, v); }, a.grads,
      b.grads);
  return same;
}

/// max |a - b| / max |b| of a step's input and parameter gradients, the worst tensor.
template <class Scalar>
double gradient_distance(const Step<Scalar>& a, const Step<Scalar>& b) {
  double worst = worse(distance<Scalar>(a.dx, b.dx), distance<Scalar>(a.dcondition, b.dcondition));
  zip([&](const TensorInfo&, RowView<const Scalar> u, RowView<const Scalar> v) { worst = worse(worst, distance(u, v)); },
      a.grads, b.grads);
  return worst;
}

/// 0, ..., n-1 in random order (Fisher and Yates), each sequence for itself.
inline std::vector<Index> permutation(const Sequences& sequences, const Rng& rng) {
  std::vector<Index> p(static_cast<std::size_t>(sequences.tokens()));
  std::iota(p.begin(), p.end(), Index{0});
  sequences.for_each([&](Index, Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      std::swap(p[std::size_t(i)], p[std::size_t(begin + rng.below(i - begin + 1, std::uint64_t(i)))]);
    }
  });
  return p;
}

/// The rows of `in` in that order, which may leave some out; the sequences are the caller's to set. Holds what `tokens` views.
template <class Scalar>
struct Reordered {
  moxie::detail::TokenCopies fields;
  std::vector<std::uint8_t> mask;
  Tokens<Scalar> tokens;

  Reordered(const Tokens<Scalar>& in, const std::vector<Index>& order, const Sequences& sequences) : tokens(in) {
    for (const Index t : order) {
      if (!in.mask.empty()) {
        mask.push_back(in.mask[std::size_t(t)]);
      }
    }
    fields.copy(in, order);
    fields.view(tokens, Index(order.size()));
    tokens.mask = mask;
    tokens.sequences = sequences.over(Index(order.size()));
  }
  Reordered(const Reordered&) = delete;
  Reordered& operator=(const Reordered&) = delete;
};

}  // namespace detail

/// Assignments + dropped = proposed (T·K for token choice), every expert's rows are sorted by token, and every row belongs to
/// one expert and one token.
template <class Plan>
LawResult plan_is_sorted_and_complete(const Plan& plan, Index proposed) {
  const auto result = [](const std::string& why_not) {
    return detail::stated("plan: sorted by expert, then by token, nothing lost", why_not.empty(), why_not);
  };
  const auto starts = plan.expert_starts();
  if (plan.rows() + plan.dropped() != proposed) {
    return result(std::to_string(plan.rows()) + " rows and " + std::to_string(plan.dropped()) + " dropped, expected " +
                  std::to_string(proposed) + " together");
  }
  if (Index(starts.size()) != plan.experts() + 1 || starts.front() != 0 || starts.back() != plan.rows() ||
      !std::ranges::is_sorted(starts)) {
    return result("the experts' rows do not divide the plan's");
  }
  for (Index e = 0; e < plan.experts(); ++e) {
    const Index begin = starts[std::size_t(e)];
    const Index end = starts[std::size_t(e + 1)];
    if (plan.tokens_per_expert()[std::size_t(e)] != end - begin) {
      return result("the count of expert " + std::to_string(e) + " is not its number of rows");
    }
    for (Index r = begin; r < end; ++r) {
      if (plan.token(r) < 0 || plan.token(r) >= plan.tokens() || (r > begin && plan.token(r) < plan.token(r - 1))) {
        return result("row " + std::to_string(r) + " of expert " + std::to_string(e) + " is out of order");
      }
    }
  }
  Index rows = 0;
  for (Index t = 0; t < plan.tokens(); ++t) {
    for (const Index r : plan.rows_of_token(t)) {
      ++rows;
      if (r < 0 || r >= plan.rows() || plan.token(r) != t) {
        return result("row " + std::to_string(r) + " is not one of token " + std::to_string(t));
      }
    }
  }
  return result(rows == plan.rows() ? "" : "the tokens' rows are not the plan's");
}

/// Soft MoE: the columns of D sum to 1 in every sequence, and so do the rows of C.
template <class Scalar>
LawResult plan_is_convex(const DensePlan<Scalar>& plan, double tolerance) {
  double error = 0;
  const auto d = plan.dispatch();
  const auto c = plan.combine();
  plan.sequences().for_each([&](Index, Index begin, Index end) {
    for (Index n = 0; n < plan.slot_count() && begin < end; ++n) {
      double sum = 0;
      for (Index t = begin; t < end; ++t) {
        error = detail::worse(error, -double(d(t, n)));
        sum += double(d(t, n));
      }
      error = detail::worse(error, (std::abs)(sum - 1));
    }
  });
  for (Index t = 0; t < plan.tokens(); ++t) {
    double sum = 0;
    for (Index n = 0; n < plan.slot_count(); ++n) {
      error = detail::worse(error, -double(c(t, n)));
      sum += double(c(t, n));
    }
    error = detail::worse(error, (std::abs)(sum - 1));
  }
  return detail::measured("plan: columns of D and rows of C are convex weights", error, tolerance);
}

/// ⟨A x, r⟩ = ⟨x, Aᵀ r⟩, where `dispatch_backward` adds Aᵀ r; for a dense plan also ⟨A x, r⟩ = ⟨D, ∂/∂D⟩.
template <class Plan, class Scalar = typename Plan::Scalar>
LawResult dispatch_is_adjoint(const Plan& plan, Index dim, const LawOptions& options = {}) {
  const Matrix<Scalar> x = random_normal<Scalar>(plan.tokens(), dim, options.rng.split(0));
  const Matrix<Scalar> r = random_normal<Scalar>(plan.rows(), dim, options.rng.split(1));
  const Matrix<Scalar> before = random_normal<Scalar>(plan.tokens(), dim, options.rng.split(2));
  Matrix<Scalar> slot_rows(plan.rows(), dim);
  typename Plan::Gradient dplan;
  const Matrix<Scalar> ax = detail::gathered(dispatch(plan, RowView<const Scalar>(x), slot_rows, options.exec));
  Matrix<Scalar> dx = before;
  dispatch_backward(plan, RowView<const Scalar>(x), RowView<const Scalar>(r), kernel::add_to<Scalar>(dx), dplan, options.exec);
  double error = detail::adjoint_error<Scalar>(ax, r, x, detail::difference<Scalar>(dx, before));
  if constexpr (requires { dplan.dispatch; }) {
    error = detail::worse(error, detail::adjoint_error<Scalar>(
                                     ax, r, detail::copy_of<Scalar>(plan.dispatch()),
                                     detail::copy_of<Scalar>(dplan.dispatch.spread_view(plan.tokens(), plan.slot_count()))));
  }
  return detail::measured("dispatch: backward is the adjoint", error, detail::tolerance<Scalar>(options));
}

/// ⟨C h, dy⟩ = ⟨h, Cᵀ dy⟩, where `combine` adds C h and `combine_backward` overwrites with Cᵀ dy; and, as y is linear in the
/// weights too, = ⟨weights, ∂/∂weights⟩.
template <class Plan, class Scalar = typename Plan::Scalar>
LawResult combine_is_adjoint(const Plan& plan, Index dim, const LawOptions& options = {}) {
  const Matrix<Scalar> h = random_normal<Scalar>(plan.rows(), dim, options.rng.split(0));
  const Matrix<Scalar> dy = random_normal<Scalar>(plan.tokens(), dim, options.rng.split(1));
  const Matrix<Scalar> before = random_normal<Scalar>(plan.tokens(), dim, options.rng.split(2));
  typename Plan::Gradient dplan;
  Matrix<Scalar> y = before;
  combine(plan, RowView<const Scalar>(h), kernel::add_to<Scalar>(y), options.exec);
  const Matrix<Scalar> ch = detail::difference<Scalar>(y, before);
  Matrix<Scalar> dh = detail::filled(h.rows(), h.cols(), std::numeric_limits<Scalar>::quiet_NaN());
  combine_backward(plan, RowView<const Scalar>(h), RowView<const Scalar>(dy), RowView<Scalar>(dh), dplan, options.exec);
  Matrix<Scalar> weights, dweights;
  if constexpr (requires { dplan.combine; }) {
    weights = detail::copy_of<Scalar>(plan.combine());
    dweights = detail::copy_of<Scalar>(dplan.combine.spread_view(plan.tokens(), plan.slot_count()));
  } else {
    weights.resize(1, plan.rows());
    for (Index r = 0; r < plan.rows(); ++r) {
      weights(0, r) = plan.weight(r);
    }
    dweights = detail::copy_of<Scalar>(dplan.weight.view(1, plan.rows()));
  }
  const double error =
      detail::worse(detail::adjoint_error<Scalar>(ch, dy, h, dh), detail::adjoint_error<Scalar>(ch, dy, weights, dweights));
  return detail::measured("combine: backward is the adjoint", error, detail::tolerance<Scalar>(options));
}

namespace detail {

/// Random rows for a bank, `counts[e]` of expert e, with what it makes of them.
template <class Bank_, class Scalar = typename Bank_::Scalar>
struct BankRun {
  Matrix<Scalar> h, drows;
  Parameters<Scalar> grads;

  BankRun(const Bank_& bank, const Parameters<Scalar>& p, const std::vector<Index>& counts, const Matrix<Scalar>& x,
          const Matrix<Scalar>& dh, const Exec& exec)
      : grads(p.zeros_like()) {
    std::vector<Index> starts{0};
    for (const Index n : counts) {
      starts.push_back(starts.back() + n);
    }
    const GroupedRows<Scalar> rows{starts, x, nullptr};
    h = filled(x.rows(), x.cols(), std::numeric_limits<Scalar>::quiet_NaN());
    drows = h;
    typename Bank_::Tape tape{nullptr};
    Workspace workspace;
    bank.forward(p, rows, h, &tape, {workspace, exec});
    bank.backward(p, rows, dh, {drows, grads}, tape, {workspace, exec});
  }
};

/// ‖a - b‖ / ‖b‖.
template <class Scalar>
double relative_difference(const Matrix<Scalar>& a, const Matrix<Scalar>& b) {
  double error = 0;
  double size = 0;
  for (Index i = 0; i < b.rows(); ++i) {
    for (Index j = 0; j < b.cols(); ++j) {
      error += (double(a(i, j)) - double(b(i, j))) * (double(a(i, j)) - double(b(i, j)));
      size += double(b(i, j)) * double(b(i, j));
    }
  }
  return error == 0 ? 0 : std::sqrt(error / size);
}

/// Whether a bank multiplies numbers that are rounded to BFloat16.
template <class Bank_>
inline constexpr bool rounds = [] {
  if constexpr (requires { typename Bank_::Element; }) {
    return sizeof(typename Bank_::Element) < sizeof(typename Bank_::Scalar);
  } else {
    return false;
  }
}();

template <class Bank_, class Scalar = typename Bank_::Scalar>
Parameters<Scalar> random_parameters(const Bank_& bank, const Rng& rng) {
  Parameters<Scalar> p{Layout(bank.layout())};
  Index i = 0;
  zip([&](const TensorInfo&, RowView<Scalar> w) { rng.split(std::uint64_t(i++)).fill_normal(w, 0.5); }, p);
  return p;
}

}  // namespace detail

/// A row of an expert is bit-identical, forward and backward, whatever the other rows are, and R =
/// 0 is legal.
template <Bank Bank_>
LawResult rows_are_independent(const Bank_& bank, const LawOptions& options = {}) {
  using Scalar = typename Bank_::Scalar;
  const auto p = detail::random_parameters(bank, options.rng.split(0));
  // Seven rows for each expert, then of expert e the rows that are not e mod 3.
  const Index each = 7;
  const Index experts = bank.experts();
  const Matrix<Scalar> x = random_normal<Scalar>(experts * each, bank.model_dim(), options.rng.split(1));
  const Matrix<Scalar> dh = random_normal<Scalar>(experts * each, bank.model_dim(), options.rng.split(2));
  std::vector<Index> kept;
  std::vector<Index> counts(std::size_t(experts), 0);
  for (Index r = 0; r < experts * each; ++r) {
    if (r % each % 3 != r / each % 3) {
      kept.push_back(r);
      ++counts[std::size_t(r / each)];
    }
  }
  const detail::BankRun whole(bank, p, std::vector<Index>(std::size_t(experts), each), x, dh, options.exec);
  const detail::BankRun part(bank, p, counts, detail::rows_at<Scalar>(kept, x), detail::rows_at<Scalar>(kept, dh),
                             options.exec);
  const detail::BankRun none(bank, p, std::vector<Index>(std::size_t(experts), 0), Matrix<Scalar>(0, x.cols()),
                             Matrix<Scalar>(0, x.cols()), options.exec);
  const bool same = detail::same_bits<Scalar>(part.h, detail::rows_at<Scalar>(kept, whole.h)) &&
                    detail::same_bits<Scalar>(part.drows, detail::rows_at<Scalar>(kept, whole.drows));
  return detail::stated("experts: rows are independent", same, "a row has other bits when other rows are missing");
}

/// From dy of tokens, the rows' tokens and their weights a bank gives what it gives of dh_r = weight_r dy_t, and the gradient
/// ⟨h_r, dy_t⟩ of each weight.
template <Bank Bank_>
LawResult output_gradient_is_weighted(const Bank_& bank, const LawOptions& options = {}) {
  using Scalar = typename Bank_::Scalar;
  const auto p = detail::random_parameters(bank, options.rng.split(0));
  const Index each = 5;
  const Index rows = bank.experts() * each;
  const Index tokens = 7;
  const Matrix<Scalar> x = random_normal<Scalar>(rows, bank.model_dim(), options.rng.split(1));
  const Matrix<Scalar> dy = random_normal<Scalar>(tokens, bank.model_dim(), options.rng.split(2));
  const Matrix<Scalar> weight = random_normal<Scalar>(1, rows, options.rng.split(3));
  std::vector<Index> starts{0};
  std::vector<Index> token;
  Matrix<Scalar> dh(rows, dy.cols());
  for (Index r = 0; r < rows; ++r) {
    token.push_back(r * 3 % tokens);
    for (Index j = 0; j < dy.cols(); ++j) {
      dh(r, j) = weight(0, r) * dy(token.back(), j);
    }
    if ((r + 1) % each == 0) {
      starts.push_back(r + 1);
    }
  }
  const detail::BankRun formed(bank, p, std::vector<Index>(std::size_t(bank.experts()), each), x, dh, options.exec);
  Matrix<Scalar> h(rows, dy.cols()), drows(rows, dy.cols()), dweight(1, rows), expected(1, rows);
  auto grads = p.zeros_like();
  typename Bank_::Tape tape{nullptr};
  Workspace workspace;
  const GroupedRows<Scalar> grouped{starts, x, nullptr};
  // Without h, as where a tape with Keep::inputs is filled.
  const Context context(workspace, options.exec);
  bank.forward(p, grouped, RowView<Scalar>(), &tape, context);
  bank.backward(p, grouped, OutputGradient<Scalar>(dy, token.data(), weight.data(), dweight.data()), {drows, grads}, tape,
                context);
  for (Index r = 0; r < rows; ++r) {
    expected(0, r) = kernel::dot(dy.cols(), formed.h.row(r).data(), dy.data() + token[std::size_t(r)] * dy.cols());
  }
  double error = detail::worse(detail::relative_difference<Scalar>(drows, formed.drows),
                               detail::relative_difference<Scalar>(dweight, expected));
  auto formed_grads = formed.grads;
  zip(
      [&](const TensorInfo&, RowView<Scalar> a, RowView<Scalar> b) {
        error =
            detail::worse(error, detail::relative_difference<Scalar>(detail::copy_of<Scalar>(a), detail::copy_of<Scalar>(b)));
      },
      grads, formed_grads);
  const double tolerance = detail::rounds<Bank_> ? 0.02 : detail::tolerance<Scalar>(options);
  return detail::measured("experts: rows of the output's gradient are weighted", error, tolerance);
}

/// An expert without tokens gets exactly zero gradient: no element of a gradient comes from the rows of two experts, and
/// without rows there is none.
template <Bank Bank_>
LawResult idle_experts_have_zero_gradient(const Bank_& bank, const LawOptions& options = {}) {
  using Scalar = typename Bank_::Scalar;
  const std::string law = "experts: an expert without tokens has zero gradient";
  const auto p = detail::random_parameters(bank, options.rng.split(0));
  const auto run = [&](Index busy, Index n) {
    std::vector<Index> counts(std::size_t(bank.experts()), 0);
    counts[std::size_t(busy)] = n;
    return detail::BankRun(bank, p, counts, random_normal<Scalar>(n, bank.model_dim(), options.rng.split(1)),
                           random_normal<Scalar>(n, bank.model_dim(), options.rng.split(2)), options.exec)
        .grads;
  };
  auto none = run(0, 0);
  const auto is_zero = [](Scalar v) { return v == Scalar(0); };
  if (!std::ranges::all_of(detail::elements(none), is_zero)) {
    return detail::stated(law, false, "there are gradients without any row");
  }
  Parameters<double> owners{Layout(bank.layout())};
  for (Index e = 0; e < bank.experts(); ++e) {
    auto grads = run(e, 3);
    const auto of_expert = detail::elements(grads);
    const auto count = detail::elements(owners);
    for (std::size_t i = 0; i < of_expert.size(); ++i) {
      if (!std::isfinite(of_expert[i])) {
        return detail::stated(law, false, "a gradient is not finite");
      }
      count[i] += is_zero(of_expert[i]) ? 0 : 1;
    }
  }
  const bool one = std::ranges::all_of(detail::elements(owners), [](double count) { return count <= 1; });
  return detail::stated(law, one, "a parameter's gradient comes from two experts");
}

/// `forward` and `backward` are bit-identical for all numbers of threads, and from run to run on
/// one tape.
template <class Layer, class Scalar = typename Layer::Scalar>
LawResult bits_do_not_depend_on_threads(const Layer& layer, const Tokens<Scalar>& in,
                                        RowView<const std::type_identity_t<Scalar>> dy, const LawOptions& options = {}) {
  const detail::Step<Scalar> first = detail::step(layer, in, dy, options.exec);
  detail::Step<Scalar> again = first;
  auto tape = layer.make_tape();
  for (const int threads : options.threads) {
    for (int run = 0; run < 2; ++run) {
      const Exec exec{.threads = threads};
      layer.forward(in, again.y, tape, exec);
      again.grads.set_zero();
      layer.backward(in, dy, {again.dx, again.dcondition}, again.grads, tape, exec);
      again.balance_loss = tape.balance_loss();
      if (!detail::same_bits(first, again)) {
        return detail::stated("layer: the same bits for any number of threads and from run to run", false,
                              "run " + std::to_string(run) + " with " + std::to_string(threads) + " threads differs");
      }
    }
  }
  return detail::stated("layer: the same bits for any number of threads and from run to run", true, "");
}

/// Permuting the tokens of a sequence permutes the rows of y and dx, and leaves balance loss and parameter gradients.
template <class Layer, class Scalar = typename Layer::Scalar>
LawResult permuting_tokens_permutes_outputs(const Layer& layer, const Tokens<Scalar>& in,
                                            RowView<const std::type_identity_t<Scalar>> dy, const LawOptions& options = {}) {
  const auto order = detail::permutation(in.sequences, options.rng.split(7));
  const detail::Reordered<Scalar> permuted(in, order, in.sequences);
  const Matrix<Scalar> dy_permuted = detail::rows_at<Scalar>(order, dy);
  detail::Step<Scalar> plain = detail::step(layer, in, dy, options.exec);
  const detail::Step<Scalar> moved = detail::step(layer, permuted.tokens, dy_permuted, options.exec);
  plain.y = detail::rows_at<Scalar>(order, plain.y);
  plain.dx = detail::rows_at<Scalar>(order, plain.dx);
  const double error =
      detail::worse(detail::worse(detail::distance<Scalar>(moved.y, plain.y), detail::gradient_distance(moved, plain)),
                    (std::abs)(moved.balance_loss - plain.balance_loss));
  return detail::measured("layer: permuting tokens permutes outputs", error, detail::tolerance<Scalar>(options));
}

/// A masked token changes nothing: outputs, gradients and losses have the bits that they have without its row, its own output
/// and gradient are zero, and it may hold NaN. Masks a third of the tokens, drawn with `options.rng`, and those that `in`
/// masks.
template <class Layer, class Scalar = typename Layer::Scalar>
LawResult masked_tokens_change_nothing(const Layer& layer, const Tokens<Scalar>& in,
                                       RowView<const std::type_identity_t<Scalar>> dy, const LawOptions& options = {}) {
  const std::string law = "layer: a masked token changes nothing";
  std::vector<std::uint8_t> mask(std::size_t(in.count()));
  std::vector<Index> kept;
  std::vector<Index> starts{0};
  Matrix<Scalar> x = detail::copy_of<Scalar>(in.x);
  Matrix<Scalar> spoilt_dy = detail::copy_of<Scalar>(dy);
  in.sequences.for_each([&](Index, Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      const bool was = in.mask.empty() || in.mask[std::size_t(t)] != 0;
      mask[std::size_t(t)] = was && options.rng.split(6).uniform(std::uint64_t(t)) >= 1.0 / 3 ? 1 : 0;
      if (mask[std::size_t(t)] != 0) {
        kept.push_back(t);
      } else {
        std::fill_n(&x(t, 0), x.cols(), std::numeric_limits<Scalar>::quiet_NaN());
        std::fill_n(&spoilt_dy(t, 0), spoilt_dy.cols(), std::numeric_limits<Scalar>::quiet_NaN());
      }
    }
    starts.push_back(Index(kept.size()));
  });
  Tokens<Scalar> masked = in;
  masked.x = x;
  masked.mask = mask;
  detail::Reordered<Scalar> without(in, kept, starts);
  without.tokens.mask = {};
  const Matrix<Scalar> dy_without = detail::rows_at<Scalar>(kept, dy);
  const detail::Step<Scalar> expected = detail::step(layer, without.tokens, dy_without, options.exec);
  detail::Step<Scalar> found = detail::step<Layer, Scalar>(layer, masked, spoilt_dy, options.exec);
  const auto is_zero = [](const Matrix<Scalar>& m, Index row) {
    return std::all_of(&m(row, 0), &m(row, 0) + m.cols(), [](Scalar v) { return v == Scalar(0); });
  };
  for (Index t = 0; t < in.count(); ++t) {
    if (mask[std::size_t(t)] == 0 && !(is_zero(found.y, t) && is_zero(found.dx, t))) {
      return detail::stated(law, false, "the output or gradient of masked token " + std::to_string(t) + " is not zero");
    }
  }
  found.y = detail::rows_at<Scalar>(kept, found.y);
  found.dx = detail::rows_at<Scalar>(kept, found.dx);
  return detail::stated(law, detail::same_bits(found, expected), "something has other bits than without the token's row");
}

/// Backward is linear in dy, except the balance losses' part, which does not depend on it: g(a u +
/// b v) - g(0) = a (g(u) - g(0)) + b (g(v) - g(0)).
template <class Layer, class Scalar = typename Layer::Scalar>
LawResult backward_is_linear(const Layer& layer, const Tokens<Scalar>& in, const LawOptions& options = {}) {
  const Index rows = in.x.rows();
  const Index cols = in.x.cols();
  const Matrix<Scalar> u = random_normal<Scalar>(rows, cols, options.rng.split(3));
  const Matrix<Scalar> v = random_normal<Scalar>(rows, cols, options.rng.split(4));
  const Matrix<Scalar> mixed =
      detail::element_wise<Scalar>([](Scalar a, Scalar b) { return Scalar(2) * a - Scalar(0.5) * b; }, u, v);
  const Matrix<Scalar> zero = detail::filled(rows, cols, Scalar(0));
  detail::Step<Scalar> sum = detail::step(layer, in, mixed, options.exec);
  detail::Step<Scalar> parts = detail::step(layer, in, u, options.exec);
  detail::Step<Scalar> of_v = detail::step(layer, in, v, options.exec);
  detail::Step<Scalar> of_zero = detail::step(layer, in, zero, options.exec);
  // a g(u) + b g(v) + (1 - a - b) g(0)
  const auto mix = [](Scalar a, Scalar b, Scalar c) { return Scalar(2) * a - Scalar(0.5) * b - Scalar(0.5) * c; };
  parts.dx = detail::element_wise<Scalar>(mix, parts.dx, of_v.dx, of_zero.dx);
  parts.dcondition = detail::element_wise<Scalar>(mix, parts.dcondition, of_v.dcondition, of_zero.dcondition);
  const auto grads = detail::elements(parts.grads);
  for (std::size_t i = 0; i < grads.size(); ++i) {
    grads[i] = mix(grads[i], detail::elements(of_v.grads)[i], detail::elements(of_zero.grads)[i]);
  }
  return detail::measured("layer: backward is linear in dy", detail::gradient_distance(sum, parts),
                          detail::tolerance<Scalar>(options));
}

/// Backward overwrites dx and adds to the parameters' gradients.
template <class Layer, class Scalar = typename Layer::Scalar>
LawResult backward_overwrites_dx_and_adds_to_gradients(const Layer& layer, const Tokens<Scalar>& in,
                                                       RowView<const std::type_identity_t<Scalar>> dy,
                                                       const LawOptions& options = {}) {
  const std::string law = "layer: backward overwrites dx and adds to gradients";
  detail::Step<Scalar> once = detail::step(layer, in, dy, options.exec);
  detail::Step<Scalar> added = once;
  auto tape = layer.make_tape();
  layer.forward(in, added.y, tape, options.exec);
  const Scalar start = 3;
  std::ranges::fill(detail::elements(added.grads), start);
  layer.backward(in, dy, {added.dx, added.dcondition}, added.grads, tape, options.exec);
  if (!detail::same_bits<Scalar>(added.dx, once.dx) || !detail::same_bits<Scalar>(added.dcondition, once.dcondition)) {
    return detail::stated(law, false, "dx or dcondition depends on what was in it");
  }
  for (Scalar& g : detail::elements(once.grads)) {
    g += start;
  }
  return detail::measured(law, detail::gradient_distance(added, once), detail::tolerance<Scalar>(options));
}

/// After the first step of a shape, forward and backward allocate nothing (on one thread: kernels keep a packing buffer for
/// each thread, which a thread that gets its first task later allocates later).
template <class Layer, class Scalar = typename Layer::Scalar>
LawResult steps_allocate_nothing(const Layer& layer, const Tokens<Scalar>& in, RowView<const std::type_identity_t<Scalar>> dy,
                                 const LawOptions& options) {
  const Exec exec{.threads = 1};
  Matrix<Scalar> y(in.x.rows(), in.x.cols());
  Matrix<Scalar> dx(in.x.rows(), in.x.cols());
  auto grads = layer.parameters().zeros_like();
  auto tape = layer.make_tape(in.count());
  std::size_t start = 0;
  for (int i = 0; i < 3; ++i) {
    layer.forward(in, y, tape, exec);
    layer.backward(in, dy, dx, grads, tape, exec);
    start = i == 0 ? options.allocations() : start;
  }
  const std::size_t count = options.allocations() - start;
  return detail::stated("layer: steps after the first allocate nothing", count == 0,
                        std::to_string(count) + " allocations in two steps");
}

/// The laws of a bank: rows are independent, experts without tokens have zero gradient, and rows of the output's gradient are
/// weighted.
template <Bank Bank_>
std::vector<LawResult> check_bank_laws(const Bank_& bank, const LawOptions& options = {}) {
  return {rows_are_independent(bank, options), idle_experts_have_zero_gradient(bank, options),
          output_gradient_is_weighted(bank, options)};
}

/// The laws of a plan.
template <class Scalar>
std::vector<LawResult> check_plan_laws(const SparsePlan<Scalar>& plan, Index dim, const LawOptions& options = {}) {
  return {plan_is_sorted_and_complete(plan, plan.rows() + plan.dropped()), dispatch_is_adjoint(plan, dim, options),
          combine_is_adjoint(plan, dim, options)};
}
template <class Scalar>
std::vector<LawResult> check_plan_laws(const DensePlan<Scalar>& plan, Index dim, const LawOptions& options = {}) {
  return {plan_is_convex(plan, detail::tolerance<Scalar>(options)), dispatch_is_adjoint(plan, dim, options),
          combine_is_adjoint(plan, dim, options)};
}

namespace detail {

/// Whether a layer that has a `freeze` freezes: one whose type is known at run time says so.
template <class Layer>
bool can_freeze(const Layer& layer) {
  if constexpr (requires { layer.can_freeze(); }) {
    return layer.can_freeze();
  } else {
    return true;
  }
}

}  // namespace detail

/// Results are bit-identical with Keep::inputs. So is y with Keep::nothing and with frozen weights, if
/// the layer freezes, after which there is no backward.
template <class Layer, class Scalar = typename Layer::Scalar>
LawResult keeping_less_changes_nothing(const Layer& layer, const Tokens<Scalar>& in,
                                       RowView<const std::type_identity_t<Scalar>> dy, const LawOptions& options = {}) {
  const std::string law = "layer: the same bits whatever the tape keeps, and of frozen weights";
  const detail::Step<Scalar> first = detail::step(layer, in, dy, options.exec);
  if (!detail::same_bits(first, detail::step(layer, in, dy, options.exec, Keep::inputs))) {
    return detail::stated(law, false, "Keep::inputs differs");
  }
  detail::Step<Scalar> other = first;
  auto tape = layer.make_tape(in.count(), Keep::nothing);
  const auto differs = [&] {
    try {
      layer.backward(in, dy, {other.dx, other.dcondition}, other.grads, tape, options.exec);
      return true;
    } catch (const ValueError&) {
      return !detail::same_bits<Scalar>(first.y, other.y);
    }
  };
  std::fill_n(other.y.data(), other.y.size(), std::numeric_limits<Scalar>::quiet_NaN());
  layer.forward(in, other.y, tape, options.exec);
  if (differs()) {
    return detail::stated(law, false, "Keep::nothing differs, or has a backward");
  }
  if constexpr (requires { layer.forward(layer.freeze(options.exec), in, other.y, tape, options.exec); }) {
    if (detail::can_freeze(layer)) {
      tape = layer.make_tape(in.count());
      std::fill_n(other.y.data(), other.y.size(), std::numeric_limits<Scalar>::quiet_NaN());
      layer.forward(layer.freeze(options.exec), in, other.y, tape, options.exec);
      if (differs()) {
        return detail::stated(law, false, "the frozen layer differs, or has a backward");
      }
    }
  }
  return detail::stated(law, true, "");
}

/// All laws of a layer on one batch, with the parameters that the layer has: those of its plan and its bank, if it shows them,
/// and those of the whole. What differs from layer to layer (what it equals in special cases) is left to its own tests.
template <class Layer>
std::vector<LawResult> check_layer_laws(const Layer& layer, const Tokens<typename Layer::Scalar>& in,
                                        const LawOptions& options = {}) {
  using Scalar = typename Layer::Scalar;
  const Matrix<Scalar> dy = random_normal<Scalar>(in.x.rows(), in.x.cols(), options.rng.split(5));
  Matrix<Scalar> y(in.x.rows(), in.x.cols());
  auto tape = layer.make_tape(in.count());
  layer.forward(in, y, tape, options.exec);

  std::vector<LawResult> results;
  if constexpr (requires { tape.plan(); }) {
    results = check_plan_laws(tape.plan(), layer.model_dim(), options);
  }
  if constexpr (requires { layer.experts(); }) {
    for (LawResult& law : check_bank_laws(layer.experts(), options)) {
      results.push_back(std::move(law));
    }
  }
  results.push_back(bits_do_not_depend_on_threads(layer, in, dy, options));
  if (options.permute_tokens) {
    results.push_back(permuting_tokens_permutes_outputs(layer, in, dy, options));
  }
  if (options.mask_tokens) {
    results.push_back(masked_tokens_change_nothing(layer, in, dy, options));
  }
  results.push_back(keeping_less_changes_nothing(layer, in, dy, options));
  results.push_back(backward_is_linear(layer, in, options));
  results.push_back(backward_overwrites_dx_and_adds_to_gradients(layer, in, dy, options));
  if (options.allocations) {
    results.push_back(steps_allocate_nothing(layer, in, dy, options));
  }
  return results;
}

}  // namespace moxie::inline MOXIE_NAMESPACE::testing
