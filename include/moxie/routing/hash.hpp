// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/routing/config.hpp>
#include <moxie/routing/router.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

struct HashRouterConfig {
  Index experts = 0;
  std::uint64_t seed = 0;  ///< of the hash: another seed, another assignment
  double scale = 1;        ///< γ, the weight of every token
};

/// Hash routing: the expert of a token is a hash of its id, so nothing is learned and the assignment never changes.
///
///     expert_t = hash(id_t) mod E,   w = γ
///
/// Roller et al. 2021. The hash is the counter-based generator at the id, modulo E. Needs `Tokens::ids`. No parameters, no
/// gradient. O(T).
template <class Scalar_>
class HashRouter : public FixedRouter<Scalar_> {
 public:
  using Scalar = Scalar_;
  using Base = FixedRouter<Scalar>;
  using typename Base::Plan;
  using Config = HashRouterConfig;

  class Tape : public Base::Tape {
   public:
    Tape() = default;
    explicit Tape(std::pmr::memory_resource* resource) : expert_(0, resource), weight_(0, resource) {}

   private:
    friend class HashRouter;
    Buffer<Index> expert_;
    Buffer<Scalar> weight_;
  };

  /// Throws ValueError for no experts, or more than `most_experts`.
  explicit HashRouter(const Config& config) : config_(config) {
    detail::expect_experts("HashRouter", config.experts);
    detail::expect_scale<Scalar>("HashRouter", config.scale);
  }

  const Config& config() const { return config_; }
  Index experts() const { return config_.experts; }
  /// R of a call: T.
  Index most_rows(const Sequences& sequences) const { return sequences.tokens(); }
  /// The expert of an id.
  Index expert_of(std::int64_t id) const {
    return Index(Rng(config_.seed).bits(static_cast<std::uint64_t>(id)) % std::uint64_t(config_.experts));
  }

  /// Throws ValueError if there are no ids, for `in.top_k` above 1, and for what only other routers read.
  void route(ParameterView<const Scalar> /*p*/, const Tokens<Scalar>& in, Plan& plan, Tape& tape,
             const Context& /*context*/) const {
    detail::expect_read("HashRouter::route", in, {.top_k = true});
    detail::expect_value(Index(in.ids.size()) == in.count(), "HashRouter::route", "the tokens have no ids; set Tokens::ids");
    detail::expect_value(in.top_k <= 1, "HashRouter::route", "a hash chooses one expert; top_k cannot be more");
    tape.expert_.resize(in.count());
    for (Index t = 0; t < in.count(); ++t) {
      tape.expert_[t] = expert_of(in.ids[std::size_t(t)]);
    }
    tape.weight_.assign(in.count(), Scalar(config_.scale));
    plan.build(in.count(), config_.experts, 1, tape.expert_.span(), tape.weight_.span());
  }

 private:
  Config config_;
};

}  // namespace moxie::inline MOXIE_NAMESPACE
