// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/loss/diffusion_prior.hpp>
#include <moxie/routing/score.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <numeric>
#include <support.hpp>

namespace {

using moxie::DiffusionPrior;
using moxie::Index;
using moxie::Matrix;
using moxie::RowView;
using moxie::unit_mapping;
using Mapping = Matrix<std::uint8_t>;

Index first_one(const Mapping& mapping, Index timestep) {
  Index j = 0;
  while (j < mapping.cols() && mapping(timestep, j) == 0) {
    ++j;
  }
  return j;
}

// Softmax rows of `experts` units each, `blocks` of them side by side.
template <class S>
Matrix<S> random_probabilities(Index samples, Index blocks, Index experts, std::uint64_t seed) {
  Matrix<S> p = moxie::test::random<S>(samples, blocks * experts, seed, 2);
  for (Index l = 0; l < blocks; ++l) {
    moxie::softmax_rows(RowView<S>(p.middleCols(l * experts, experts)), moxie::Exec{});
  }
  return p;
}

// A prior of T = 20, 2 blocks with K = 2 of E = 3, matched at random.
struct Example {
  Mapping mapping = unit_mapping(20, 6, 2.0 / 3);
  std::vector<Index> pair{4, 0, 3, 5, 2, 1};
  std::vector<Index> timestep{0, 19, 7, 13, 7};
  DiffusionPrior prior{.blocks = 2, .mapping = mapping, .prior_of_unit = pair};
};

TEST_CASE("diffusion prior: every timestep uses as many units, the first timestep the first, the last the last") {
  for (const Index timesteps : {Index{2}, Index{7}, Index{100}, Index{1000}}) {
    for (const Index units : {Index{1}, Index{6}, Index{37}}) {
      for (const double share : {0.2, 0.5, 2.0 / 3, 1.0}) {
        const auto filled = Index(double(units) * share);
        if (filled == 0) {
          continue;
        }
        CAPTURE(timesteps);
        CAPTURE(units);
        CAPTURE(share);
        const Mapping mapping = unit_mapping(timesteps, units, share);
        REQUIRE(mapping.rows() == timesteps);
        REQUIRE(mapping.cols() == units);
        CHECK(first_one(mapping, 0) == 0);
        CHECK(first_one(mapping, timesteps - 1) == units - filled);
        for (Index i = 0; i < timesteps; ++i) {
          const Index start = first_one(mapping, i);
          CHECK(mapping.row(i).cast<Index>().sum() == filled);
          CHECK(mapping.row(i).segment(start, filled).cast<Index>().sum() == filled);
          CHECK(start >= first_one(mapping, std::max<Index>(i - 1, 0)));
        }
      }
    }
  }
}

TEST_CASE("diffusion prior: the share of units is truncated as the floating-point number that it is") {
  const auto filled = [](Index experts, Index k, Index depth) {
    return unit_mapping(5, experts * depth, double(k) / double(experts)).row(2).cast<Index>().sum();
  };
  CHECK(filled(10, 7, 9) == 62);  // 90 · 0.7 = 62.99...
  CHECK(filled(3, 2, 2) == 4);
  CHECK(filled(8, 2, 12) == 24);
  CHECK(filled(3, 1, 28) == 28);
}

TEST_CASE("diffusion prior: the window starts at the rounded power of the place, halves at the even unit") {
  // Places 0, 1/2, 1: the fourth power is 1/16 of n - filled.
  for (const auto& pair : std::vector<std::pair<Index, Index>>{{9, 0}, {10, 1}, {25, 2}, {41, 2}, {42, 3}}) {
    const Index units = pair.first;
    const Index start = pair.second;
    CAPTURE(units);
    CHECK(first_one(unit_mapping(3, units, 1.0 / double(units) * 1.01), 1) == start);  // one unit filled
  }
  // Places i/4, linear: 0, 1/4, 1/2, 3/4 and 1 of 6.
  const Mapping linear = unit_mapping(5, 8, 0.25, 1);
  std::vector<Index> starts;
  for (Index i = 0; i < 5; ++i) {
    starts.push_back(first_one(linear, i));
  }
  CHECK(starts == std::vector<Index>{0, 2, 3, 4, 6});
  CHECK(first_one(unit_mapping(1, 6, 0.5), 0) == 0);
}

TEST_CASE("diffusion prior: the choices of a block become ones in its columns, those of others stay") {
  Mapping chosen = Mapping::Constant(2, 7, 1);
  moxie::mark_chosen_units(std::vector<Index>{2, 0, 1, 2}, 3, 2, chosen);
  Mapping expected(2, 7);
  expected << 1, 1, 1, 0, 1, 1, 1,  //
      1, 1, 0, 1, 1, 1, 1;
  CHECK(chosen == expected);
}

TEST_CASE("diffusion prior: a cost is the number of timesteps in which two units differ") {
  Mapping chosen(3, 2), mapping(3, 2);
  chosen << 1, 0, 1, 1, 0, 1;
  mapping << 1, 0, 1, 0, 1, 1;
  Matrix<double> expected(2, 2);
  expected << 1, 3, 1, 1;  // columns (1,1,0) and (0,1,1) chosen, (1,1,1) and (0,0,1) in the prior
  CHECK(moxie::unit_costs(chosen, mapping) == expected);
}

TEST_CASE("diffusion prior: the matching finds a prior whose units were shuffled, at no cost") {
  const Example e;
  const Mapping plain = unit_mapping(40, 12, 0.25, 1);
  Mapping shuffled(40, 12);
  for (Index g = 0; g < 12; ++g) {
    shuffled.col(g) = plain.col(5 * g % 12);
  }
  const auto pair = moxie::match_units(shuffled, plain);
  CHECK(pair.cost == 0);
  for (Index g = 0; g < 12; ++g) {
    CHECK(shuffled.col(g) == plain.col(pair.column[std::size_t(g)]));
  }
  // The prior itself: units that are used at the same timesteps keep their order.
  const auto own = moxie::match_units(e.mapping, e.mapping);
  CHECK(own.column == std::vector<Index>{0, 1, 2, 3, 4, 5});
}

TEST_CASE("diffusion prior: the matching is the best of all permutations") {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    Mapping chosen(20, 6);
    for (Index i = 0; i < chosen.size(); ++i) {
      chosen.data()[i] = std::uint8_t(moxie::Rng(seed).below(2, std::uint64_t(i)));
    }
    const Example e;
    const Matrix<double> cost = moxie::unit_costs(chosen, e.mapping);
    std::vector<Index> p{0, 1, 2, 3, 4, 5};
    double least = 1e9;
    do {
      double sum = 0;
      for (std::size_t g = 0; g < 6; ++g) {
        sum += cost(Index(g), p[g]);
      }
      least = std::min(least, sum);
    } while (std::next_permutation(p.begin(), p.end()));
    CHECK(moxie::match_units(chosen, e.mapping).cost == least);
  }
}

