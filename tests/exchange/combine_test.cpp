// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <moxie/exchange/combine.hpp>
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

TEST_CASE_TEMPLATE("combine: of a sparse plan adds the weighted rows of each token", S, float, double) {
  const auto plan = sparse_plan<S>(30, 4, 3, 841);
  const Matrix<S> h = moxie::test::random<S>(plan.rows(), 5, 842);
  Matrix<S> y = moxie::test::random<S>(30, 5, 843);
  Matrix<double> expected = moxie::test::as_double(y);
  for (Index r = 0; r < plan.rows(); ++r) {
    expected.row(plan.token(r)) += double(plan.weight(r)) * h.row(r).template cast<double>();
  }
  moxie::combine(plan, RowView<const S>(h), moxie::kernel::add_to<S>(y), Exec{});
  CHECK(moxie::test::relative_error(y, expected) < Tolerance<S>::sum);
}

TEST_CASE_TEMPLATE("combine: a term is one fused multiply-add, in the order of the token's choices", S, float, double) {
  const auto plan = sparse_plan<S>(30, 4, 3, 844);
  const Matrix<S> h = moxie::test::random<S>(plan.rows(), 21, 845);
  Matrix<S> y = moxie::test::random<S>(30, 21, 846);
  Matrix<S> expected = y;
  for (Index t = 0; t < 30; ++t) {
    for (const Index r : plan.rows_of_token(t)) {
      for (Index j = 0; j < 21; ++j) {
#if defined(__FMA__) || defined(__aarch64__)
        expected(t, j) = std::fma(plan.weight(r), h(r, j), expected(t, j));
#else
        volatile S product = plan.weight(r) * h(r, j);  // rounded
        expected(t, j) += product;
#endif
      }
    }
  }
  moxie::combine(plan, RowView<const S>(h), moxie::kernel::add_to<S>(y), Exec{});
  CHECK(moxie::test::same_bits(y, expected));
}

TEST_CASE("combine: leaves tokens without an assignment as they are") {
  const Index expert[] = {-1, 0, -1};
  const double weight[] = {1, 1, 1};
  SparsePlan<double> plan;
  plan.build(3, 1, 1, expert, weight);
  const Matrix<double> h = Matrix<double>::Ones(1, 4);
  Matrix<double> y = moxie::test::untouched<double>(3, 4);
  moxie::combine(plan, RowView<const double>(h), moxie::kernel::add_to<double>(y), Exec{});
  CHECK((y.row(0).array() == -77).all());
  CHECK((y.row(1).array() == -76).all());
  CHECK((y.row(2).array() == -77).all());
}

TEST_CASE_TEMPLATE("combine: replaces y where it does not add, of tokens without an assignment too", S, float, double) {
  const auto check = [](const auto& plan) {
    const Matrix<S> h = moxie::test::random<S>(plan.rows(), 5, 854);
    Matrix<S> sum = Matrix<S>::Zero(plan.tokens(), 5);
    moxie::combine(plan, RowView<const S>(h), moxie::kernel::add_to<S>(sum), Exec{});
    Matrix<S> y = Matrix<S>::Constant(plan.tokens(), 5, std::numeric_limits<S>::quiet_NaN());
    moxie::combine(plan, RowView<const S>(h), moxie::kernel::replace<S>(y), Exec{});
    CHECK(moxie::testing::detail::same_bits<S>(y, sum));
  };
  const Index expert[] = {-1, 0, -1};
  const S weight[] = {1, 1, 1};
  SparsePlan<S> partly;
  partly.build(3, 1, 1, expert, weight);
  check(partly);
  check(sparse_plan<S>(200, 4, 2, 855));
  check(dense_plan<S>(3, 4, 2, 3, 856));
}

TEST_CASE_TEMPLATE("combine: of a dense plan mixes the slots of each sequence into its tokens", S, float, double) {
  const Index sequences = 3, length = 4, experts = 2, slots = 3;
  const auto plan = dense_plan<S>(sequences, length, experts, slots, 844);
  const Matrix<S> h = moxie::test::random<S>(plan.rows(), 5, 845);
  Matrix<S> y = moxie::test::random<S>(sequences * length, 5, 846);
  Matrix<double> expected = moxie::test::as_double(y);
  for (Index t = 0; t < sequences * length; ++t) {
    for (Index e = 0; e < experts; ++e) {
      for (Index s = 0; s < slots; ++s) {
        expected.row(t) +=
            double(plan.combine()(t, e * slots + s)) * h.row((e * sequences + t / length) * slots + s).template cast<double>();
      }
    }
  }
  moxie::combine(plan, RowView<const S>(h), moxie::kernel::add_to<S>(y), Exec{});
  CHECK(moxie::test::relative_error(y, expected) < Tolerance<S>::sum);
}

