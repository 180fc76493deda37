// SPDX-License-Identifier: MIT
#pragma once

#include <memory>
#include <moxie/layer/layer.hpp>
#include <string>
#include <string_view>
#include <type_traits>
#include <typeinfo>
#include <utility>

namespace moxie::inline MOXIE_NAMESPACE {

namespace detail {

/// A tape of some layer.
class TapeBase {
 public:
  virtual ~TapeBase() = default;
  virtual std::unique_ptr<TapeBase> clone() const = 0;
  virtual double balance_loss() const = 0;
  virtual RoutingStatistics statistics() const = 0;
  /// The tape itself, its plan or its router's tape, whichever is of this type; null if none is.
  virtual void* find(const std::type_info& type) = 0;

 protected:
  TapeBase() = default;
  TapeBase(const TapeBase&) = default;
  TapeBase& operator=(const TapeBase&) = default;
};

/// What some layer froze.
class FrozenBase {
 public:
  virtual ~FrozenBase() = default;

 protected:
  FrozenBase() = default;
  FrozenBase(const FrozenBase&) = default;
  FrozenBase& operator=(const FrozenBase&) = default;
};

/// Some layer.
template <class Scalar>
class LayerBase {
 public:
  virtual ~LayerBase() = default;
  virtual std::unique_ptr<LayerBase> clone() const = 0;
  virtual Index model_dim() const = 0;
  virtual const Layout& layout() const = 0;
  virtual Parameters<Scalar>& parameters() = 0;
  virtual void initialize(ParameterView<Scalar> p, const Rng& rng) const = 0;
  virtual std::unique_ptr<TapeBase> make_tape(Index max_tokens, Keep keep, std::pmr::memory_resource* resource) const = 0;
  virtual void forward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const Outputs<Scalar>& out, TapeBase& tape,
                       const Context& context) const = 0;
  virtual void backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const OutputsGradient<Scalar>& dout,
                        const Gradients<Scalar>& into, TapeBase& tape, const Context& context) const = 0;
  virtual bool can_freeze() const = 0;
  virtual std::unique_ptr<const FrozenBase> freeze(ParameterView<const Scalar> p, const Exec& exec) const = 0;
  virtual void forward(const FrozenBase& frozen, const Tokens<Scalar>& in, const Outputs<Scalar>& out, TapeBase& tape,
                       const Context& context) const = 0;
  virtual Cost multiply_adds(Index tokens, const Sequences& division) const = 0;
  virtual Cost multiply_adds(const TapeBase& tape) const = 0;

 protected:
  LayerBase() = default;
  LayerBase(const LayerBase&) = default;
  LayerBase& operator=(const LayerBase&) = default;
};

template <class Tape>
struct TapeOf final : TapeBase {
  explicit TapeOf(Tape t) : tape(std::move(t)) {}
  std::unique_ptr<TapeBase> clone() const override { return std::make_unique<TapeOf>(tape); }
  double balance_loss() const override { return tape.balance_loss(); }
  RoutingStatistics statistics() const override { return tape.statistics(); }
  void* find(const std::type_info& type) override {
    void* found = type == typeid(Tape) ? &tape : nullptr;
    if constexpr (requires(const Tape& t) { t.plan(); }) {
      using Plan = std::remove_cvref_t<decltype(tape.plan())>;
      found = type == typeid(Plan) ? const_cast<Plan*>(&std::as_const(tape).plan()) : found;
    }
    if constexpr (requires(Tape & t) { t.router(); }) {
      found = type == typeid(tape.router()) ? &tape.router() : found;
    }
    return found;
  }

  Tape tape;
};

template <class Frozen>
struct FrozenOf final : FrozenBase {
  explicit FrozenOf(Frozen f) : frozen(std::move(f)) {}

  Frozen frozen;
};

template <class L>
struct LayerOf final : LayerBase<typename L::Scalar> {
  using Scalar = typename L::Scalar;
  using Tape = typename L::Tape;
  static constexpr bool freezes = requires(const L& layer, ParameterView<const Scalar> p, const Tokens<Scalar>& in,
                                           const Outputs<Scalar>& out, Tape& tape, const Context& context) {
    layer.forward(layer.freeze(p, context.exec), in, out, tape, context);
  };

