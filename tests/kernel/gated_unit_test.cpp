// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <array>
#include <moxie/kernel/gated_unit.hpp>
#include <support.hpp>

namespace {

using moxie::ClampedSwiGlu;
using moxie::Gated;
using moxie::GateUp;
using moxie::Index;
using moxie::SoftCappedSwiGlu;
using moxie::SwiGluClampedAfter;
using moxie::test::message_of;
using moxie::test::Tolerance;
namespace kernel = moxie::kernel;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double silu(double x) { return x * sigmoid(x); }

// Pairs on a grid that meets no limit of the tests: within 0.01 of 7, 1.5 or 2.25 there is no point.
template <class F>
void for_each_pair(const F& f) {
  for (double gate = -12.07; gate < 12; gate += 0.63) {
    for (double up = -12.11; up < 12; up += 0.71) {
      f(gate, up);
    }
  }
}

// The value is the formula's; the derivatives are its central differences; vectors give what numbers give.
template <class Unit, class F>
void check(const Unit& unit, const F& formula) {
  double worst_value = 0;
  double worst_slope = 0;
  double worst_vector = 0;
  const double h = 1e-5;
  const auto error = [](double found, double expected) {
    return std::abs(found - expected) / std::max(1.0, std::abs(expected));
  };
  for_each_pair([&](double gate, double up) {
    worst_value = std::max(worst_value, error(unit.value(gate, up), formula(gate, up)));
    const GateUp<double> slope = unit.derivatives(gate, up);
    worst_slope = std::max(worst_slope, error(slope.gate, (formula(gate + h, up) - formula(gate - h, up)) / (2 * h)));
    worst_slope = std::max(worst_slope, error(slope.up, (formula(gate, up + h) - formula(gate, up - h)) / (2 * h)));
    std::array<double, 3> of_vector{};
    kernel::map(
        1, std::array{of_vector.data(), of_vector.data() + 1, of_vector.data() + 2},
        [&](auto g, auto u) {
          const auto d = unit.derivatives(g, u);
          return std::array{unit.value(g, u), d.gate, d.up};
        },
        &gate, &up);
    const double size = std::max(1.0, std::abs(gate)) * std::max(1.0, std::abs(up));  // erf's error is multiplied by both
    worst_vector = std::max({worst_vector, std::abs(of_vector[0] - unit.value(gate, up)) / size,
                             std::abs(of_vector[1] - slope.gate) / size, std::abs(of_vector[2] - slope.up) / size});
    const GateUp<float> rough = unit.derivatives(float(gate), float(up));
    CHECK(double(unit.value(float(gate), float(up))) == doctest::Approx(formula(gate, up)).epsilon(1e-5));
    CHECK(error(double(rough.gate), slope.gate) < 1e-5);
    CHECK(error(double(rough.up), slope.up) < 1e-5);
  });
  CHECK(worst_value < 1e-14);
  CHECK(worst_slope < 1e-8);
  CHECK(worst_vector < Tolerance<double>::function);
}

TEST_CASE("gated unit: act(g) u of each activation") {
  check(Gated<moxie::Silu>(), [](double g, double u) { return silu(g) * u; });
  check(Gated<moxie::GeluErf>(), [](double g, double u) { return 0.5 * g * (1 + std::erf(g / std::sqrt(2.0))) * u; });
  check(Gated<moxie::Relu>(), [](double g, double u) { return std::max(g, 0.0) * u; });
}

TEST_CASE("gated unit: gpt-oss is (u' + 1) g' σ(1.702 g'), the gate limited from above only") {
  const auto formula = [](double g, double u) {
    const double gate = std::min(g, 7.0);
    return (std::clamp(u, -7.0, 7.0) + 1) * gate * sigmoid(1.702 * gate);
  };
  const ClampedSwiGlu unit{.limit = 7, .alpha = 1.702, .beta = 1};
  check(unit, formula);
  // The lower bound that a clamp of both sides would have: σ is far from its limit there.
  const ClampedSwiGlu tight{.limit = 0.5, .alpha = 1.702, .beta = 1};
  CHECK(tight.value(-2.0, 0.25) == doctest::Approx(1.25 * -2 * sigmoid(-3.404)).epsilon(1e-14));
  CHECK(tight.derivatives(-2.0, 0.25).gate != 0);
}

TEST_CASE("gated unit: DeepSeek-V4 is silu(min(g, λ)) clamp(u, ±λ), and without a limit SwiGLU") {
  check(ClampedSwiGlu{.limit = 1.5}, [](double g, double u) { return silu(std::min(g, 1.5)) * std::clamp(u, -1.5, 1.5); });
  check(ClampedSwiGlu{}, [](double g, double u) { return silu(g) * u; });
}

TEST_CASE("gated unit: Step-3.7 limits what the activation made") {
  check(SwiGluClampedAfter{.limit = 1.5}, [](double g, double u) { return std::min(silu(g), 1.5) * std::clamp(u, -1.5, 1.5); });
  check(SwiGluClampedAfter{}, [](double g, double u) { return silu(g) * u; });
}

TEST_CASE("gated unit: Inkling 2 has smooth limits, and σ of the gate as it is") {
  const auto cap = [](double v, double c) { return c * std::tanh(v / c); };
  check(SoftCappedSwiGlu{.gate_cap = 4, .up_cap = 25}, [&](double g, double u) { return cap(g, 4) * sigmoid(g) * cap(u, 25); });
}

TEST_CASE("gated unit: at a limit there is a derivative, beyond there is none, and NaN stays NaN") {
  const ClampedSwiGlu clamped{.limit = 2, .beta = 1};
  const SwiGluClampedAfter after{.limit = 2};
  CHECK(clamped.derivatives(2.0, 2.0).gate != 0);
  CHECK(clamped.derivatives(2.0, 2.0).up != 0);
  CHECK(clamped.derivatives(2.0, -2.0).up != 0);
  CHECK(after.derivatives(1.0, -2.0).up != 0);
  for (const double beyond : {2.1, 1e10, std::numeric_limits<double>::infinity()}) {
    CHECK(clamped.derivatives(beyond, 1.0).gate == 0);
    CHECK(clamped.derivatives(1.0, beyond).up == 0);
    CHECK(clamped.derivatives(1.0, -beyond).up == 0);
    CHECK(after.derivatives(beyond + 1, 1.0).gate == 0);
    CHECK(after.derivatives(1.0, -beyond).up == 0);
  }
  const double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(std::isnan(clamped.value(nan, 1.0)));
  CHECK(std::isnan(clamped.value(1.0, nan)));
  CHECK(std::isnan(after.value(nan, 1.0)));
  CHECK(std::isnan(after.value(1.0, nan)));
  CHECK(std::isnan(SoftCappedSwiGlu{.gate_cap = 1, .up_cap = 1}.value(nan, 1.0)));
}

TEST_CASE("gated unit: huge numbers give finite derivatives") {
  for (const float gate : {1e20F, -1e20F}) {
    for (const float up : {3.0F, -3.0F}) {
      const auto finite = [&](const auto& unit) {
        const GateUp<float> d = unit.derivatives(gate, up);
        return std::isfinite(unit.value(gate, up)) && std::isfinite(d.gate) && std::isfinite(d.up);
      };
      CHECK(finite(Gated<moxie::Silu>()));
      CHECK(finite(ClampedSwiGlu{.limit = 7, .alpha = 1.702, .beta = 1}));
      CHECK(finite(SwiGluClampedAfter{.limit = 7}));
      CHECK(finite(SoftCappedSwiGlu{.gate_cap = 4, .up_cap = 25}));
    }
  }
}

TEST_CASE_TEMPLATE("gated unit: options that make no function are refused, in the precision that computes", S, float, double) {
  const auto refused = [](const auto& unit) {
    return message_of<moxie::ValueError>([&] { unit.template expect_valid<S>("Bank"); });
  };
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::string fine = "nothing was thrown";
  CHECK(refused(ClampedSwiGlu{}) == fine);
  CHECK(refused(ClampedSwiGlu{.limit = 7, .alpha = 1.702, .beta = 1}) == fine);
  for (const double limit : {0.0, -1.0, nan}) {
    CHECK(refused(ClampedSwiGlu{.limit = limit}) == "Bank: the limit of a gated unit must be above 0");
    CHECK(refused(SwiGluClampedAfter{.limit = limit}) == "Bank: the limit of a gated unit must be above 0");
    CHECK(refused(SoftCappedSwiGlu{.gate_cap = 1, .up_cap = limit}) ==
          "Bank: the caps of a gated unit must be finite and above 0");
  }
  CHECK(refused(ClampedSwiGlu{.alpha = nan}) == "Bank: alpha of a gated unit is not finite");
  CHECK(refused(ClampedSwiGlu{.beta = -1 / 0.0}) == "Bank: beta of a gated unit is not finite");
  CHECK(refused(SoftCappedSwiGlu{}) == "Bank: the caps of a gated unit must be finite and above 0");
  const bool too_small = std::is_same_v<S, float>;
  CHECK((refused(ClampedSwiGlu{.limit = 1e-300}) == fine) != too_small);
  CHECK((refused(ClampedSwiGlu{.beta = 1e300}) == fine) != too_small);
}

}  // namespace