TEST_CASE_TEMPLATE("diffusion prior: the loss is 0 where the probabilities are the prior, and so is its gradient", S, float,
                   double) {
  const Example e;
  Matrix<S> p(5, 6);
  for (Index b = 0; b < 5; ++b) {
    for (Index g = 0; g < 6; ++g) {
      p(b, g) = S(0.5) * S(e.mapping(e.timestep[std::size_t(b)], e.pair[std::size_t(g)]));  // 2 blocks, a quarter each
    }
  }
  CHECK(moxie::diffusion_prior_loss<S>(p, e.timestep, e.prior) == 0);
  Matrix<S> dp = Matrix<S>::Zero(5, 6);
  moxie::diffusion_prior_loss_backward<S>(p, e.timestep, e.prior, 1, dp);
  CHECK(dp.isZero(0));
}

TEST_CASE("diffusion prior: the loss of distributions without a common unit is ln 2, whatever the matching") {
  const Mapping mapping = unit_mapping(3, 4, 0.5);  // the first two units, at last the last two
  const std::vector<Index> pair{3, 1, 0, 2};
  const std::vector<Index> timestep{0, 2};
  Matrix<double> p(2, 4);
  p << 1, 0, 0, 1,  // units 3 and 2 of the prior
      0, 1, 1, 0;
  const DiffusionPrior prior{.blocks = 2, .mapping = mapping, .prior_of_unit = pair, .epsilon = 1e-12};
  CHECK(moxie::diffusion_prior_loss<double>(p, timestep, prior) == doctest::Approx(std::log(2.0)).epsilon(1e-10));
}

TEST_CASE_TEMPLATE("diffusion prior: the loss is the equation, and the mean over the samples", S, float, double) {
  const Example e;
  const Matrix<S> p = random_probabilities<S>(5, 2, 3, 901);
  double mean = 0;
  for (Index b = 0; b < 5; ++b) {
    double sum = 0;
    for (Index g = 0; g < 6; ++g) {
      const double u = double(p(b, g)) / 2;
      const double q = double(e.mapping(e.timestep[std::size_t(b)], e.pair[std::size_t(g)])) / 4;
      const double m = (u + q) / 2;
      sum += u * std::log((u + 1e-6) / (m + 1e-6)) + q * std::log((q + 1e-6) / (m + 1e-6));
    }
    mean += sum / 10;
    const std::vector<Index> one{e.timestep[std::size_t(b)]};
    CHECK(moxie::diffusion_prior_loss<S>(p.middleRows(b, 1), one, e.prior) == doctest::Approx(sum / 2).epsilon(1e-12));
  }
  const double loss = moxie::diffusion_prior_loss<S>(p, e.timestep, e.prior);
  CHECK(loss == doctest::Approx(mean).epsilon(1e-13));
  CHECK(loss > 0.01);
  CHECK(loss < std::log(2.0));
}

