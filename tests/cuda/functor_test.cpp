// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/core/random.hpp>
#include <moxie/cuda/expert_choice.hpp>
#include <moxie/cuda/soft.hpp>
#include <moxie/kernel/gated_unit.hpp>
#include <moxie/routing/plan.hpp>
#include <moxie/routing/selection.hpp>
#include <support.hpp>

// The functions that layers are made of, each alone; the layers are in layer_test.cpp.
namespace {

using moxie::Index;
using moxie::Matrix;
using moxie::cuda::DeviceExec;
using moxie::cuda::DeviceRows;
using moxie::cuda::Groups;

template <class S>
DeviceRows<S> view(Matrix<S>& m) {
  return {m.data(), m.rows(), m.cols()};
}

TEST_CASE("random: the numbers of the CPU's streams") {
  const moxie::Rng host = moxie::Rng(0x123456789abcdefULL, 77).split(3);
  const moxie::cuda::DeviceRng device = moxie::cuda::DeviceRng(0x123456789abcdefULL, 77).split(3);
  CHECK(device.seed() == host.seed());
  CHECK(device.stream() == host.stream());
  for (const std::uint64_t i : {std::uint64_t{0}, std::uint64_t{1}, std::uint64_t{1000}, ~std::uint64_t{0}}) {
    CHECK(device.uniform(i) == host.uniform(i));
    CHECK(device.normal(i) == doctest::Approx(host.normal(i)).epsilon(1e-14));
  }
}

TEST_CASE("column_reduce: sums and maxima of each group's columns, in pieces, added or not") {
  DeviceExec exec;
  Matrix<double> m = moxie::test::random<double>(400, 3, 1);
  const std::vector<int> starts{0, 200, 200, 201, 400};
  const Groups groups{starts, starts.data()};
  Matrix<double> sums = Matrix<double>::Ones(4, 5);
  const moxie::cuda::ElementOf<double, double> value{view(m)};
  moxie::cuda::column_sums<double>(exec, groups, 3, value,
                                   moxie::cuda::GroupRows<double>{sums.data(), 5, moxie::kernel::Write::add});
  Matrix<double> largest(4, 3);
  moxie::cuda::column_reduce<moxie::cuda::Largest, double>(exec, groups, 3, value,
                                                           moxie::cuda::GroupRows<double>{largest.data(), 3});
  for (Index g = 0; g < 4; ++g) {
    const auto part = m.middleRows(groups.begin(g), groups.rows(g));
    for (Index j = 0; j < 3; ++j) {
      CHECK(sums(g, j) == doctest::Approx(1 + part.col(j).sum()).epsilon(1e-12));
      CHECK(largest(g, j) == (g == 1 ? -std::numeric_limits<double>::infinity() : part.col(j).maxCoeff()));
    }
    CHECK(sums(g, 3) == 1);
  }
}

TEST_CASE("next_best: asked K times it is a selection of the K largest, ties to the lower index, NaN never") {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    Matrix<double> z = moxie::test::random<double>(1, 9, seed);
    z = (2 * z).array().round();  // ties
    std::vector<Index> expected(9);
    moxie::select_top_k(z.data(), Index{9}, Index{9}, expected.data());
    double value = 0;
    int index = -1;
    for (Index j = 0; j < 9; ++j) {
      moxie::cuda::detail::next_best(
          9, [&](int e) { return z(0, e); }, moxie::cuda::Lanes(), value, index);
      CHECK(index == expected[std::size_t(j)]);
    }
    moxie::cuda::detail::next_best(
        9, [&](int e) { return z(0, e); }, moxie::cuda::Lanes(), value, index);
    CHECK(index == -1);
  }
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double z[] = {nan, 1, nan, 3};
  double value = 0;
  int index = -1;
  for (const int expected : {3, 1, -1}) {
    moxie::cuda::detail::next_best(
        4, [&](int e) { return z[e]; }, moxie::cuda::Lanes(), value, index);
    CHECK(index == expected);
  }
}

