// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/expert/glu.hpp>
#include <moxie/layer/moe.hpp>
#include <moxie/routing/gated_router.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <moxie/testing/laws.hpp>
#include <support.hpp>

namespace {

using moxie::Exec;
using moxie::Index;
using moxie::Matrix;
using moxie::Moe;
using moxie::RowView;
using moxie::Tokens;

constexpr Index tokens = 14, dim = 5, experts = 4;

/// ReMoE (Wang et al. 2024): every expert with a positive logit, which is the weight; and α times the mean of the weights as a
/// loss.
template <class S>
class ReluRouter : public moxie::GatedRouter<ReluRouter<S>, S> {
  using Base = moxie::GatedRouter<ReluRouter, S>;

 public:
  using typename Base::Plan;
  class Tape : public Base::Tape {
   public:
    using Base::Tape::Tape;
    double balance_loss() const { return loss_; }

   private:
    friend class ReluRouter;
    double loss_ = 0;
  };

  explicit ReluRouter(double alpha = 0, Index gate_dim = dim)
      : Base("ReluRouter", dim, moxie::LinearGate<S>("ReluRouter", gate_dim, experts)), alpha_(alpha) {}

  void choose(moxie::ParameterView<const S> /*p*/, const Tokens<S>& in, RowView<const S> z, Plan& plan, Tape& tape,
              const moxie::Context& /*context*/) const {
    std::vector<Index> expert;
    std::vector<S> weight;
    tape.loss_ = 0;
    for (Index t = 0; t < in.count(); ++t) {
      for (Index e = 0; e < experts; ++e) {
        expert.push_back(z(t, e) > 0 ? e : -1);
        weight.push_back(z(t, e));
        tape.loss_ += z(t, e) > 0 ? alpha_ * double(z(t, e)) / double(in.count()) : 0;
      }
    }
    plan.build(in.count(), experts, experts, expert, weight);
  }
  void choose_backward(const Tokens<S>& in, const Plan& plan, const moxie::RouterGradient<Plan>& gradient, RowView<S> dz,
                       Tape& /*tape*/, const moxie::Context& /*context*/) const {
    for (Index r = 0; r < plan.rows(); ++r) {
      const Index pair = plan.pair(r);
      dz(pair / experts, pair % experts) =
          gradient.plan.weight[r] + S(gradient.into.tokens.loss_factor * alpha_ / double(in.count()));
    }
  }

 private:
  double alpha_;
};
static_assert(moxie::Router<ReluRouter<float>>);
static_assert(moxie::Gate<moxie::LinearGate<float>>);
static_assert(!moxie::Gate<ReluRouter<float>>);

template <class S>
auto relu_layer(double alpha = 0, Index gate_dim = dim) {
  using Experts = moxie::SwiGluExperts<S>;
  Moe<ReluRouter<S>, Experts> layer(ReluRouter<S>(alpha, gate_dim), Experts(experts, dim, {.hidden_dim = 3}));
  moxie::test::randomize(layer.parameters(), 881);
  return layer;
}

TEST_CASE_TEMPLATE("GatedRouter: a router of one's own keeps the laws of a layer", S, float, double) {
  const Matrix<S> x = moxie::test::random<S>(tokens, dim, 882);
  for (const auto& law : moxie::testing::check_layer_laws(relu_layer<S>(0.3), Tokens<S>{x})) {
    INFO(law.message);
    CHECK(law.holds);
  }
}

TEST_CASE("GatedRouter: a router of one's own has the right gradients, with its loss and an input of the gate") {
  const Matrix<double> x = moxie::test::random<double>(tokens, dim, 883), dy = moxie::test::random<double>(tokens, dim, 884);
  const Matrix<double> gate_x = moxie::test::random<double>(tokens, 3, 885);
  const auto check = [&](const auto& layer, const Tokens<double>& in, std::size_t count) {
    const auto reports = moxie::testing::check_layer_gradients(layer, in, dy, Exec{1});
    CHECK(reports.size() == count);
    for (const auto& report : reports) {
      INFO(report.message());
      CHECK(report.passes(moxie::test::gradient_tolerance));
    }
  };
  check(relu_layer<double>(0.3), x, 2 + 3 * experts);
  Tokens<double> in(x);
  in.gate_x = gate_x;
  check(relu_layer<double>(0.3, 3), in, 3 + 3 * experts);
}

TEST_CASE("GatedRouter: what a router does not read is refused by name, and y stays as it was") {
  const auto layer = relu_layer<float>();
  const Matrix<float> x = moxie::test::random<float>(tokens, dim, 886);
  const std::vector<Index> none(std::size_t(tokens), 0);
  const auto refused = [&](auto&& change) {
    Tokens<float> in(x);
    change(in);
    Matrix<float> y = moxie::test::untouched<float>(tokens, dim);
    auto tape = layer.make_tape();
    const std::string message = moxie::test::message_of<moxie::ValueError>([&] { layer.forward(in, y, tape); });
    CHECK(moxie::test::is_untouched(y));
    return message;
  };
  CHECK(refused([&](auto& in) {
          in.chosen = {none.data(), tokens, 1};
        }) == "ReluRouter::route: Tokens::chosen is set, and this router does not read it");
  CHECK(refused([](auto& in) { in.top_k = 2; }) == "ReluRouter::route: Tokens::top_k is set, and this router does not read it");
  CHECK(refused([](auto& in) { in.capacity_factor = 2; }) ==
        "ReluRouter::route: Tokens::capacity_factor is set, and this router does not read it");
  auto broken = layer;
  broken.parameters()["gate.weight"](1, 1) = std::numeric_limits<float>::quiet_NaN();
  Matrix<float> y(tokens, dim);
  auto tape = broken.make_tape();
  CHECK(moxie::test::message_of<moxie::ValueError>([&] { broken.forward(x, y, tape); }) ==
        "ReluRouter::route: the logits of token 0 are not finite");
}

TEST_CASE("GatedRouter: sizes that make no router are refused, with its name") {
  CHECK(moxie::test::contains(moxie::test::message_of<moxie::ValueError>([] { ReluRouter<float>(0, 0); }), "ReluRouter"));
}

TEST_CASE("GatedRouter: costs what its gate costs, and has the gate's tensors first") {
  const auto layer = relu_layer<float>();
  CHECK(layer.router().layout().tensors()[0].name == "gate.weight");
  CHECK(layer.router().model_dim() == dim);
  CHECK(layer.router().experts() == experts);
  CHECK(moxie::multiply_adds(layer.router(), tokens, 1).forward == double(tokens * dim * experts));
}

}  // namespace
