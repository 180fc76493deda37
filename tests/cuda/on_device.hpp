// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/layer/expert_choice_moe.hpp>
#include <moxie/layer/shared_expert_moe.hpp>
#include <moxie/layer/soft_moe.hpp>
#include <moxie/layer/top_k_moe.hpp>

#include "../quick_gelu.hpp"
#include "device_layer.hpp"

namespace moxie::test {

namespace detail {

template <class Bank>
struct DeviceBank;
template <class S, class Element>
struct DeviceBank<GluExperts<S, Silu, Element>> {
  static constexpr DeviceExperts kind = DeviceExperts::swiglu;
};
template <class S, class Element>
struct DeviceBank<GluExperts<S, GeluTanh, Element>> {
  static constexpr DeviceExperts kind = DeviceExperts::geglu_tanh;
};
template <class S, class Element>
struct DeviceBank<GluExperts<S, GeluErf, Element>> {
  static constexpr DeviceExperts kind = DeviceExperts::geglu_erf;
};
template <class S, class Element>
struct DeviceBank<GluExperts<S, Relu, Element>> {
  static constexpr DeviceExperts kind = DeviceExperts::reglu;
};
template <class S, class Element>
struct DeviceBank<GluExperts<S, ClampedSwiGlu, Element>> {
  static constexpr DeviceExperts kind = DeviceExperts::clamped_swiglu;
};
template <class S, class Element>
struct DeviceBank<MlpExperts<S, GeluTanh, Element>> {
  static constexpr DeviceExperts kind = DeviceExperts::gelu_tanh;
};
template <class S, class Element>
struct DeviceBank<MlpExperts<S, GeluErf, Element>> {
  static constexpr DeviceExperts kind = DeviceExperts::gelu_erf;
};
template <class S, class Element>
struct DeviceBank<MlpExperts<S, ReluSquared, Element>> {
  static constexpr DeviceExperts kind = DeviceExperts::relu_squared;
};

template <class S, class Element>
struct DeviceBank<GluExperts<S, QuickGelu, Element>> {
  static constexpr DeviceExperts kind = DeviceExperts::quick_glu;
};
template <class S, class Element>
struct DeviceBank<MlpExperts<S, QuickGelu, Element>> {
  static constexpr DeviceExperts kind = DeviceExperts::quick_gelu;
};

}  // namespace detail

/// A layer of the CUDA backend with the interface of the CPU's `Host`: what is written for that one (golden files, laws,
/// gradient checks) runs on this one too. The parameters are the CPU's; every call copies what it needs there and back.
template <class Host>
class OnDevice {
 public:
  using Scalar = typename Host::Scalar;
  using Config = typename Host::Config;
  using Plan = typename Host::Plan;
  using Experts = std::remove_cvref_t<decltype(std::declval<Host>().experts())>;

  explicit OnDevice(const Config& config) : config_(config), host_(config) {}

  const auto& router() const { return host_.router(); }
  const auto& experts() const { return host_.experts(); }
  const Layout& layout() const { return host_.layout(); }
  Index model_dim() const { return host_.model_dim(); }
  Parameters<Scalar>& parameters() { return host_.parameters(); }
  const Parameters<Scalar>& parameters() const { return host_.parameters(); }
  void initialize(const Rng& rng) { host_.initialize(rng); }

  class Tape {
   public:
    struct Router {
      Matrix<Scalar> all_scores;
      std::vector<Index> all_choices, all_places;

      RowView<const Scalar> scores() const { return all_scores; }
      std::span<const Index> choices() const { return all_choices; }
      std::span<const Index> places() const { return all_places; }
    };
    const Plan& plan() const { return plan_; }
    const Router& router() const { return router_; }
    double balance_loss() const { return balance_loss_; }
    Index row(Index token) const { return rows_[std::size_t(token)]; }
    DeviceLayer<Scalar>& device() const { return *device_; }

   private:
    friend class OnDevice;
    std::shared_ptr<DeviceLayer<Scalar>> device_;
    Plan plan_;
    Router router_;
    std::vector<Index> rows_;
    double balance_loss_ = 0;
  };
  Tape make_tape(Index /*max_tokens*/ = 0, Keep /*keep*/ = Keep::activations) const {
    Tape tape;
    tape.device_ = make_device_layer<Scalar>(config_, detail::DeviceBank<Experts>::kind,
                                             std::is_same_v<typename Experts::Element, BFloat16>);
    moxie::detail::expect_value(moxie::detail::same_layout(layout(), tape.device_->layout()), "OnDevice",
                                "the device's layer has another layout");
    return tape;
  }

  void forward(const Tokens<Scalar>& in, RowView<Scalar> y, Tape& tape, const Exec& exec = {}) const {
    forward(parameters(), in, y, tape, exec);
  }
  void forward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, RowView<Scalar> y, Tape& tape,
               const Exec& /*exec*/ = {}, bool frozen = false) const {
    const Input input(in);
    Matrix<Scalar> out = y.eigen();
    tape.device_->forward(block_of(p).flat().data(), input.numbers, out.data(), frozen);
    tape.device_->expect_finite();
    y.eigen() = out;
    tape.balance_loss_ = tape.device_->balance_loss();
    look(in, tape);
  }

