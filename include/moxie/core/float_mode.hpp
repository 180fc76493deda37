// SPDX-License-Identifier: MIT
#pragma once

#if defined(__SSE2_MATH__)
#define MOXIE_FLOAT_MODE_MXCSR
#elif defined(__aarch64__) && defined(__GNUC__)
#define MOXIE_FLOAT_MODE_FPCR
#else
#include <cfenv>
#endif

#include <cstdint>
#include <moxie/config.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// The floating-point mode of a thread: rounding mode, flushing of subnormal numbers to zero, and
/// traps. Every thread has its own mode. The same operations give other bits in another mode.
class FloatMode {
 public:
  /// The mode of the calling thread.
  static FloatMode current() {
    FloatMode mode;
    mode.read();
    return mode;
  }

  class Scope;

 private:
#if defined(MOXIE_FLOAT_MODE_MXCSR)
  // The six lowest bits are exception flags, which belong to the thread.
  static constexpr std::uint32_t flags = 0x3F;
  void read() { word_ = __builtin_ia32_stmxcsr() & ~flags; }
  void write() const { __builtin_ia32_ldmxcsr(word_ | (__builtin_ia32_stmxcsr() & flags)); }
  bool same(const FloatMode& other) const { return word_ == other.word_; }
  std::uint32_t word_ = 0;
#elif defined(MOXIE_FLOAT_MODE_FPCR)
  void read() { asm volatile("mrs %0, fpcr" : "=r"(word_)); }
  void write() const { asm volatile("msr fpcr, %0" : : "r"(word_)); }
  bool same(const FloatMode& other) const { return word_ == other.word_; }
  std::uint64_t word_ = 0;
#else
  void read() { std::fegetenv(&environment_); }
  void write() const { std::fesetenv(&environment_); }
  bool same(const FloatMode& /*other*/) const { return false; }  // the standard has no comparison
  std::fenv_t environment_;
#endif
};

/// Puts the calling thread into a mode until the end of a scope. Costs a read of a register if the
/// thread is in that mode already.
class FloatMode::Scope {
 public:
  explicit Scope(const FloatMode& mode) : before_(current()), differs_(!before_.same(mode)) {
    if (differs_) {
      mode.write();
    }
  }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;
  ~Scope() {
    if (differs_) {
      before_.write();
    }
  }

 private:
  FloatMode before_;
  bool differs_;
};

}  // namespace moxie::inline MOXIE_NAMESPACE
