// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <bit>
#include <moxie/core/bfloat16.hpp>
#include <moxie/core/matrix.hpp>
#include <support.hpp>

namespace {

using moxie::BFloat16;
using moxie::Index;
using moxie::Matrix;

float from_bits(std::uint32_t bits) { return std::bit_cast<float>(bits); }

TEST_CASE("BFloat16: every float becomes the nearest one, ties to even, as Eigen rounds") {
  Index wrong = 0;
  for (std::uint64_t word = 0; word < (std::uint64_t{1} << 32U); word += 65'521) {
    const float x = from_bits(std::uint32_t(word));
    if (!std::isnan(x)) {
      wrong += BFloat16(x).bits == std::bit_cast<std::uint16_t>(Eigen::bfloat16(x)) ? 0 : 1;
    }
  }
  CHECK(wrong == 0);
  CHECK(BFloat16(from_bits(0x3f808000)).bits == 0x3f80);  // between 1 and the next one: to even, down
  CHECK(BFloat16(from_bits(0x3f818000)).bits == 0x3f82);  // and up
  CHECK(BFloat16(from_bits(0x3f808001)).bits == 0x3f81);
  CHECK(BFloat16(from_bits(0x7f7fffff)).bits == 0x7f80);  // the largest float becomes infinity
}

TEST_CASE("BFloat16: all 65536 numbers become floats and come back, and NaN stays NaN") {
  Index wrong = 0;
  for (std::uint32_t i = 0; i < 65'536; ++i) {
    const BFloat16 x = BFloat16::from_bits(std::uint16_t(i));
    const float wide = x;
    const bool same = std::isnan(wide) ? std::isnan(float(BFloat16(wide))) : BFloat16(wide).bits == x.bits;
    wrong += same && std::bit_cast<std::uint32_t>(wide) == i << 16U ? 0 : 1;
  }
  CHECK(wrong == 0);
  CHECK(std::isnan(float(BFloat16(from_bits(0x7f800001)))));  // whose upper half alone is infinity
  CHECK(std::isnan(float(BFloat16(from_bits(0xffffffff)))));
  CHECK(std::signbit(float(BFloat16(from_bits(0xff800001)))));
}

TEST_CASE("BFloat16: other numbers convert by way of float, those of Eigen too, back as well") {
  CHECK(float(BFloat16(2)) == 2.0F);
  CHECK(float(BFloat16(-0.3)) == float(BFloat16(-0.3F)));
  CHECK(BFloat16(Eigen::bfloat16(1.5F)).bits == 0x3fc0);
  CHECK(float(BFloat16(Eigen::half(0.25F))) == 0.25F);
  CHECK(float(Eigen::bfloat16(BFloat16(1.5F))) == 1.5F);
  static_assert(!std::is_convertible_v<float, BFloat16>, "rounding is asked for");
  static_assert(!std::is_constructible_v<BFloat16, const char*>);
  CHECK(BFloat16().bits == 0);
}

TEST_CASE("BFloat16: arithmetic is that of floats, rounded once") {
  const BFloat16 a(1.0F);
  const BFloat16 b(0.00390625F);  // half of the distance to the next number
  CHECK((a + b).bits == a.bits);
  CHECK((a - b).bits == 0x3f7f);
  CHECK(float(a * b) == float(b));
  CHECK(float(a / BFloat16(3.0F)) == float(BFloat16(1.0F / 3.0F)));
  CHECK(float(-a) == -1.0F);
  BFloat16 c = a;
  c += BFloat16(2.0F);
  c *= BFloat16(2.0F);
  c -= a;
  c /= BFloat16(5.0F);
  CHECK(float(c) == 1.0F);
  CHECK(a > b);
  CHECK(BFloat16(0.0F) == BFloat16(-0.0F));
  CHECK(float(abs(BFloat16(-2.0F))) == 2.0F);
}

TEST_CASE("BFloat16: the limits are those of the format") {
  using Limits = std::numeric_limits<BFloat16>;
  static_assert(Limits::is_specialized && Limits::digits == 8);
  CHECK(float((Limits::min)()) == std::numeric_limits<float>::min());
  CHECK(std::isinf(float(BFloat16(float((Limits::max)()) * 1.01F))));
  CHECK(float(Limits::lowest()) == -float((Limits::max)()));
  CHECK(float(Limits::epsilon()) == 0.0078125F);
  CHECK(std::isinf(float(Limits::infinity())));
  CHECK(std::isnan(float(Limits::quiet_NaN())));
}

TEST_CASE("BFloat16: matrices of it are cast, compared, added and multiplied") {
  const Matrix<float> wide = moxie::test::random<float>(5, 7, 1);
  const Matrix<BFloat16> m = wide.cast<BFloat16>();
  for (Index i = 0; i < m.size(); ++i) {
    CHECK(m.data()[i].bits == BFloat16(wide.data()[i]).bits);
  }
  const Matrix<float> back = m.cast<float>();
  CHECK((back - wide).cwiseAbs().maxCoeff() <= 0.004F * wide.cwiseAbs().maxCoeff());
  CHECK(moxie::test::random<double>(5, 7, 1).cast<BFloat16>().cast<double>() == m.cast<double>());
  CHECK(m.cast<Eigen::bfloat16>().cast<BFloat16>() == m);
  CHECK(m == m);
  CHECK(m.transpose().transpose() == m);
  CHECK((m + m).cast<float>() == 2 * back);
  CHECK((m - m).isZero());
  CHECK(float(m.cwiseAbs().maxCoeff()) == back.cwiseAbs().maxCoeff());
  CHECK(float(m.sum()) == doctest::Approx(double(back.sum())).epsilon(0.1));
  const Matrix<BFloat16> square = m * m.transpose();
  const Matrix<float> expected = back * back.transpose();
  CHECK((square.cast<float>() - expected).cwiseAbs().maxCoeff() <= 0.05F * expected.cwiseAbs().maxCoeff());
  Matrix<BFloat16> zero = Matrix<BFloat16>::Zero(2, 2);
  zero.setConstant(BFloat16(3.0F));
  CHECK(float(zero(1, 1)) == 3.0F);
}

}  // namespace