  explicit LayerOf(L l) : layer(std::move(l)) {}
  std::unique_ptr<LayerBase<Scalar>> clone() const override { return std::make_unique<LayerOf>(layer); }
  Index model_dim() const override { return layer.model_dim(); }
  const Layout& layout() const override { return layer.layout(); }
  Parameters<Scalar>& parameters() override { return layer.parameters(); }
  void initialize(ParameterView<Scalar> p, const Rng& rng) const override { layer.initialize(p, rng); }
  std::unique_ptr<TapeBase> make_tape(Index max_tokens, Keep keep, std::pmr::memory_resource* resource) const override {
    return std::make_unique<TapeOf<Tape>>(layer.make_tape(max_tokens, keep, resource));
  }
  void forward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const Outputs<Scalar>& out, TapeBase& tape,
               const Context& context) const override {
    layer.forward(p, in, out, own("AnyLayer::forward", tape), context);
  }
  void backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const OutputsGradient<Scalar>& dout,
                const Gradients<Scalar>& into, TapeBase& tape, const Context& context) const override {
    layer.backward(p, in, dout, into, own("AnyLayer::backward", tape), context);
  }
  bool can_freeze() const override { return freezes; }
  std::unique_ptr<const FrozenBase> freeze(ParameterView<const Scalar> p, const Exec& exec) const override {
    if constexpr (freezes) {
      using Frozen = decltype(layer.freeze(p, exec));
      return std::make_unique<FrozenOf<Frozen>>(layer.freeze(p, exec));
    } else {
      throw_value_error("AnyLayer::freeze", "this layer does not freeze");
    }
  }
  void forward(const FrozenBase& frozen, const Tokens<Scalar>& in, const Outputs<Scalar>& out, TapeBase& tape,
               const Context& context) const override {
    constexpr std::string_view where = "AnyLayer::forward";
    if constexpr (freezes) {
      using Frozen = decltype(layer.freeze(ParameterView<const Scalar>(), context.exec));
      const auto* const weights = dynamic_cast<const FrozenOf<Frozen>*>(&frozen);
      expect_value(weights != nullptr, where, "the weights were frozen by a layer of another type");
      layer.forward(weights->frozen, in, out, own(where, tape), context);
    } else {
      throw_value_error(where, "the weights were frozen by a layer of another type");
    }
  }
  Cost multiply_adds(Index tokens, const Sequences& division) const override { return layer.multiply_adds(tokens, division); }
  Cost multiply_adds(const TapeBase& tape) const override {
    const auto* const mine = dynamic_cast<const TapeOf<Tape>*>(&tape);
    expect_value(mine != nullptr, "AnyLayer::multiply_adds", foreign_tape);
    return layer.multiply_adds(mine->tape);
  }

  L layer;

 private:
  static constexpr std::string_view foreign_tape = "the tape is one of a layer of another type";

  static Tape& own(std::string_view where, TapeBase& tape) {
    auto* const mine = dynamic_cast<TapeOf<Tape>*>(&tape);
    expect_value(mine != nullptr, where, foreign_tape);
    return mine->tape;
  }
};

}  // namespace detail

/// A layer whose type is known at run time: any that models `Layer`, with the bits that it has by itself.
///
///     AnyLayer<float> layer = TopKMoE<float>({...});
///     auto tape = layer.make_tape();
///     layer.forward(x, y, tape);
///     layer.backward(x, dy, dx, grads, tape);
///
/// A value: a copy has parameters of its own. What functions compute, throw and write is the layer's; beside that they throw
/// ValueError, before anything is written, for a tape or weights of a layer of another type, and for a layer that was moved
/// away. A file that only calls one compiles none of the layers. Cost: a virtual call.
template <class Scalar_>
class AnyLayer {
 public:
  using Scalar = Scalar_;

