// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <moxie/expert/bank.hpp>
#include <moxie/layer/cost.hpp>
#include <moxie/layer/layer.hpp>
#include <moxie/layer/moe.hpp>
#include <moxie/layer/outputs.hpp>
#include <optional>
#include <string_view>

namespace moxie::inline MOXIE_NAMESPACE {

/// Options of `DenseFeedForward`.
template <class ExpertConfig>
struct DenseFeedForwardConfig {
  Index model_dim = 0;
  ExpertConfig expert = {};
  BankNames names = {"feed_forward", false};  ///< of the tensors: "feed_forward.up_proj.weight"
};

/// The plain feed-forward of a transformer in the interface of a mixture: one expert that every token passes.
///
///     y_t = f(x_t)          (T,D)
///
/// What a mixture is compared with, or takes the place of in some blocks of a model. f and its tensors are the bank's, of one
/// expert: `DenseFeedForward<SwiGluExperts<float>>`. Tokens that are masked take no part: their rows of y and dx are 0.
///
/// It has no router, no plan and no balance loss, and computes what `Moe` computes with one expert of weight 1, bit for bit,
/// without its copies of rows. A step allocates nothing that an earlier one of as many tokens has. Cost: the bank's for T rows.
template <class Bank_>
class DenseFeedForward {
  static_assert(Bank<Bank_>, "DenseFeedForward: the argument is not a Bank of experts; the requirement that failed is below");

 public:
  using Scalar = typename Bank_::Scalar;

  /// What `backward` needs of a `forward`. Reused from step to step.
  class Tape {
   public:
    Tape() = default;
    explicit Tape(std::pmr::memory_resource* resource, Keep keep = Keep::activations) : resource_(resource), keep_(keep) {}

    double balance_loss() const { return 0; }
    /// One expert with the tokens that take part.
    RoutingStatistics statistics() const {
      RoutingStatistics s = detail::statistics_of_load({double(starts_[1])}, 0.0);
      s.tokens = starts_[1];
      s.rows = starts_[1];
      return s;
    }

   private:
    friend class DenseFeedForward;

    detail::OwnResource resource_;
    Keep keep_ = Keep::activations;
    // The layer that a forward was of; none before the first one, after one that threw, and after a frozen one.
    std::shared_ptr<const Layout> layer_;
    Index tokens_ = 0;
    std::array<Index, 2> starts_{};  // of the one expert's rows
    typename Bank_::Tape kept_{resource_};
    bool masked_ = false;
    Buffer<Index> unmasked_{0, resource_};  // the rows in x of the tokens that take part
    Workspace workspace_{resource_};        // stays empty where the caller has one
  };

  /// The layer for inference. It refers to no block, so that parameters may change or go.
  class Frozen {
    friend class DenseFeedForward;

    std::shared_ptr<const Layout> layer_;
    std::optional<detail::Frozen<Bank_>> weights_;
  };

  /// Throws what the bank throws.
  template <class Config = typename Bank_::Config>
  explicit DenseFeedForward(const DenseFeedForwardConfig<Config>& config)
      : DenseFeedForward(Bank_(1, config.model_dim, config.expert, config.names)) {}
  /// Throws ValueError unless the bank is of one expert.
  explicit DenseFeedForward(Bank_ bank) : bank_(std::move(bank)) {
    detail::expect_value(bank_.experts() == 1, "DenseFeedForward", "the bank must have one expert");
    layout_ = std::make_shared<const Layout>(bank_.layout());
    parameters_ = Parameters<Scalar>(layout_);
  }

  /// The bank of one expert.
  const Bank_& experts() const { return bank_; }
  Index model_dim() const { return bank_.model_dim(); }
  /// Without tensors where the layer was moved away.
  const Layout& layout() const { return layout_ != nullptr ? *layout_ : *detail::empty_layout(); }
  /// The layer's own block.
  Parameters<Scalar>& parameters() { return parameters_; }
  const Parameters<Scalar>& parameters() const { return parameters_; }

  /// First values: what the bank draws.
  void initialize(const Rng& rng) { initialize(parameters_, rng); }
  void initialize(ParameterView<Scalar> p, const Rng& rng) const { bank_.initialize(p, rng); }

  /// A tape. It holds what the bank keeps of T rows, with `Keep::inputs` and `Keep::nothing` none of it.
  Tape make_tape(Index /*max_tokens*/ = 0, Keep keep = Keep::activations, std::pmr::memory_resource* resource = nullptr) const {
    return Tape(resource, keep);
  }

  /// What T tokens cost that are not masked.
  Cost multiply_adds(Index tokens, const Sequences& division = {}) const {
    detail::expect_at_least("multiply_adds", "the number of tokens", tokens, 0);
    division.over(tokens).expect_valid("multiply_adds");
    return moxie::multiply_adds(bank_, tokens);
  }
  /// What the forward of a tape cost.
  Cost multiply_adds(const Tape& tape) const { return moxie::multiply_adds(bank_, tape.starts_[1]); }

