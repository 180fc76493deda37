// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <moxie/core/index.hpp>

namespace moxie {

/// The memory of a matrix, in bytes: rows of equal width at equal distances, from the lowest address up.
///
/// The distance between rows as the matrix has it may be negative (rows in reverse), zero (one row repeated) or smaller than
/// a row (rows that overlap). An extent describes the same bytes with a distance of at least a row's width.
struct Extent {
  std::uintptr_t begin = 0;  ///< the first byte
  Index rows = 0;            ///< 0 where there is no byte
  Index width = 0;
  Index stride = 0;  ///< at least `width`

  Extent() = default;
  template <class T>
  Extent(const T* data, Index count, Index cols, Index distance)
      : begin(reinterpret_cast<std::uintptr_t>(data)),
        rows(cols == 0 ? 0 : count),
        width(cols * Index{sizeof(T)}),
        stride(distance * Index{sizeof(T)}) {
    if (stride < 0 && rows > 0) {  // the last row is the lowest
      begin -= std::uintptr_t((rows - 1) * -stride);
      stride = -stride;
    }
    if (stride < width && rows > 0) {  // no byte lies between rows: one row of all
      width += (rows - 1) * stride;
      rows = 1;
      stride = width;
    }
  }

  bool empty() const { return rows == 0; }
  /// Behind the last byte.
  std::uintptr_t end() const { return empty() ? begin : begin + std::uintptr_t((rows - 1) * stride + width); }
  Extent row(Index i) const {
    Extent one = *this;
    one.begin += std::uintptr_t(i * stride);
    one.rows = 1;
    return one;
  }
};

/// Whether two matrices share a byte. Cost: O(1); O(rows) if their hulls meet and both have several rows at other distances.
inline bool overlaps(const Extent& a, const Extent& b) {
  if (a.empty() || b.empty() || a.begin >= b.end() || b.begin >= a.end()) {
    return false;
  }
  if (a.rows > 1 && b.rows > 1 && a.stride != b.stride) {
    const Extent& fewer = a.rows < b.rows ? a : b;
    const Extent& more = a.rows < b.rows ? b : a;
    for (Index i = 0; i < fewer.rows; ++i) {
      if (overlaps(fewer.row(i), more)) {
        return true;
      }
    }
    return false;
  }
  if (a.rows == 1 && b.rows == 1) {
    return true;
  }
  // Columns of one matrix: where b begins in a's rows.
  const Index stride = a.rows > 1 ? a.stride : b.stride;
  const Index shift = Index(b.begin - a.begin) % stride;
  const Index start = shift < 0 ? shift + stride : shift;
  return start < a.width || start + b.width > stride;
}

namespace detail {

using moxie::Extent;
using moxie::overlaps;

}  // namespace detail
}  // namespace moxie
