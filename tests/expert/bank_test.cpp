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

TEST_CASE_TEMPLATE("bank products: rows Wᵀ, dh W and dhᵀ rows of each expert, gathered or not", S, float, double) {
  namespace kernel = moxie::kernel;
  const Index in = 5, out = 7;
  std::vector<Matrix<S>> w;
  for (std::uint64_t e = 0; e < 3; ++e) {
    w.push_back(moxie::test::random<S>(out, in, 951 + e));
  }
  const auto weight = [&](Index e) { return RowView<const S>(w[std::size_t(std::min(e, Index{2}))]); };
  const Matrix<S> bias = moxie::test::random<S>(experts, out, 953);
  const auto bias_of = [&](Index e) { return bias.data() + e * out; };
  const Matrix<S> x = moxie::test::random<S>(rows, in, 954);
  const Matrix<S> dh = moxie::test::random<S>(rows, out, 955);
  for (const bool gathered : {false, true}) {
    const GroupedRows<S> grouped{starts, x, gathered ? gather : nullptr};
    Matrix<S> h = moxie::test::untouched<S>(rows, out);
    Matrix<S> with_bias = h;
    Matrix<S> drows = moxie::test::untouched<S>(rows, in);
    Matrix<double> expected_h(rows, out), expected_d(rows, in), expected_with_bias(rows, out);
    for (Index e = 0; e < experts; ++e) {
      for (Index r = starts[e]; r < starts[e + 1]; ++r) {
        const Matrix<double> row = x.row(gathered ? gather[r] : r).template cast<double>();
        const Matrix<double> w64 = weight(e).eigen().template cast<double>();
        expected_h.row(r) = row * w64.transpose();
        expected_with_bias.row(r) = expected_h.row(r) + bias.row(e).template cast<double>();
        expected_d.row(r) = dh.row(r).template cast<double>() * w64;
      }
    }
    const auto product = [&](Matrix<S>& to) {
      return [&](Index e) {
        return moxie::detail::with_rows(moxie::detail::through<S>(weight(e)), grouped.operand(e), grouped.count(e),
                                        kernel::replace<S>(grouped.part(RowView<S>(to), e)));
      };
    };
    kernel::grouped_gemm<S>(experts, product(h), Exec{});
    kernel::grouped_gemm<S>(
        experts,
        [&](Index e) {
          auto biased = product(with_bias)(e);
          biased.bias = bias_of(e);
          return biased;
        },
        Exec{});
    kernel::grouped_gemm<S>(
        experts,
        [&](Index e) {
          return moxie::detail::back_through<S>(moxie::detail::regrouped(grouped, RowView<const S>(dh)),
                                                kernel::rows_of(weight(e)), in, e,
                                                kernel::replace<S>(grouped.part(RowView<S>(drows), e)));
        },
        Exec{});
    CHECK(moxie::test::relative_error(h, expected_h) < Tolerance<S>::sum);
    CHECK(moxie::test::relative_error(with_bias, expected_with_bias) < Tolerance<S>::sum);
    CHECK(moxie::test::relative_error(drows, expected_d) < Tolerance<S>::sum);

    std::vector<Matrix<S>> dw, db;
    std::vector<Matrix<double>> expected_w, expected_b;
    for (std::uint64_t e = 0; e < std::uint64_t(experts); ++e) {
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
    kernel::grouped_gemm<S>(
        experts,
        [&](Index e) {
          return moxie::detail::weight_gradient<S>(grouped, moxie::detail::regrouped(grouped, RowView<const S>(dh)),
                                                   kernel::rows_of(RowView<S>(dw[std::size_t(e)])), e);
        },
        Exec{});
    moxie::detail::add_bias_gradient(
        grouped, moxie::OutputGradient<S>(dh), [&](Index e) { return RowView<S>(db[std::size_t(e)]); }, Exec{});
    for (std::size_t e = 0; e < std::size_t(experts); ++e) {
      CHECK(moxie::test::relative_error(dw[e], expected_w[e]) < Tolerance<S>::sum);
      CHECK(moxie::test::relative_error(db[e], expected_b[e]) < Tolerance<S>::sum);
    }
    CHECK(moxie::test::same_bits(dw[1], idle));  // an expert without rows: exactly nothing added
  }
}

TEST_CASE("bank products: without rows nothing is written") {
  const Index none[] = {0, 0, 0};
  Matrix<float> h(0, 4);
  Matrix<float> w = moxie::test::untouched<float>(4, 4);
  const GroupedRows<float> grouped{none, h, nullptr};
  namespace kernel = moxie::kernel;
  kernel::TaskGraph<float> graph;
  graph.add(2, [&](Index e) {
    return moxie::detail::with_rows(moxie::detail::through<float>(RowView<const float>(w)), grouped.operand(e), 0);
  });
  graph.add(2, [&](Index e) {
    return moxie::detail::weight_gradient<float>(grouped, moxie::detail::regrouped(grouped, RowView<const float>(h)),
                                                 kernel::rows_of(RowView<float>(w)), e);
  });
  graph.run(Exec{});
  CHECK(moxie::test::is_untouched(w));
}

TEST_CASE_TEMPLATE("bank results: a vector's first numbers, in the caches or past them", T, float, double, moxie::BFloat16) {
  using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
  using V = moxie::kernel::Batch<S>;
  constexpr Index width{V::size};
  constexpr Index line = 64 / Index{sizeof(T)};
  alignas(64) S numbers[V::size];
  for (Index i = 0; i < width; ++i) {
    numbers[i] = S(i) + S(1) / 3;
  }
  const V v = V::load_aligned(numbers);
  const Index few = 3, many = moxie::kernel::l2_cache() / 16 / 64 + 1;
  for (const Index count : {few, many}) {
    for (const Index stride : {2 * line, 2 * line + 1}) {
      moxie::Buffer<T> memory(count * stride);
      const RowView<T> to(memory.data(), count, 2 * line, stride);
      const moxie::detail::Filled<S, T> filled(to);
      const bool past_caches = count == many && stride % line == 0 && sizeof(T) == sizeof(S) && moxie::kernel::fill_lines<V>;
      CHECK(filled.touched().rows() == (past_caches ? 0 : count));
      for (Index n = 1; n <= width + 1; ++n) {
        std::fill_n(memory.data(), memory.size(), T(-7));
        filled.store(v, 2, width, n);
        bool same = true;
        for (Index i = 0; i < memory.size(); ++i) {
          const Index at = i - 2 * stride - width;
          same = same && S(memory[i]) == (at >= 0 && at < std::min(n, width) ? S(T(numbers[at])) : S(-7));
        }
        CHECK(same);
      }
    }
  }
}

}  // namespace
