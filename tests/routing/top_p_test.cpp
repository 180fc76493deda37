// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <allocations.hpp>
#include <moxie/expert/glu.hpp>
#include <moxie/layer/moe.hpp>
#include <moxie/routing/top_p.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <moxie/testing/laws.hpp>
#include <support.hpp>

namespace {

using moxie::Index;
using moxie::Matrix;
using moxie::Tokens;
using moxie::TopPRouterConfig;

constexpr Index dim = 5, experts = 6, tokens = 12;

template <class S>
auto make(const TopPRouterConfig& config) {
  moxie::Moe<moxie::TopPRouter<S>, moxie::SwiGluExperts<S>> layer(moxie::TopPRouter<S>(config),
                                                                  moxie::SwiGluExperts<S>(experts, dim, {4}));
  moxie::test::randomize(layer.parameters(), 761);
  return layer;
}

const TopPRouterConfig modes[] = {
    {.model_dim = dim, .experts = experts},
    {.model_dim = dim, .experts = experts, .top_p = 0.8, .token_entropy = 0.3},
    {.model_dim = dim, .experts = experts, .top_p = 0.9, .most = 2},
    {.model_dim = dim, .experts = experts, .top_p = 1},
};

TEST_CASE_TEMPLATE("top-p: a token takes the fewest of its best experts that reach p, with their scores", S, float, double) {
  const Matrix<S> x = moxie::test::random<S>(tokens, dim, 762);
  for (const TopPRouterConfig& mode : modes) {
    CAPTURE(mode.top_p);
    const auto layer = make<S>(mode);
    Matrix<S> y(tokens, dim);
    auto tape = layer.make_tape();
    layer.forward(x, y, tape);
    for (Index t = 0; t < tokens; ++t) {
      const moxie::test::reference::Vector s = moxie::test::reference::softmax(
          (layer.parameters()["gate.weight"].eigen() * x.row(t).transpose()).template cast<double>());
      const std::vector<Index> best = moxie::test::reference::top_k(s, experts);
      std::size_t k = 0;
      double sum = 0;
      while (k < best.size() && (k == 0 || sum < mode.top_p) && (mode.most == 0 || Index(k) < mode.most)) {
        sum += s(best[k++]);
      }
      const auto rows = tape.plan().rows_of_token(t);
      if (mode.top_p < 1) {  // where rounding may leave the sum of all just below 1
        CHECK(rows.size() == k);
      }
      for (std::size_t j = 0; j < rows.size(); ++j) {
        CHECK(double(tape.plan().weight(rows[j])) == doctest::Approx(s(best[j])).epsilon(moxie::test::Tolerance<S>::layer));
      }
    }
  }
}

TEST_CASE_TEMPLATE("top-p: keeps the laws", S, float, double) {
  const Matrix<S> x = moxie::test::random<S>(tokens, dim, 763);
  const std::vector<Index> ragged{0, 5, 5, 12};
  for (const TopPRouterConfig& mode : modes) {
    moxie::testing::LawOptions options;
    options.allocations = [] { return moxie::test::allocation_count.load(); };
    for (const auto& law : moxie::testing::check_layer_laws(make<S>(mode), Tokens<S>(x, ragged), options)) {
      INFO(law.message);
      CHECK(law.holds);
    }
  }
}

TEST_CASE("top-p: gradients match central differences") {
  const Matrix<double> x = moxie::test::random<double>(tokens, dim, 764);
  const Matrix<double> dy = moxie::test::random<double>(tokens, dim, 765);
  for (const TopPRouterConfig& mode : modes) {
    for (const auto& report : moxie::testing::check_layer_gradients(make<double>(mode), Tokens<double>(x), dy,
                                                                    moxie::Exec{.threads = 1}, {.step = 2e-5})) {
      INFO(report.message());
      CHECK(report.passes(moxie::test::gradient_tolerance));
    }
  }
}

TEST_CASE("top-p: bad options are refused") {
  for (const TopPRouterConfig& config : {TopPRouterConfig{.model_dim = 0, .experts = 2},
                                         {.model_dim = 2, .experts = 0},
                                         {.model_dim = 2, .experts = 2, .top_p = 0},
                                         {.model_dim = 2, .experts = 2, .top_p = 1.1},
                                         {.model_dim = 2, .experts = 2, .most = -1},
                                         {.model_dim = 2, .experts = 2, .token_entropy = -1}}) {
    CHECK_THROWS_AS(moxie::TopPRouter<float>{config}, moxie::ValueError);
  }
}

}  // namespace