  /// The tape of the layer. One that was made without a layer takes the type of the first that runs forward on it.
  class Tape {
   public:
    Tape() = default;
    explicit Tape(std::pmr::memory_resource* resource) : resource_(resource), workspace_(resource) {}
    Tape(const Tape& other) : tape_(other.tape_ != nullptr ? other.tape_->clone() : nullptr) {}
    Tape(Tape&&) noexcept = default;
    Tape& operator=(Tape other) noexcept {
      tape_.swap(other.tape_);
      return *this;
    }
    ~Tape() = default;

    /// 0 and no tokens before the first forward.
    double balance_loss() const { return tape_ != nullptr ? tape_->balance_loss() : 0; }
    RoutingStatistics statistics() const { return tape_ != nullptr ? tape_->statistics() : RoutingStatistics(); }

    /// The tape itself, its plan or its router's tape, if that is a `T`; null if none is:
    ///
    ///     tape.get_if<SparsePlan<float>>()     tape.get_if<TopKRouter<float>::Tape>()     tape.get_if<TopKMoE<float>::Tape>()
    template <class T>
    T* get_if() {
      return tape_ != nullptr ? static_cast<T*>(tape_->find(typeid(T))) : nullptr;
    }
    template <class T>
    const T* get_if() const {
      return tape_ != nullptr ? static_cast<const T*>(tape_->find(typeid(T))) : nullptr;
    }

   private:
    friend class AnyLayer;
    detail::OwnResource resource_;
    std::unique_ptr<detail::TapeBase> tape_;
    Workspace workspace_;  // stays empty where the caller has one
  };

  /// The layer for inference. Copies share it.
  class Frozen {
    friend class AnyLayer;
    std::shared_ptr<const detail::FrozenBase> frozen_;
  };

  /// Of a layer, with the parameters that it has.
  // The constraint is less than `Layer`: whether a block around an AnyLayer can be copied must not ask whether it is a Layer.
  template <class L>
  requires(!std::is_same_v<L, AnyLayer> && std::is_same_v<typename L::Scalar, Scalar> && std::is_class_v<typename L::Tape>)
      AnyLayer(L layer)
      : layer_(make(std::move(layer))) {}
  AnyLayer(const AnyLayer& other) : layer_(other.layer_ != nullptr ? other.layer_->clone() : nullptr) {}
  AnyLayer(AnyLayer&&) noexcept = default;
  AnyLayer& operator=(AnyLayer other) noexcept {
    layer_.swap(other.layer_);
    return *this;
  }
  ~AnyLayer() = default;

  /// False where the layer was moved away.
  bool has_value() const { return layer_ != nullptr; }
  /// The layer itself, if it is an `L`; null if it is another.
  template <class L>
  L* get_if() {
    auto* const found = dynamic_cast<detail::LayerOf<L>*>(layer_.get());
    return found != nullptr ? &found->layer : nullptr;
  }
  template <class L>
  const L* get_if() const {
    const auto* const found = dynamic_cast<const detail::LayerOf<L>*>(layer_.get());
    return found != nullptr ? &found->layer : nullptr;
  }

  Index model_dim() const { return get("model_dim").model_dim(); }
  const Layout& layout() const { return get("layout").layout(); }
  /// The layer's own block.
  Parameters<Scalar>& parameters() { return get("parameters").parameters(); }
  const Parameters<Scalar>& parameters() const { return get("parameters").parameters(); }
  void initialize(const Rng& rng) { get("initialize").initialize(parameters(), rng); }
  void initialize(ParameterView<Scalar> p, const Rng& rng) const { get("initialize").initialize(p, rng); }
  Tape make_tape(Index max_tokens = 0, Keep keep = Keep::activations, std::pmr::memory_resource* resource = nullptr) const {
    Tape tape(resource);
    tape.tape_ = get("make_tape").make_tape(max_tokens, keep, resource);
    return tape;
  }
  Cost multiply_adds(Index tokens, const Sequences& division = {}) const {
    return get("multiply_adds").multiply_adds(tokens, division);
  }
  /// 0 before the first forward.
  Cost multiply_adds(const Tape& tape) const {
    const auto& layer = get("multiply_adds");
    return tape.tape_ != nullptr ? layer.multiply_adds(*tape.tape_) : Cost();
  }