TEST_CASE("softmax: rows that are not finite are told, the first of them") {
  Matrix<double> z = moxie::test::random<double>(6, 4, 1);
  Matrix<double> s(6, 4);
  z(4, 1) = std::numeric_limits<double>::quiet_NaN();
  z(3, 0) = std::numeric_limits<double>::infinity();
  int first_bad = moxie::cuda::detail::all_finite;
  DeviceExec exec;
  exec.for_each_row(6, moxie::cuda::SoftmaxRow<double>{view(z), view(s), nullptr, &first_bad});
  CHECK(first_bad == 3);
  for (Index t = 0; t < 3; ++t) {
    CHECK(s.row(t).sum() == doctest::Approx(1).epsilon(1e-14));
  }
  first_bad = moxie::cuda::detail::all_finite;
  exec.for_each_row(6, moxie::cuda::SigmoidRow<double>{view(z), view(s), nullptr, &first_bad});
  CHECK(first_bad == 3);
}

TEST_CASE("sigmoid: probabilities keep their ratios where all scores vanish") {
  Matrix<double> z = moxie::test::random<double>(2, 5, 3).array() - 900;
  Matrix<double> s(2, 5), p(2, 5), softmax(2, 5);
  int first_bad = moxie::cuda::detail::all_finite;
  DeviceExec exec;
  exec.for_each_row(2, moxie::cuda::SigmoidRow<double>{view(z), view(s), p.data(), &first_bad});
  exec.for_each_row(2, moxie::cuda::SoftmaxRow<double>{view(z), view(softmax), nullptr, &first_bad});
  CHECK(s.isZero(0));
  CHECK(moxie::test::relative_error(p, softmax) < 1e-12);
}

TEST_CASE("sequences: the sequence of every token, empty ones among them") {
  DeviceExec exec;
  moxie::cuda::DeviceSequences sequences;
  const std::vector<Index> starts{0, 0, 3, 3, 3, 5, 5};
  sequences.set(exec, moxie::Sequences(starts).over(5));
  CHECK(std::vector<int>(sequences.of_token(), sequences.of_token() + 5) == std::vector<int>{1, 1, 1, 4, 4});
  CHECK(sequences.groups().rows(4) == 2);
  const auto launches = exec.counts().launches;
  sequences.set(exec, moxie::Sequences(starts).over(5));
  CHECK(exec.counts().launches == launches);  // nothing new
  sequences.set(exec, moxie::Sequences(1).over(5));
  CHECK(sequences.count() == 5);
  sequences.set(exec, moxie::Sequences().over(0));
  CHECK(sequences.count() == 0);
}

TEST_CASE("plan: pairs sorted by expert are those of the CPU, and the status comes along") {
  DeviceExec exec;
  const moxie::Rng rng(3);
  const Index tokens = 40, experts = 7, k = 3;
  std::vector<int> expert;
  std::vector<Index> expected_expert;
  std::vector<double> weight;
  for (Index p = 0; p < tokens * k; ++p) {
    expert.push_back(int(rng.uniform(std::uint64_t(p)) * 8) - 1);
    expected_expert.push_back(expert.back());
    weight.push_back(rng.normal(std::uint64_t(p)));
  }
  moxie::SparsePlan<double> expected;
  expected.build(tokens, experts, k, expected_expert, weight);
  moxie::cuda::SparsePlan<double> plan;
  const int status = 17;
  CHECK(plan.build(exec, {tokens, tokens, experts, k, expert.data(), weight.data()}, &status) == 17);
  CHECK(exec.counts().synchronizations == 1);
  REQUIRE(plan.rows() == expected.rows());
  for (Index e = 0; e <= experts; ++e) {
    CHECK(plan.groups().host[std::size_t(e)] == expected.expert_starts()[std::size_t(e)]);
  }
  for (Index r = 0; r < plan.rows(); ++r) {
    CHECK(plan.token()[r] == expected.token(r));
    CHECK(plan.weight()[r] == expected.weight(r));
    CHECK(plan.rows_of_token().rows[expected.pair(r)] == r);
  }
  CHECK(std::count(plan.rows_of_token().rows, plan.rows_of_token().rows + tokens * k, -1) == expected.dropped());
}

