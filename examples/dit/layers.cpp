// SPDX-License-Identifier: MIT
//
// All feed-forwards of the diffusion transformer, compiled here and nowhere else.
#include <dit/configuration.hpp>
#include <type_traits>

namespace dit {

namespace {

template <class Element>
moxie::AnyLayer<float> layer_with(const TrainingConfig& c) {
  using SwiGlu = moxie::SwiGluExperts<float, Element>;
  const Index dim = c.model.dim;
  const auto balance = moxie::Balance{.expert_level = c.recipe.balance};
  const bool gelu = has_gelu_experts(c);
  const auto mixing = [](const std::string& name) {
    moxie::detail::expect_value(name == "learned" || name == "uniform", "TrainingConfig", "mixing is learned or uniform");
    return name == "learned" ? moxie::Mixing::learned : moxie::Mixing::uniform;
  };
  moxie::detail::expect_value(c.score == "softmax" || c.score == "sigmoid", "TrainingConfig", "score is softmax or sigmoid");
  // Those of the router, which shared and top-k have in common.
  const auto routed = [&]<class Config>(Config config) {
    config.model_dim = dim;
    config.experts = c.experts;
    config.top_k = c.top_k;
    config.expert.hidden_dim = c.hidden_dim;
    config.normalize = c.normalize;
    config.balance = balance;
    config.score = c.score == "softmax" ? moxie::Score::softmax : moxie::Score::sigmoid;
    config.selection_bias = c.recipe.bias_rate > 0;
    config.capacity = {.factor = c.token_capacity,
                       .priority = c.batch_priority ? moxie::Priority::weight : moxie::Priority::order};
    return config;
  };
  const auto top_k = [&]<class Experts>(std::type_identity<Experts>) {
    using Layer = moxie::TopKMoE<float, Experts>;
    return moxie::AnyLayer<float>(Layer(routed(typename Layer::Config{})));
  };
  if (c.feed_forward == "shared") {
    using Layer = moxie::SharedExpertMoE<float, SwiGlu>;
    auto config = routed(typename Layer::Config{});
    config.shared.hidden_dim = c.shared_hidden_dim;
    return Layer(config);
  }
  if (c.feed_forward == "top-k" && !gelu) {
    return top_k(std::type_identity<SwiGlu>());
  }
  if (c.feed_forward == "expert-choice") {
    return moxie::ExpertChoiceMoE<float, SwiGlu>({.model_dim = dim,
                                                  .experts = c.experts,
                                                  .expert = {.hidden_dim = c.hidden_dim},
                                                  .capacity = {.factor = c.capacity_factor}});
  }
  if constexpr (std::is_same_v<Element, float>) {
    if (c.feed_forward == "top-k") {
      return top_k(std::type_identity<moxie::GeluTanhExperts<float>>());
    }
    const auto of = [&]<class Experts>(std::type_identity<Experts>) -> moxie::AnyLayer<float> {
      if (c.feed_forward == "soft") {
        return moxie::SoftMoE<float, Experts>({.model_dim = dim,
                                               .experts = c.experts,
                                               .slots_per_expert = c.slots_per_expert,
                                               .expert = {.hidden_dim = c.hidden_dim},
                                               .dispatch = mixing(c.dispatch),
                                               .combine = mixing(c.combine)});
      }
      moxie::detail::expect_value(c.feed_forward == "dense", "TrainingConfig",
                                  "feed_forward is shared, top-k, expert-choice, soft or dense");
      return DenseFeedForward<float, Experts>({.model_dim = dim, .hidden_dim = c.hidden_dim});
    };
    return gelu ? of(std::type_identity<moxie::GeluTanhExperts<float>>()) : of(std::type_identity<SwiGlu>());
  } else {
    throw moxie::ValueError(
        "TrainingConfig: only SwiGLU experts of shared, top-k and expert-choice hold numbers of another kind than float");
  }
}

using SwiGlu = moxie::SwiGluExperts<float>;
using Gelu = moxie::GeluTanhExperts<float>;

/// Calls `f(bank)` with the experts of a layer that is one of these types. Whether it is.
template <class... Layers, class F>
bool with_experts_of(const moxie::AnyLayer<float>& layer, F&& f) {
  const auto call = [&](const auto* found) {
    if (found != nullptr) {
      f(found->experts());
    }
    return found != nullptr;
  };
  return (call(layer.get_if<Layers>()) || ...);
}
/// The same of all that `feed_forward_of` makes.
template <class F>
void with_experts(const moxie::AnyLayer<float>& layer, F&& f) {
  with_experts_of<DenseFeedForward<float, SwiGlu>, moxie::TopKMoE<float, SwiGlu>, moxie::SoftMoE<float, SwiGlu>,
                  moxie::SharedExpertMoE<float, SwiGlu>, moxie::ExpertChoiceMoE<float, SwiGlu>, DenseFeedForward<float, Gelu>,
                  moxie::TopKMoE<float, Gelu>, moxie::SoftMoE<float, Gelu>>(layer, f);
}

}  // namespace

moxie::AnyLayer<float> feed_forward_of(const TrainingConfig& c, ExpertNumbers numbers) {
  return numbers == ExpertNumbers::bfloat16 ? layer_with<moxie::BFloat16>(c) : layer_with<float>(c);
}

void upcycle_feed_forward(const moxie::AnyLayer<float>& dense, ParameterView<const float> from,
                          const moxie::AnyLayer<float>& sparse, ParameterView<float> to) {
  bool done = false;
  with_experts(dense, [&]<class Bank>(const Bank& one) {
    with_experts(sparse, [&]<class Other>(const Other& many) {
      if constexpr (std::is_same_v<Bank, Other>) {
        moxie::upcycle(one, from, many, to);
        done = true;
      }
    });
  });
  moxie::expect_value(done, "upcycle", "the experts are of another kind than the dense feed-forward");
}

}  // namespace dit
