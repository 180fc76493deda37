// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <moxie/expert/bank.hpp>
#include <moxie/layer/cost.hpp>
#include <moxie/layer/layer.hpp>
#include <moxie/layer/moe.hpp>
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

    Keep keep_ = Keep::activations;
    // The layer that a forward was of; none before the first one, after one that threw, and after a frozen one.
    std::shared_ptr<const Layout> layer_;
    Index tokens_ = 0;
    std::array<Index, 2> starts_{};  // of the one expert's rows
    Buffer<Scalar> kept_;
    bool masked_ = false;
    Buffer<Index> unmasked_;  // the rows in x of the tokens that take part
    Workspace workspace_;     // stays empty where the caller has one
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

  /// A tape. `max_tokens` is a hint. It holds T·kept_width numbers, with `Keep::inputs` and `Keep::nothing` none.
  Tape make_tape(Index max_tokens = 0, Keep keep = Keep::activations) const {
    Tape tape;
    tape.keep_ = keep;
    if (keep == Keep::activations) {
      tape.kept_.spread(max_tokens, bank_.kept_width());
    }
    return tape;
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
  void forward(const Tokens<Scalar>& in, RowView<Scalar> y, Tape& tape, const Exec& exec = {}) const {
    forward(parameters_.view(), in, y, tape, exec);
  }
  /// The same over a block of parameters that lives elsewhere, and with scratch that does.
  void forward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, RowView<Scalar> y, Tape& tape,
               const Exec& exec = {}) const {
    forward(p, in, y, tape, tape.workspace_, exec);
  }
  void forward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, RowView<Scalar> y, Tape& tape, Workspace& workspace,
               const Exec& exec = {}) const {
    expect_layout(forward_name, p);
    expect_value(p.complete(), forward_name, "a parameter is absent");
    expect_value(!overlaps(p, y), forward_name, "y overlaps the parameters");
    begin(in, y, tape);
    run(p, in, y, tape.keep_ == Keep::activations ? tape.kept_.spread(tape.starts_[1], bank_.kept_width()) : RowView<Scalar>(),
        tape, workspace, exec);
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
  void forward(const Frozen& frozen, const Tokens<Scalar>& in, RowView<Scalar> y, Tape& tape, const Exec& exec = {}) const {
    expect_value(layout_ != nullptr && frozen.layer_ == layout_, forward_name, "the weights were not frozen by this layer");
    begin(in, y, tape);
    run(*frozen.weights_, in, y, {}, tape, tape.workspace_, exec);
  }

  /// From a forward's input and tape: overwrites dx (T,D), sets the gradient of the condition to 0 where `din` has one, and
  /// adds to the gradients of all parameters. The gradient is that of ⟨y, dy⟩. Rows of dx that are masked become 0.
  ///
  /// Throws ShapeError for other shapes or a block of another layout, ValueError if the tape holds no forward of this layer (or
  /// a copy of it) and as many tokens and the same mask, or what is written overlaps what is read, before anything is written.
  void backward(const Tokens<Scalar>& in, RowView<const Scalar> dy, const TokensGradient<Scalar>& din,
                ParameterView<Scalar> grads, Tape& tape, const Exec& exec = {}) const {
    backward(parameters_.view(), in, dy, din, grads, tape, exec);
  }
  void backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, RowView<const Scalar> dy,
                const TokensGradient<Scalar>& din, ParameterView<Scalar> grads, Tape& tape, const Exec& exec = {}) const {
    backward(p, in, dy, din, grads, tape, tape.workspace_, exec);
  }
  void backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, RowView<const Scalar> dy,
                const TokensGradient<Scalar>& din, ParameterView<Scalar> grads, const Tape& tape, Workspace& workspace,
                const Exec& exec = {}) const {
    expect_backward(p, in, dy, din, grads, tape);
    for (const RowView<Scalar>& d : {din.condition, din.gate_x, din.weight}) {
      detail::fill_rows(d, Scalar(0));
    }
    const Workspace::Frame frame(workspace);
    const Index rows = tape.starts_[1];
    RowView<const Scalar> kept = tape.kept_.spread_view(tape.keep_ == Keep::activations ? rows : 0, bank_.kept_width());
    if (tape.keep_ != Keep::activations) {
      const RowView<Scalar> again = workspace.spread<Scalar>(rows, bank_.kept_width());
      bank_.forward(p, rows_of(tape, in), {}, again, workspace, exec);  // no h: only what is kept
      kept = again;
    }
    const GroupedRows<Scalar> x = rows_of(tape, in);
    const OutputGradient<Scalar> dout(dy, x.index);
    if (!tape.masked_) {
      bank_.backward(p, x, dout, din.x, grads, kept, workspace, exec);
      return;
    }
    const RowView<Scalar> drows = workspace.matrix<Scalar>(rows, model_dim());
    bank_.backward(p, x, dout, drows, grads, kept, workspace, exec);
    scatter(drows, din.x, tape);
  }

 private:
  static constexpr std::string_view forward_name = "DenseFeedForward::forward";

  /// The checks of a forward, and the rows that take part. The tape then has no forward, until there is one.
  void begin(const Tokens<Scalar>& in, RowView<Scalar> y, Tape& tape) const {
    detail::expect_tokens(forward_name, in, model_dim());
    detail::expect_read(forward_name, in, {});
    expect_value(in.top_k <= 1, forward_name, "there is one expert; top_k cannot be more");
    expect_shape(forward_name, "y", y, in.count(), model_dim());
    expect_value(!overlaps(in.x, y), forward_name, "y overlaps x; the layer cannot run in place");
    expect_value(!rows_overlap(y), forward_name, "the rows of y overlap");
    expect_value(!overlaps(in.condition, y), forward_name, "y overlaps the condition");
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

  void expect_backward(ParameterView<const Scalar> p, const Tokens<Scalar>& in, RowView<const Scalar> dy,
                       const TokensGradient<Scalar>& din, ParameterView<Scalar> grads, const Tape& tape) const {
    constexpr std::string_view where = "DenseFeedForward::backward";
    detail::expect_tokens(where, in, model_dim());
    expect_shape(where, "dy", dy, in.count(), model_dim());
    expect_shape(where, "dx", din.x, in.count(), model_dim());
    if (din.condition.rows() != 0) {
      expect_shape(where, "dcondition", din.condition, in.condition.rows(), in.condition.cols());
    }
    detail::expect_tokens_gradient(where, in, din);
    expect_value(!rows_overlap(din.x), where, "the rows of dx overlap");
    expect_value(layout_ != nullptr && tape.layer_ == layout_, where, "the tape holds no forward of this layer");
    expect_value(tape.keep_ != Keep::nothing, where, "the tape was made to keep nothing for a backward");
    expect_value(is_forward_of(tape, in), where, "the tape holds no forward of these tokens and mask");
    expect_layout(where, p);
    expect_layout(where, grads);
    expect_value(p.complete(), where, "a parameter is absent");
    const auto apart = [](const auto& written, const auto&... read) { return (!overlaps(written, read) && ...); };
    expect_value(apart(grads, p, in.x, dy, din.x, din.condition, in.condition) && apart(p, din.x, din.condition) &&
                     apart(dy, din.x, din.condition),
                 where, "gradients overlap each other, or what they are computed from");
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
  void run(const Weights& weights, const Tokens<Scalar>& in, RowView<Scalar> y, RowView<Scalar> kept, const Tape& tape,
           Workspace& workspace, const Exec& exec) const {
    if (!tape.masked_) {
      detail::forward_bank(bank_, weights, rows_of(tape, in), y, kept, workspace, exec);
      return;
    }
    const Workspace::Frame frame(workspace);
    const RowView<Scalar> h = workspace.matrix<Scalar>(tape.starts_[1], model_dim());
    detail::forward_bank(bank_, weights, rows_of(tape, in), h, kept, workspace, exec);
    scatter(h, y, tape);
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
