// SPDX-License-Identifier: MIT
#pragma once

#include <cstdint>
#include <moxie/core/index.hpp>

namespace moxie {

/// The memory of a matrix, in bytes: rows of equal width at equal distances.
struct Extent {
  std::uintptr_t begin = 0;
  Index rows = 0;
  Index width = 0;
  Index stride = 0;

  template <class T>
  Extent(const T* data, Index count, Index cols, Index distance)
      : begin(reinterpret_cast<std::uintptr_t>(data)),
        rows(count),
        width(cols * Index{sizeof(T)}),
        stride(distance * Index{sizeof(T)}) {}

  bool empty() const { return rows == 0 || width == 0; }
  std::uintptr_t end() const { return std::uintptr_t(Index(begin) + (rows - 1) * stride + width); }
};

/// Whether two matrices share a byte. Those of other strides count as sharing what lies between their rows.
inline bool overlaps(const Extent& a, const Extent& b) {
  if (a.empty() || b.empty() || a.begin >= b.end() || b.begin >= a.end()) {
    return false;
  }
  if (a.stride != b.stride || a.stride <= 0) {
    return true;
  }
  // Columns of one matrix: where b begins in a's rows.
  const Index shift = (Index(b.begin) - Index(a.begin)) % a.stride;
  const Index start = shift < 0 ? shift + a.stride : shift;
  return start < a.width || start + b.width > a.stride;
}

namespace detail {

using moxie::Extent;
using moxie::overlaps;

}  // namespace detail
}  // namespace moxie
