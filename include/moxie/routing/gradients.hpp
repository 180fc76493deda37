// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/core/parameters.hpp>
#include <moxie/routing/plan.hpp>
#include <moxie/routing/tokens.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// Where a backward puts its results: `layer.backward(p, x, dy, {dx, grads}, tape, context)`.
template <class Scalar>
struct Gradients {
  TokensGradient<Scalar> tokens;          ///< of the tokens
  ParameterView<Scalar> parameters = {};  ///< added to; tensors may be absent
};

/// What a router's backward reads, and where it adds its results.
template <class Plan_>
struct RouterGradient {
  using Scalar = typename Plan_::Scalar;

  const typename Plan_::Gradient& plan;  ///< of what the plan holds
  RowView<const Scalar> logits;          ///< of `Tape::logits()`, in its shape; empty: there is none
  Gradients<Scalar> into;                ///< added to
};

}  // namespace moxie::inline MOXIE_NAMESPACE