TEST_CASE("diffusion prior: backward matches central differences and adds to what is there") {
  for (const double epsilon : {1e-6, 0.05}) {
    CAPTURE(epsilon);
    Example e;
    e.prior.epsilon = epsilon;
    Matrix<double> p = random_probabilities<double>(5, 2, 3, 902);
    REQUIRE(p.minCoeff() > 5e-4);  // far above the step of the differences
    const Matrix<double> start = moxie::test::random<double>(5, 6, 903);
    Matrix<double> dp = start;
    moxie::diffusion_prior_loss_backward<double>(p, e.timestep, e.prior, 0.7, dp);
    const auto loss = [&] {
      return 0.7 * moxie::diffusion_prior_loss<double>(p, e.timestep, e.prior) + p.cwiseProduct(start).sum();
    };
    const auto report = moxie::testing::check_gradient(loss, p, dp, {.step = 1e-5});
    INFO(report.message());
    CHECK(report.passes(moxie::test::gradient_tolerance));
  }
}

TEST_CASE("diffusion prior: probabilities of 0 have a finite loss and gradient") {
  const Example e;
  Matrix<float> p = Matrix<float>::Zero(5, 6);
  p.col(0).setOnes();
  p.col(4).setOnes();
  Matrix<float> dp = Matrix<float>::Zero(5, 6);
  moxie::diffusion_prior_loss_backward<float>(p, e.timestep, e.prior, 1, dp);
  CHECK(std::isfinite(moxie::diffusion_prior_loss<float>(p, e.timestep, e.prior)));
  CHECK(dp.allFinite());
}

