// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <initializer_list>
#include <moxie/core/extent.hpp>
#include <moxie/routing/gradients.hpp>
#include <moxie/routing/tokens.hpp>
#include <string>
#include <string_view>

namespace moxie::inline MOXIE_NAMESPACE {

/// What a forward writes. Converts from a plain matrix, y.
///
///     layer.forward(x, {y, logits}, tape);
template <class Scalar>
struct Outputs {
  RowView<Scalar> y;            ///< (T,D), overwritten
  RowView<Scalar> logits = {};  ///< (T,E), overwritten: `Tape::logits()` of the router, 0 for masked tokens; empty: not wanted

  Outputs() = default;
  template <class M>
  requires std::is_convertible_v<M&&, RowView<Scalar>> Outputs(  // NOLINT(bugprone-forwarding-reference-overload): constrained
      M&& out, RowView<Scalar> of_router = {})
      : y(std::forward<M>(out)), logits(of_router) {}
};

/// The gradient of `Outputs`, which backward reads. Converts from a plain matrix, dy.
///
///     layer.backward(x, {dy, dlogits}, dx, grads, tape);
template <class Scalar>
struct OutputsGradient {
  RowView<const Scalar> y;            ///< (T,D)
  RowView<const Scalar> logits = {};  ///< (T,E): the gradient of a loss of one's own on the logits; empty: there is none

  OutputsGradient() = default;
  template <class M>
  requires std::is_convertible_v<M&&, RowView<const Scalar>>
  OutputsGradient(  // NOLINT(bugprone-forwarding-reference-overload): constrained
      M&& dy, RowView<const Scalar> dlogits = {})
      : y(std::forward<M>(dy)), logits(dlogits) {}
};

namespace detail {

/// The memory of an argument, by the name that errors give it.
struct NamedExtent {
  std::string_view name;
  Extent extent;
};

/// Calls `f(extent)` for all that a call may read of its tokens.
template <class Scalar, class F>
void for_each_read(const Tokens<Scalar>& in, F&& f) {
  const auto of_span = [&](std::string_view name, const auto& span) {
    f(NamedExtent{name, Extent(span.data(), Index(span.size()), 1, 1)});
  };
  for_each_token_field(in, [&](std::string_view name, const auto& field) {
    if constexpr (requires { field.cols(); }) {
      f(NamedExtent{name, extent_of(field)});
    } else {
      of_span(name, field);
    }
  });
  f(NamedExtent{"the condition", extent_of(in.condition)});
  of_span("the mask", in.mask);
  of_span("labels", in.labels);
}

/// Throws ValueError if `meet`. The text is made only then: a step allocates nothing.
inline void expect_no_overlap(bool meet, std::string_view where, std::string_view written, std::string_view other) {
  if (meet) {
    throw ValueError(std::string(where) + ": " + std::string(written) + " overlaps " + std::string(other));
  }
}

/// Throws ValueError for two of what is written that share memory.
inline void expect_apart(std::string_view where, std::initializer_list<NamedExtent> written) {
  for (const NamedExtent* a = written.begin(); a != written.end(); ++a) {
    for (const NamedExtent* b = written.begin(); b != a; ++b) {
      expect_no_overlap(overlaps(a->extent, b->extent), where, a->name, b->name);
    }
  }
}

/// Throws ValueError if something that is written shares memory with what is read.
inline void expect_not_written(std::string_view where, std::initializer_list<NamedExtent> written, const NamedExtent& read) {
  for (const NamedExtent& w : written) {
    expect_no_overlap(overlaps(w.extent, read.extent), where, w.name, read.name);
  }
}

/// The checks of all that a forward gets except parameters, before anything is written. The logits are (rows, cols) if they
/// are wanted; cols = 0: the layer has none.
template <class Scalar>
void expect_forward(std::string_view where, const Tokens<Scalar>& in, const Outputs<Scalar>& out, Index model_dim,
                    Index logit_rows, Index logit_cols) {
  expect_tokens(where, in, model_dim);
  expect_shape(where, "y", out.y, in.count(), model_dim);
  expect_value(!rows_overlap(out.y), where, "the rows of y overlap");
  if (out.logits.cols() != 0) {
    expect_value(logit_cols > 0, where, "logits are wanted, and the router of this layer has none");
    expect_shape(where, "logits", out.logits, logit_rows, logit_cols);
    expect_value(!rows_overlap(out.logits), where, "the rows of logits overlap");
  }
  const auto written = {NamedExtent{"y", extent_of(out.y)}, NamedExtent{"logits", extent_of(out.logits)}};
  expect_apart(where, written);
  for_each_read(in, [&](const NamedExtent& read) { expect_not_written(where, written, read); });
}

/// The checks of all that a backward gets except the tape and layouts, before anything is written.
template <class Scalar>
void expect_backward(std::string_view where, ParameterView<const std::type_identity_t<Scalar>> p, const Tokens<Scalar>& in,
                     const OutputsGradient<Scalar>& dout, const Gradients<Scalar>& into, Index model_dim) {
  const TokensGradient<Scalar>& din = into.tokens;
  expect_tokens(where, in, model_dim);
  expect_shape(where, "dy", dout.y, in.count(), model_dim);
  expect_shape(where, "dx", din.x, in.count(), model_dim);
  expect_value(std::isfinite(Scalar(din.loss_factor)), where, "loss_factor is not finite");
  const auto expect_gradient = [&](std::string_view name, const RowView<Scalar>& d, const RowView<const Scalar>& of) {
    if (d.rows() != 0) {
      expect_shape(where, name, d, of.rows(), of.cols());
    }
    if (rows_overlap(d)) {
      throw ValueError(std::string(where) + ": the rows of " + std::string(name) + " overlap");
    }
  };
  expect_gradient("dx", din.x, in.x);
  expect_gradient("dcondition", din.condition, in.condition);
  expect_gradient("dgate_x", din.gate_x, in.gate_x);
  expect_gradient("dweight", din.weight, in.weight);
  const auto written = {NamedExtent{"dx", extent_of(din.x)}, NamedExtent{"dcondition", extent_of(din.condition)},
                        NamedExtent{"dgate_x", extent_of(din.gate_x)}, NamedExtent{"dweight", extent_of(din.weight)}};
  expect_apart(where, written);
  const auto expect_read_only = [&](const NamedExtent& read) {
    expect_not_written(where, written, read);
    expect_no_overlap(into.parameters.overlaps(read.extent), where, "the block of gradients", read.name);
  };
  for_each_read(in, expect_read_only);
  expect_read_only({"dy", extent_of(dout.y)});
  expect_read_only({"dlogits", extent_of(dout.logits)});
  for (const NamedExtent& w : written) {
    expect_no_overlap(p.overlaps(w.extent), where, w.name, "the parameters");
    expect_no_overlap(into.parameters.overlaps(w.extent), where, w.name, "the block of gradients");
  }
  expect_no_overlap(into.parameters.overlaps(p), where, "the block of gradients", "the parameters");
}

}  // namespace detail
}  // namespace moxie::inline MOXIE_NAMESPACE
