// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/moxie.hpp>

namespace nn {

using moxie::RowView;

/// out = act(in), element by element. `Activation` is one of moxie's, `moxie::Silu` for example.
template <class Activation, class S>
void activate(RowView<const S> in, RowView<S> out) {
  moxie::kernel::map(
      in.size(), out.data(), [](auto a) { return Activation::value(a); }, in.data());
}

/// d = d · act'(in): the gradient of the output becomes that of the input, in place.
template <class Activation, class S>
void activate_backward(RowView<const S> in, RowView<S> d) {
  moxie::kernel::map(
      in.size(), d.data(), [](auto g, auto a) { return g * Activation::derivative(a); }, static_cast<const S*>(d.data()),
      in.data());
}

}  // namespace nn