  void backward(const Tokens<Scalar>& in, RowView<const Scalar> dy, const TokensGradient<Scalar>& din,
                ParameterView<Scalar> grads, const Tape& tape, const Exec& exec = {}) const {
    backward(parameters(), in, dy, {din, grads}, tape, exec);
  }
  void backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, RowView<const Scalar> dy,
                const Gradients<Scalar>& into, const Tape& tape, const Exec& /*exec*/ = {}) const {
    const TokensGradient<Scalar>& din = into.tokens;
    const ParameterView<Scalar> grads = into.parameters;
    const Input input(in);
    const Matrix<Scalar> from = dy.eigen();
    Matrix<Scalar> dx = din.x.eigen();
    Parameters<Scalar> sum = block_of(grads);
    tape.device_->backward(block_of(p).flat().data(), input.numbers, from.data(), dx.data(), sum.flat().data());
    moxie::copy_tensors(sum.view(), grads);
    din.x.eigen() = dx;
  }

 private:
  /// One block of what a view sees.
  static Parameters<Scalar> block_of(ParameterView<const Scalar> p) {
    Parameters<Scalar> block{Layout(p.layout())};
    moxie::copy_tensors(p, block.view());
    return block;
  }
  /// The same tokens as rows without gaps.
  struct Input {
    Matrix<Scalar> x, noise;
    DeviceInput<Scalar> numbers;

    explicit Input(const Tokens<Scalar>& in) : x(in.x.eigen()), noise(in.noise.eigen()) {
      numbers = {.x = x.data(),
                 .sequences = in.sequences,
                 .mask = in.mask,
                 .training = in.training,
                 .seed = in.rng.value_or(Rng(0)).seed(),
                 .stream = in.rng.value_or(Rng(0)).stream(),
                 .noise = noise.size() == 0 ? nullptr : noise.data(),
                 .top_k = in.top_k};
    }
  };

  /// Plan and routing as the CPU has them.
  void look(const Tokens<Scalar>& in, Tape& tape) const {
    const DeviceRouting<Scalar> seen = tape.device_->routing();
    const Index experts = host_.router().experts();
    tape.rows_ = seen.row;
    std::vector<Index> starts{0};  // of what the mask leaves
    in.sequences.for_each([&](Index, Index begin, Index end) {
      starts.push_back(starts.back());
      for (Index t = begin; t < end; ++t) {
        starts.back() += in.mask.empty() || in.mask[std::size_t(t)] != 0 ? 1 : 0;
      }
    });
    const Sequences sequences = Sequences(starts).over(seen.tokens);
    if constexpr (requires { tape.plan_.slot_count(); }) {
      tape.plan_.resize(sequences, experts, host_.router().slot_count() / experts);
      const Index slots = tape.plan_.slot_count();
      tape.plan_.dispatch().eigen() = Eigen::Map<const Matrix<Scalar>>(seen.dispatch.data(), seen.tokens, slots);
      tape.plan_.combine().eigen() = Eigen::Map<const Matrix<Scalar>>(seen.combine.data(), seen.tokens, slots);
    } else {
      tape.router_.all_scores = Eigen::Map<const Matrix<Scalar>>(seen.scores.data(), seen.tokens, experts);
      tape.router_.all_choices = seen.choices;
      tape.router_.all_places = seen.places;
      std::vector<Index> expert, token;
      std::vector<Scalar> weight;
      const auto propose = [&](Index t, Index row) {
        token.push_back(t);
        expert.push_back(row < 0 ? -1 : seen.expert[std::size_t(row)]);
        weight.push_back(row < 0 ? Scalar(0) : seen.weight[std::size_t(row)]);
      };
      if constexpr (requires { host_.router().config().top_k; }) {
        for (std::size_t p = 0; p < seen.row_of_pair.size(); ++p) {
          propose(Index(p) * seen.tokens / Index(seen.row_of_pair.size()), seen.row_of_pair[p]);
        }
      } else {
        // Pairs count sequences, then experts; rows count experts, then sequences.
        const Index rows = Index(seen.token.size()) / experts;
        Index first = 0;
        sequences.for_each([&](Index, Index begin, Index end) {
          const Index room = host_.router().capacity(end - begin);
          for (Index e = 0; e < experts; ++e) {
            for (Index row = e * rows + first; row < e * rows + first + room; ++row) {
              tape.router_.all_choices.push_back(seen.token[std::size_t(row)]);
              propose(seen.token[std::size_t(row)], row);
            }
          }
          first += room;
        });
      }
      tape.plan_.build(
          seen.tokens, experts, [&](Index p) { return token[std::size_t(p)]; }, expert, weight);
    }
  }

  Config config_;
  Host host_;
};

}  // namespace moxie::test