TEST_CASE_TEMPLATE("combine: its backward is the adjoint, for sparse and dense plans", S, float, double) {
  const auto check = [](const auto& plan) {
    const auto law = moxie::testing::combine_is_adjoint(plan, 5);
    INFO(law.message);
    CHECK(law.holds);
  };
  check(sparse_plan<S>(200, 4, 2, 847));
  check(sparse_plan<S>(1, 7, 1, 848));
  check(sparse_plan<S>(0, 7, 1, 849));
  check(dense_plan<S>(3, 4, 2, 3, 850));
  check(dense_plan<S>(1, 30, 4, 1, 851));
  check(dense_plan<S>(5, 1, 1, 1, 852));
  check(dense_plan<S>(0, 4, 2, 3, 853));
}

TEST_CASE("combine: backward matches central differences in the rows, and in the weights or C") {
  const Index dim = 3;
  const auto loss_of = [&](const auto& plan, const Matrix<double>& h, const Matrix<double>& dy) {
    Matrix<double> y = Matrix<double>::Zero(plan.tokens(), dim);
    moxie::combine(plan, RowView<const double>(h), moxie::kernel::add_to<double>(y), Exec{.threads = 1});
    return y.cwiseProduct(dy).sum();
  };
  const auto passes = [](const moxie::testing::GradientReport& report) {
    INFO(report.message());
    CHECK(report.passes(moxie::test::gradient_tolerance));
  };
  {
    const Index expert[] = {1, 0, 2, 2, -1, 1};
    Matrix<double> weight = moxie::test::random<double>(1, 6, 854);
    SparsePlan<double> plan;
    const auto build = [&] { plan.build(3, 3, 2, expert, {weight.data(), 6}); };
    build();
    Matrix<double> h = moxie::test::random<double>(plan.rows(), dim, 855);
    const Matrix<double> dy = moxie::test::random<double>(3, dim, 856);
    Matrix<double> dh = moxie::test::untouched<double>(plan.rows(), dim);
    SparsePlan<double>::Gradient dplan;
    moxie::combine_backward(plan, RowView<const double>(h), RowView<const double>(dy), RowView<double>(dh), dplan, Exec{});
    Matrix<double> dweight = Matrix<double>::Zero(1, 6);
    for (Index r = 0; r < plan.rows(); ++r) {
      dweight(0, plan.pair(r)) = dplan.weight[r];
    }
    passes(moxie::testing::check_gradient([&] { return loss_of(plan, h, dy); }, h, dh, {}, "h"));
    passes(moxie::testing::check_gradient(
        [&] {
          build();
          return loss_of(plan, h, dy);
        },
        weight, dweight, {}, "weight"));
  }
  {
    auto plan = dense_plan<double>(2, 4, 2, 2, 857);
    Matrix<double> h = moxie::test::random<double>(plan.rows(), dim, 858);
    const Matrix<double> dy = moxie::test::random<double>(8, dim, 859);
    Matrix<double> dh = moxie::test::untouched<double>(plan.rows(), dim);
    DensePlan<double>::Gradient dplan;
    moxie::combine_backward(plan, RowView<const double>(h), RowView<const double>(dy), RowView<double>(dh), dplan, Exec{});
    const auto loss = [&] { return loss_of(plan, h, dy); };
    passes(moxie::testing::check_gradient(loss, h, dh, {}, "h"));
    passes(moxie::testing::check_gradient(loss, plan.combine(), dplan.combine.spread_view(8, 4), {}, "C"));
  }
}

TEST_CASE_TEMPLATE("combine: the same bits for any number of threads", S, float, double) {
  const auto check = [](const auto& plan) {
    const Matrix<S> h = moxie::test::random<S>(plan.rows(), 19, 860);
    const Matrix<S> dy = moxie::test::random<S>(plan.tokens(), 19, 861);
    std::vector<Matrix<S>> y, dh;
    for (const int threads : {1, 2, 7}) {
      typename std::remove_cvref_t<decltype(plan)>::Gradient dplan;
      y.push_back(dy);
      dh.push_back(h);
      moxie::combine(plan, RowView<const S>(h), moxie::kernel::add_to<S>(y.back()), Exec{threads});
      moxie::combine_backward(plan, RowView<const S>(h), RowView<const S>(dy), RowView<S>(dh.back()), dplan, Exec{threads});
      CHECK(moxie::test::same_bits(y.front(), y.back()));
      CHECK(moxie::test::same_bits(dh.front(), dh.back()));
    }
  };
  check(sparse_plan<S>(300, 4, 2, 862));
  check(dense_plan<S>(10, 30, 4, 2, 863));
}

}  // namespace
