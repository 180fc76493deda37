// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/routing/cluster.hpp>
#include <support.hpp>

namespace {

using moxie::balanced_k_means;
using moxie::ClusterRouter;
using moxie::ClusterRouterConfig;
using moxie::Index;
using moxie::Matrix;
using moxie::RowView;
using moxie::Tokens;
using moxie::test::Tolerance;

template <class S>
struct Routed {
  ClusterRouter<S> router;
  moxie::Parameters<S> p;
  moxie::SparsePlan<S> plan = {};
  typename ClusterRouter<S>::Tape tape;
  moxie::Workspace workspace = {};

  explicit Routed(const ClusterRouterConfig& config) : router(config), p(moxie::Layout(router.layout())) {
    moxie::test::randomize(p, 701);
  }
  void route(const Tokens<S>& in) { router.route(p.view(), in, plan, tape, workspace); }
};

TEST_CASE_TEMPLATE("cluster router: a sequence goes to its nearest clusters, weighted by exp(-distance²/τ)", S, float, double) {
  const Matrix<S> x = moxie::test::random<S>(6, 2, 702);
  const Matrix<S> features = moxie::test::random<S>(3, 4, 703);
  Routed<S> routed({.feature_dim = 4, .experts = 5, .top_k = 2, .temperature = 0.7});
  Tokens<S> in(x, 2);
  in.condition = features;
  routed.route(in);
  for (Index t = 0; t < 6; ++t) {
    moxie::test::reference::Vector p(5);
    for (Index e = 0; e < 5; ++e) {
      p(e) =
          std::exp(-(features.row(t / 2) - routed.p["centroids"].eigen().row(e)).template cast<double>().squaredNorm() / 0.7);
    }
    const auto best = moxie::test::reference::top_k(p, 2);
    const double sum = p(best[0]) + p(best[1]);
    for (const Index r : routed.plan.rows_of_token(t)) {
      const Index j = routed.plan.pair(r) % 2;
      CHECK(double(routed.plan.weight(r)) == doctest::Approx(p(best[std::size_t(j)]) / sum).epsilon(Tolerance<S>::layer));
    }
    for (Index e = 0; e < 5; ++e) {
      CHECK(double(routed.tape.scores()(t / 2, e)) == doctest::Approx(p(e) / p.sum()).epsilon(Tolerance<S>::layer));
    }
  }
  CHECK(routed.router.layout().tensors()[0].trained == moxie::Trained::elsewhere);
}

TEST_CASE("cluster router: of tokens, each row is its own feature; far ones do not underflow to nothing") {
  Matrix<float> x = moxie::test::random<float>(4, 3, 704);
  x.row(2) *= 1e6F;
  Routed<float> routed({.feature_dim = 3, .experts = 4, .top_k = 2, .of_tokens = true});
  routed.route({x});
  for (Index t = 0; t < 4; ++t) {
    float sum = 0;
    for (const Index r : routed.plan.rows_of_token(t)) {
      sum += routed.plan.weight(r);
    }
    CHECK(sum == doctest::Approx(1));
  }
  CHECK(routed.router.model_dim() == 3);
}

TEST_CASE("cluster router: bad options and features are refused") {
  for (const ClusterRouterConfig& config : {ClusterRouterConfig{.feature_dim = 0, .experts = 2},
                                            {.feature_dim = 2, .experts = 0},
                                            {.feature_dim = 2, .experts = 2, .top_k = 3},
                                            {.feature_dim = 2, .experts = 2, .top_k = 0},
                                            {.feature_dim = 2, .experts = 2, .temperature = 0},
                                            {.feature_dim = 2, .experts = 2, .temperature = -1}}) {
    CHECK_THROWS_AS(ClusterRouter<float>{config}, moxie::ValueError);
  }
  const Matrix<double> x = moxie::test::random<double>(6, 2, 705);
  Matrix<double> features = moxie::test::random<double>(3, 4, 706);
  Routed<double> routed({.feature_dim = 4, .experts = 5});
  CHECK_THROWS_AS(routed.route({x, 2}), moxie::ShapeError);
  Tokens<double> in(x, 2);
  in.condition = features;
  in.top_k = 6;
  CHECK_THROWS_AS(routed.route(in), moxie::ValueError);
  in.top_k = 0;
  features(1, 2) = std::numeric_limits<double>::infinity();
  CHECK(moxie::test::contains(moxie::test::message_of<moxie::ValueError>([&] { routed.route(in); }), "sequence 1"));
}

TEST_CASE_TEMPLATE("balanced k-means: finds separated clusters of equal size, the same for the same seed", S, float, double) {
  Matrix<S> features(60, 2);
  for (Index i = 0; i < 60; ++i) {
    features(i, 0) = S(10 * (i % 3)) + S(0.1 * moxie::Rng(707).normal(std::uint64_t(2 * i)));
    features(i, 1) = S(-5 * (i % 3)) + S(0.1 * moxie::Rng(707).normal(std::uint64_t(2 * i + 1)));
  }
  const auto found = balanced_k_means<S>(features, 3, moxie::Rng(1));
  for (Index i = 3; i < 60; ++i) {
    CHECK(found.assignment[std::size_t(i)] == found.assignment[std::size_t(i % 3)]);
  }
  CHECK(found.distance < 0.05);
  for (Index c = 0; c < 3; ++c) {
    const Index cluster = found.assignment[std::size_t(c)];
    CHECK(double(found.centroids(cluster, 0)) == doctest::Approx(10.0 * double(c)).epsilon(0.02).scale(1));
  }
  CHECK(balanced_k_means<S>(features, 3, moxie::Rng(1)).assignment == found.assignment);
}

TEST_CASE("balanced k-means: no cluster is larger than its share, however the features lie") {
  for (const Index n : {Index{7}, Index{20}, Index{23}}) {
    Matrix<double> features = moxie::test::random<double>(n, 3, 708).cwiseAbs2().cwiseAbs2();  // most near the origin
    const auto found = balanced_k_means<double>(features, 5, moxie::Rng(2), 20);
    std::vector<Index> size(5, 0);
    for (const Index c : found.assignment) {
      REQUIRE(c >= 0);
      ++size[std::size_t(c)];
    }
    CHECK(*std::max_element(size.begin(), size.end()) <= (n + 4) / 5);
    CHECK(found.centroids.allFinite());
  }
  const Matrix<double> equal = Matrix<double>::Ones(6, 2);
  CHECK(balanced_k_means<double>(equal, 3, moxie::Rng(2)).centroids.isOnes());
}

TEST_CASE("balanced k-means: fewer features than clusters, and NaN, are refused") {
  Matrix<double> features = moxie::test::random<double>(3, 2, 709);
  CHECK_THROWS_AS(balanced_k_means<double>(features, 4, moxie::Rng(1)), moxie::ValueError);
  CHECK_THROWS_AS(balanced_k_means<double>(features, 0, moxie::Rng(1)), moxie::ValueError);
  features(1, 1) = std::numeric_limits<double>::quiet_NaN();
  CHECK_THROWS_AS(balanced_k_means<double>(features, 2, moxie::Rng(1)), moxie::ValueError);
}

}  // namespace
