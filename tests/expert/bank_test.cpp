// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/expert/bank.hpp>
#include <moxie/expert/glu.hpp>
#include <moxie/expert/linear.hpp>
#include <moxie/expert/mlp.hpp>
#include <support.hpp>

namespace {

using moxie::Exec;
using moxie::GroupedRows;
using moxie::Index;
using moxie::Matrix;
using moxie::RowView;
using moxie::test::Tolerance;

static_assert(moxie::Bank<moxie::SwiGluExperts<float>>);
static_assert(moxie::Bank<moxie::GeluTanhExperts<double>>);
static_assert(moxie::Bank<moxie::GeluErfExperts<double>>);
static_assert(moxie::Bank<moxie::LinearExperts<float>>);
static_assert(!moxie::Bank<int>);

const Index starts[] = {0, 3, 3, 8};
const Index gather[] = {5, 0, 2, 2, 4, 1, 1, 3};
constexpr Index experts = 3;
constexpr Index rows = 8;

TEST_CASE("bank names: number the experts, or do not") {
  CHECK(moxie::BankNames{}.prefix(3) == "experts.3.");
  CHECK(moxie::BankNames{"mine", true}.prefix(0) == "mine.0.");
  CHECK(moxie::BankNames{"shared_experts", false}.prefix(0) == "shared_experts.");
}

TEST_CASE_TEMPLATE("bank products: rows Wᵀ, dh W and dhᵀ rows of each expert, gathered or not, added or not", S, float,
                   double) {
  const Index in = 5, out = 7;
  std::vector<Matrix<S>> w;
  for (std::uint64_t e = 0; e < 3; ++e) {
    w.push_back(moxie::test::random<S>(out, in, 951 + e));
  }
  const auto weight = [&](Index e) { return RowView<const S>(w[std::size_t(e)]); };
  const Matrix<S> x = moxie::test::random<S>(rows, in, 954);
  const Matrix<S> dh = moxie::test::random<S>(rows, out, 955);
  for (const bool gathered : {false, true}) {
    const GroupedRows<S> grouped{starts, x, gathered ? gather : nullptr};
    for (const bool add : {false, true}) {
      Matrix<S> h = moxie::test::random<S>(rows, out, 956);
      Matrix<S> drows = moxie::test::random<S>(rows, in, 957);
      Matrix<double> expected_h = add ? moxie::test::as_double(h) : Matrix<double>(Matrix<double>::Zero(rows, out));
      Matrix<double> expected_d = add ? moxie::test::as_double(drows) : Matrix<double>(Matrix<double>::Zero(rows, in));
      for (Index e = 0; e < experts; ++e) {
        for (Index r = starts[e]; r < starts[e + 1]; ++r) {
          const Matrix<double> row = x.row(gathered ? gather[r] : r).template cast<double>();
          expected_h.row(r) += row * moxie::test::as_double(w[std::size_t(e)]).transpose();
          expected_d.row(r) += dh.row(r).template cast<double>() * moxie::test::as_double(w[std::size_t(e)]);
        }
      }
      moxie::detail::multiply_rows(grouped, weight, RowView<S>(h), add, Exec{});
      moxie::detail::multiply_rows_backward(grouped, weight, RowView<const S>(dh), RowView<S>(drows), add, Exec{});
      CHECK(moxie::test::relative_error(h, expected_h) < Tolerance<S>::sum);
      CHECK(moxie::test::relative_error(drows, expected_d) < Tolerance<S>::sum);
    }
    std::vector<Matrix<S>> dw, db;
    std::vector<Matrix<double>> expected_w, expected_b;
    for (std::uint64_t e = 0; e < 3; ++e) {
      dw.push_back(moxie::test::random<S>(out, in, 961 + e));
      db.push_back(moxie::test::random<S>(1, out, 971 + e));
      expected_w.push_back(moxie::test::as_double(dw.back()));
      expected_b.push_back(moxie::test::as_double(db.back()));
      for (Index r = starts[e]; r < starts[e + 1]; ++r) {
        expected_w.back() +=
            dh.row(r).transpose().template cast<double>() * x.row(gathered ? gather[r] : r).template cast<double>();
        expected_b.back() += dh.row(r).template cast<double>();
      }
    }
    const Matrix<S> idle = dw[1];
    moxie::detail::add_weight_gradient(
        grouped, RowView<const S>(dh), [&](Index e) { return RowView<S>(dw[std::size_t(e)]); }, Exec{});
    moxie::detail::add_bias_gradient(
        grouped, RowView<const S>(dh), [&](Index e) { return RowView<S>(db[std::size_t(e)]); }, Exec{});
    for (std::size_t e = 0; e < 3; ++e) {
      CHECK(moxie::test::relative_error(dw[e], expected_w[e]) < Tolerance<S>::sum);
      CHECK(moxie::test::relative_error(db[e], expected_b[e]) < Tolerance<S>::sum);
    }
    CHECK(moxie::test::same_bits(dw[1], idle));  // an expert without rows: exactly nothing added
  }
}

TEST_CASE("bank products: each row becomes the bias of its expert") {
  Matrix<float> bias(3, 4);
  bias << 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12;
  Matrix<float> h = moxie::test::untouched<float>(rows, 4);
  const GroupedRows<float> grouped{starts, h, nullptr};
  moxie::detail::set_rows_to_bias(
      grouped, [&](Index e) { return RowView<const float>(bias).middle_rows(e, 1); }, RowView<float>(h), Exec{});
  for (Index r = 0; r < rows; ++r) {
    CHECK(h.row(r) == bias.row(r < 3 ? 0 : 2));
  }
}

TEST_CASE("bank products: without rows nothing is written") {
  const Index none[] = {0, 0, 0};
  Matrix<float> h(0, 4);
  Matrix<float> w = moxie::test::untouched<float>(4, 4);
  const GroupedRows<float> grouped{none, h, nullptr};
  const auto weight = [&](Index) { return RowView<float>(w); };
  moxie::detail::multiply_rows(grouped, weight, RowView<float>(h), false, Exec{});
  moxie::detail::multiply_rows_backward(grouped, weight, RowView<const float>(h), RowView<float>(h), false, Exec{});
  moxie::detail::add_weight_gradient(grouped, RowView<const float>(h), weight, Exec{});
  CHECK(moxie::test::is_untouched(w));
}

}  // namespace