TEST_CASE("diffusion prior: sizes and shares that make no mapping are refused") {
  using moxie::test::contains;
  const auto message = [](Index timesteps, Index units, double share, double exponent) {
    return moxie::test::message_of<moxie::ValueError>([=] { unit_mapping(timesteps, units, share, exponent); });
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(contains(message(0, 6, 0.5, 4), "timesteps is 0"));
  CHECK(contains(message(5, 0, 0.5, 4), "units is 0"));
  for (const double share : {0.0, -0.5, 1.1, nan}) {
    CHECK(contains(message(5, 6, share, 4), "share must be above 0 and at most 1"));
  }
  CHECK(contains(message(5, 6, 0.1, 4), "no timestep would use any unit"));
  for (const double exponent : {0.0, -1.0, nan, std::numeric_limits<double>::infinity()}) {
    CHECK(contains(message(5, 6, 0.5, exponent), "exponent must be positive and finite"));
  }
}

TEST_CASE("diffusion prior: choices and matrices that do not fit are refused, and nothing is written") {
  using moxie::ShapeError;
  using moxie::ValueError;
  Mapping chosen = Mapping::Constant(2, 5, 7);
  const auto mark = [&](const std::vector<Index>& choices, Index experts, Index first) {
    return [&chosen, choices, experts, first] { moxie::mark_chosen_units(choices, experts, first, chosen); };
  };
  CHECK_THROWS_AS(mark({0, 1, 2}, 3, 0)(), ShapeError);
  CHECK_THROWS_AS(mark({}, 3, 0)(), ShapeError);
  CHECK_THROWS_AS(mark({0, 1}, 3, 3)(), ShapeError);
  CHECK_THROWS_AS(mark({0, 1}, 3, -1)(), ShapeError);
  CHECK_THROWS_AS(mark({0, 3}, 3, 0)(), ValueError);
  CHECK_THROWS_AS(mark({0, -1}, 3, 0)(), ValueError);
  CHECK((chosen.array() == 7).all());
  CHECK_THROWS_AS(moxie::mark_chosen_units(std::vector<Index>{}, 3, 0, Mapping(0, 3)), ShapeError);

  const Mapping zeros = Mapping::Zero(3, 4);
  CHECK_THROWS_AS(moxie::match_units(Mapping::Zero(3, 5).eval(), zeros), ShapeError);
  CHECK_THROWS_AS(moxie::match_units(Mapping::Zero(2, 4).eval(), zeros), ShapeError);
  CHECK_THROWS_AS(moxie::match_units(Mapping(0, 4), Mapping(0, 4)), ValueError);
  CHECK_THROWS_AS(moxie::match_units(Mapping(3, 0), Mapping(3, 0)), ValueError);
  CHECK_THROWS_AS(moxie::match_units(Mapping::Constant(3, 4, 2).eval(), zeros), ValueError);
}

TEST_CASE("diffusion prior: a batch, timesteps or a matching that do not fit are refused, and nothing is written") {
  using moxie::ShapeError;
  using moxie::ValueError;
  using moxie::test::contains;
  const Matrix<double> p = random_probabilities<double>(5, 2, 3, 904);
  // Both functions have to say the same.
  const auto refused = [](const auto& error, const Matrix<double>& probabilities, const std::vector<Index>& timestep,
                          const DiffusionPrior& prior) {
    using Error = std::decay_t<decltype(error)>;
    Matrix<double> dp = moxie::test::untouched<double>(probabilities.rows(), probabilities.cols());
    const std::string value =
        moxie::test::message_of<Error>([&] { moxie::diffusion_prior_loss<double>(probabilities, timestep, prior); });
    const std::string gradient = moxie::test::message_of<Error>(
        [&] { moxie::diffusion_prior_loss_backward<double>(probabilities, timestep, prior, 1, dp); });
    CHECK(gradient == "diffusion_prior_loss_backward" + value.substr(std::string("diffusion_prior_loss").size()));
    CHECK(moxie::test::is_untouched(dp));
    return value;
  };
  const ValueError value("");
  const ShapeError shape("");
  const Example e;
  CHECK(contains(refused(value, p, {0, 1, 20, 3, 4}, e.prior), "the timestep of sample 2 is 20, expected 0 to 19"));
  CHECK(contains(refused(value, p, {0, 1, 2, 3, -1}, e.prior), "the timestep of sample 4 is -1"));
  CHECK(contains(refused(value, Matrix<double>(0, 6), {}, e.prior), "samples is 0"));
  CHECK(contains(refused(shape, p, {0, 1}, e.prior), "there are 2 timesteps and 6 matched units, expected 5 and 6"));
  CHECK(contains(refused(shape, Matrix<double>::Ones(5, 7), e.timestep, e.prior), "probabilities is (5,7), expected (B,6)"));
  for (const std::vector<Index>& pair : {std::vector<Index>{0, 1, 2, 3, 4, 4}, {0, 1, 2, 3, 4, 6}, {0, 1, 2, 3, 4, -1}}) {
    DiffusionPrior prior = e.prior;
    prior.prior_of_unit = pair;
    CHECK(contains(refused(value, p, e.timestep, prior), "prior_of_unit is not a permutation of the 6 units"));
  }
  DiffusionPrior prior = e.prior;
  prior.prior_of_unit = prior.prior_of_unit.first(5);
  CHECK(contains(refused(shape, p, e.timestep, prior), "5 matched units"));
  prior = e.prior;
  prior.mapping = {};
  CHECK(contains(refused(value, p, e.timestep, prior), "units is 0"));
  Mapping mapping = e.mapping;
  prior.mapping = mapping;
  mapping.row(13).setZero();
  CHECK(contains(refused(value, p, e.timestep, prior), "the mapping of timestep 13 is not 0 and 1, with a 1"));
  mapping(13, 2) = 2;
  CHECK(contains(refused(value, p, e.timestep, prior), "the mapping of timestep 13"));
  prior = e.prior;
  for (const Index blocks : {Index{0}, Index{4}}) {
    prior.blocks = blocks;
    CHECK(contains(refused(value, p, e.timestep, prior), "blocks"));
  }
  prior = e.prior;
  for (const double epsilon : {0.0, -1.0, std::numeric_limits<double>::quiet_NaN()}) {
    prior.epsilon = epsilon;
    CHECK(contains(refused(value, p, e.timestep, prior), "epsilon must be positive and finite"));
  }
  for (const double bad : {-0.1, std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    Matrix<double> spoilt = p;
    spoilt(3, 1) = bad;
    CHECK(contains(refused(value, spoilt, e.timestep, e.prior), "the probabilities of sample 3 are negative or not finite"));
  }
  Matrix<double> other = moxie::test::untouched<double>(5, 5);
  CHECK_THROWS_AS(moxie::diffusion_prior_loss_backward<double>(p, e.timestep, e.prior, 1, other), ShapeError);
  CHECK(moxie::test::is_untouched(other));
}

}  // namespace
