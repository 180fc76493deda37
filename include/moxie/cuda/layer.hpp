// SPDX-License-Identifier: MIT
#pragma once

#include <functional>
#include <initializer_list>
#include <memory>
#include <moxie/cuda/expert_choice.hpp>
#include <moxie/cuda/experts.hpp>
#include <moxie/cuda/soft.hpp>
#include <moxie/cuda/top_k.hpp>
#include <moxie/layer/config.hpp>
#include <optional>

namespace moxie::inline MOXIE_NAMESPACE::cuda {
inline namespace MOXIE_CUDA_BACKEND {

namespace detail {

/// A number that layouts of other names or shapes do not share.
inline std::size_t fingerprint(const Layout& layout) {
  std::size_t hash = std::hash<Index>()(layout.size());
  const auto mix = [&hash](std::size_t x) { hash ^= x + 0x9e3779b97f4a7c15U + (hash << 6U) + (hash >> 2U); };
  for (const TensorInfo& t : layout.tensors()) {
    mix(std::hash<std::string>()(t.name));
    for (const Index n : t.shape) {
      mix(std::hash<Index>()(n));
    }
  }
  return hash;
}

/// A range of a block whose tensors lie in the same order on the host and on the device.
struct DeviceRange {
  Index on_host;
  Index on_device;
  Index size;
};
inline std::vector<DeviceRange> device_ranges(const Layout& layout) {
  std::vector<DeviceRange> ranges;
  Index on_device = 0;
  for (Index i = 0; i < layout.count(); ++i) {
    const Index size = device_size(layout, i);
    if (!ranges.empty() && ranges.back().on_host + ranges.back().size == layout.offset(i)) {
      ranges.back().size += size;
    } else {
      ranges.push_back({layout.offset(i), on_device, size});
    }
    on_device += size;
  }
  return ranges;
}

}  // namespace detail

/// A block of parameters or gradients on the device. Tensors lie in order of adding there, so that each part of a layer is one
/// block; on the host, those that no gradient trains come last. A copy takes a range that is the same on both sides.
template <class Scalar>
class DeviceParameters {
 public:
  /// Zeros.
  DeviceParameters(DeviceExec& exec, const Layout& layout)
      : layout_(detail::fingerprint(layout)), ranges_(detail::device_ranges(layout)) {
    block_.resize(exec, layout.size());
    set_zero(exec);
  }

  /// From and to a block of `layout().size()` numbers of the host: `parameters.flat().data()`. `download` waits for the device.
  void upload(DeviceExec& exec, const Scalar* block) {
    for (const detail::DeviceRange& range : ranges_) {
      exec.upload(block + range.on_host, block_.data() + range.on_device, range.size);
    }
  }
  void download(DeviceExec& exec, Scalar* block) const {
    for (const detail::DeviceRange& range : ranges_) {
      exec.read(block_.data() + range.on_device, block + range.on_host, range.size);
    }
  }
  void set_zero(DeviceExec& exec) { exec.zero(block_.data(), size()); }

  Scalar* data() { return block_.data(); }
  const Scalar* data() const { return block_.data(); }
  Index size() const { return block_.size(); }
  /// Whether it was made for this layout, and not moved away since.
  bool is_of(std::size_t layout) const { return layout == layout_ && data() != nullptr; }

 private:
  std::size_t layout_;
  std::vector<detail::DeviceRange> ranges_;
  DeviceBuffer<Scalar> block_;
};

/// Where a layer's backward puts its results: dx (T,D) is overwritten, the gradients of all parameters are added to.
template <class Scalar>
struct DeviceGradients {
  DeviceRows<Scalar> x;
  DeviceParameters<Scalar>& parameters;
};

/// The mixture-of-experts layer on the device: what `moxie::Moe` is on the CPU.
///
///     y = combine(experts(dispatch(x))) [+ shared(x)]
///
/// Parameters, gradients, x, y, dy and dx are the device's; rows may be any distance apart that is
/// at least their length. `forward` and `backward` queue work on the stream and return; token
/// choice waits for the device once, in the middle of `forward`. Results are bit-identical from run
/// to run.
template <class Router_, class Experts_>
class Moe {
 public:
  using Scalar = typename Router_::Scalar;
  using Element = typename Experts_::Element;
  using Plan = typename Router_::Plan;
  static_assert(std::is_same_v<Scalar, typename Experts_::Scalar>, "Moe: router and experts must have the same scalar");

  /// What `backward` needs of a `forward`; reused from step to step.
  class Tape {
   public:
    const Plan& plan() const { return plan_; }
    const typename Router_::Tape& router() const { return router_; }
    /// Where token t of the plan stands in x: with a mask, those that it leaves are numbered without gaps.
    Index row(Index token) const { return masked_ ? unmasked_.rows()[std::size_t(token)] : token; }
    /// The balance losses of the last forward, weighted. `backward` adds their gradient. Waits for the device.
    double balance_loss(DeviceExec& exec) const { return router_.balance_loss(exec); }

   private:
    friend class Moe;
    /// Whether the forward was of that division and mask.
    bool is_of(const DeviceTokens<Scalar>& in) const {
      if (masked_ || !in.mask.empty()) {
        return masked_ && unmasked_.are_of(in.mask, in.sequences);
      }
      return sequences_ == in.sequences;
    }

    std::shared_ptr<const Layout> layer_;  // that a forward was of
    bool masked_ = false;
    UnmaskedTokens unmasked_;
    DeviceBuffer<Scalar> unmasked_x_, unmasked_noise_;
    DeviceSequences sequences_;
    DeviceSequences whole_;  // all tokens as the rows of one expert
    Plan plan_;
    typename Router_::Tape router_;
    typename Experts_::Tape experts_, shared_;
    DeviceBuffer<Scalar> h_;      // what the experts made of the rows; of slots in the order of sequences
    DeviceBuffer<Scalar> slots_;  // X̃, in the same order
  };

  /// The layer for inference: parameters of the device in the form that products read, of which the bank's take half the memory
  /// with BFloat16. It refers to no block.
  class Frozen {
    friend class Moe;
    std::shared_ptr<const Layout> layer_;
    DeviceBuffer<Scalar> router_;
    typename Experts_::Frozen experts_;
    std::optional<typename Experts_::Frozen> shared_;
  };

  /// Throws ValueError if the parts differ in experts or width.
  Moe(Router_ router, Experts_ experts, std::optional<Experts_> shared, std::string name)
      : name_(std::move(name)), router_(std::move(router)), experts_(std::move(experts)), shared_(std::move(shared)) {
    detail::expect_value(router_.experts() == experts_.experts() && router_.model_dim() == experts_.model_dim(), name_,
                         "the router is for other experts or another width than the bank");
    if (shared_) {
      detail::expect_value(shared_->experts() == 1 && shared_->model_dim() == experts_.model_dim(), name_,
                           "shared experts are a bank of one expert of the same width");
    }
    auto layout = std::make_shared<Layout>();
    layout->add_part("", router_.layout());
    layout->add_part("", experts_.layout());
    experts_offset_ = router_.layout().size();
    if (shared_) {
      layout->add_part("", shared_->layout());
      shared_offset_ = experts_offset_ + experts_.layout().size();
    }
    layout_ = std::move(layout);
    fingerprint_ = detail::fingerprint(*layout_);
  }

  const Router_& router() const { return router_; }
  const Experts_& experts() const { return experts_; }
  Index model_dim() const { return experts_.model_dim(); }
  /// That of the CPU's layer of the same options.
  const Layout& layout() const { return *layout_; }
  Tape make_tape() const { return {}; }

  /// y (T,D) from x (T,D), overwritten. T = 0 is legal. Rows of y that are masked become 0.
  ///
  /// Throws ShapeError for other shapes or parameters, ValueError if y overlaps x or the parameters, or rows overlap, and with
  /// token choice if a logit is not finite, before y is written. CudaError where a call fails.
  void forward(DeviceExec& exec, const DeviceParameters<Scalar>& parameters, const DeviceTokens<Scalar>& in,
               DeviceRows<Scalar> y, Tape& tape) const {
    const std::string where = name_ + "::forward";
    expect_layout(where, parameters);
    expect_apart(where, "y overlaps the parameters", y.extent(), {memory_of(parameters)});
    run_checked(exec, parameters.data(), in, y, tape);
    tape.layer_ = layout_;
  }

  /// Balance without a loss, after the optimizer's step: b_i += γ sign(mean load - load_i), from the load that
  /// `tape.router().add_times_chosen` counted. Throws ShapeError for parameters of another layout, ValueError if the router has
  /// no selection bias, the load is not of E experts, or the rate is not finite.
  void update_selection_bias(DeviceExec& exec, DeviceParameters<Scalar>& parameters, const DeviceBuffer<double>& load,
                             double rate, bool recentre = false) const {
    expect_layout(name_ + "::update_selection_bias", parameters);
    router_.update_selection_bias(exec, parameters.data() + router_offset_, load, rate, recentre);
  }

  /// Packs parameters for any number of forwards without a backward.
  Frozen freeze(DeviceExec& exec, const DeviceParameters<Scalar>& parameters) const {
    expect_layout(name_ + "::freeze", parameters);
    Frozen frozen;
    const Scalar* p = parameters.data();
    exec.copy(p + router_offset_, frozen.router_.resize(exec, router_.layout().size()), router_.layout().size());
    frozen.experts_ = experts_.freeze(exec, p + experts_offset_);
    if (shared_) {
      frozen.shared_ = shared_->freeze(exec, p + shared_offset_);
    }
    frozen.layer_ = layout_;
    return frozen;
  }
  /// The same y as with the parameters that were frozen, bit for bit. The tape holds the plan, and nothing for a backward.
  void forward(DeviceExec& exec, const Frozen& frozen, const DeviceTokens<Scalar>& in, DeviceRows<Scalar> y, Tape& tape) const {
    detail::expect_value(layout_ != nullptr && frozen.layer_ == layout_, name_ + "::forward",
                         "the weights were not frozen by this layer");
    run_checked(exec, frozen, in, y, tape);
  }

  /// From the x of a forward and its tape: overwrites dx (T,D), adds to the gradients of all parameters: of ⟨y, dy⟩ +
  /// balance_loss. Rows of dx that are masked become 0.
  ///
  /// Throws ShapeError for other shapes, parameters or gradients, ValueError if the tape holds no forward of this layer,
  /// sequences and mask, rows overlap, or what is written overlaps what is read, before anything is written. CudaError where a
  /// call fails.
  void backward(DeviceExec& exec, const DeviceParameters<Scalar>& parameters, const DeviceTokens<Scalar>& in,
                DeviceRows<const Scalar> dy, const DeviceGradients<Scalar>& into, const Tape& tape) const {
    const std::string where = name_ + "::backward";
    const DeviceRows<Scalar> dx = into.x;
    DeviceParameters<Scalar>& grads = into.parameters;
    detail::expect_tokens(where, in, model_dim());
    expect_rows(where, "dy", dy, in);
    expect_rows(where, "dx", dx, in);
    expect_rows(where, "x", in.x, in);
    expect_layout(where, parameters);
    expect_layout(where, grads);
    detail::expect_value(layout_ != nullptr && tape.layer_ == layout_ && tape.is_of(in), where,
                         "the tape holds no forward of this layer, these sequences and this mask");
    expect_apart(where, "dx overlaps x, dy or the parameters", dx.extent(),
                 {in.x.extent(), dy.extent(), memory_of(parameters)});
    expect_apart(where, "the gradients overlap what they are computed from, or dx", memory_of(grads),
                 {in.x.extent(), dy.extent(), dx.extent(), memory_of(parameters)});
    if (!tape.masked_) {
      run_backward(exec, parameters.data(), in, dy, {dx, grads.data()}, tape);
      return;
    }
    const DeviceExec::Frame frame(exec);
    const DeviceTokens<Scalar> part = unmasked_tokens(in, tape);
    const DeviceRows<Scalar> dx_part(exec.scratch<Scalar>(in.count() * model_dim()), part.count(), model_dim());
    run_backward(exec, parameters.data(), part,
                 gather<Scalar>(exec, dy, tape.unmasked_.device_rows(), part.count(), in.count()), {dx_part, grads.data()},
                 tape);
    exec.for_each_row(in.count(), dx.cols, RestoreRow<Scalar>{dx_part, tape.unmasked_.device_place(), dx});
  }

 private:
  static constexpr bool sparse = std::is_same_v<Plan, SparsePlan<Scalar>>;
  static constexpr Index of_group = Product<Scalar, Scalar>::of_group;

  template <class T>
  void expect_rows(const std::string& where, const char* what, const DeviceRows<T>& m, const DeviceTokens<Scalar>& in) const {
    if (m.rows != in.count() || m.cols != model_dim()) {
      throw ShapeError(where + ": " + what + " is " + moxie::detail::dimensions(m.rows, m.cols) + ", expected " +
                       moxie::detail::dimensions(in.count(), model_dim()));
    }
    if (m.rows > 1 && m.stride < m.cols) {
      throw ShapeError(where + ": the rows of " + what + " overlap");
    }
  }
  void expect_layout(const std::string& where, const DeviceParameters<Scalar>& block) const {
    if (!block.is_of(fingerprint_)) {
      throw ShapeError(where + ": the parameters or gradients have another layout than the layer");
    }
  }
  static moxie::detail::Extent memory_of(const DeviceParameters<Scalar>& block) { return {block.data(), 1, block.size(), 0}; }
  static void expect_apart(const std::string& where, const char* message, const moxie::detail::Extent& written,
                           std::initializer_list<moxie::detail::Extent> read) {
    for (const moxie::detail::Extent& other : read) {
      detail::expect_value(!moxie::detail::overlaps(written, other), where, message);
    }
  }

  // The parts of a block of parameters, or of a frozen one.
  const Scalar* router_part(const Scalar* p) const { return p + router_offset_; }
  const Scalar* experts_part(const Scalar* p) const { return p + experts_offset_; }
  const Scalar* shared_part(const Scalar* p) const { return p + shared_offset_; }
  const Scalar* router_part(const Frozen& frozen) const { return frozen.router_.data(); }
  const auto& experts_part(const Frozen& frozen) const { return frozen.experts_; }
  const auto& shared_part(const Frozen& frozen) const { return *frozen.shared_; }

  /// Checks all but the weights, leaves masked tokens out, and runs; after a failure and afterwards the tape has no forward.
  template <class Weights>
  void run_checked(DeviceExec& exec, const Weights& weights, const DeviceTokens<Scalar>& in, DeviceRows<Scalar> y,
                   Tape& tape) const {
    const std::string where = name_ + "::forward";
    detail::expect_tokens(where, in, model_dim());
    expect_rows(where, "x", in.x, in);
    expect_rows(where, "y", y, in);
    expect_apart(where, "y overlaps x", y.extent(), {in.x.extent()});
    tape.layer_ = nullptr;
    try {
      run_unmasked(exec, weights, in, y, tape);
    } catch (...) {  // a tape without a forward, not one with parts of two
      tape.masked_ = false;
      tape.plan_.clear();
      tape.router_.clear();
      throw;
    }
  }
  template <class Weights>
  void run_unmasked(DeviceExec& exec, const Weights& weights, const DeviceTokens<Scalar>& in, DeviceRows<Scalar> y,
                    Tape& tape) const {
    tape.masked_ = !in.mask.empty();
    if (!tape.masked_) {
      DeviceTokens<Scalar> all = in;
      all.rows = {};
      all.whole = {};
      run(exec, weights, all, y, tape);
      return;
    }
    tape.unmasked_.set(exec, in.mask, in.sequences);
    const Index count = tape.unmasked_.count();
    const auto take = [&](DeviceRows<const Scalar> from, DeviceBuffer<Scalar>& buffer) {
      const DeviceRows<Scalar> to(buffer.resize(exec, count * from.cols, in.count() * from.cols), count, from.cols);
      exec.for_each_row(count, to.cols, GatherRow<Scalar, Scalar>{from, tape.unmasked_.device_rows(), to});
    };
    take(in.x, tape.unmasked_x_);
    if (reads_noise(in)) {
      take(in.noise, tape.unmasked_noise_);
    }
    const DeviceTokens<Scalar> part = unmasked_tokens(in, tape);
    const DeviceExec::Frame frame(exec);
    const DeviceRows<Scalar> y_part(exec.scratch<Scalar>(in.count() * model_dim()), part.count(), model_dim());
    run(exec, weights, part, y_part, tape);
    exec.for_each_row(in.count(), y.cols, RestoreRow<Scalar>{y_part, tape.unmasked_.device_place(), y});
  }
  /// What a mask leaves of the tokens of a forward.
  DeviceTokens<Scalar> unmasked_tokens(const DeviceTokens<Scalar>& in, const Tape& tape) const {
    DeviceTokens<Scalar> out = in;
    out.x = {tape.unmasked_x_.data(), tape.unmasked_.count(), model_dim()};
    out.sequences = tape.unmasked_.sequences();
    out.mask = {};
    out.rows = tape.unmasked_.rows();
    out.whole = in.sequences;
    out.noise = {};
    if (reads_noise(in)) {
      out.noise = {tape.unmasked_noise_.data(), out.count(), in.noise.cols};
    }
    return out;
  }
  static bool reads_noise(const DeviceTokens<Scalar>& in) { return in.training && in.noise.rows != 0; }
  /// The tokens as a router reads them.
  static DeviceTokens<Scalar> divided(const DeviceTokens<Scalar>& in, const Tape& tape) {
    DeviceTokens<Scalar> out = in;
    out.on_device = &tape.sequences_;
    return out;
  }
  /// The three steps, over tokens that are not masked; the arguments have been checked.
  template <class Weights>
  void run(DeviceExec& exec, const Weights& weights, const DeviceTokens<Scalar>& in, DeviceRows<Scalar> y, Tape& tape) const {
    tape.sequences_.set(exec, in.sequences, in.room());
    router_.route(exec, router_part(weights), divided(in, tape), tape.plan_, tape.router_);
    if (shared_) {
      tape.whole_.set(exec, Sequences().over(in.count()), in.room());
      if (in.count() > 0) {
        shared_->forward(exec, shared_part(weights), {tape.whole_.groups(), in.x, nullptr, nullptr, in.room()}, y,
                         tape.shared_);
      }
    }
    run_experts(exec, experts_part(weights), in, y, tape);
  }
  void run_backward(DeviceExec& exec, const Scalar* p, const DeviceTokens<Scalar>& in, DeviceRows<const Scalar> dy,
                    const DeviceGradient<Scalar>& into, const Tape& tape) const {
    const DeviceExec::Frame frame(exec);
    if (shared_ && in.count() > 0) {
      shared_->backward(exec, shared_part(p), {tape.whole_.groups(), in.x, nullptr, nullptr, in.room()},
                        elements(exec, dy, in.room()), {into.x, into.parameters + shared_offset_}, tape.shared_);
    }
    run_experts_backward(exec, p, divided(in, tape), dy, into, tape);
  }

  /// Rows as products read them.
  static DeviceRows<const Element> elements(DeviceExec& exec, DeviceRows<const Scalar> m, Index room) {
    if constexpr (std::is_same_v<Element, Scalar>) {
      return m;
    } else {
      return gather<Element>(exec, m, nullptr, m.rows, room);
    }
  }
  template <class To>
  static DeviceRows<To> gather(DeviceExec& exec, DeviceRows<const Scalar> m, const int* index, Index rows, Index room) {
    const DeviceRows<To> out(exec.scratch<To>(room * m.cols), rows, m.cols);
    exec.for_each_row(rows, out.cols, GatherRow<Scalar, To>{m, index, out});
    return out;
  }
  /// C (of each sequence) = A B, rows by sequences and blocks of N slots.
  template <class Scalar2>
  static Series<Scalar2> slots_of(DeviceRows<Scalar2> m, Index slot_count, bool transposed = false) {
    return block_of(m, slot_count * m.cols, transposed);
  }

  /// y += combine of what the experts make of the rows; y = where there is no shared expert.
  template <class Weights>
  void run_experts(DeviceExec& exec, const Weights& weights, const DeviceTokens<Scalar>& in, DeviceRows<Scalar> y,
                   Tape& tape) const {
    const Index rows = tape.plan_.rows();
    const Index dim = model_dim();
    const DeviceExec::Frame frame(exec);
    const DeviceRows<Scalar> kept(tape.h_.resize(exec, rows * dim, tape.plan_.room() * dim), rows, dim);
    if constexpr (sparse) {
      experts_.forward(exec, weights, {tape.plan_.groups(), in.x, tape.plan_.token(), tape.plan_.expert(), tape.plan_.room()},
                       kept, tape.experts_);
      exec.for_each_row(in.count(), dim,
                        CombineRow<Scalar>{tape.plan_.rows_of_token(), tape.plan_.weight(), kept, y, shared_.has_value()});
    } else {
      const Groups groups = tape.sequences_.groups();
      const Index slot_count = tape.plan_.slot_count();
      const DeviceRows<Scalar> mixed(tape.slots_.resize(exec, rows * dim), rows, dim);
      multiply<Scalar, Scalar>(exec, groups,
                               {.m = slot_count,
                                .n = dim,
                                .k = of_group,
                                .a = rows_of(std::as_const(tape.plan_).dispatch(), true),
                                .b = rows_of(in.x),
                                .c = slots_of(mixed, slot_count)});
      const DeviceRows<Scalar> h(exec.scratch<Scalar>(rows * dim), rows, dim);
      experts_.forward(exec, weights, {tape.plan_.groups(), mixed, tape.plan_.slot_of_row(), tape.plan_.expert()}, h,
                       tape.experts_);
      exec.for_each_row(rows, kept.cols, GatherRow<Scalar, Scalar>{h, tape.plan_.row_of_slot(), kept});
      multiply<Scalar, Scalar>(exec, groups,
                               {.m = of_group,
                                .n = dim,
                                .k = slot_count,
                                .a = rows_of(std::as_const(tape.plan_).combine()),
                                .b = slots_of(DeviceRows<const Scalar>(kept), slot_count),
                                .c = rows_of(y),
                                .add = shared_.has_value()});
    }
  }

  void run_experts_backward(DeviceExec& exec, const Scalar* p, const DeviceTokens<Scalar>& in, DeviceRows<const Scalar> dy,
                            const DeviceGradient<Scalar>& into, const Tape& tape) const requires(sparse) {
    const DeviceRows<Scalar> dx = into.x;
    Scalar* const grads = into.parameters;
    const Index rows = tape.plan_.rows();
    const Index dim = model_dim();
    const DeviceRows<const Scalar> kept(tape.h_.data(), rows, dim);
    const DeviceRows<Scalar> drows(exec.scratch<Scalar>(tape.plan_.room() * dim), rows, dim);
    Scalar* dweight = exec.scratch<Scalar>(tape.plan_.room());
    const DeviceRows<Element> dh(exec.scratch<Element>(tape.plan_.room() * dim), rows, dim);
    exec.for_each_row(rows,
                      CombineBackwardRow<Scalar, Element>{tape.plan_.token(), tape.plan_.weight(), kept, dy, dh, dweight});
    experts_.backward(exec, p + experts_offset_,
                      {tape.plan_.groups(), in.x, tape.plan_.token(), tape.plan_.expert(), tape.plan_.room()}, dh,
                      {drows, grads + experts_offset_}, tape.experts_);
    exec.for_each_row(in.count(), dx.cols,
                      CombineRow<Scalar>{tape.plan_.rows_of_token(), nullptr, drows, dx, shared_.has_value()});
    router_.backward(exec, p + router_offset_, in, tape.plan_, {dweight, {dx, grads + router_offset_}}, tape.router_);
  }
  void run_experts_backward(DeviceExec& exec, const Scalar* p, const DeviceTokens<Scalar>& in, DeviceRows<const Scalar> dy,
                            const DeviceGradient<Scalar>& into, const Tape& tape) const requires(!sparse) {
    const DeviceRows<Scalar> dx = into.x;
    Scalar* const grads = into.parameters;
    const Index rows = tape.plan_.rows();
    const Index dim = model_dim();
    const DeviceRows<const Scalar> kept(tape.h_.data(), rows, dim);
    const DeviceRows<Scalar> drows(exec.scratch<Scalar>(tape.plan_.room() * dim), rows, dim);
    const Groups groups = tape.sequences_.groups();
    const Index slot_count = tape.plan_.slot_count();
    const Index tokens = in.count();
    const DeviceRows<const Scalar> dispatch = tape.plan_.dispatch();
    const DeviceRows<const Scalar> combine = tape.plan_.combine();
    const DeviceRows<const Scalar> mixed(tape.slots_.data(), rows, dim);
    const DeviceRows<Scalar> dout(exec.scratch<Scalar>(rows * dim), rows, dim);  // dỸ, then dX̃
    const DeviceRows<Scalar> ddispatch(exec.scratch<Scalar>(in.room() * slot_count), tokens, slot_count);
    const DeviceRows<Scalar> dcombine(exec.scratch<Scalar>(in.room() * slot_count), tokens, slot_count);
    multiply<Scalar, Scalar>(exec, groups,
                             {.m = slot_count,
                              .n = dim,
                              .k = of_group,
                              .a = rows_of(combine, true),
                              .b = rows_of(dy),
                              .c = slots_of(dout, slot_count)});
    multiply<Scalar, Scalar>(exec, groups,
                             {.m = of_group,
                              .n = slot_count,
                              .k = dim,
                              .a = rows_of(dy),
                              .b = slots_of(kept, slot_count, true),
                              .c = rows_of(dcombine)});
    experts_.backward(exec, p + experts_offset_, {tape.plan_.groups(), mixed, tape.plan_.slot_of_row(), tape.plan_.expert()},
                      gather<Element>(exec, dout, tape.plan_.slot_of_row(), rows, rows), {drows, grads + experts_offset_},
                      tape.experts_);
    exec.for_each_row(rows, dout.cols, GatherRow<Scalar, Scalar>{drows, tape.plan_.row_of_slot(), dout});
    multiply<Scalar, Scalar>(exec, groups,
                             {.m = of_group,
                              .n = slot_count,
                              .k = dim,
                              .a = rows_of(in.x),
                              .b = slots_of(DeviceRows<const Scalar>(dout), slot_count, true),
                              .c = rows_of(ddispatch)});
    multiply<Scalar, Scalar>(exec, groups,
                             {.m = of_group,
                              .n = dim,
                              .k = slot_count,
                              .a = rows_of(dispatch),
                              .b = slots_of(DeviceRows<const Scalar>(dout), slot_count),
                              .c = rows_of(dx),
                              .add = shared_.has_value()});
    router_.backward(exec, p + router_offset_, in, tape.plan_, {ddispatch, dcombine, {dx, grads + router_offset_}},
                     tape.router_);
  }

  std::string name_;
  Router_ router_;
  Experts_ experts_;
  std::optional<Experts_> shared_;
  Index router_offset_ = 0;
  Index experts_offset_ = 0;
  Index shared_offset_ = 0;
  std::shared_ptr<const Layout> layout_;  // what tapes know the layer by; copies of the layer share it
  std::size_t fingerprint_ = 0;           // what blocks know it by
};

/// `moxie::TopKMoE` on the device.
template <class Scalar, class Experts = SwiGluExperts<Scalar>>
class TopKMoE : public Moe<TopKRouter<Scalar>, Experts> {
 public:
  using Config = TopKMoEConfig<typename Experts::Config>;

  explicit TopKMoE(const Config& config)
      : Moe<TopKRouter<Scalar>, Experts>(TopKRouter<Scalar>(config.router()),
                                         Experts(config.experts, config.model_dim, config.expert), std::nullopt, "TopKMoE") {}
};

/// `moxie::SharedExpertMoE` on the device.
template <class Scalar, class Experts = SwiGluExperts<Scalar>>
class SharedExpertMoE : public Moe<TopKRouter<Scalar>, Experts> {
 public:
  using Config = SharedExpertMoEConfig<typename Experts::Config>;

  explicit SharedExpertMoE(const Config& config)
      : Moe<TopKRouter<Scalar>, Experts>(
            TopKRouter<Scalar>(config.router()), Experts(config.experts, config.model_dim, config.expert),
            Experts(1, config.model_dim, config.shared, BankNames{"shared_experts", false}), "SharedExpertMoE") {}
};

/// `moxie::ExpertChoiceMoE` on the device.
template <class Scalar, class Experts = SwiGluExperts<Scalar>>
class ExpertChoiceMoE : public Moe<ExpertChoiceRouter<Scalar>, Experts> {
 public:
  using Config = ExpertChoiceMoEConfig<typename Experts::Config>;

  explicit ExpertChoiceMoE(const Config& config)
      : Moe<ExpertChoiceRouter<Scalar>, Experts>(ExpertChoiceRouter<Scalar>(config.router()),
                                                 Experts(config.experts, config.model_dim, config.expert), std::nullopt,
                                                 "ExpertChoiceMoE") {}
};

/// `moxie::SoftMoE` on the device.
template <class Scalar, class Experts = GeluTanhExperts<Scalar>>
class SoftMoE : public Moe<SoftRouter<Scalar>, Experts> {
 public:
  using Config = SoftMoEConfig<typename Experts::Config>;

  explicit SoftMoE(const Config& config)
      : Moe<SoftRouter<Scalar>, Experts>(SoftRouter<Scalar>(config.router()),
                                         Experts(config.experts, config.model_dim, config.expert), std::nullopt, "SoftMoE") {}
};

}  // namespace MOXIE_CUDA_BACKEND
}  // namespace moxie::inline MOXIE_NAMESPACE::cuda
