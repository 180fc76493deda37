// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <moxie/config.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// A sum of doubles with twice their precision: value + rest, where the rest is the rounding error
/// of the value (Knuth's two-sum; Dekker 1971). The grouping of terms changes it by 2^-105 of their
/// size. So the sums of micro-batches add up to the sum of the whole batch, after rounding.
class WideSum {
 public:
  WideSum& operator+=(double x) {
    const double sum = value_ + x;
    const double part = sum - value_;
    rest_ += (value_ - (sum - part)) + (x - part);
    value_ = sum;
    return *this;
  }
  WideSum& operator+=(const WideSum& other) {
    *this += other.value_;
    rest_ += other.rest_;
    return *this;
  }
  double value() const { return value_ + rest_; }

 private:
  double value_ = 0;
  double rest_ = 0;
};

}  // namespace moxie::inline MOXIE_NAMESPACE
