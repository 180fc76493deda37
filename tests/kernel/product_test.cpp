// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/kernel/product.hpp>
#include <support.hpp>
#include <type_traits>

namespace {

using moxie::BFloat16;
using moxie::Index;
using moxie::Matrix;
using moxie::RowView;
namespace kernel = moxie::kernel;

TEST_CASE("product: rows are found by stride, by index, and beyond a gap") {
  const Matrix<float> m = moxie::test::random<float>(10, 3, 204);
  const Index index[] = {7, 2};
  const auto plain = kernel::rows_of(RowView<const float>(m));
  const auto gathered = kernel::rows_of(RowView<const float>(m), index);
  const RowView<const float> view(m);
  const auto stacked = kernel::stacked(view.middle_rows(1, 2), view.middle_rows(6, 3));
  CHECK(plain.row(4) == m.data() + 12);
  CHECK(gathered.row(0) == m.data() + 21);
  CHECK(gathered.row(1) == m.data() + 6);
  CHECK(stacked.row(1) == m.data() + 6);
  CHECK(stacked.row(2) == m.data() + 18);
}

TEST_CASE("product: a factor gives back the operand that it was made of, Elements or Scalars") {
  const Matrix<float> m = moxie::test::random<float>(3, 4, 205);
  const Matrix<BFloat16> rounded = m.cast<BFloat16>();
  const kernel::Factor<float, BFloat16> scalars = kernel::transposed<float>(m);
  const kernel::Factor<float, BFloat16> elements = kernel::plain<BFloat16>(rounded);
  const kernel::Factor<float, float> floats = kernel::transposed<float>(m);
  CHECK(scalars.transposed());
  CHECK_FALSE(elements.transposed());
  const auto start = [](const auto& factor) {
    return factor.visit([](const auto& operand) -> const void* { return operand.row(2); });
  };
  CHECK(start(scalars) == m.data() + 8);
  CHECK(start(elements) == rounded.data() + 8);
  CHECK(start(floats) == m.data() + 8);
  scalars.visit([]<class T>(const kernel::Operand<T>& operand) {
    CHECK(std::is_same_v<T, float>);
    CHECK(operand.transposed());
  });
}

}  // namespace
