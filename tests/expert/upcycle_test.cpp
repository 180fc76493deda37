// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/expert/upcycle.hpp>
#include <moxie/layer/top_k_moe.hpp>
#include <support.hpp>

namespace {

using moxie::BankNames;
using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::Parameters;
using moxie::RowView;
using moxie::ShapeError;
using moxie::UpcycleOptions;
using moxie::ValueError;
using moxie::test::Tolerance;

constexpr Index dim = 6;
constexpr Index hidden = 24;
constexpr Index tokens = 40;
const BankNames shared{"shared_experts", false};

template <class Experts>
Parameters<typename Experts::Scalar> zeros(const Experts& bank) {
  return Parameters<typename Experts::Scalar>{moxie::Layout(bank.layout())};
}
template <class Experts>
Parameters<typename Experts::Scalar> random_weights(const Experts& bank) {
  auto p = zeros(bank);
  moxie::test::randomize(p, 501);
  return p;
}

// What the dense feed-forward makes of x.
template <class Experts, class S = typename Experts::Scalar>
Matrix<S> dense_output(const Experts& dense, const Parameters<S>& weights, const Matrix<S>& x) {
  const Index starts[] = {0, x.rows()};
  Matrix<S> y(x.rows(), x.cols());
  moxie::Workspace workspace;
  dense.forward(weights.view(), moxie::GroupedRows<S>{starts, x, nullptr}, y, nullptr, workspace);
  return y;
}

// Whether the experts of each token are complete copies of `parts` experts.
template <class S>
bool chooses_complete_copies(const moxie::SparsePlan<S>& plan, Index parts) {
  Matrix<double> chosen = Matrix<double>::Zero(plan.tokens(), plan.experts() / parts);
  for (Index e = 0; e < plan.experts(); ++e) {
    for (Index r = plan.expert_starts()[std::size_t(e)]; r < plan.expert_starts()[std::size_t(e) + 1]; ++r) {
      chosen(plan.token()[std::size_t(r)], e / parts) += 1;
    }
  }
  return (chosen.array() == 0 || chosen.array() == double(parts)).all();
}

struct Case {
  Index experts, top_k, parts;
  double scale = 1;
};

// A layer of upcycled experts against the dense feed-forward that they come from.
template <class Experts, class S = typename Experts::Scalar>
void check_equals_dense(const Case& c, const typename Experts::Config& dense_config,
                        const typename Experts::Config& expert_config) {
  const Experts dense(1, dim, dense_config, shared);
  const auto weights = random_weights(dense);
  moxie::TopKMoE<S, Experts> layer(
      {.model_dim = dim, .experts = c.experts, .top_k = c.top_k, .expert = expert_config, .normalize = true, .scale = c.scale});
  moxie::test::randomize(layer.parameters(), 502);
  moxie::upcycle(dense, weights, layer.experts(), layer.parameters(), {.parts = c.parts, .weight_sum = c.scale});
  moxie::tie_gate(layer.parameters()["gate.weight"], c.parts);
  const Matrix<S> x = moxie::test::random<S>(tokens, dim, 503);
  Matrix<S> y(tokens, dim);
  auto tape = layer.make_tape(tokens);
  layer.forward(x, y, tape);
  CHECK(chooses_complete_copies(tape.plan(), c.parts));
  CHECK(moxie::test::relative_error(y, dense_output(dense, weights, x)) < Tolerance<S>::layer);
}

template <class S>
void check_families(const Case& c) {
  const Index part = hidden / c.parts;
  check_equals_dense<moxie::SwiGluExperts<S>>(c, {hidden}, {part});
  check_equals_dense<moxie::SwiGluExperts<S>>(c, {.hidden_dim = hidden, .bias = true}, {.hidden_dim = part, .bias = true});
  check_equals_dense<moxie::ReGluExperts<S>>(c, {hidden}, {part});
  const moxie::ClampedSwiGlu unit{.limit = 0.5, .alpha = 1.702, .beta = 1};
  check_equals_dense<moxie::ClampedSwiGluExperts<S>>(c, {hidden, true, unit}, {part, true, unit});
  check_equals_dense<moxie::GeluTanhExperts<S>>(c, {hidden}, {part});
  check_equals_dense<moxie::ReluSquaredExperts<S>>(c, {hidden}, {part});
}

// Weights are those of the float bank: only products round.
template <class Rounded, class Plain>
void check_same_weights(const typename Plain::Config& dense_config, const typename Plain::Config& expert_config, Index parts) {
  const Rounded rounded(4, dim, expert_config);
  const Plain plain(4, dim, expert_config);
  const Plain dense(1, dim, dense_config, shared);
  const auto weights = random_weights(dense);
  auto found = zeros(rounded);
  auto expected = zeros(plain);
  const UpcycleOptions options{.parts = parts, .weight_sum = 2, .noise = 0.1, .rng = moxie::Rng(7)};
  moxie::upcycle(Rounded(1, dim, dense_config, shared), weights, rounded, found, options);
  moxie::upcycle(dense, weights, plain, expected, options);
  CHECK((expected.flat() != 0).any());
  CHECK((found.flat() == expected.flat()).all());
}

TEST_CASE("upcycle: banks of BFloat16 elements get what banks of floats get") {
  using moxie::BFloat16;
  check_same_weights<moxie::SwiGluExperts<float, BFloat16>, moxie::SwiGluExperts<float>>({hidden}, {hidden / 2}, 2);
  check_same_weights<moxie::GeluTanhExperts<float, BFloat16>, moxie::GeluTanhExperts<float>>({hidden}, {hidden / 2}, 2);
  check_same_weights<moxie::LinearExperts<float, BFloat16>, moxie::LinearExperts<float>>({}, {}, 1);
}

TEST_CASE_TEMPLATE("upcycle: copies with normalized weights are the dense feed-forward, for any K", S, float, double) {
  for (const Index k : {2, 3, 4}) {
    check_families<S>({.experts = 4, .top_k = k, .parts = 1});
    const Case c{.experts = 4, .top_k = k, .parts = 1};
    check_equals_dense<moxie::LinearExperts<S>>(c, {}, {});
    check_equals_dense<moxie::LinearExperts<S>>(c, {.bias = false}, {.bias = false});
  }
}

TEST_CASE_TEMPLATE("upcycle: parts with a tied gate are the dense feed-forward, for K = m, 2m and E", S, float, double) {
  for (const Index m : {2, 3, 4}) {
    for (const Index copies : {1, 2, 3}) {
      check_families<S>({.experts = 3 * m, .top_k = copies * m, .parts = m});
    }
  }
}

TEST_CASE_TEMPLATE("upcycle: weight_sum makes up for weights that do not add up to 1", S, float, double) {
  check_families<S>({.experts = 4, .top_k = 2, .parts = 1, .scale = 2.5});
  check_families<S>({.experts = 6, .top_k = 4, .parts = 2, .scale = 0.25});
  check_equals_dense<moxie::LinearExperts<S>>({.experts = 4, .top_k = 2, .parts = 1, .scale = 2.5}, {}, {});
}

TEST_CASE("upcycle: without a tied gate a token may choose parts of several copies, and gets another output") {
  using Experts = moxie::SwiGluExperts<double>;
  const Experts dense(1, dim, {hidden}, shared);
  const auto weights = random_weights(dense);
  moxie::TopKMoE<double> layer(
      {.model_dim = dim, .experts = 6, .top_k = 2, .expert = {.hidden_dim = hidden / 2}, .normalize = true});
  layer.initialize(moxie::Rng(7));
  moxie::upcycle(dense, weights, layer.experts(), layer.parameters(), {.parts = 2});
  const Matrix<double> x = moxie::test::random<double>(tokens, dim, 503);
  Matrix<double> y(tokens, dim);
  auto tape = layer.make_tape();
  layer.forward(x, y, tape);
  CHECK(!chooses_complete_copies(tape.plan(), 2));
  CHECK(moxie::test::relative_error(y, dense_output(dense, weights, x)) > 0.01);
}

TEST_CASE("upcycle: copies without noise have the bits of the dense weights") {
  const moxie::GeluTanhExperts<float> dense(1, dim, {hidden}, shared);
  const moxie::GeluTanhExperts<float> bank(3, dim, {hidden});
  const auto weights = random_weights(dense);
  auto p = random_weights(bank);
  moxie::upcycle(dense, weights, bank, p);
  for (const char* expert : {"experts.0.", "experts.1.", "experts.2."}) {
    for (const char* name : {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}) {
      CHECK(p[std::string(expert) + name].eigen() == weights[std::string("shared_experts.") + name].eigen());
    }
  }
}

TEST_CASE("upcycle: expert c·m + s has part s of the hidden units, and the output side carries m / weight_sum") {
  const moxie::GeluTanhExperts<double> dense(1, dim, {hidden}, shared);
  const moxie::GeluTanhExperts<double> bank(4, dim, {hidden / 2});
  const auto weights = random_weights(dense);
  auto p = random_weights(bank);
  moxie::upcycle(dense, weights, bank, p, {.parts = 2, .weight_sum = 4});
  for (Index e = 0; e < 4; ++e) {
    const std::string name = "experts." + std::to_string(e) + ".";
    const Index first = e % 2 * hidden / 2;
    CHECK(p[name + "fc1.weight"].eigen() == weights["shared_experts.fc1.weight"].eigen().middleRows(first, hidden / 2));
    CHECK(p[name + "fc1.bias"].eigen() == weights["shared_experts.fc1.bias"].eigen().middleCols(first, hidden / 2));
    CHECK(p[name + "fc2.weight"].eigen() == 0.5 * weights["shared_experts.fc2.weight"].eigen().middleCols(first, hidden / 2));
    CHECK(p[name + "fc2.bias"].eigen() == 0.25 * weights["shared_experts.fc2.bias"].eigen());
  }
}

TEST_CASE("upcycle: noise is normal, in deviations of the dense tensor, and another one for each expert and tensor") {
  const moxie::GeluTanhExperts<double> dense(1, 40, {80}, shared);
  const moxie::GeluTanhExperts<double> bank(4, 40, {40});
  auto weights = random_weights(dense);
  weights["shared_experts.fc1.weight"].eigen().array() += 3;  // the mean is no part of the deviation
  weights["shared_experts.fc2.weight"].eigen() *= 5;
  weights["shared_experts.fc2.bias"].eigen().setConstant(2);
  auto plain = zeros(bank);
  auto noisy = zeros(bank);
  auto again = zeros(bank);
  const UpcycleOptions options{.parts = 2, .weight_sum = 0.5, .noise = 0.1, .rng = moxie::Rng(9)};
  moxie::upcycle(dense, weights, bank, plain, {.parts = 2, .weight_sum = 0.5});
  moxie::upcycle(dense, weights, bank, noisy, options);
  moxie::upcycle(dense, weights, bank, again, options);
  CHECK((noisy.flat() == again.flat()).all());

  const auto noise = [&](const std::string& name) { return Matrix<double>(noisy[name].eigen() - plain[name].eigen()); };
  const auto deviation = [](const Matrix<double>& m) { return std::sqrt(m.array().square().mean()); };
  // 1600 numbers: their mean is within 4 of 40th parts of a deviation, the deviation within 4 of 57th parts.
  const Matrix<double> first = noise("experts.1.fc1.weight");
  const Matrix<double> second = noise("experts.1.fc2.weight");
  CHECK(deviation(first) == doctest::Approx(0.1 * 0.5).epsilon(0.07));
  CHECK(std::abs(first.mean()) < 0.1 * 0.05);
  CHECK(deviation(second) == doctest::Approx(4 * 0.1 * 2.5).epsilon(0.07));  // multiplied with the weights
  CHECK(noise("experts.1.fc2.bias").isZero(0));                              // of a constant, the deviation is 0
  CHECK(noise("experts.0.fc1.weight") != noise("experts.2.fc1.weight"));
  const double correlation = first.cwiseProduct(second).mean() / (deviation(first) * deviation(second));
  CHECK(std::abs(correlation) < 0.1);
}

TEST_CASE("upcycle: what does not fit is refused before anything is written") {
  using Glu = moxie::SwiGluExperts<float>;
  const Glu dense(1, dim, {hidden}, shared);
  const auto weights = random_weights(dense);
  const auto refused_with = [&]<class Error>(const Error*, const Glu& from, const Glu& bank, const UpcycleOptions& options) {
    auto p = zeros(bank);
    p.flat() = -77;
    const auto from_weights = random_weights(from);
    std::string message = moxie::test::message_of<Error>([&] { moxie::upcycle(from, from_weights, bank, p, options); });
    CHECK((p.flat() == -77).all());
    return message;
  };
  const ValueError* value = nullptr;
  const ShapeError* shape = nullptr;
  const Glu halves(4, dim, {hidden / 2});
  CHECK(refused_with(value, Glu(2, dim, {hidden}), halves, {.parts = 2}) ==
        "upcycle: the dense feed-forward has to be a bank of one expert");
  CHECK(refused_with(value, dense, halves, {.parts = 0}) == "upcycle: parts is 0, expected at least 1");
  CHECK(refused_with(value, dense, halves, {.parts = 3}) == "upcycle: 4 experts are no multiple of 3 parts");
  CHECK(refused_with(value, Glu(1, dim, {25}, shared), halves, {.parts = 2}) ==
        "upcycle: hidden_dim 25 is no multiple of 2 parts");
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double infinity = std::numeric_limits<double>::infinity();
  for (const double sum : {0.0, -1.0, nan, infinity}) {
    CHECK(refused_with(value, dense, halves, {.parts = 2, .weight_sum = sum}) ==
          "upcycle: weight_sum must be finite and positive");
  }
  for (const double noise : {-0.1, nan, infinity}) {
    CHECK(refused_with(value, dense, halves, {.parts = 2, .noise = noise}) == "upcycle: noise must be finite and not negative");
  }
  CHECK(refused_with(shape, dense, halves, {}) == "upcycle: experts.0.gate_proj.weight is (12,6), expected (24,6)");
  CHECK(refused_with(shape, dense, Glu(4, dim + 1, {hidden / 2}), {.parts = 2}) ==
        "upcycle: experts.0.gate_proj.weight is (12,7), expected (12,6)");

  // Blocks of another layout.
  const Glu copies(2, dim, {hidden});
  auto p = zeros(copies);
  p.flat() = -77;
  auto other = zeros(halves);
  other.flat() = -77;
  CHECK_THROWS_AS(moxie::upcycle(dense, p, copies, p), ShapeError);
  CHECK_THROWS_AS(moxie::upcycle(dense, weights, copies, other), ShapeError);
  CHECK_THROWS_AS(moxie::upcycle(Glu(1, dim, {hidden}), p, copies, p), ValueError);  // expert 0 onto itself
  CHECK((p.flat() == -77).all());
  CHECK((other.flat() == -77).all());
}

TEST_CASE("upcycle: gated units have the biases of their part, and must have the same biases and options") {
  using Glu = moxie::ClampedSwiGluExperts<double>;
  const auto config = [](Index width, bool bias, double limit) { return Glu::Config{width, bias, {.limit = limit}}; };
  const Glu dense(1, dim, config(hidden, true, 7), shared);
  const Glu bank(4, dim, config(hidden / 2, true, 7));
  const auto weights = random_weights(dense);
  auto p = random_weights(bank);
  moxie::upcycle(dense, weights, bank, p, {.parts = 2, .weight_sum = 4});
  for (Index e = 0; e < 4; ++e) {
    const std::string name = "experts." + std::to_string(e) + ".";
    const Index first = e % 2 * hidden / 2;
    for (const char* side : {"gate_proj.bias", "up_proj.bias"}) {
      CHECK(p[name + side].eigen() == weights[std::string("shared_experts.") + side].eigen().middleCols(first, hidden / 2));
    }
    CHECK(p[name + "down_proj.bias"].eigen() == 0.25 * weights["shared_experts.down_proj.bias"].eigen());
  }
  for (const bool bias : {true, false}) {
    const Glu other(4, dim, config(hidden / 2, bias, bias ? 6 : 7));
    auto q = zeros(other);
    q.flat() = -77;
    if (bias) {
      CHECK_THROWS_WITH_AS(moxie::upcycle(dense, weights, other, q, {.parts = 2}),
                           "upcycle: the gated unit of the experts has other options than that of the dense feed-forward",
                           ValueError);
    } else {
      CHECK_THROWS_WITH_AS(moxie::upcycle(dense, weights, other, q, {.parts = 2}),
                           "upcycle: the experts have other tensors than the dense feed-forward (a bias)", ShapeError);
    }
    CHECK((q.flat() == -77).all());
  }
}

TEST_CASE("upcycle: linear experts have no hidden units to cut, and both have a bias or neither") {
  using Linear = moxie::LinearExperts<float>;
  const Linear dense(1, dim, {}, shared);
  const auto weights = random_weights(dense);
  const Linear bank(2, dim);
  const Linear plain(2, dim, {.bias = false});
  auto p = zeros(bank);
  auto q = zeros(plain);
  CHECK_THROWS_WITH_AS(moxie::upcycle(dense, weights, bank, p, {.parts = 2}),
                       "upcycle: linear experts have no hidden units to cut into parts", ValueError);
  CHECK_THROWS_AS(moxie::upcycle(dense, weights, plain, q), ShapeError);
  CHECK((p.flat() == 0).all());
  CHECK((q.flat() == 0).all());
}

TEST_CASE("tied gate: every row of a copy is the first one") {
  Matrix<double> gate(6, 2);
  gate << 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12;
  Matrix<double> expected(6, 2);
  expected << 1, 2, 1, 2, 1, 2, 7, 8, 7, 8, 7, 8;
  moxie::tie_gate(RowView<double>(gate), 3);
  CHECK(gate == expected);
  moxie::tie_gate(RowView<double>(gate), 1);
  CHECK(gate == expected);
  CHECK_THROWS_WITH_AS(moxie::tie_gate(RowView<double>(gate), 4), "tie_gate: 6 rows are no multiple of 4 parts", ValueError);
  CHECK_THROWS_AS(moxie::tie_gate(RowView<double>(gate), 0), ValueError);
  CHECK(gate == expected);
}

}  // namespace
