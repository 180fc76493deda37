// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <expert/bank_checks.hpp>
#include <moxie/expert/linear.hpp>

namespace {

using moxie::BankNames;
namespace reference = moxie::test::reference;
using namespace moxie::test::bank;  // NOLINT(google-build-using-namespace)

TEST_CASE_TEMPLATE("linear experts: rows are x Wᵀ + b of their expert, or x Wᵀ", S, float, double) {
  for (const bool bias : {true, false}) {
    check_forward(moxie::LinearExperts<S>(experts, dim, {bias}),
                  [&](const auto& p, const std::string& name, const reference::Vector& x) {
                    reference::Vector h = reference::tensor(p, name + "weight") * x;
                    return reference::Vector(bias ? reference::Vector(h + reference::vector(p, name + "bias")) : h);
                  });
  }
}

TEST_CASE("linear experts: backward matches central differences, and adds to gradients") {
  check_backward(moxie::LinearExperts<double>(experts, dim, {.bias = true}));
  check_backward(moxie::LinearExperts<double>(experts, dim, {.bias = false}));
}

TEST_CASE_TEMPLATE("linear experts: keep the laws of banks", S, float, double) {
  check_laws(moxie::LinearExperts<S>(3, dim, {.bias = true}));
  check_laws(moxie::LinearExperts<S>(3, 40, {.bias = false}));
  check_laws(moxie::LinearExperts<S>(1, 1));
}

TEST_CASE_TEMPLATE("linear experts: many rows give what few give", S, float, double) {
  check_many_rows(moxie::LinearExperts<S>(2, 64));
  check_many_rows(moxie::LinearExperts<S>(2, 37, {.bias = false}));  // lines that tiles do not fill
}

TEST_CASE("linear experts: of BFloat16 elements are close, and keep the laws of banks") {
  using moxie::BFloat16;
  for (const moxie::Index width : {dim, moxie::Index{33}}) {
    check_bfloat16(moxie::LinearExperts<float, BFloat16>(experts, width), moxie::LinearExperts<double>(experts, width));
  }
  check_laws(moxie::LinearExperts<float, BFloat16>(3, dim));
}

TEST_CASE("linear experts: have a bias unless told otherwise, and start it at zero") {
  const moxie::LinearExperts<double> bank(2, dim);
  moxie::Parameters<double> p = random_parameters(bank);
  bank.initialize(p.view(), moxie::Rng(7));
  CHECK((p["experts.1.bias"].eigen().array() == 0).all());
  CHECK(p["experts.1.weight"].eigen().cwiseAbs().maxCoeff() <= std::sqrt(6.0 / (2 * dim)));
  CHECK(p["experts.0.weight"].eigen() != p["experts.1.weight"].eigen());
  CHECK(moxie::LinearExperts<double>(2, dim, {.bias = false}).layout().find("experts.0.bias") == -1);
  const moxie::LinearExperts<double> shared(1, dim, {}, BankNames{"shared", false});
  CHECK(shared.layout().find("shared.bias") == 1);
}

TEST_CASE("linear experts: sizes that make no bank are refused") {
  CHECK_THROWS_AS(moxie::LinearExperts<float>(0, 4), moxie::ValueError);
  CHECK_THROWS_AS(moxie::LinearExperts<float>(2, 0), moxie::ValueError);
}

}  // namespace
