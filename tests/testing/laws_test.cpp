// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <allocations.hpp>
#include <moxie/expert/linear.hpp>
#include <moxie/layer/any_layer.hpp>
#include <moxie/layer/soft_moe.hpp>
#include <moxie/layer/top_k_moe.hpp>
#include <moxie/testing/laws.hpp>
#include <support.hpp>

// Each law holds for what the library has, and notices when it is broken.
namespace {

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::ParameterView;
using moxie::RowView;
using moxie::Tokens;
using moxie::testing::LawOptions;
using moxie::testing::LawResult;

constexpr Index dim = 4;
constexpr Index tokens = 9;

void holds(const LawResult& law) {
  INFO(law.law);
  INFO(law.message);
  CHECK(law.holds);
  CHECK(law.message.empty());
}
void is_broken(const LawResult& law) {
  INFO(law.law);
  CHECK_FALSE(law.holds);
  CHECK(moxie::test::contains(law.message, law.law));
}

// A plan of four tokens and two experts that may be written as one likes.
struct LoosePlan {
  std::vector<Index> starts{0, 2, 4};
  std::vector<Index> of{0, 2, 1, 3};
  std::vector<std::int64_t> counts{2, 2};
  std::vector<std::vector<Index>> by_token{{0}, {2}, {1}, {3}};

  Index tokens() const { return 4; }
  Index experts() const { return 2; }
  Index rows() const { return Index(of.size()); }
  Index dropped() const { return 0; }
  std::span<const Index> expert_starts() const { return starts; }
  Index token(Index r) const { return of[std::size_t(r)]; }
  const std::vector<std::int64_t>& tokens_per_expert() const { return counts; }
  std::span<const Index> rows_of_token(Index t) const { return by_token[std::size_t(t)]; }
};

TEST_CASE("laws: a plan that is out of order or incomplete is noticed") {
  using moxie::testing::plan_is_sorted_and_complete;
  holds(plan_is_sorted_and_complete(LoosePlan{}, 4));
  is_broken(plan_is_sorted_and_complete(LoosePlan{}, 5));
  const auto broken = [](auto&& change) {
    LoosePlan plan;
    change(plan);
    is_broken(plan_is_sorted_and_complete(plan, 4));
  };
  broken([](LoosePlan& p) { p.of = {2, 0, 1, 3}; });
  broken([](LoosePlan& p) { p.of = {0, 2, 1, 4}; });
  broken([](LoosePlan& p) { p.of = {0, 2, -1, 3}; });
  broken([](LoosePlan& p) { p.starts = {0, 1, 4}; });
  broken([](LoosePlan& p) { p.starts = {0, 2, 3}; });
  broken([](LoosePlan& p) { p.counts = {1, 3}; });
  broken([](LoosePlan& p) { p.by_token[0] = {1}; });
  broken([](LoosePlan& p) { p.by_token[3] = {}; });
}

TEST_CASE("laws: a dense plan whose weights are not convex is noticed") {
  moxie::DensePlan<double> plan;
  plan.resize(moxie::Sequences(2).over(4), 2, 1);
  plan.dispatch().eigen().setConstant(0.5);
  plan.combine().eigen().setConstant(0.5);
  const auto law = [&] { return moxie::testing::plan_is_convex(plan, 1e-12); };
  holds(law());
  const auto broken = [&](RowView<double> m, Index i, Index j, double value) {
    const double kept = m(i, j);
    m(i, j) = value;
    is_broken(law());
    m(i, j) = kept;
  };
  broken(plan.dispatch(), 1, 0, 0.4);
  broken(plan.dispatch(), 3, 1, std::numeric_limits<double>::quiet_NaN());
  broken(plan.combine(), 2, 1, 0.6);
  plan.combine().eigen().row(0) << 1.5, -0.5;  // sums to 1
  is_broken(law());
}

// Plans whose maps have a bug.
struct PlanWithoutDispatchBackward : moxie::SparsePlan<double> {};
void dispatch_backward(const PlanWithoutDispatchBackward& /*plan*/, RowView<const double> /*x*/,
                       RowView<const double> /*drows*/, const moxie::kernel::Destination<double>& /*dx*/,
                       moxie::SparsePlan<double>::Gradient& /*dplan*/, const Exec& /*exec*/) {}
struct PlanThatForgetsWeights : moxie::SparsePlan<double> {};
void combine_backward(const PlanThatForgetsWeights& plan, RowView<const double> h, RowView<const double> dy, RowView<double> dh,
                      moxie::SparsePlan<double>::Gradient& dplan, const Exec& exec) {
  moxie::combine_backward(static_cast<const moxie::SparsePlan<double>&>(plan), h, dy, dh, dplan, exec);
  for (Index r = 0; r < plan.rows(); ++r) {
    dh.middle_rows(r, 1).eigen() = dy.middle_rows(plan.token(r), 1).eigen();
  }
}
struct PlanWithWrongWeightGradient : moxie::SparsePlan<double> {};
void combine_backward(const PlanWithWrongWeightGradient& plan, RowView<const double> h, RowView<const double> dy,
                      RowView<double> dh, moxie::SparsePlan<double>::Gradient& dplan, const Exec& exec) {
  moxie::combine_backward(static_cast<const moxie::SparsePlan<double>&>(plan), h, dy, dh, dplan, exec);
  dplan.weight[0] = std::numeric_limits<double>::quiet_NaN();
}

TEST_CASE("laws: a backward that is not the adjoint is noticed") {
  const auto build = [](auto plan) {
    const Index expert[] = {0, 1, 1, 0, 1, -1};
    const double weight[] = {0.5, -1, 2, 0.25, 3, 1};
    plan.build(3, 2, 2, expert, weight);
    return plan;
  };
  holds(moxie::testing::dispatch_is_adjoint(build(moxie::SparsePlan<double>()), dim));
  holds(moxie::testing::combine_is_adjoint(build(moxie::SparsePlan<double>()), dim));
  is_broken(moxie::testing::dispatch_is_adjoint(build(PlanWithoutDispatchBackward()), dim));
  is_broken(moxie::testing::combine_is_adjoint(build(PlanThatForgetsWeights()), dim));
  is_broken(moxie::testing::combine_is_adjoint(build(PlanWithWrongWeightGradient()), dim));
}

// A bank of linear experts with a bug.
enum class BankBug { none, rows_see_their_number, idle_gradient, gradient_to_all, forgets_weights };
struct BrokenBank : moxie::LinearExperts<double> {
  BankBug bug;

