// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <limits>
#include <moxie/core/error.hpp>
#include <span>
#include <type_traits>

/// Prefetching: which lines, and when. A tile prefetches a line or two in every step of its loop:
/// first lines that will be read, in its last steps lines that its epilogue will write.
namespace moxie::inline MOXIE_NAMESPACE::kernel::detail {

inline constexpr Index cache_line = 64;
/// Steps of a tile in one turn of the prefetch loop.
inline constexpr Index steps_at_once = 2;

/// Lines of memory at equal distances, in bytes. If `second` is not 0, each line comes with the one
/// `second` bytes after it.
struct PrefetchRun {
  const std::byte* from = nullptr;
  std::ptrdiff_t pitch = 0;
  Index lines = 0;
  std::ptrdiff_t second = 0;

  /// The number of steps that prefetch it: one line, or one pair, a step.
  Index steps() const { return (lines + steps_at_once - 1) / steps_at_once * steps_at_once; }
};

/// The lines that one tile prefetches.
class PrefetchList {
 public:
  void clear() {
    read_count_ = 0;
    write_count_ = 0;
  }
  /// Adds n elements at p: to be read if T is const, else to be written.
  template <class T>
  void add(T* p, Index n) {
    add(std::is_const_v<T>, {reinterpret_cast<const std::byte*>(p), cache_line, (n + line<T> - 1) / line<T>});
  }
  /// Adds n elements of each of `rows` rows, `stride` elements apart.
  template <class T>
  void add(T* p, Index stride, Index rows, Index n) {
    for (Index j = 0; j < n; j += line<T>) {
      add(std::is_const_v<T>, {reinterpret_cast<const std::byte*>(p + j), stride * Index{sizeof(T)}, rows});
    }
  }
  void read(const PrefetchRun& run) { add(true, run); }

  std::span<const PrefetchRun> reads() const { return {reads_.data(), read_count_}; }
  std::span<const PrefetchRun> writes() const { return {writes_.data(), write_count_}; }
  /// The number of steps that prefetch all of it.
  Index steps() const { return steps_of(reads()) + steps_of(writes()); }

  /// The order for a tile of `steps` steps: reads first, then idle steps, and writes in the last
  /// steps. Earlier, lines to write would leave the L1 cache again. Reads that do not fit are left
  /// out. Idle steps prefetch the line at `idle`, which should be in the L1 cache: one loop without
  /// a branch is faster than two. The last run never ends.
  const PrefetchRun* ordered(Index steps, const void* idle) {
    Index left = (std::max)(Index{0}, steps / steps_at_once * steps_at_once - steps_of(writes()));
    std::size_t n = 0;
    for (const PrefetchRun& run : reads()) {
      if (left <= 0) {
        break;
      }
      ordered_[n] = run;
      ordered_[n].lines = (std::min)(left, run.steps());
      left -= ordered_[n++].lines;
    }
    const PrefetchRun rest{static_cast<const std::byte*>(idle), 0, (std::numeric_limits<Index>::max)() / 2};
    if (left > 0) {
      ordered_[n] = rest;
      ordered_[n++].lines = left;
    }
    for (const PrefetchRun& run : writes()) {
      ordered_[n] = run;
      ordered_[n].lines = run.steps();
      ++n;
    }
    ordered_[n] = rest;
    return ordered_.data();
  }

 private:
  static constexpr std::size_t most = 32;
  template <class T>
  static constexpr Index line = cache_line / Index{sizeof(T)};

  void add(bool read, const PrefetchRun& run) {
    std::size_t& count = read ? read_count_ : write_count_;
    if (run.lines > 0 && count < most) {
      (read ? reads_ : writes_)[count++] = run;
    }
  }
  static Index steps_of(std::span<const PrefetchRun> runs) {
    Index sum = 0;
    for (const PrefetchRun& run : runs) {
      sum += run.steps();
    }
    return sum;
  }

  std::array<PrefetchRun, most> reads_;
  std::array<PrefetchRun, most> writes_;
  std::array<PrefetchRun, 2 * most + 2> ordered_;
  std::size_t read_count_ = 0;
  std::size_t write_count_ = 0;
};

/// The panels after the present ones. Each tile until then prefetches a part of them.
class PrefetchQueue {
 public:
  static constexpr Index most = 32;

  void clear() {
    count_ = 0;
    next_ = 0;
    taken_ = 0;
  }
  /// Appends a run, up to `most` of them.
  void add(const PrefetchRun& run) {
    if (count_ < most) {
      runs_[std::size_t(count_++)] = run;
    }
  }
  bool full() const { return count_ == most; }

  /// Takes the whole next run.
  PrefetchRun take() { return next_ < count_ ? runs_[std::size_t(next_++)] : PrefetchRun{}; }
  /// Takes the part for the first of `tiles` >= 1 remaining tiles, of up to `steps` steps. If there
  /// are more tiles than needed, the first ones prefetch nothing, so that lines stay in the cache
  /// until they are read. If there are fewer tiles than runs, a tile takes a pair of runs, and
  /// their ends are left out.
  PrefetchRun take(Index tiles, Index steps) {
    if (taken_ > 0 && tiles < count_ - next_) {
      ++next_;
      taken_ = 0;
    }
    if (next_ == count_ || steps < 1) {
      return {};
    }
    const PrefetchRun& run = runs_[std::size_t(next_)];
    const bool begun = next_ > 0 || taken_ > 0;
    if (!begun && tiles > count_ * (std::max)(Index{1}, (run.lines + steps - 1) / steps)) {  // runs are about equal
      return {};
    }
    if (taken_ == 0 && tiles < count_ - next_) {
      const PrefetchRun& second = runs_[std::size_t(next_ + 1)];
      next_ += 2;
      return {run.from, run.pitch, (std::min)(steps, run.lines), second.lines > 0 ? second.from - run.from : 0};
    }
    const PrefetchRun part{run.from + taken_ * run.pitch, run.pitch, (std::min)(steps, run.lines - taken_)};
    taken_ += part.lines;
    if (taken_ >= run.lines) {
      ++next_;
      taken_ = 0;
    }
    return part;
  }

 private:
  std::array<PrefetchRun, std::size_t(most)> runs_;
  Index count_ = 0;
  Index next_ = 0;   // of the runs
  Index taken_ = 0;  // lines of it
};

}  // namespace moxie::inline MOXIE_NAMESPACE::kernel::detail
