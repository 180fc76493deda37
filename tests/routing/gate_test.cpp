// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/routing/gate.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <support.hpp>

namespace {

using moxie::GateNoise;
using moxie::Index;
using moxie::LinearGate;
using moxie::Matrix;
using moxie::RowView;
using moxie::Tokens;

constexpr Index tokens = 40, dim = 6, experts = 5;

template <class S>
struct Gated {
  LinearGate<S> gate;
  moxie::Parameters<S> p;
  typename LinearGate<S>::Tape tape;

  explicit Gated(const GateNoise& noise) : gate("Gate", dim, experts, noise), p(moxie::Layout(gate.layout())) {
    weight().eigen() = moxie::test::random<S>(experts, dim, 661);
  }
  RowView<S> weight() { return p["gate.weight"]; }
  void forward(const Tokens<S>& in, const moxie::Exec& exec = {}) { gate.forward("f", p.view(), in, tape, exec); }
  // Adds to dx and dweight.
  void backward(const Tokens<S>& in, const Matrix<S>& dz, RowView<S> dx, Matrix<S>& dweight) {
    moxie::Parameters<S> dp = p.zeros_like();
    dp["gate.weight"].eigen() = dweight;
    moxie::TokensGradient<S> din;
    (in.has_gate_x() ? din.gate_x : din.x) = dx;
    moxie::Workspace workspace;
    gate.backward(p.view(), in, dz, {din, dp}, tape, workspace);
    dweight = dp["gate.weight"].eigen();
  }
};

TEST_CASE_TEMPLATE("gate: logits are x Wᵀ; noise and jitter are for training alone", S, float, double) {
  const Matrix<S> x = moxie::test::random<S>(tokens, dim, 662);
  Gated<S> g({.logits = 1, .jitter = 0.2});
  g.forward({x});
  const Matrix<double> expected = moxie::test::as_double(x) * moxie::test::as_double(Matrix<S>(g.weight().eigen())).transpose();
  CHECK(moxie::test::relative_error(Matrix<S>(g.tape.logits().eigen()), expected) < moxie::test::Tolerance<S>::layer);
  CHECK(g.tape.noisy_logits().data() == g.tape.logits().data());
  CHECK_FALSE(g.tape.noisy());
}

TEST_CASE("gate: noise has the deviation σ/E, and is the one that is given") {
  const Matrix<double> x = moxie::test::random<double>(2000, dim, 663);
  Gated<double> g({.logits = 2});
  Tokens<double> in(x);
  in.training = true;
  in.rng = moxie::Rng(5);
  g.forward(in);
  Matrix<double> noise = g.tape.noisy_logits().eigen() - g.tape.logits().eigen();
  CHECK(std::sqrt(noise.squaredNorm() / double(noise.size())) == doctest::Approx(2.0 / experts).epsilon(0.03));
  CHECK(std::abs(noise.mean()) < 0.02);
  const Matrix<double> given = moxie::test::random<double>(2000, experts, 664);
  in.noise = given;
  g.forward(in);
  noise = g.tape.noisy_logits().eigen() - g.tape.logits().eigen();
  CHECK(moxie::test::relative_error(noise, Matrix<double>(given * (2.0 / experts))) < 1e-13);
}

TEST_CASE("gate: jitter multiplies the input by U(1-ε, 1+ε), other numbers for another stream") {
  const Matrix<double> x = Matrix<double>::Ones(3000, dim);
  Gated<double> g({.jitter = 0.3});
  g.weight().eigen().setZero();
  g.weight().eigen().leftCols(experts).setIdentity();  // logits are the jittered features
  Tokens<double> in(x);
  in.training = true;
  in.rng = moxie::Rng(0);
  g.forward(in);
  const Matrix<double> first = g.tape.logits().eigen();
  CHECK(first.minCoeff() >= 0.7);
  CHECK(first.maxCoeff() < 1.3);
  CHECK(first.minCoeff() < 0.71);
  CHECK(first.maxCoeff() > 1.29);
  CHECK(first.mean() == doctest::Approx(1).epsilon(0.01));
  in.rng = moxie::Rng(6);
  g.forward(in);
  CHECK(first != Matrix<double>(g.tape.logits().eigen()));
}

TEST_CASE("gate: backward matches central differences, with noise and jitter, and adds") {
  Matrix<double> x = moxie::test::random<double>(7, dim, 665);
  const Matrix<double> c = moxie::test::random<double>(7, experts, 666);
  for (const GateNoise& noise : {GateNoise{}, {.logits = 1}, {.jitter = 0.4}, {.logits = 1, .jitter = 0.4}}) {
    Gated<double> g(noise);
    Tokens<double> in(x);
    in.training = true;
    in.rng = moxie::Rng(0);
    g.forward(in);
    const Matrix<double> start = moxie::test::random<double>(7, dim, 667);
    const Matrix<double> start_weight = moxie::test::random<double>(experts, dim, 668);
    Matrix<double> dx = start, dweight = start_weight;
    g.backward(in, c, dx, dweight);
    const auto loss = [&] {
      g.forward(in);
      return g.tape.noisy_logits().eigen().cwiseProduct(c).sum() + x.cwiseProduct(start).sum() +
             g.weight().eigen().cwiseProduct(start_weight).sum();
    };
    for (const auto& report : {moxie::testing::check_gradient(loss, x, dx, {}, "x"),
                               moxie::testing::check_gradient(loss, g.weight(), dweight, {}, "weight")}) {
      INFO(report.message());
      CHECK(report.passes(moxie::test::gradient_tolerance));
    }
  }
}

TEST_CASE_TEMPLATE("gate: the same bits for any number of threads", S, float, double) {
  const Matrix<S> x = moxie::test::random<S>(500, dim, 669);
  Gated<S> one({.logits = 1, .jitter = 0.1}), seven({.logits = 1, .jitter = 0.1});
  Tokens<S> in(x);
  in.training = true;
  in.rng = moxie::Rng(0);
  one.forward(in, moxie::Exec{1});
  seven.forward(in, moxie::Exec{7});
  CHECK(moxie::test::same_bits(Matrix<S>(one.tape.noisy_logits().eigen()), Matrix<S>(seven.tape.noisy_logits().eigen())));
}

TEST_CASE("gate: bad noise, noise of another shape and logits that are not finite are refused") {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const GateNoise& noise :
       {GateNoise{.logits = -1}, {.logits = nan}, {.jitter = -0.1}, {.jitter = 1.1}, {.jitter = nan}}) {
    CHECK_THROWS_AS(Gated<float>{noise}, moxie::ValueError);
  }
  Matrix<double> x = moxie::test::random<double>(tokens, dim, 670);
  Gated<double> g({.logits = 1});
  Tokens<double> in(x);
  in.training = true;
  Matrix<double> noise = moxie::test::random<double>(tokens, experts + 1, 671);
  in.noise = noise;
  CHECK_THROWS_AS(g.forward(in), moxie::ShapeError);
  noise = moxie::test::random<double>(tokens, experts, 672);
  noise(8, 1) = nan;
  in.noise = noise;
  CHECK(moxie::test::message_of<moxie::ValueError>([&] { g.forward(in); }) == "f: the logits of token 8 are not finite");
}