  explicit BrokenBank(BankBug which) : moxie::LinearExperts<double>(3, dim), bug(which) {}
  void forward(ParameterView<const double> p, const moxie::GroupedRows<double>& rows, RowView<double> h, Tape* keep,
               const moxie::Context& context) const {
    moxie::LinearExperts<double>::forward(p, rows, h, keep, context);
    if (bug == BankBug::rows_see_their_number) {
      h.eigen() *= 1 + 1e-15 * double(rows.count());
    }
  }
  void backward(ParameterView<const double> p, const moxie::GroupedRows<double>& rows, const moxie::OutputGradient<double>& dh,
                const moxie::BankGradient<double>& into, Tape& tape, const moxie::Context& context) const {
    const ParameterView<double> dp = into.parameters;
    const bool forgets = bug == BankBug::forgets_weights;
    moxie::LinearExperts<double>::backward(p, rows, {dh.dy, dh.index, forgets ? nullptr : dh.weight, dh.dweight}, into, tape,
                                           context);
    if (bug == BankBug::idle_gradient) {
      dp["experts.2.bias"](0, 0) += 1e-30;
    }
    if (bug == BankBug::gradient_to_all && rows.count() > 0) {
      dp["experts.0.weight"](1, 1) += dh.dy(0, 0);
    }
  }
};
static_assert(moxie::Bank<BrokenBank>);

TEST_CASE("laws: rows that see each other, and gradients without tokens, are noticed") {
  using moxie::testing::idle_experts_have_zero_gradient;
  using moxie::testing::rows_are_independent;
  holds(rows_are_independent(BrokenBank(BankBug::none)));
  holds(idle_experts_have_zero_gradient(BrokenBank(BankBug::none)));
  holds(moxie::testing::output_gradient_is_weighted(BrokenBank(BankBug::none)));
  is_broken(moxie::testing::output_gradient_is_weighted(BrokenBank(BankBug::forgets_weights)));
  is_broken(rows_are_independent(BrokenBank(BankBug::rows_see_their_number)));
  is_broken(idle_experts_have_zero_gradient(BrokenBank(BankBug::idle_gradient)));
  is_broken(idle_experts_have_zero_gradient(BrokenBank(BankBug::gradient_to_all)));
}

// A layer with a bug.
enum class Bug {
  none,
  bits_by_threads,
  bits_by_run,
  looks_at_position,
  gradient_looks_at_position,
  quadratic_in_dy,
  adds_to_dx,
  overwrites_gradients,
  allocates,
  masked_output,
  masked_tokens_count,
  keeps_too_much,
  recomputes_something_else,
  frozen_differs
};
struct BrokenLayer : moxie::TopKMoE<double> {
  using Base = moxie::TopKMoE<double>;
  using Tape = Base::Tape;
  Bug bug;
  mutable double drift = 0;
  mutable moxie::Keep last_kept = moxie::Keep::activations;