  /// y (T,D) from x (T,D), overwritten; and the router's logits, if they are wanted.
  void forward(const Tokens<Scalar>& in, const Outputs<Scalar>& out, Tape& tape, const Exec& exec = {}) const {
    forward(parameters().view(), in, out, tape, Context{tape.workspace_, exec});
  }
  /// The same over a block of parameters that lives elsewhere, and with scratch that does.
  void forward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const Outputs<Scalar>& out, Tape& tape,
               const Exec& exec = {}) const {
    forward(p, in, out, tape, Context{tape.workspace_, exec});
  }
  void forward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const Outputs<Scalar>& out, Tape& tape,
               const Context& context) const {
    const auto& layer = get("forward");
    layer.forward(p, in, out, made(layer, tape), context);
  }

  /// From a forward's input and tape: overwrites dx (T,D) and what else is there of `din`, adds to the parameters' gradients.
  void backward(const Tokens<Scalar>& in, const OutputsGradient<Scalar>& dout, const TokensGradient<Scalar>& din,
                ParameterView<Scalar> grads, Tape& tape, const Exec& exec = {}) const {
    backward(parameters().view(), in, dout, {din, grads}, tape, Context{tape.workspace_, exec});
  }
  void backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const OutputsGradient<Scalar>& dout,
                const Gradients<Scalar>& into, Tape& tape, const Exec& exec = {}) const {
    backward(p, in, dout, into, tape, Context{tape.workspace_, exec});
  }
  void backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const OutputsGradient<Scalar>& dout,
                const Gradients<Scalar>& into, Tape& tape, const Context& context) const {
    const auto& layer = get("backward");
    expect_value(tape.tape_ != nullptr, "AnyLayer::backward", "the tape holds no forward of this layer");
    layer.backward(p, in, dout, into, *tape.tape_, context);
  }

  /// Whether the layer's type has a `freeze`.
  bool can_freeze() const { return get("can_freeze").can_freeze(); }
  /// Throws ValueError if the layer's type has none.
  Frozen freeze(const Exec& exec = {}) const { return freeze(parameters().view(), exec); }
  Frozen freeze(ParameterView<const Scalar> p, const Exec& exec = {}) const {
    Frozen frozen;
    frozen.frozen_ = get("freeze").freeze(p, exec);
    return frozen;
  }
  /// The same y as with the parameters that were frozen. The tape then holds nothing for a backward.
  void forward(const Frozen& frozen, const Tokens<Scalar>& in, const Outputs<Scalar>& out, Tape& tape,
               const Exec& exec = {}) const {
    forward(frozen, in, out, tape, Context{tape.workspace_, exec});
  }
  void forward(const Frozen& frozen, const Tokens<Scalar>& in, const Outputs<Scalar>& out, Tape& tape,
               const Context& context) const {
    const auto& layer = get("forward");
    expect_value(frozen.frozen_ != nullptr, "AnyLayer::forward", "there are no frozen weights");
    layer.forward(*frozen.frozen_, in, out, made(layer, tape), context);
  }

 private:
  detail::LayerBase<Scalar>& get(std::string_view what) const {
    if (layer_ == nullptr) {
      detail::throw_value_error("AnyLayer::" + std::string(what), "the layer was moved away");
    }
    return *layer_;
  }
  template <class L>
  static std::unique_ptr<detail::LayerBase<Scalar>> make(L layer) {
    static_assert(Layer<L>, "AnyLayer: the argument is not a Layer; the requirement that failed is named below");
    return std::make_unique<detail::LayerOf<L>>(std::move(layer));
  }
  static detail::TapeBase& made(const detail::LayerBase<Scalar>& layer, Tape& tape) {
    if (tape.tape_ == nullptr) {
      tape.tape_ = layer.make_tape(0, Keep::activations, tape.resource_);
    }
    return *tape.tape_;
  }

  std::unique_ptr<detail::LayerBase<Scalar>> layer_;
};

}  // namespace moxie::inline MOXIE_NAMESPACE
