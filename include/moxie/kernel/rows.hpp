// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <moxie/kernel/simd.hpp>

/// Loops over the rows of views, on the calling thread.
namespace moxie::inline MOXIE_NAMESPACE::detail {

template <class T>
void fill_rows(RowView<T> m, T value) {
  for (Index i = 0; i < m.rows(); ++i) {
    std::fill_n(m.row(i), m.cols(), value);
  }
}

/// to = from, of the same shape.
template <class T>
void copy_rows(RowView<const std::type_identity_t<T>> from, RowView<T> to) {
  for (Index i = 0; i < to.rows(); ++i) {
    std::copy_n(from.row(i), to.cols(), to.row(i));
  }
}

/// to += from, of the same shape.
template <class T>
void add_rows(RowView<const std::type_identity_t<T>> from, RowView<T> to) {
  for (Index i = 0; i < to.rows(); ++i) {
    kernel::map(
        to.cols(), to.row(i), [](auto a, auto b) { return a + b; }, static_cast<const T*>(to.row(i)), from.row(i));
  }
}

}  // namespace moxie::inline MOXIE_NAMESPACE::detail