TEST_CASE("gate: noise that has to be drawn needs a stream, and noise that is given does not") {
  const Matrix<double> x = moxie::test::random<double>(tokens, dim, 673);
  const Matrix<double> noise = moxie::test::random<double>(tokens, experts, 674);
  const auto message = [&](const GateNoise& options, bool training, bool given, const Matrix<double>& input) {
    Gated<double> g(options);
    Tokens<double> in(input);
    in.training = training;
    if (given) {
      in.noise = noise;
    }
    return moxie::test::message_of<moxie::ValueError>([&] { g.forward(in); });
  };
  const std::string refused =
      "f: training draws noise, and there is no stream to draw from; set Tokens::rng, another one for every step";
  CHECK(message({.logits = 1}, true, false, x) == refused);
  CHECK(message({.jitter = 0.1}, true, true, x) == refused);
  CHECK(message({.logits = 1}, true, true, x) == "nothing was thrown");
  CHECK(message({.logits = 1, .jitter = 0.1}, false, false, x) == "nothing was thrown");
  CHECK(message({}, true, false, x) == "nothing was thrown");
  CHECK(message({.logits = 1}, true, false, Matrix<double>(0, dim)) == "nothing was thrown");
}

TEST_CASE("gate: backward follows the forward on the tape, whatever it is told of training") {
  const Matrix<double> x = moxie::test::random<double>(tokens, dim, 675);
  const Matrix<double> dz = moxie::test::random<double>(tokens, experts, 676);
  Gated<double> g({.logits = 1, .jitter = 0.4});
  Tokens<double> in(x);
  in.training = true;
  in.rng = moxie::Rng(3);
  g.forward(in);
  Matrix<double> dx = Matrix<double>::Zero(tokens, dim), dweight = Matrix<double>::Zero(experts, dim);
  Matrix<double> again = dx, dweight_again = dweight;
  g.backward(in, dz, dx, dweight);
  in.training = false;
  in.rng.reset();
  g.backward(in, dz, again, dweight_again);
  CHECK(moxie::test::same_bits(dx, again));
  CHECK(moxie::test::same_bits(dweight, dweight_again));
}

TEST_CASE("gate: noise and jitter of a part of the tokens are those of the whole") {
  const Matrix<double> x = moxie::test::random<double>(tokens, dim, 677);
  Gated<double> whole({.logits = 1, .jitter = 0.4}), part({.logits = 1, .jitter = 0.4});
  part.p = whole.p;
  Tokens<double> in(x);
  in.training = true;
  in.rng = moxie::Rng(3);
  whole.forward(in);
  Tokens<double> rest(x.bottomRows(tokens - 3));
  rest.training = true;
  rest.rng = in.rng;
  rest.first = 3;
  part.forward(rest);
  CHECK(moxie::test::same_bits<double>(part.tape.noisy_logits().eigen(),
                                       whole.tape.noisy_logits().eigen().bottomRows(tokens - 3)));
}

TEST_CASE("gate: reads an input of its own, whose gradient may be left out") {
  const Matrix<double> x = moxie::test::random<double>(tokens, 2, 678), gate_x = moxie::test::random<double>(tokens, dim, 679);
  const Matrix<double> dz = moxie::test::random<double>(tokens, experts, 680);
  Gated<double> g(GateNoise{});
  Tokens<double> in(x);
  CHECK(moxie::test::contains(moxie::test::message_of<moxie::ShapeError>([&] { g.forward(in); }), "the input of the gate, x,"));
  in.gate_x = gate_x;
  g.forward(in);
  CHECK(moxie::test::relative_error(Matrix<double>(g.tape.logits().eigen()),
                                    Matrix<double>(gate_x * g.weight().eigen().transpose())) <
        moxie::test::Tolerance<double>::layer);
  Matrix<double> dx = Matrix<double>::Zero(tokens, dim), dweight = Matrix<double>::Zero(experts, dim), without = dweight;
  g.backward(in, dz, dx, dweight);
  g.backward(in, dz, RowView<double>(), without);
  CHECK(moxie::test::same_bits(dweight, without));
  CHECK(moxie::test::relative_error(dx, Matrix<double>(dz * g.weight().eigen())) < moxie::test::Tolerance<double>::layer);
}

}  // namespace