TEST_CASE("normalize: rows of length 1, and their adjoint is that of differences") {
  Matrix<double> v = moxie::test::random<double>(3, 5, 1);
  const Matrix<double> dhat = moxie::test::random<double>(3, 5, 2);
  Matrix<double> hat(3, 5), factor(3, 1), dv = Matrix<double>::Ones(3, 5), dots(3, 1);
  const double scale = 1.7;
  DeviceExec exec;
  const auto forward = [&] {
    exec.for_each_row(3, moxie::cuda::NormalizeRow<double>{view(v), view(hat), factor.data()});
    return scale * hat.cwiseProduct(dhat).sum();
  };
  forward();
  CHECK(hat.row(1).norm() == doctest::Approx(1).epsilon(1e-5));
  Matrix<double> d = dhat;
  exec.for_each_row(
      3, moxie::cuda::NormalizeBackwardRow<double>{view(hat), view(d), factor.data(), &scale, view(dv), dots.data()});
  for (Index i = 0; i < v.size(); ++i) {
    const double h = 1e-6, x = v.data()[i];
    v.data()[i] = x + h;
    const double up = forward();
    v.data()[i] = x - h;
    const double down = forward();
    v.data()[i] = x;
    CHECK(dv.data()[i] - 1 == doctest::Approx((up - down) / (2 * h)).epsilon(1e-6));
  }
  forward();
  CHECK(dots(2, 0) == doctest::Approx(hat.row(2).dot(dhat.row(2))).epsilon(1e-12));
}

TEST_CASE("gated unit: a row is its value, and backward its derivatives, with options of the object") {
  DeviceExec exec;
  const moxie::ClampedSwiGlu unit{.limit = 1, .alpha = 1.702, .beta = 1};
  Matrix<double> gate_up = moxie::test::random<double>(3, 14, 1);
  Matrix<double> dhidden = moxie::test::random<double>(3, 7, 2);
  Matrix<double> hidden(3, 7), again(3, 7), dgate_up(3, 14);
  const auto read = [](Matrix<double>& m) { return DeviceRows<const double>(view(m)); };
  exec.for_each_row(3, moxie::cuda::GluRow<moxie::ClampedSwiGlu, double>{read(gate_up), view(hidden), unit});
  exec.for_each_row(3, moxie::cuda::GluBackwardRow<moxie::ClampedSwiGlu, double>{read(gate_up), read(dhidden), view(again),
                                                                                 view(dgate_up), unit});
  CHECK(hidden == again);
  for (Index r = 0; r < 3; ++r) {
    for (Index j = 0; j < 7; ++j) {
      const double gate = gate_up(r, j);
      const double up = gate_up(r, 7 + j);
      CHECK(hidden(r, j) == unit.value(gate, up));
      CHECK(dgate_up(r, j) == dhidden(r, j) * unit.derivatives(gate, up).gate);
      CHECK(dgate_up(r, 7 + j) == dhidden(r, j) * unit.derivatives(gate, up).up);
    }
  }
}

TEST_CASE_TEMPLATE("activation: NaN stays NaN in a bank's rows", Activation, moxie::Silu, moxie::Relu, moxie::ReluSquared,
                   moxie::GeluErf, moxie::GeluTanh) {
  DeviceExec exec;
  Matrix<float> a = Matrix<float>::Constant(1, 1, std::numeric_limits<float>::quiet_NaN());
  Matrix<float> hidden = Matrix<float>::Zero(1, 1);
  const float bias = 0;
  exec.for_each_row(1, moxie::cuda::MlpRow<Activation, float, float>{view(a), {&bias, 0, nullptr}, view(hidden)});
  CHECK(std::isnan(hidden(0, 0)));
  Matrix<float> gate_up(1, 2);
  gate_up << std::numeric_limits<float>::quiet_NaN(), 1.0F;
  hidden.setZero();
  exec.for_each_row(1,
                    moxie::cuda::GluRow<moxie::Gated<Activation>, float>{DeviceRows<const float>(view(gate_up)), view(hidden)});
  CHECK(std::isnan(hidden(0, 0)));
}

}  // namespace
