// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <expert/bank_checks.hpp>
#include <moxie/expert/glu.hpp>
#include <moxie/expert/mlp.hpp>
#include <quick_gelu.hpp>

// That it serves the CUDA backend too is shown by cuda/layer_test.cpp.
namespace {

using moxie::BFloat16;
using moxie::Index;
using moxie::test::QuickGelu;
namespace reference = moxie::test::reference;
using namespace moxie::test::bank;  // NOLINT(google-build-using-namespace)

constexpr Index hidden = 7;

template <class S, class Element = S>
using Perceptrons = moxie::MlpExperts<S, QuickGelu, Element>;
template <class S, class Element = S>
using GatedUnits = moxie::GluExperts<S, QuickGelu, Element>;

double quick_gelu(double x) { return x / (1 + std::exp(-1.702 * x)); }

TEST_CASE_TEMPLATE("activation of one's own: rows are the formula's, of perceptrons and of gated units", S, float, double) {
  check_forward(Perceptrons<S>(experts, dim, {hidden}), [](const auto& p, const std::string& name, const reference::Vector& x) {
    return reference::mlp(p, name, x, &quick_gelu);
  });
  check_forward(GatedUnits<S>(experts, dim, {hidden}), [](const auto& p, const std::string& name, const reference::Vector& x) {
    const reference::Vector gate = reference::tensor(p, name + "gate_proj.weight") * x;
    const reference::Vector up = reference::tensor(p, name + "up_proj.weight") * x;
    return reference::Vector(reference::tensor(p, name + "down_proj.weight") * gate.unaryExpr(&quick_gelu).cwiseProduct(up));
  });
}

TEST_CASE("activation of one's own: backward matches central differences") {
  check_backward(Perceptrons<double>(experts, dim, {hidden}));
  check_backward(GatedUnits<double>(experts, dim, {hidden}));
}

TEST_CASE("activation of one's own: keeps the laws of banks, frozen weights among them") {
  check_laws(Perceptrons<float>(3, dim, {hidden}));
  check_laws(GatedUnits<float>(3, dim, {hidden}));
}

TEST_CASE("activation of one's own: of BFloat16 elements is close, and the same bits with frozen weights") {
  check_bfloat16(Perceptrons<float, BFloat16>(experts, 33, {71}), Perceptrons<double>(experts, 33, {71}));
  check_bfloat16(GatedUnits<float, BFloat16>(experts, 33, {71}), GatedUnits<double>(experts, 33, {71}));
}

TEST_CASE("activation of one's own: is a function of a plain number too") {
  CHECK(QuickGelu::value(1.5) == doctest::Approx(quick_gelu(1.5)).epsilon(1e-14));
  CHECK(QuickGelu::derivative(0.0F) == 0.5F);
}

}  // namespace
