// SPDX-License-Identifier: MIT
#pragma once

#include <doctest/doctest.h>

#include <moxie/expert/bank.hpp>
#include <moxie/testing/gradient_check.hpp>
#include <moxie/testing/laws.hpp>
#include <support.hpp>

/// What the tests of all banks of experts check alike.
namespace moxie::test::bank {

inline constexpr Index dim = 5;
// Expert 1 has no rows, expert 2 has one; rows are gathered, some twice.
inline constexpr Index starts[] = {0, 4, 4, 5, 9};
inline constexpr Index gather[] = {3, 0, 6, 3, 1, 2, 5, 4, 0};
inline constexpr Index experts = 4;
inline constexpr Index rows = 9;
inline constexpr Index tokens = 7;

template <class Bank_>
Parameters<typename Bank_::Scalar> random_parameters(const Bank_& bank) {
  Parameters<typename Bank_::Scalar> p{Layout(bank.layout())};
  test::randomize(p, 901);
  return p;
}

// h of a bank against f(expert, x) row by row, with gathered rows and with rows in order.
template <class Bank_, class F>
void check_forward(const Bank_& bank, F&& f) {
  using S = typename Bank_::Scalar;
  const auto p = random_parameters(bank);
  const Parameters<double> p64 = test::as_double(p);
  const Matrix<S> x = test::random<S>(rows, dim, 902);
  for (const bool gathered : {true, false}) {
    Matrix<S> h = test::untouched<S>(rows, dim);
    Workspace workspace;
    bank.forward(p.view(), GroupedRows<S>{starts, x, gathered ? gather : nullptr}, h, nullptr, workspace);
    Matrix<double> expected(rows, dim);
    for (Index e = 0; e < experts; ++e) {
      for (Index r = starts[e]; r < starts[e + 1]; ++r) {
        const reference::Vector v = x.row(gathered ? gather[r] : r).transpose().template cast<double>();
        expected.row(r) = f(p64, "experts." + std::to_string(e) + ".", v).transpose();
      }
    }
    CHECK(test::relative_error(h, expected) < Tolerance<S>::layer);
  }
}

// drows and all parameter gradients, added to what is there, against central differences of <h, dh>.
template <class Bank_>
void check_backward(const Bank_& bank) {
  auto p = random_parameters(bank);
  Matrix<double> x = test::random<double>(tokens, dim, 903);
  Matrix<double> x_rows(rows, dim);
  for (Index r = 0; r < rows; ++r) {
    x_rows.row(r) = x.row(gather[r]);
  }
  const Matrix<double> dh = test::random<double>(rows, dim, 904);
  Matrix<double> h(rows, dim);
  typename Bank_::Tape kept;
  Workspace workspace;
  for (const bool gathered : {true, false}) {
    const GroupedRows<double> in{starts, gathered ? RowView<const double>(x) : RowView<const double>(x_rows),
                                 gathered ? gather : nullptr};
    Matrix<double> drows = test::untouched<double>(rows, dim);
    auto grads = random_parameters(bank);
    const auto before = grads;
    bank.forward(p.view(), in, h, &kept, workspace);
    bank.backward(p.view(), in, dh, {drows, grads}, kept, workspace);
    grads.flat() -= before.flat();
    const auto loss = [&] {
      bank.forward(p.view(), in, h, &kept, {workspace, Exec{.threads = 1}});
      return h.cwiseProduct(dh).sum();
    };
    std::vector<testing::GradientReport> reports;
    if (!gathered) {
      reports.push_back(testing::check_gradient(loss, x_rows, drows, {}, "rows"));
    }
    zip(
        [&](const TensorInfo& info, RowView<double> value, RowView<double> gradient) {
          if (info.name.find("experts.1.") == 0) {
            CHECK((gradient.eigen().array() == 0).all());
          } else {
            reports.push_back(testing::check_gradient(loss, value, gradient, {}, info.name));
          }
        },
        p, grads);
    for (const auto& report : reports) {
      INFO(report.message());
      CHECK(report.passes(test::gradient_tolerance));
    }
  }
}

// A bank of BFloat16 elements against the same bank in double, over the same parameters: as close as 8 bits are, forward and
// backward, and the same bits with frozen weights.
template <class Rounded, class Exact>
void check_bfloat16(const Rounded& rounded, const Exact& exact) {
  const Index width = rounded.model_dim();
  const auto p = random_parameters(rounded);
  const auto p64 = test::as_double(p);
  const Matrix<float> x = test::random<float>(tokens, width, 906);
  const Matrix<float> dh = test::random<float>(rows, width, 907);
  const auto run = [&]<class B, class S>(const B& bank, const Parameters<S>& q, const Matrix<S>& in, const Matrix<S>& d) {
    struct Result {
      Matrix<S> h, drows;
      Parameters<S> grads;
    } out{Matrix<S>(rows, width), Matrix<S>(rows, width), q.zeros_like()};
    Workspace workspace;
    typename B::Tape kept;
    const GroupedRows<S> grouped{starts, in, gather};
    bank.forward(q.view(), grouped, out.h, &kept, workspace);
    bank.backward(q.view(), grouped, d, {out.drows, out.grads}, kept, workspace);
    return out;
  };
  const auto a = run(rounded, p, x, dh);
  const auto b = run(exact, p64, test::as_double(x), test::as_double(dh));
  const auto distance = [](const auto& u, const auto& v) {
    return (u.template cast<double>() - v).norm() / std::max(v.norm(), 1e-30);
  };
  CHECK(distance(a.h, b.h) < 0.01);
  CHECK(distance(a.h, b.h) > 1e-4);  // something was rounded
  CHECK(distance(a.drows, b.drows) < 0.01);
  zip(
      [&](const TensorInfo& info, RowView<const float> u, RowView<const double> v) {
        INFO(info.name);
        if (info.name.find("experts.1.") == 0) {
          CHECK((u.eigen().array() == 0).all());
        } else {
          CHECK(distance(u.eigen(), v.eigen()) < 0.015);
        }
      },
      a.grads, b.grads);

  Matrix<float> frozen(rows, width);
  Workspace workspace;
  rounded.forward(rounded.freeze(p.view(), Exec{}), GroupedRows<float>{starts, x, gather}, frozen, nullptr, workspace);
  CHECK(test::same_bits(frozen, a.h));
}

// So many rows that what is computed of them goes past the caches, against the same rows a few at a time: the same bits of h
// and drows, forward and backward, and gradients as near as another order of their sums leaves them.
template <class Bank_>
void check_many_rows(const Bank_& bank) {
  using S = typename Bank_::Scalar;
  const Index width = bank.model_dim();
  const Index count = kernel::l2_cache() / 16 / Index{sizeof(S)} / width + 70;
  const Index few = 12;
  const auto p = random_parameters(bank);
  const Matrix<S> x = test::random<S>(count, width, 908);
  const Matrix<S> dh = test::random<S>(count, width, 909);
  const auto run = [&](Index step) {
    struct Result {
      Matrix<S> h, drows;
      Parameters<S> grads;
    } out{{}, {}, p.zeros_like()};
    Buffer<S> h_buffer, drows_buffer;
    typename Bank_::Tape kept;
    const RowView<S> h = h_buffer.spread(count, width);
    const RowView<S> drows = drows_buffer.spread(count, width);
    CHECK(kernel::is_streamed(h));
    CHECK(kernel::is_streamed(drows));
    Workspace workspace;
    for (Index first = 0; first < count; first += step) {
      const Index n = std::min(step, count - first);
      const auto part = [&](auto m) { return m.middle_rows(first, n); };
      const Index ends[] = {0, std::clamp(count / 2 - first, Index{0}, n), n};  // half of all rows are the first expert's
      const GroupedRows<S> grouped{ends, part(RowView<const S>(x)), nullptr};
      CHECK(kernel::is_streamed(part(h)) == (step == count));
      const Exec exec{.threads = 2};
      bank.forward(p.view(), grouped, part(h), &kept, {workspace, exec});
      bank.backward(p.view(), grouped, part(RowView<const S>(dh)), {part(drows), out.grads}, kept, {workspace, exec});
    }
    out.h = h.eigen();
    out.drows = drows.eigen();
    return out;
  };
  const auto at_once = run(count);
  const auto in_steps = run(few);
  CHECK(test::same_bits(at_once.h, in_steps.h));
  CHECK(test::same_bits(at_once.drows, in_steps.drows));
  zip(
      [&](const TensorInfo& info, RowView<const S> a, RowView<const S> b) {
        INFO(info.name);
        CHECK(double((a.eigen() - b.eigen()).norm()) <= Tolerance<S>::layer * double(b.eigen().norm()));
      },
      at_once.grads, in_steps.grads);
}

template <class Bank_>
void check_laws(const Bank_& bank) {
  for (const auto& law : testing::check_bank_laws(bank)) {
    INFO(law.message);
    CHECK(law.holds);
  }
}

}  // namespace moxie::test::bank