  /// y (T,D) from x (T,D), overwritten. T = 0 is legal.
  ///
  /// Throws ShapeError for other shapes, ValueError if y overlaps x or the parameters, and for what only routers read (a gate's
  /// input, choices, weights, a capacity, more than one expert a token), before y is written.
  void forward(const Tokens<Scalar>& in, const Outputs<Scalar>& out, Tape& tape, const Exec& exec = {}) const {
    forward(parameters_.view(), in, out, tape, Context{tape.workspace_, exec});
  }
  /// The same over a block of parameters that lives elsewhere, and with scratch that does.
  void forward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const Outputs<Scalar>& out, Tape& tape,
               const Exec& exec = {}) const {
    forward(p, in, out, tape, Context{tape.workspace_, exec});
  }
  void forward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const Outputs<Scalar>& out, Tape& tape,
               const Context& context) const {
    expect_layout(forward_name, p);
    expect_value(p.complete(), forward_name, "a parameter is absent");
    detail::expect_no_overlap(overlaps(p, out.y), forward_name, "y", "the parameters");
    begin(in, out, tape);
    run(p, in, out.y, tape.keep_ == Keep::activations ? &tape.kept_ : nullptr, tape, context);
    tape.layer_ = layout_;
  }

  /// Packs the layer's weights, or those of a block, for any number of forwards without a backward.
  Frozen freeze(const Exec& exec = {}) const { return freeze(parameters_.view(), exec); }
  Frozen freeze(ParameterView<const Scalar> p, const Exec& exec = {}) const {
    expect_layout("DenseFeedForward::freeze", p);
    Frozen frozen;
    frozen.layer_ = layout_;
    frozen.weights_.emplace(bank_, p, exec);
    return frozen;
  }
  /// The same y as with the parameters that were frozen, bit for bit. The tape then holds nothing for a backward.
  void forward(const Frozen& frozen, const Tokens<Scalar>& in, const Outputs<Scalar>& out, Tape& tape,
               const Exec& exec = {}) const {
    forward(frozen, in, out, tape, Context{tape.workspace_, exec});
  }
  void forward(const Frozen& frozen, const Tokens<Scalar>& in, const Outputs<Scalar>& out, Tape& tape,
               const Context& context) const {
    expect_value(layout_ != nullptr && frozen.layer_ == layout_, forward_name, "the weights were not frozen by this layer");
    begin(in, out, tape);
    run(*frozen.weights_, in, out.y, nullptr, tape, context);
  }

  /// From a forward's input and tape: overwrites dx (T,D), sets the gradient of the condition to 0 where `din` has one, and
  /// adds to the gradients of all parameters. The gradient is that of ⟨y, dy⟩. Rows of dx that are masked become 0.
  ///
  /// Throws ShapeError for other shapes or a block of another layout, ValueError if the tape holds no forward of this layer (or
  /// a copy of it) and as many tokens and the same mask, or what is written overlaps what is read, before anything is written.
  void backward(const Tokens<Scalar>& in, const OutputsGradient<Scalar>& dout, const TokensGradient<Scalar>& din,
                ParameterView<Scalar> grads, Tape& tape, const Exec& exec = {}) const {
    backward(parameters_.view(), in, dout, {din, grads}, tape, Context{tape.workspace_, exec});
  }
  void backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const OutputsGradient<Scalar>& dout,
                const Gradients<Scalar>& into, Tape& tape, const Exec& exec = {}) const {
    backward(p, in, dout, into, tape, Context{tape.workspace_, exec});
  }
  void backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const OutputsGradient<Scalar>& dout,
                const Gradients<Scalar>& into, Tape& tape, const Context& context) const {
    expect_backward(p, in, dout, into, tape);
    const TokensGradient<Scalar>& din = into.tokens;
    for (const RowView<Scalar>& d : {din.condition, din.gate_x, din.weight}) {
      detail::fill_rows(d, Scalar(0));
    }
    if (tape.keep_ == Keep::activations) {
      run_backward(p, in, dout.y, into, tape.kept_, tape, context);
      return;
    }
    Workspace& tapes = context.workspace.tapes();
    const Workspace::Frame frame(tapes);
    typename Bank_::Tape again(&tapes);
    bank_.forward(p, rows_of(tape, in), {}, &again, context);  // no h: only what is kept
    run_backward(p, in, dout.y, into, again, tape, context);
  }

 private:
  static constexpr std::string_view forward_name = "DenseFeedForward::forward";

  /// The checks of a forward, and the rows that take part. The tape then has no forward, until there is one.
  void begin(const Tokens<Scalar>& in, const Outputs<Scalar>& out, Tape& tape) const {
    detail::expect_forward(forward_name, in, out, model_dim(), 0, 0);
    detail::expect_read(forward_name, in, {.top_k = true});
    expect_value(in.top_k <= 1, forward_name, "there is one expert; top_k cannot be more");
    tape.layer_.reset();
    tape.tokens_ = in.count();
    tape.masked_ = !in.mask.empty();
    tape.unmasked_.resize(tape.masked_ ? in.count() : 0);
    Index rows = 0;
    for (Index t = 0; t < Index(in.mask.size()); ++t) {
      if (in.mask[std::size_t(t)] != 0) {
        tape.unmasked_[rows++] = t;
      }
    }
    tape.starts_ = {0, tape.masked_ ? rows : in.count()};
  }

  void expect_backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, const OutputsGradient<Scalar>& dout,
                       const Gradients<Scalar>& into, const Tape& tape) const {
    constexpr std::string_view where = "DenseFeedForward::backward";
    detail::expect_backward(where, p, in, dout, into, model_dim());
    expect_value(dout.logits.cols() == 0, where, "there is a gradient of logits, and the layer has none");
    expect_value(layout_ != nullptr && tape.layer_ == layout_, where, "the tape holds no forward of this layer");
    expect_value(tape.keep_ != Keep::nothing, where, "the tape was made to keep nothing for a backward");
    expect_value(is_forward_of(tape, in), where, "the tape holds no forward of these tokens and mask");
    expect_layout(where, p);
    expect_layout(where, into.parameters);
    expect_value(p.complete(), where, "a parameter is absent");
  }
  static bool is_forward_of(const Tape& tape, const Tokens<Scalar>& in) {
    if (tape.tokens_ != in.count() || tape.masked_ == in.mask.empty()) {
      return false;
    }
    Index next = 0;
    for (Index t = 0; t < Index(in.mask.size()); ++t) {
      if (in.mask[std::size_t(t)] != 0 && (next == tape.starts_[1] || tape.unmasked_[next++] != t)) {
        return false;
      }
    }
    return !tape.masked_ || next == tape.starts_[1];
  }

  template <class Weights>
  void run(const Weights& weights, const Tokens<Scalar>& in, RowView<Scalar> y, typename Bank_::Tape* keep, const Tape& tape,
           const Context& context) const {
    if (!tape.masked_) {
      detail::forward_bank(bank_, weights, rows_of(tape, in), y, keep, context);
      return;
    }
    const Workspace::Frame frame(context.workspace);
    const RowView<Scalar> h = context.workspace.matrix<Scalar>(tape.starts_[1], model_dim());
    detail::forward_bank(bank_, weights, rows_of(tape, in), h, keep, context);
    scatter(h, y, tape);
  }

  void run_backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, RowView<const Scalar> dy,
                    const Gradients<Scalar>& into, typename Bank_::Tape& kept, const Tape& tape, const Context& context) const {
    const RowView<Scalar>& dx = into.tokens.x;
    const GroupedRows<Scalar> x = rows_of(tape, in);
    const OutputGradient<Scalar> dout(dy, x.index);
    if (!tape.masked_) {
      bank_.backward(p, x, dout, {dx, into.parameters}, kept, context);
      return;
    }
    const Workspace::Frame frame(context.workspace);
    const RowView<Scalar> drows = context.workspace.matrix<Scalar>(x.count(), model_dim());
    bank_.backward(p, x, dout, {drows, into.parameters}, kept, context);
    scatter(drows, dx, tape);
  }

  /// The tokens that take part as the rows of the expert.
  static GroupedRows<Scalar> rows_of(const Tape& tape, const Tokens<Scalar>& in) {
    return {tape.starts_, in.x, tape.masked_ ? tape.unmasked_.data() : nullptr};
  }
  /// The rows to their places in `whole`, zeros elsewhere.
  static void scatter(RowView<const Scalar> rows, RowView<Scalar> whole, const Tape& tape) {
    detail::fill_rows(whole, Scalar(0));
    for (Index r = 0; r < rows.rows(); ++r) {
      std::copy_n(rows.row(r), rows.cols(), whole.row(tape.unmasked_[r]));
    }
  }
  template <class T>
  void expect_layout(std::string_view where, ParameterView<T> p) const {
    if (p.empty() || layout_ == nullptr || !detail::same_layout(p.layout(), *layout_)) {
      throw ShapeError(std::string(where) + ": the parameters or gradients have another layout than the layer");
    }
  }

  Bank_ bank_;
  std::shared_ptr<const Layout> layout_;  // what tapes know the layer by; copies of the layer share it
  Parameters<Scalar> parameters_;
};

}  // namespace moxie::inline MOXIE_NAMESPACE
