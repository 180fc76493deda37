// SPDX-License-Identifier: MIT
//
// What Debian 12's emscripten lacks of the C++20 library, so that the headers can be parsed for wasm32. Force-included; never
// run.
#pragma once

#include <atomic>
#include <version>

namespace std {

#if !defined(__cpp_lib_bit_cast)
template <class To, class From>
constexpr To bit_cast(const From& from) noexcept {
  return __builtin_bit_cast(To, from);
}
#endif

#if !defined(__cpp_lib_atomic_ref)
template <class T>
class atomic_ref {
 public:
  explicit atomic_ref(T& value) : value_(&value) {}
  T load(memory_order /*order*/ = memory_order_seq_cst) const { return *value_; }
  void store(T value, memory_order /*order*/ = memory_order_seq_cst) const { *value_ = value; }
  T fetch_add(T value, memory_order /*order*/ = memory_order_seq_cst) const { return exchange(*value_ + value); }
  T exchange(T value, memory_order /*order*/ = memory_order_seq_cst) const {
    const T before = *value_;
    *value_ = value;
    return before;
  }

 private:
  T* value_;
};
#endif

}  // namespace std
