// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cstdint>
#include <moxie/core/index.hpp>
#include <utility>
#include <vector>

namespace moxie::inline MOXIE_NAMESPACE {

/// The memory of a matrix, in bytes: rows of equal width at equal distances, from the lowest
/// address up.
///
/// A matrix's own distance between rows may be negative (rows in reverse), zero (one row repeated)
/// or smaller than a row (rows that overlap). An extent describes the same bytes with a distance of
/// at least a row's width.
struct Extent {
  std::uintptr_t begin = 0;  ///< the first byte
  Index rows = 0;            ///< 0 if there is no byte
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
  /// One past the last byte.
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

/// The memory of many matrices, in order of address: made once, compared often.
class ExtentList {
 public:
  ExtentList() = default;
  explicit ExtentList(std::vector<Extent> extents) : extents_(std::move(extents)) {
    std::erase_if(extents_, [](const Extent& e) { return e.empty(); });
    std::sort(extents_.begin(), extents_.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
    std::uintptr_t end = 0;
    ends_.reserve(extents_.size());
    for (const Extent& e : extents_) {
      overlap_ = overlap_ || meets(e, extents_.begin() + Index(ends_.size()));
      ends_.push_back(end = (std::max)(end, e.end()));
    }
  }

  bool empty() const { return extents_.empty(); }
  /// Whether two of the matrices share a byte.
  bool overlap_each_other() const { return overlap_; }

  /// Whether one of the matrices shares a byte with `other`. Cost: O(1) if `other` lies outside all
  /// of them, else a binary search and the neighbours.
  bool overlaps(const Extent& other) const {
    if (other.empty() || empty() || other.begin >= ends_.back() || other.end() <= extents_.front().begin) {
      return false;
    }
    return meets(other, std::lower_bound(extents_.begin(), extents_.end(), other.end(),
                                         [](const Extent& e, std::uintptr_t address) { return e.begin < address; }));
  }
  bool overlaps(const ExtentList& other) const {
    if (empty() || other.empty() || extents_.front().begin >= other.ends_.back() ||
        other.extents_.front().begin >= ends_.back()) {
      return false;
    }
    if (extents_.size() > other.extents_.size()) {
      return other.overlaps(*this);
    }
    return std::any_of(extents_.begin(), extents_.end(), [&](const Extent& e) { return other.overlaps(e); });
  }

 private:
  /// Whether one of the matrices before `last`, all of which begin before the end of e, shares a byte with e.
  bool meets(const Extent& e, std::vector<Extent>::const_iterator last) const {
    for (auto i = last - extents_.begin(); i > 0 && ends_[std::size_t(i - 1)] > e.begin; --i) {
      if (moxie::overlaps(extents_[std::size_t(i - 1)], e)) {
        return true;
      }
    }
    return false;
  }

  std::vector<Extent> extents_;
  std::vector<std::uintptr_t> ends_;  // the highest end of this matrix and those before
  bool overlap_ = false;
};

namespace detail {

using moxie::Extent;
using moxie::overlaps;

}  // namespace detail
}  // namespace moxie::inline MOXIE_NAMESPACE
