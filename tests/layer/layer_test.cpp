// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/layer/layer.hpp>
#include <moxie/moxie.hpp>

namespace {

using moxie::Layer;

// What does not model the concept, for one reason each.
struct NoStatistics : moxie::TopKMoE<float> {
  struct Tape {
    double balance_loss() const { return 0; }
  };
  Tape make_tape(moxie::Index /*max_tokens*/, moxie::Keep /*keep*/) const { return {}; }
};
struct NotCopyable : moxie::TopKMoE<float> {
  NotCopyable(const NotCopyable&) = delete;
  NotCopyable& operator=(const NotCopyable&) = delete;
};

TEST_CASE_TEMPLATE("Layer: every layer of the library is one, whatever its experts are", S, float, double) {
  CHECK(Layer<moxie::TopKMoE<S>>);
  CHECK(Layer<moxie::SharedExpertMoE<S>>);
  CHECK(Layer<moxie::SoftMoE<S>>);
  CHECK(Layer<moxie::ExpertChoiceMoE<S>>);
  CHECK(Layer<moxie::TimestepMoE<S>>);
  CHECK(Layer<moxie::Moe<moxie::HashRouter<S>, moxie::ExpertBank<moxie::IdentityExpert<S>>>>);
  CHECK(Layer<moxie::DenseFeedForward<moxie::GeluTanhExperts<S>>>);
  CHECK(Layer<moxie::AnyLayer<S>>);
}

TEST_CASE("Layer: of 16 bits too") {
  CHECK(Layer<moxie::TopKMoE<float, moxie::SwiGluExperts<float, moxie::BFloat16>>>);
  CHECK(Layer<moxie::DenseFeedForward<moxie::SwiGluExperts<float, moxie::BFloat16>>>);
}

TEST_CASE("Layer: routers, banks and halves of layers are none") {
  CHECK_FALSE(Layer<moxie::TopKRouter<float>>);
  CHECK_FALSE(Layer<moxie::SwiGluExperts<float>>);
  CHECK_FALSE(Layer<NoStatistics>);
  CHECK_FALSE(Layer<NotCopyable>);
  CHECK_FALSE(Layer<int>);
}

}  // namespace
