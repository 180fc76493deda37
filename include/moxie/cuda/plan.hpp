// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <moxie/core/sequences.hpp>
#include <moxie/cuda/exec.hpp>
#include <moxie/cuda/functor.hpp>
#include <moxie/cuda/random.hpp>
// After exec.hpp, which tells Thrust what to do without CUDA.
#include <thrust/sort.h>

namespace moxie::inline MOXIE_NAMESPACE::cuda {
inline namespace MOXIE_CUDA_BACKEND {

class DeviceSequences;

/// Where a backward puts the gradient of its input, and adds those of its parameters.
template <class Scalar>
struct DeviceGradient {
  DeviceRows<Scalar> x;
  Scalar* parameters;
};

/// Tokens of the device, and how they divide into sequences; what `moxie::Tokens` is on the host. Converts from rows.
template <class Scalar>
struct DeviceTokens {
  DeviceRows<const Scalar> x;  ///< (T,D)
  Sequences sequences;
  /// T bytes of the host, 0 for padding, or empty for none: masked tokens take no part, as on the CPU.
  std::span<const std::uint8_t> mask = {};
  /// Whether noise and jitter are drawn, and the load loss is taken.
  bool training = false;
  /// The stream of this step's noise; that of the CPU's `Rng` of the same seed and stream draws the same numbers.
  DeviceRng rng{};
  /// (T,E) standard normal numbers of the device to take for the noise on logits instead of drawing them; no rows to draw.
  DeviceRows<const Scalar> noise = {};
  /// Another K for this call; 0: the router's own.
  Index top_k = 0;
  /// Set by the layer where it left masked tokens out: the row of each token in the caller's x, and how all divide.
  std::span<const int> rows = {};
  Sequences whole = {};
  /// Set by the layer for its router: the sequences on the device.
  const DeviceSequences* on_device = nullptr;

  DeviceTokens() = default;
  template <class T>
  DeviceTokens(const DeviceRows<T>& tokens, Sequences division = {}) : x(tokens), sequences(division.over(tokens.rows)) {}

  Index count() const { return x.rows; }
  /// Tokens that there may be in another step of the same shape.
  Index room() const { return whole.tokens() > count() ? whole.tokens() : count(); }
};

namespace detail {

/// Throws ShapeError for other widths, or tokens that do not divide into the sequences; ValueError for more of them than 31
/// bits can count.
template <class Scalar>
void expect_tokens(std::string_view where, const DeviceTokens<Scalar>& in, Index model_dim) {
  if (in.x.cols != model_dim) {
    throw ShapeError(std::string(where) + ": x has " + std::to_string(in.x.cols) + " columns, expected " +
                     std::to_string(model_dim));
  }
  expect_at_least(where, "the number of rows of x", in.count(), 0);
  if (in.sequences.tokens() != in.count()) {
    throw ShapeError(std::string(where) + ": the sequences divide " + std::to_string(in.sequences.tokens()) +
                     " tokens, expected " + std::to_string(in.count()) + "; make them with .over(T)");
  }
  in.sequences.expect_valid(where);
  if (!in.mask.empty() && Index(in.mask.size()) != in.count()) {
    throw ShapeError(std::string(where) + ": there are " + std::to_string(in.mask.size()) +
                     " elements of the mask, expected one for each of " + std::to_string(in.count()) + " tokens");
  }
  if (in.noise.rows != 0 && in.noise.rows != in.count()) {
    throw ShapeError(std::string(where) + ": noise is " + moxie::detail::dimensions(in.noise.rows, in.noise.cols) +
                     ", expected (" + std::to_string(in.count()) + ",E)");
  }
  expect_value(in.top_k >= 0, where, "top_k must not be negative");
}
/// Throws ValueError for what an index of 31 bits cannot count.
inline int to_index(std::string_view where, Index n) {
  expect_value(n <= (std::numeric_limits<int>::max)(), where, "there are more than 2^31 - 1 elements to sort");
  return int(n);
}

/// The first place in [0, n) of sorted keys that is not below `key`.
MOXIE_HOST_DEVICE inline int lower_bound(const int* keys, int n, int key) {
  int first = 0;
  while (n > 0) {
    const int half = n / 2;
    if (keys[first + half] < key) {
      first += half + 1;
      n -= half + 1;
    } else {
      n = half;
    }
  }
  return first;
}

/// The last sequence that does not begin after the token.
struct SequenceOf {
  const int* starts;
  int count;
  int* sequence;

  MOXIE_HOST_DEVICE void operator()(Index t) const { sequence[t] = lower_bound(starts, count + 1, int(t) + 1) - 1; }
};

}  // namespace detail

/// A division of tokens that both sides know. Made again, and sent to the device, only when it changes.
class DeviceSequences {
 public:
  /// `room`: tokens that there may be in other steps.
  void set(DeviceExec& exec, const Sequences& sequences, Index room = 0) {
    room_ = room;
    const Index count = sequences.count();
    bool same = set_ && Index(host_.size()) == count + 1 && host_.back() == sequences.tokens();
    for (Index b = 0; same && b < count; ++b) {
      same = host_[std::size_t(b)] == sequences.begin(b);
    }
    if (same) {
      return;
    }
    set_ = false;
    host_.assign(std::size_t(count) + 1, 0);
    for (Index b = 0; b < count; ++b) {
      host_[std::size_t(b) + 1] = detail::to_index("DeviceSequences", sequences.end(b));
    }
    exec.upload(host_.data(), starts_.resize(exec, count + 1), count + 1);
    exec.for_each(sequences.tokens(),
                  detail::SequenceOf{starts_.data(), int(count), sequence_.resize(exec, sequences.tokens(), room)});
    set_ = true;
  }

  Groups groups() const { return {host_, starts_.data()}; }
  Index count() const { return Index(host_.size()) - 1; }
  Index tokens() const { return host_.back(); }
  Index room() const { return room_; }
  /// The sequence of each token.
  const int* of_token() const { return sequence_.data(); }
  bool operator==(const Sequences& other) const {
    bool same = other.count() == count() && other.tokens() == tokens();
    for (Index b = 0; same && b < count(); ++b) {
      same = other.end(b) == host_[std::size_t(b) + 1];
    }
    return same;
  }

 private:
  bool set_ = false;
  Index room_ = 0;
  std::vector<int> host_{0};
  DeviceBuffer<int> starts_;
  DeviceBuffer<int> sequence_;
};

/// The tokens that a mask leaves, known to both sides. Made again, and sent to the device, only when they change.
class UnmaskedTokens {
 public:
  void set(DeviceExec& exec, std::span<const std::uint8_t> mask, const Sequences& sequences) {
    if (are_of(mask, sequences)) {
      return;
    }
    mask_.clear();  // nothing is known if this throws
    std::vector<int> place;
    rows_.clear();
    starts_.assign(1, 0);
    whole_.assign(1, 0);
    sequences.for_each([&](Index /*b*/, Index begin, Index end) {
      whole_.push_back(end);
      for (Index t = begin; t < end; ++t) {
        place.push_back(mask[std::size_t(t)] == 0 ? -1 : int(rows_.size()));
        if (mask[std::size_t(t)] != 0) {
          rows_.push_back(detail::to_index("UnmaskedTokens", t));
        }
      }
      starts_.push_back(Index(rows_.size()));
    });
    exec.upload(rows_.data(), device_rows_.resize(exec, count(), sequences.tokens()), count());
    exec.upload(place.data(), device_place_.resize(exec, sequences.tokens()), sequences.tokens());
    mask_.assign(mask.begin(), mask.end());
  }
  bool are_of(std::span<const std::uint8_t> mask, const Sequences& sequences) const {
    const auto same = [](std::uint8_t a, std::uint8_t b) { return (a != 0) == (b != 0); };
    return !mask_.empty() && std::equal(mask_.begin(), mask_.end(), mask.begin(), mask.end(), same) &&
           Sequences(whole_).over(Index(mask_.size())) == sequences;
  }

  Index count() const { return Index(rows_.size()); }
  /// The row of each token in the x that the mask is for.
  std::span<const int> rows() const { return rows_; }
  const int* device_rows() const { return device_rows_.data(); }
  /// The token of each of those rows, -1 where it is masked.
  const int* device_place() const { return device_place_.data(); }
  /// How they divide.
  Sequences sequences() const { return Sequences(starts_).over(count()); }

 private:
  std::vector<std::uint8_t> mask_;
  std::vector<Index> whole_;
  std::vector<int> rows_;
  std::vector<Index> starts_;
  DeviceBuffer<int> device_rows_, device_place_;
};

namespace detail {

/// Keys to sort pairs by: their expert, those without one last.
struct PairKey {
  const int* expert;
  int experts;
  int* key;
  int* pair;

  MOXIE_HOST_DEVICE void operator()(Index i) const {
    key[i] = expert[i] < 0 ? experts : expert[i];
    pair[i] = int(i);
  }
};
/// Where the rows of each expert begin.
struct StartOf {
  const int* key;
  int n;
  int* starts;

  MOXIE_HOST_DEVICE void operator()(Index e) const { starts[e] = lower_bound(key, n, int(e)); }
};
/// Sorted pairs become rows.
template <class Scalar>
struct RowOfPair {
  const int* pair;
  const int* starts;
  int experts;
  int k;
  const Scalar* weight_of_pair;
  int* token;
  Scalar* weight;
  int* row_of_pair;

  MOXIE_HOST_DEVICE void operator()(Index i) const {
    const int p = pair[i];
    token[i] = p / k;
    weight[i] = weight_of_pair[p];
    row_of_pair[p] = i < starts[experts] ? int(i) : -1;
  }
};

struct Iota {
  int* to;
  MOXIE_HOST_DEVICE void operator()(Index i) const { to[i] = int(i); }
};

/// Sorts values by keys, both in place; of equal keys the first stays first.
template <class Key>
void sort_by_key(DeviceExec& exec, Key* keys, int* values, Index n) {
  if (n > 1) {
    exec.launch([&](const auto& policy) { thrust::stable_sort_by_key(policy, keys, keys + n, values); });
  }
}
template <class Key>
void sort_by_key_descending(DeviceExec& exec, Key* keys, int* values, Index n) {
  if (n > 1) {
    exec.launch(
        [&](const auto& policy) { thrust::stable_sort_by_key(policy, keys, keys + n, values, thrust::greater<Key>()); });
  }
}

}  // namespace detail

/// The choices of tokens, on the device: pair t·K + k is the k-th of token t. Memory is for `room` tokens.
template <class Scalar>
struct ChosenPairs {
  Index tokens;
  Index room;
  Index experts;
  Index top_k;
  const int* expert;  ///< -1: none
  const Scalar* weight;
};

/// A sparse plan on the device: R rows, sorted by expert; with token choice then by token, as in `moxie::SparsePlan`.
template <class Scalar>
class SparsePlan {
 public:
  Index tokens() const { return tokens_; }
  Index experts() const { return Index(starts_.size()) - 1; }
  Index rows() const { return starts_.back(); }
  /// Rows that there may be in another step of the same shape: a capacity, or a mask, leaves another number of them.
  Index room() const { return room_; }
  /// No plan.
  void clear() {
    tokens_ = 0;
    room_ = 0;
    k_ = 0;
    starts_.assign(1, 0);
    uploaded_ = nullptr;
  }
  /// Expert e owns rows [starts[e], starts[e+1]); known to the host too.
  Groups groups() const { return {starts_, device_starts_.data()}; }
  /// Of each row, on the device.
  const int* token() const { return token_.data(); }
  const int* expert() const { return expert_.data(); }
  const Scalar* weight() const { return weight_.data(); }
  TokenRows rows_of_token() const { return {token_rows_.data(), k_ == 0 ? token_starts_.data() : nullptr, int(k_)}; }

  /// Of K choices a token: pair t·K + k has an expert, -1 for none, and a weight. Waits for the device, to know how many rows
  /// every expert has; `status` (one number of the device) comes along, and is returned.
  int build(DeviceExec& exec, const ChosenPairs<Scalar>& chosen, const int* status) {
    const auto [tokens, room, experts, k, expert, weight] = chosen;
    const Index pairs = detail::to_index("SparsePlan::build", tokens * k);
    tokens_ = tokens;
    room_ = room * k;
    k_ = k;
    const DeviceExec::Frame frame(exec);
    int* key = expert_.resize(exec, pairs, room_);
    int* pair = exec.scratch<int>(room_);
    exec.for_each(pairs, detail::PairKey{expert, int(experts), key, pair});
    detail::sort_by_key(exec, key, pair, pairs);
    int* starts = device_starts_.resize(exec, experts + 2);
    exec.for_each(experts + 1, detail::StartOf{key, int(pairs), starts});
    exec.for_each(pairs,
                  detail::RowOfPair<Scalar>{pair, starts, int(experts), int(k), weight, token_.resize(exec, pairs, room_),
                                            weight_.resize(exec, pairs, room_), token_rows_.resize(exec, pairs, room_)});
    exec.copy(status, starts + experts + 1, 1);
    starts_.resize(std::size_t(experts) + 2);
    exec.read(starts, starts_.data(), experts + 2);
    const int seen = starts_.back();
    starts_.pop_back();
    return seen;
  }

  /// Of rows that are there already: `fill(token, expert, weight)` writes R of each, sorted by expert, `starts` of them.
  /// Nothing waits. Memory is for `room` tokens and `room_of_rows` rows.
  template <class Fill>
  void build(DeviceExec& exec, Index tokens, Index room, const std::vector<int>& starts, Index room_of_rows, const Fill& fill) {
    const Index rows = starts.back();
    const Index experts = Index(starts.size()) - 1;
    tokens_ = tokens;
    room_ = room_of_rows;
    k_ = 0;
    int* device = device_starts_.resize(exec, experts + 2);
    if (starts != starts_ || device != uploaded_) {
      uploaded_ = nullptr;
      starts_ = starts;
      exec.upload(starts_.data(), device, experts + 1);
      uploaded_ = device;
    }
    fill(token_.resize(exec, rows, room_), expert_.resize(exec, rows, room_), weight_.resize(exec, rows, room_));
    const DeviceExec::Frame frame(exec);
    int* key = exec.scratch<int>(room_);
    exec.copy(token_.data(), key, rows);
    int* row = token_rows_.resize(exec, rows, room_);
    exec.for_each(rows, detail::Iota{row});
    detail::sort_by_key(exec, key, row, rows);
    exec.for_each(tokens + 1, detail::StartOf{key, int(rows), token_starts_.resize(exec, tokens + 1, room + 1)});
  }

 private:
  Index tokens_ = 0;
  Index room_ = 0;
  Index k_ = 0;  // 0: tokens have as many rows as their starts say
  std::vector<int> starts_{0};
  const int* uploaded_ = nullptr;
  DeviceBuffer<int> device_starts_;
  DeviceBuffer<int> token_, expert_;
  DeviceBuffer<Scalar> weight_;
  DeviceBuffer<int> token_rows_, token_starts_;
};

/// The gradient of a sparse plan, of each row's weight, and where the router puts what follows from it.
template <class Scalar>
struct SparsePlanGradient {
  const Scalar* weight;
  DeviceGradient<Scalar> into;
};
/// That of a dense plan.
template <class Scalar>
struct DensePlanGradient {
  DeviceRows<const Scalar> dispatch;
  DeviceRows<const Scalar> combine;
  DeviceGradient<Scalar> into;
};

}  // namespace MOXIE_CUDA_BACKEND
}  // namespace moxie::inline MOXIE_NAMESPACE::cuda
