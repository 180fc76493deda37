// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <limits>
#include <moxie/exchange/dispatch.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <moxie/testing/laws.hpp>
#include <support.hpp>

namespace {

using moxie::DensePlan;
using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::RowView;
using moxie::SparsePlan;
using moxie::test::Tolerance;

// Random choices, one in five dropped.
template <class S>
SparsePlan<S> sparse_plan(Index tokens, Index experts, Index choices, std::uint64_t seed) {
  const moxie::Rng rng(seed);
  std::vector<Index> expert;
  std::vector<S> weight;
  for (Index p = 0; p < tokens * choices; ++p) {
    expert.push_back(rng.below(5, std::uint64_t(2 * p)) == 0 ? -1 : rng.below(experts, std::uint64_t(2 * p + 1)));
    weight.push_back(S(rng.normal(std::uint64_t(p))));
  }
  SparsePlan<S> plan;
  plan.build(tokens, experts, choices, expert, weight);
  return plan;
}

// Random matrices D and C: the adjoints do not need their columns or rows to sum to 1.
template <class S>
DensePlan<S> dense_plan(Index sequences, Index length, Index experts, Index slots, std::uint64_t seed) {
  DensePlan<S> plan;
  plan.resize(moxie::Sequences(length).over(sequences * length), experts, slots);
  moxie::Rng(seed).fill_normal(plan.dispatch());
  moxie::Rng(seed + 1).fill_normal(plan.combine());
  return plan;
}

TEST_CASE_TEMPLATE("dispatch: of a sparse plan gathers tokens, and copies nothing", S, float, double) {
  const auto plan = sparse_plan<S>(30, 4, 2, 811);
  const Matrix<S> x = moxie::test::random<S>(30, 5, 812);
  const moxie::GroupedRows<S> rows = moxie::dispatch(plan, RowView<const S>(x), RowView<S>(), Exec{});
  REQUIRE(rows.count() == plan.rows());
  for (Index r = 0; r < plan.rows(); ++r) {
    CHECK(rows.row(r) == x.data() + 5 * plan.token(r));
  }
}

TEST_CASE_TEMPLATE("dispatch: of a dense plan mixes the tokens of each sequence into its slots", S, float, double) {
  const Index sequences = 3, length = 4, experts = 2, slots = 3;
  const auto plan = dense_plan<S>(sequences, length, experts, slots, 813);
  const Matrix<S> x = moxie::test::random<S>(sequences * length, 5, 814);
  Matrix<S> slots_of_all(plan.rows(), 5);
  const moxie::GroupedRows<S> rows = moxie::dispatch(plan, RowView<const S>(x), slots_of_all, Exec{});
  Matrix<double> expected = Matrix<double>::Zero(plan.rows(), 5);
  for (Index b = 0; b < sequences; ++b) {
    for (Index e = 0; e < experts; ++e) {
      for (Index s = 0; s < slots; ++s) {
        for (Index t = b * length; t < (b + 1) * length; ++t) {
          expected.row((e * sequences + b) * slots + s) +=
              double(plan.dispatch()(t, e * slots + s)) * x.row(t).template cast<double>();
        }
      }
    }
  }
  CHECK(rows.index == nullptr);
  CHECK(moxie::test::relative_error(moxie::testing::detail::gathered(rows), expected) < Tolerance<S>::sum);
}

TEST_CASE_TEMPLATE("dispatch: its backward is the adjoint, for sparse and dense plans", S, float, double) {
  const auto check = [](const auto& plan) {
    const auto law = moxie::testing::dispatch_is_adjoint(plan, 5);
    INFO(law.message);
    CHECK(law.holds);
  };
  check(sparse_plan<S>(200, 4, 2, 815));
  check(sparse_plan<S>(1, 7, 1, 816));
  check(sparse_plan<S>(0, 7, 1, 817));
  check(dense_plan<S>(3, 4, 2, 3, 818));
  check(dense_plan<S>(1, 30, 4, 1, 819));
  check(dense_plan<S>(5, 1, 1, 1, 820));
  check(dense_plan<S>(0, 4, 2, 3, 821));
}

TEST_CASE_TEMPLATE("dispatch: its backward replaces dx where it does not add", S, float, double) {
  const auto check = [](const auto& plan) {
    const Matrix<S> x = moxie::test::random<S>(plan.tokens(), 5, 824);
    const Matrix<S> drows = moxie::test::random<S>(plan.rows(), 5, 825);
    typename std::remove_cvref_t<decltype(plan)>::Gradient dplan;
    Matrix<S> sum = Matrix<S>::Zero(plan.tokens(), 5);
    moxie::dispatch_backward(plan, RowView<const S>(x), RowView<const S>(drows), moxie::kernel::add_to<S>(sum), dplan, Exec{});
    Matrix<S> dx = Matrix<S>::Constant(plan.tokens(), 5, std::numeric_limits<S>::quiet_NaN());
    moxie::dispatch_backward(plan, RowView<const S>(x), RowView<const S>(drows), moxie::kernel::replace<S>(dx), dplan, Exec{});
    CHECK(moxie::testing::detail::same_bits<S>(dx, sum));
  };
  const Index expert[] = {-1, 0, -1};
  const S weight[] = {1, 1, 1};
  moxie::SparsePlan<S> partly;
  partly.build(3, 1, 1, expert, weight);
  check(partly);
  check(sparse_plan<S>(200, 4, 2, 826));
  check(dense_plan<S>(3, 4, 2, 3, 827));
}

TEST_CASE("dispatch: backward matches central differences in x and in D") {
  const auto check = [](auto plan) {
    const Index dim = 3;
    Matrix<double> x = moxie::test::random<double>(plan.tokens(), dim, 822);
    const Matrix<double> dr = moxie::test::random<double>(plan.rows(), dim, 823);
    Matrix<double> dx = Matrix<double>::Zero(plan.tokens(), dim);
    typename decltype(plan)::Gradient dplan;
    Matrix<double> slots(plan.rows(), dim);
    moxie::dispatch_backward(plan, RowView<const double>(x), RowView<const double>(dr), moxie::kernel::add_to<double>(dx),
                             dplan, Exec{});
    const auto loss = [&] {
      const auto rows = moxie::dispatch(plan, RowView<const double>(x), slots, Exec{.threads = 1});
      return moxie::testing::detail::gathered(rows).cwiseProduct(dr).sum();
    };
    const auto of_x = moxie::testing::check_gradient(loss, x, dx, {}, "x");
    INFO(of_x.message());
    CHECK(of_x.passes(moxie::test::gradient_tolerance));
    if constexpr (requires { dplan.dispatch; }) {
      const auto of_d = moxie::testing::check_gradient(loss, plan.dispatch(),
                                                       dplan.dispatch.spread_view(plan.tokens(), plan.slot_count()), {}, "D");
      INFO(of_d.message());
      CHECK(of_d.passes(moxie::test::gradient_tolerance));
    }
  };
  check(sparse_plan<double>(9, 3, 2, 824));
  check(dense_plan<double>(2, 4, 2, 2, 825));
}

TEST_CASE_TEMPLATE("dispatch: the same bits for any number of threads", S, float, double) {
  const auto check = [](const auto& plan) {
    const Matrix<S> x = moxie::test::random<S>(plan.tokens(), 19, 826);
    const Matrix<S> dr = moxie::test::random<S>(plan.rows(), 19, 827);
    Matrix<S> slots(plan.rows(), 19);
    typename std::remove_cvref_t<decltype(plan)>::Gradient dplan;
    std::vector<Matrix<S>> rows, dx;
    for (const int threads : {1, 2, 7}) {
      rows.push_back(moxie::testing::detail::gathered(moxie::dispatch(plan, RowView<const S>(x), slots, Exec{threads})));
      dx.push_back(x);
      moxie::dispatch_backward(plan, RowView<const S>(x), RowView<const S>(dr), moxie::kernel::add_to<S>(dx.back()), dplan,
                               Exec{threads});
      CHECK(moxie::test::same_bits(rows.front(), rows.back()));
      CHECK(moxie::test::same_bits(dx.front(), dx.back()));
    }
  };
  check(sparse_plan<S>(300, 4, 2, 828));
  check(dense_plan<S>(10, 30, 4, 2, 829));
}

}  // namespace
