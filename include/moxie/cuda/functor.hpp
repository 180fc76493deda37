// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <moxie/cuda/product.hpp>
#include <moxie/kernel/gated_unit.hpp>
#include <moxie/kernel/write.hpp>

/// What the backend does with rows, a small function each: the same on the host and on the device.
/// All are given to `DeviceExec::for_each_row`, except those whose operator takes no lanes, which
/// `for_each` calls.
namespace moxie::inline MOXIE_NAMESPACE::cuda {
inline namespace MOXIE_CUDA_BACKEND {

/// What numbers are computed in: float for BFloat16.
template <class T>
using SumOf = std::conditional_t<std::is_same_v<T, BFloat16>, float, T>;

/// to_r = from_i, i = index[r], or r where there is no index; rounded where `To` is smaller.
template <class From, class To>
struct GatherRow {
  DeviceRows<const From> from;
  const int* index;
  DeviceRows<To> to;

  MOXIE_HOST_DEVICE void operator()(Index r, auto lanes) const {
    const Index i = index == nullptr ? r : index[r];
    for (Index d = lanes.first(); d < to.cols; d += lanes.step()) {
      to(r, d) = To(from(i, d));
    }
  }
};

/// Back to where a gather took rows from: to_t = from_i, i = place[t]; zeros where there is none, below 0.
template <class Scalar>
struct RestoreRow {
  DeviceRows<const Scalar> from;
  const int* place;
  DeviceRows<Scalar> to;

  MOXIE_HOST_DEVICE void operator()(Index t, auto lanes) const {
    const Index i = place[t];
    for (Index d = lanes.first(); d < to.cols; d += lanes.step()) {
      to(t, d) = i < 0 ? Scalar(0) : from(i, d);
    }
  }
};

/// The rows of every token, in the order of combine's sum: K a token, of which -1 are none, or as many as the starts say.
struct TokenRows {
  const int* rows = nullptr;
  const int* starts = nullptr;
  int k = 0;

  MOXIE_HOST_DEVICE Index begin(Index t) const { return starts == nullptr ? t * k : starts[t]; }
};

/// y_t = Σ_{r of t} w_r h_r, or added; without weights all are 1. Combine, and the adjoint of a gather.
template <class Scalar>
struct CombineRow {
  TokenRows rows_of;
  const Scalar* weight;
  DeviceRows<const Scalar> h;
  DeviceRows<Scalar> y;
  bool add;

  MOXIE_HOST_DEVICE void operator()(Index t, auto lanes) const {
    for (Index d = lanes.first(); d < y.cols; d += lanes.step()) {
      Scalar sum = add ? y(t, d) : Scalar(0);
      for (Index i = rows_of.begin(t); i < rows_of.begin(t + 1); ++i) {
        const int r = rows_of.rows[i];
        if (r >= 0) {
          sum += (weight == nullptr ? Scalar(1) : weight[r]) * h(r, d);
        }
      }
      y(t, d) = sum;
    }
  }
};

/// Combine's adjoint: dw_r = ⟨h_r, dy_t⟩, dh_r = w_r dy_t, t = token[r].
template <class Scalar, class Element>
struct CombineBackwardRow {
  const int* token;
  const Scalar* weight;
  DeviceRows<const Scalar> h;
  DeviceRows<const Scalar> dy;
  DeviceRows<Element> dh;
  Scalar* dweight;

  MOXIE_HOST_DEVICE void operator()(Index r, auto lanes) const {
    const Index t = token[r];
    Scalar dot = 0;
    for (Index d = lanes.first(); d < dy.cols; d += lanes.step()) {
      dot += h(r, d) * dy(t, d);
      dh(r, d) = Element(weight[r] * dy(t, d));
    }
    dot = lanes.sum(dot);
    if (lanes.first() == 0) {
      dweight[r] = dot;
    }
  }
};

/// Gated unit: hidden = unit(g, u), g and u the halves of a row.
template <class Unit, class Element>
struct GluRow {
  DeviceRows<const Element> gate_up;
  DeviceRows<Element> hidden;
  Unit unit = {};

  MOXIE_HOST_DEVICE void operator()(Index r, auto lanes) const {
    using Sum = SumOf<Element>;
    for (Index j = lanes.first(); j < hidden.cols; j += lanes.step()) {
      hidden(r, j) = Element(unit.value(Sum(gate_up(r, j)), Sum(gate_up(r, hidden.cols + j))));
    }
  }
};

/// Its adjoint, and hidden again: dg = dhidden ∂unit/∂g, du = dhidden ∂unit/∂u.
template <class Unit, class Element>
struct GluBackwardRow {
  DeviceRows<const Element> gate_up;
  DeviceRows<const SumOf<Element>> dhidden;
  DeviceRows<Element> hidden;
  DeviceRows<Element> dgate_up;
  Unit unit = {};

  MOXIE_HOST_DEVICE void operator()(Index r, auto lanes) const {
    using Sum = SumOf<Element>;
    const Index width = hidden.cols;
    for (Index j = lanes.first(); j < width; j += lanes.step()) {
      const Sum gate = Sum(gate_up(r, j));
      const Sum up = Sum(gate_up(r, width + j));
      const GateUp<Sum> slope = unit.derivatives(gate, up);
      const Sum d = dhidden(r, j);
      hidden(r, j) = Element(unit.value(gate, up));
      dgate_up(r, j) = Element(d * slope.gate);
      dgate_up(r, width + j) = Element(d * slope.up);
    }
  }
};

/// A vector of each expert, at equal distances, and the expert of each row; no experts: one for all rows.
template <class T>
struct BiasOfRow {
  T* data = nullptr;
  Index distance = 0;
  const int* expert = nullptr;

  MOXIE_HOST_DEVICE T* of(Index r) const { return data + (expert == nullptr ? 0 : expert[r] * distance); }
};

/// Perceptron: a = before + b, hidden = act(a).
template <class Activation, class Element, class Scalar>
struct MlpRow {
  DeviceRows<Element> a;
  BiasOfRow<const Scalar> bias;
  DeviceRows<Element> hidden;

  MOXIE_HOST_DEVICE void operator()(Index r, auto lanes) const {
    for (Index j = lanes.first(); j < a.cols; j += lanes.step()) {
      const auto sum = SumOf<Element>(a(r, j)) + bias.of(r)[j];
      a(r, j) = Element(sum);
      hidden(r, j) = Element(Activation::value(SumOf<Element>(a(r, j))));
    }
  }
};

/// m_r += b.
template <class Scalar>
struct AddBiasRow {
  DeviceRows<Scalar> m;
  BiasOfRow<const Scalar> bias;

  MOXIE_HOST_DEVICE void operator()(Index r, auto lanes) const {
    for (Index j = lanes.first(); j < m.cols; j += lanes.step()) {
      m(r, j) += bias.of(r)[j];
    }
  }
};

/// The perceptron's adjoint, and hidden again: da = dhidden ⊙ act'(a).
template <class Activation, class Element>
struct MlpBackwardRow {
  DeviceRows<const Element> a;
  DeviceRows<const SumOf<Element>> dhidden;
  DeviceRows<Element> hidden;
  DeviceRows<Element> da;

  MOXIE_HOST_DEVICE void operator()(Index r, auto lanes) const {
    using Sum = SumOf<Element>;
    for (Index j = lanes.first(); j < hidden.cols; j += lanes.step()) {
      const Sum before = Sum(a(r, j));
      hidden(r, j) = Element(Activation::value(before));
      da(r, j) = Element(dhidden(r, j) * Activation::derivative(before));
    }
  }
};

/// Elements of a matrix, as `column_sums` reads them.
template <class Sum, class T>
struct ElementOf {
  DeviceRows<const T> m;

  MOXIE_HOST_DEVICE Sum operator()(Index r, Index j) const { return Sum(m(r, j)); }
};

/// How `column_reduce` takes numbers together.
struct Plus {
  template <class T>
  MOXIE_HOST_DEVICE static T first() {
    return T(0);
  }
  template <class T>
  MOXIE_HOST_DEVICE static T of(T a, T b) {
    return a + b;
  }
};
struct Largest {
  template <class T>
  MOXIE_HOST_DEVICE static T first() {
    return -detail::infinity<T>;
  }
  template <class T>
  MOXIE_HOST_DEVICE static T of(T a, T b) {
    return b > a ? b : a;
  }
};

namespace detail {

/// Pieces of `rows` rows: those of group g are numbered from starts[g] / rows + g on, which leaves room for all of them, and of
/// all groups together there are no more than rows / 64 + groups.
struct Pieces {
  static constexpr Index rows = 64;

  const int* starts;
  Index groups;

  MOXIE_HOST_DEVICE Index first(Index g) const { return starts[g] / rows + g; }
  MOXIE_HOST_DEVICE Index count(Index g) const { return (starts[g + 1] - starts[g] + rows - 1) / rows; }
  /// The group whose piece this number may be: the last one that does not begin after it.
  MOXIE_HOST_DEVICE Index group(Index piece) const {
    Index low = 0;
    Index high = groups;
    while (high - low > 1) {
      const Index middle = (low + high) / 2;
      (first(middle) <= piece ? low : high) = middle;
    }
    return low;
  }
};

struct Ends {
  int end;
  int* starts;
  MOXIE_HOST_DEVICE void operator()(Index i) const { starts[i] = i == 0 ? 0 : end; }
};

/// What a piece of a group's rows makes of each of its columns.
template <class Op, class T, class Value>
struct ReducePiece {
  Value value;
  Pieces pieces;
  Index cols;
  T* out;  // (pieces, cols)

  MOXIE_HOST_DEVICE void operator()(Index i) const {
    const Index j = i % cols;
    const Index piece = i / cols;
    const Index g = pieces.group(piece);
    const Index begin = pieces.starts[g] + (piece - pieces.first(g)) * Pieces::rows;
    const Index end = begin + Pieces::rows < pieces.starts[g + 1] ? begin + Pieces::rows : pieces.starts[g + 1];
    T all = Op::template first<T>();
    for (Index r = begin; r < end; ++r) {
      all = Op::of(all, value(r, j));
    }
    out[i] = all;
  }
};

/// Those together, first piece first.
template <class Op, class T, class Out>
struct ReducePieces {
  const T* parts;
  Pieces pieces;
  Index cols;
  Out* out;
  Index distance;  // from one group's row to the next one's
  bool add;

  MOXIE_HOST_DEVICE void operator()(Index i) const {
    const Index g = i / cols;
    const Index j = i % cols;
    T all = Op::template first<T>();
    for (Index piece = pieces.first(g); piece < pieces.first(g) + pieces.count(g); ++piece) {
      all = Op::of(all, parts[piece * cols + j]);
    }
    Out& to = out[g * distance + j];
    to = Out(add ? T(to) + all : all);
  }
};

}  // namespace detail

/// Where numbers of groups and columns go: row g is `distance` elements after row g-1. They replace or add to what is there.
template <class T>
struct GroupRows {
  T* data;
  Index distance;
  kernel::Write write = kernel::Write::replace;
};

/// For every group and column: out_gj = value(r, j) of all rows r of g, taken together by `Op`. Pieces of 64 rows first, then
/// these: in the same order always. `room`: how many rows there may be in other steps, so that scratch does not grow.
template <class Op, class T, class Value, class Out>
void column_reduce(DeviceExec& exec, const Groups& groups, Index cols, const Value& value, const GroupRows<Out>& out,
                   Index room = 0) {
  if (groups.count() <= 0) {
    return;
  }
  const auto numbers = [&](Index rows) { return rows / detail::Pieces::rows + groups.count(); };
  const detail::Pieces pieces{groups.device, groups.count()};
  const DeviceExec::Frame frame(exec);
  T* parts = exec.scratch<T>(numbers(room > groups.rows() ? room : groups.rows()) * cols);
  exec.for_each(numbers(groups.rows()) * cols, detail::ReducePiece<Op, T, Value>{value, pieces, cols, parts});
  exec.for_each(groups.count() * cols,
                detail::ReducePieces<Op, T, Out>{parts, pieces, cols, out.data, out.distance, out.write == kernel::Write::add});
}
template <class Sum, class Value, class Out>
void column_sums(DeviceExec& exec, const Groups& groups, Index cols, const Value& value, const GroupRows<Out>& out,
                 Index room = 0) {
  column_reduce<Plus, Sum>(exec, groups, cols, value, out, room);
}
/// Of all rows together.
template <class Sum, class Value, class Out>
void column_sums(DeviceExec& exec, Index rows, Index cols, const Value& value, const GroupRows<Out>& out, Index room = 0) {
  const int whole[] = {0, int(rows)};
  const DeviceExec::Frame frame(exec);
  int* starts = exec.scratch<int>(2);
  exec.for_each(2, detail::Ends{int(rows), starts});
  column_sums<Sum>(exec, Groups{whole, starts}, cols, value, out, room);
}

}  // namespace MOXIE_CUDA_BACKEND
}  // namespace moxie::inline MOXIE_NAMESPACE::cuda