  explicit BrokenLayer(Bug which)
      : Base({.model_dim = dim, .experts = 3, .top_k = 2, .expert = {.hidden_dim = 5}, .balance = {.expert_level = 0.1}}),
        bug(which) {
    moxie::test::randomize(parameters(), 1001);
  }
  Tape make_tape(Index max_tokens = 0, moxie::Keep keep = moxie::Keep::activations) const {
    last_kept = keep;
    return Base::make_tape(max_tokens, bug == Bug::keeps_too_much ? moxie::Keep::activations : keep);
  }
  void forward(const Frozen& frozen, const Tokens<double>& in, RowView<double> y, Tape& tape, const Exec& exec = {}) const {
    Base::forward(frozen, in, y, tape, exec);
    if (bug == Bug::frozen_differs) {
      y(1, 1) *= 1 + 1e-15;
    }
  }
  void forward(const Tokens<double>& in, RowView<double> y, Tape& tape, const Exec& exec = {}) const {
    Base::forward(in, y, tape, exec);
    if (bug == Bug::bits_by_threads && exec.threads == 7) {
      y(0, 0) = std::nextafter(y(0, 0), 1e9);
    }
    if (bug == Bug::bits_by_run) {
      drift += 1e-14;
      y(0, 0) += drift;
    }
    if (bug == Bug::looks_at_position) {
      y(1, 2) *= 1 + 1e-9;
    }
    if (bug == Bug::masked_output && !in.mask.empty()) {
      y.eigen().array() += 1e-3;
    }
    if (bug == Bug::masked_tokens_count) {
      y(0, 0) += 1e-9 * double(in.count());
    }
    if (bug == Bug::allocates) {
      const Matrix<double> copy = y.eigen();
      y.eigen() = 2 * copy;
    }
  }
  void backward(const Tokens<double>& in, RowView<const double> dy, const moxie::TokensGradient<double>& din,
                moxie::Parameters<double>& grads, Tape& tape, const Exec& exec = {}) const {
    const RowView<double> dx = din.x;
    const double before = bug == Bug::adds_to_dx ? dx(3, 3) : 0;
    if (bug == Bug::overwrites_gradients) {
      grads["experts.1.up_proj.weight"].eigen().setZero();
    }
    Base::backward(in, dy, dx, grads, tape, exec);
    if (bug == Bug::recomputes_something_else && last_kept == moxie::Keep::inputs) {
      dx(1, 1) *= 1 + 1e-15;
    }
    if (bug == Bug::gradient_looks_at_position) {
      grads["gate.weight"](0, 0) += 1e-9 * dx(0, 0);
    }
    if (bug == Bug::quadratic_in_dy) {
      dx(2, 2) += 1e-9 * dy(2, 2) * dy(2, 2);
    }
    if (bug == Bug::adds_to_dx && std::isfinite(before)) {
      dx(3, 3) += before;
    }
  }
};

TEST_CASE("laws: each law of a layer notices its bug") {
  const Matrix<double> x = moxie::test::random<double>(tokens, dim, 1002);
  const Matrix<double> dy = moxie::test::random<double>(tokens, dim, 1003);
  const Tokens<double> in{x};
  LawOptions options;
  options.allocations = [] { return moxie::test::allocation_count.load(); };
  const auto threads = [&](Bug bug) {
    return moxie::testing::bits_do_not_depend_on_threads(BrokenLayer(bug), in, dy, options);
  };
  const auto permuted = [&](Bug bug) {
    return moxie::testing::permuting_tokens_permutes_outputs(BrokenLayer(bug), in, dy, options);
  };
  const auto masked = [&](Bug bug) { return moxie::testing::masked_tokens_change_nothing(BrokenLayer(bug), in, dy, options); };
  const auto linear = [&](Bug bug) { return moxie::testing::backward_is_linear(BrokenLayer(bug), in, options); };
  const auto added = [&](Bug bug) {
    return moxie::testing::backward_overwrites_dx_and_adds_to_gradients(BrokenLayer(bug), in, dy, options);
  };
  holds(threads(Bug::none));
  is_broken(threads(Bug::bits_by_threads));
  is_broken(threads(Bug::bits_by_run));
  holds(permuted(Bug::none));
  is_broken(permuted(Bug::looks_at_position));
  is_broken(permuted(Bug::gradient_looks_at_position));
  holds(masked(Bug::none));
  is_broken(masked(Bug::masked_output));
  is_broken(masked(Bug::masked_tokens_count));
  for (const Bug bug : {Bug::keeps_too_much, Bug::recomputes_something_else, Bug::frozen_differs}) {
    is_broken(moxie::testing::keeping_less_changes_nothing(BrokenLayer(bug), in, dy, options));
  }
  holds(moxie::testing::keeping_less_changes_nothing(BrokenLayer(Bug::none), in, dy, options));
  holds(linear(Bug::none));
  is_broken(linear(Bug::quadratic_in_dy));
  holds(added(Bug::none));
  is_broken(added(Bug::adds_to_dx));
  is_broken(added(Bug::overwrites_gradients));
}

TEST_CASE("laws: a step that allocates is noticed") {
  const Matrix<double> x = moxie::test::random<double>(tokens, dim, 1004);
  LawOptions options;
  std::size_t count = 0;
  options.allocations = [&] { return count; };
  const moxie::TopKMoE<double> layer({.model_dim = dim, .experts = 3, .top_k = 2, .expert = {.hidden_dim = 5}});
  holds(moxie::testing::steps_allocate_nothing(layer, Tokens<double>{x}, x, options));
  options.allocations = [&] { return ++count; };  // something was allocated between the two readings
  is_broken(moxie::testing::steps_allocate_nothing(layer, Tokens<double>{x}, x, options));
  options.allocations = [] { return moxie::test::allocation_count.load(); };
  holds(moxie::testing::steps_allocate_nothing(BrokenLayer(Bug::none), Tokens<double>{x}, x, options));
  is_broken(moxie::testing::steps_allocate_nothing(BrokenLayer(Bug::allocates), Tokens<double>{x}, x, options));
}

TEST_CASE("laws: the check of a layer runs all of them, and finds the one that is broken") {
  const Matrix<double> x = moxie::test::random<double>(tokens, dim, 1005);
  LawOptions options;
  CHECK(moxie::testing::check_layer_laws(BrokenLayer(Bug::none), Tokens<double>{x}, options).size() == 12);
  options.allocations = [] { return moxie::test::allocation_count.load(); };
  CHECK(moxie::testing::check_layer_laws(BrokenLayer(Bug::none), Tokens<double>{x}, options).size() == 13);
  options.permute_tokens = false;
  CHECK(moxie::testing::check_layer_laws(BrokenLayer(Bug::none), Tokens<double>{x}, options).size() == 12);
  int broken = 0;
  for (const LawResult& law : moxie::testing::check_layer_laws(BrokenLayer(Bug::quadratic_in_dy), Tokens<double>{x}, options)) {
    broken += law.holds ? 0 : 1;
  }
  CHECK(broken == 1);
}

TEST_CASE("laws: of the whole are checked where a layer shows neither plan nor bank") {
  const Matrix<double> x = moxie::test::random<double>(tokens, dim, 1006);
  moxie::TopKMoE<double> layer({.model_dim = dim, .experts = 3, .top_k = 2, .expert = {.hidden_dim = 5}});
  moxie::test::randomize(layer.parameters(), 1007);
  const auto laws = moxie::testing::check_layer_laws(moxie::AnyLayer<double>(layer), Tokens<double>{x});
  CHECK(laws.size() == 6);
  for (const LawResult& law : laws) {
    holds(law);
  }
}

TEST_CASE("laws: hold for a batch without tokens") {
  const Matrix<double> none(0, dim);
  for (const LawResult& law : moxie::testing::check_layer_laws(BrokenLayer(Bug::none), Tokens<double>{none})) {
    holds(law);
  }
}

TEST_CASE("laws: of numbers measure relative errors, and NaN does not hold") {
  const LawResult nan = moxie::testing::detail::measured("law", std::numeric_limits<double>::quiet_NaN(), 1e9);
  is_broken(nan);
  holds(moxie::testing::detail::measured("law", 1e-9, 1e-9));
  Matrix<double> a = Matrix<double>::Constant(2, 2, 4);
  Matrix<double> b = a;
  a(1, 0) = 5;
  CHECK(moxie::testing::detail::distance<double>(a, b) == 0.25);
  a(0, 1) = std::numeric_limits<double>::quiet_NaN();
  CHECK(std::isnan(moxie::testing::detail::distance<double>(a, b)));
}

}  // namespace
