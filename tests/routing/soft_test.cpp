// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/routing/soft.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <moxie/testing/laws.hpp>
#include <support.hpp>

namespace {

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::RowView;
using moxie::SoftRouterConfig;
using moxie::Tokens;
using moxie::test::Tolerance;
namespace reference = moxie::test::reference;

constexpr Index dim = 5;
constexpr Index tokens = 12;

template <class S>
struct Routed {
  moxie::SoftRouter<S> router;
  moxie::Parameters<S> p;
  moxie::DensePlan<S> plan = {};
  typename moxie::SoftRouter<S>::Tape tape;
  moxie::Workspace workspace = {};

  explicit Routed(const SoftRouterConfig& config) : router(config), p(moxie::Layout(router.layout())) {
    moxie::test::randomize(p, 701);
    if (config.normalize) {
      p["scale"](0, 0) = S(2.5);
    }
  }
  void route(const Tokens<S>& in, const Exec& exec = {}) { router.route(p.view(), in, plan, tape, {workspace, exec}); }
  /// Gradients of ⟨D, u⟩ + ⟨C, v⟩.
  moxie::Parameters<S> backward(const Tokens<S>& in, const Matrix<S>& u, const Matrix<S>& v, Matrix<S>& dx,
                                const Exec& exec = {}) {
    typename moxie::DensePlan<S>::Gradient dplan;
    dplan.dispatch.spread(u.rows(), u.cols()).eigen() = u;
    dplan.combine.spread(v.rows(), v.cols()).eigen() = v;
    moxie::Parameters<S> dp = p;  // what is there is added to
    router.backward(p.view(), in, plan, {dplan, {}, {dx, dp}}, tape, {workspace, exec});
    dp.flat() -= p.flat();
    return dp;
  }
};

const SoftRouterConfig modes[] = {
    {.model_dim = dim, .experts = 3, .slots_per_expert = 1},
    {.model_dim = dim, .experts = 2, .slots_per_expert = 3},
    {.model_dim = dim, .experts = 1, .slots_per_expert = 1},
    {.model_dim = dim, .experts = 7, .slots_per_expert = 1, .normalize = false},
    {.model_dim = dim, .experts = 2, .slots_per_expert = 4, .normalize = false},
};

TEST_CASE_TEMPLATE("soft router: D and C are the softmaxes of the logits over tokens and slots", S, float, double) {
  const Matrix<S> x = moxie::test::random<S>(tokens, dim, 702);
  for (const SoftRouterConfig& mode : modes) {
    for (const Index length : {Index{12}, Index{4}, Index{1}}) {
      Routed<S> routed(mode);
      routed.route({x, length});
      const moxie::Parameters<double> p = moxie::test::as_double(routed.p);
      const Matrix<double> x64 = moxie::test::as_double(x);
      const Matrix<double> phi = reference::tensor(p, "phi.weight");
      Matrix<double> z = x64 * phi.transpose();
      if (mode.normalize) {
        z = p["scale"](0, 0) * (reference::l2norm(x64) * reference::l2norm(phi).transpose());
      }
      Matrix<double> d(tokens, z.cols()), c(tokens, z.cols());
      for (Index t = 0; t < tokens; ++t) {
        c.row(t) = reference::softmax(z.row(t).transpose()).transpose();
      }
      for (Index first = 0; first < tokens; first += length) {
        for (Index n = 0; n < z.cols(); ++n) {
          d.col(n).segment(first, length) = reference::softmax(z.col(n).segment(first, length));
        }
      }
      CHECK(moxie::test::relative_error(Matrix<S>(routed.plan.dispatch().eigen()), d) < Tolerance<S>::layer);
      CHECK(moxie::test::relative_error(Matrix<S>(routed.plan.combine().eigen()), c) < Tolerance<S>::layer);
      const auto law = moxie::testing::plan_is_convex(routed.plan, Tolerance<S>::sum);
      INFO(law.message);
      CHECK(law.holds);
    }
  }
}

TEST_CASE("soft router: backward matches central differences in both variants, and adds to dx and dp") {
  const Matrix<double> start = moxie::test::random<double>(tokens, dim, 703);
  for (const SoftRouterConfig& mode : modes) {
    for (const Index length : {Index{12}, Index{4}}) {
      CAPTURE(mode.normalize);
      CAPTURE(mode.experts);
      Matrix<double> x = moxie::test::random<double>(tokens, dim, 704);
      Routed<double> routed(mode);
      const Index n = routed.router.slot_count();
      const Matrix<double> u = moxie::test::random<double>(tokens, n, 705);
      const Matrix<double> v = moxie::test::random<double>(tokens, n, 706);
      const Tokens<double> in{x, length};
      routed.route(in);
      Matrix<double> dx = start;
      const moxie::Parameters<double> dp = routed.backward(in, u, v, dx);
      dx -= start;
      const auto loss = [&] {
        routed.route(in, Exec{.threads = 1});
        return routed.plan.dispatch().eigen().cwiseProduct(u).sum() + routed.plan.combine().eigen().cwiseProduct(v).sum();
      };
      std::vector<moxie::testing::GradientReport> reports{moxie::testing::check_gradient(loss, x, dx, {}, "x")};
      moxie::zip(
          [&](const moxie::TensorInfo& info, RowView<double> value, RowView<const double> gradient) {
            reports.push_back(moxie::testing::check_gradient(loss, value, gradient, {}, info.name));
          },
          routed.p, dp);
      CHECK(reports.size() == (mode.normalize ? 3 : 2));
      for (const auto& report : reports) {
        INFO(report.message());
        CHECK(report.passes(moxie::test::gradient_tolerance));
      }
    }
  }
}

TEST_CASE("soft router: with one token to a sequence D is exactly 1, with one slot C is") {
  Routed<double> routed(modes[1]);
  const Matrix<double> x = moxie::test::random<double>(tokens, dim, 707);
  routed.route({x, 1});
  CHECK((routed.plan.dispatch().eigen().array() == 1).all());
  Routed<double> single(modes[2]);
  single.route({x});
  CHECK((single.plan.combine().eigen().array() == 1).all());
}

TEST_CASE_TEMPLATE("soft router: large logits do not overflow", S, float, double) {
  Routed<S> routed(modes[3]);
  const Matrix<S> x = moxie::test::random<S>(tokens, dim, 708, 1e6);
  routed.route({x, 4});
  CHECK(routed.plan.dispatch().eigen().allFinite());
  CHECK(moxie::testing::plan_is_convex(routed.plan, Tolerance<S>::sum).holds);
}

TEST_CASE("soft router: the scale of a token does not matter to the normalized logits") {
  Routed<double> routed(modes[1]);
  Matrix<double> x = moxie::test::random<double>(tokens, dim, 709);
  x *= 1e5;
  routed.route({x});
  const Matrix<double> before = routed.plan.combine().eigen();
  x.row(3) *= 1000;
  routed.route({x});
  CHECK(moxie::test::relative_error(Matrix<double>(routed.plan.combine().eigen()), before) < 1e-12);
}

TEST_CASE_TEMPLATE("soft router: the same bits for any number of threads, forward and backward", S, float, double) {
  const Index many = 320;
  const Matrix<S> x = moxie::test::random<S>(many, dim, 710);
  for (const SoftRouterConfig& mode : {modes[1], modes[4]}) {
    Routed<S> one(mode), seven(mode);
    const Index n = one.router.slot_count();
    const Matrix<S> u = moxie::test::random<S>(many, n, 711);
    const Matrix<S> v = moxie::test::random<S>(many, n, 712);
    Matrix<S> dx_one = Matrix<S>::Zero(many, dim), dx_seven = dx_one;
    one.route({x, 16}, Exec{1});
    seven.route({x, 16}, Exec{7});
    const auto dp_one = one.backward({x, 16}, u, v, dx_one, Exec{1});
    const auto dp_seven = seven.backward({x, 16}, u, v, dx_seven, Exec{7});
    CHECK(moxie::testing::detail::same_bits<S>(one.plan.dispatch(), seven.plan.dispatch()));
    CHECK(moxie::testing::detail::same_bits<S>(one.plan.combine(), seven.plan.combine()));
    CHECK(moxie::test::same_bits(dx_one, dx_seven));
    CHECK((dp_one.flat() == dp_seven.flat()).all());
  }
}

TEST_CASE("soft router: tokens and parameters that are not finite are refused") {
  Matrix<float> x = moxie::test::random<float>(tokens, dim, 713);
  Routed<float> routed(modes[0]);
  routed.p["scale"](0, 0) = std::numeric_limits<float>::quiet_NaN();
  CHECK(moxie::test::message_of<moxie::ValueError>([&] { routed.route({x}); }) ==
        "SoftRouter::route: the logits of token 0 are not finite");
  Routed<float> plain(modes[3]);
  x(11, 4) = std::numeric_limits<float>::infinity();
  CHECK(moxie::test::message_of<moxie::ValueError>([&] { plain.route({x}); }) ==
        "SoftRouter::route: the logits of token 11 are not finite");
}

TEST_CASE("soft router: starts with a normal Φ of deviation 1/√D and the scale 1") {
  const moxie::SoftRouter<double> router({.model_dim = 64, .experts = 25, .slots_per_expert = 2});
  moxie::Parameters<double> p{moxie::Layout(router.layout())};
  router.initialize(p.view(), moxie::Rng(4));
  CHECK(p["scale"](0, 0) == 1);
  CHECK(p["phi.weight"].rows() == 50);
  const double variance = p["phi.weight"].eigen().squaredNorm() / 3200;
  CHECK(std::abs(variance * 64 - 1) < 5 * std::sqrt(2.0 / 3200));
  CHECK(moxie::SoftRouter<double>(modes[3]).layout().find("scale") == -1);
}

TEST_CASE_TEMPLATE("soft router: the scale multiplies combine weights, and their gradient", S, float, double) {
  const Matrix<S> x = moxie::test::random<S>(tokens, dim, 721);
  for (const moxie::Mixing combine : {moxie::Mixing::learned, moxie::Mixing::uniform}) {
    SoftRouterConfig config{.model_dim = dim, .experts = 2, .slots_per_expert = 3, .combine = combine};
    Routed<S> plain(config);
    config.scale = -2;
    Routed<S> scaled(config);
    plain.route({x, 4});
    scaled.route({x, 4});
    CHECK(moxie::test::same_bits<S>(scaled.plan.combine().eigen(), plain.plan.combine().eigen() * S(-2)));
    CHECK(moxie::test::same_bits<S>(scaled.plan.dispatch().eigen(), plain.plan.dispatch().eigen()));
    const Matrix<S> u = moxie::test::random<S>(tokens, 6, 722), v = moxie::test::random<S>(tokens, 6, 723);
    Matrix<S> dx = Matrix<S>::Zero(tokens, dim), expected = dx;
    scaled.backward({x, 4}, u, v, dx);
    plain.backward({x, 4}, u, Matrix<S>(v * S(-2)), expected);
    CHECK(moxie::test::relative_error(dx, expected) < Tolerance<S>::layer);
  }
}

TEST_CASE("soft router: starts at the scale that the options say") {
  for (const double start : {1.0, 20.0}) {
    const moxie::SoftRouter<double> router({.model_dim = dim, .experts = 2, .initial_scale = start});
    moxie::Parameters<double> p{moxie::Layout(router.layout())};
    router.initialize(p.view(), moxie::Rng(1));
    CHECK(p["scale"](0, 0) == start);
  }
  const auto message = [](const SoftRouterConfig& config) {
    return moxie::test::message_of<moxie::ValueError>([&] { moxie::SoftRouter<float>{config}; });
  };
  CHECK(moxie::test::contains(message({.model_dim = 2, .experts = 2, .scale = 1e300}), "scale is too small, too large"));
  CHECK(moxie::test::contains(message({.model_dim = 2, .experts = 2, .initial_scale = std::nan("")}), "initial_scale"));
}

}  // namespace
