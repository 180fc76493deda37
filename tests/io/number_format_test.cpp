// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <moxie/io/number_format.hpp>
#include <vector>

using moxie::DType;
using moxie::Index;
using moxie::detail::Bfloat16;
using moxie::detail::element_count;
using moxie::detail::format_position;
using moxie::detail::packed_bytes;
using moxie::detail::stored_formats;

TEST_CASE("dtype_named: inverts dtype_name, and the table of formats has the same sizes") {
  for (const DType dtype : {DType::F32, DType::F64, DType::F16, DType::BF16, DType::I32, DType::I64, DType::U8}) {
    CHECK(moxie::dtype_named(moxie::dtype_name(dtype)) == dtype);
    const Index position = format_position(moxie::dtype_name(dtype));
    REQUIRE(position >= 0);
    CHECK(stored_formats[std::size_t(position)].bits == 8 * moxie::dtype_size(dtype));
  }
  for (const char* name : {"", "F8_E4M3", "BOOL", "U16", "C64", "f32", "F32 ", "other"}) {
    CHECK(moxie::dtype_named(name) == DType::Other);
  }
  CHECK(format_position("F8_E4M3") >= 0);
  CHECK(format_position("F128") == -1);
}

TEST_CASE("reads_as: floats as floats, integers as integers at least as wide, other formats as nothing") {
  CHECK(moxie::reads_as<float>(DType::F64));
  CHECK(moxie::reads_as<double>(DType::BF16));
  CHECK(moxie::reads_as<std::int64_t>(DType::U8));
  CHECK(moxie::reads_as<std::int32_t>(DType::I32));
  CHECK_FALSE(moxie::reads_as<std::int32_t>(DType::I64));
  CHECK_FALSE(moxie::reads_as<float>(DType::I32));
  CHECK_FALSE(moxie::reads_as<std::int64_t>(DType::F16));
  CHECK_FALSE(moxie::reads_as<std::uint8_t>(DType::Other));
  CHECK_FALSE(moxie::reads_as<float>(DType::Other));
}

TEST_CASE("element_count: a product that does not fit, zeros aside, is refused") {
  constexpr Index largest = std::numeric_limits<Index>::max();
  CHECK(element_count(std::vector<Index>{}, 8) == 1);
  CHECK(element_count(std::vector<Index>{2, 3, 4}, 8) == 24);
  CHECK(element_count(std::vector<Index>{2, 0, 4}, 8) == 0);
  CHECK(element_count(std::vector<Index>{-1}, 1) == -1);
  CHECK(element_count(std::vector<Index>{largest}, 1) == largest);
  CHECK(element_count(std::vector<Index>{largest}, 2) == -1);
  CHECK(element_count(std::vector<Index>{0, largest, 2}, 1) == -1);
}

TEST_CASE("packed_bytes: elements narrower than a byte have to fill the last one") {
  CHECK(packed_bytes(3, 16) == 6);
  CHECK(packed_bytes(6, 4) == 3);
  CHECK(packed_bytes(5, 4) == -1);
  CHECK(packed_bytes(4, 6) == 3);
  CHECK(packed_bytes(3, 6) == -1);
  CHECK(packed_bytes(0, 6) == 0);
  CHECK(packed_bytes(Index{1} << (8 * sizeof(Index) - 5), 64) == Index{1} << (8 * sizeof(Index) - 2));
}

TEST_CASE("Bfloat16: widens and rounds back to the same bits; ties go to even") {
  for (std::uint32_t i = 0; i < 65536; ++i) {
    Bfloat16 b;
    b.bits = std::uint16_t(i);
    const float wide = b;
    REQUIRE(std::bit_cast<std::uint32_t>(wide) == i << 16U);
    const Bfloat16 back(wide);
    REQUIRE((back.bits == b.bits || (std::isnan(wide) && back.bits == (b.bits | 0x40U))));
  }
  CHECK(float(Bfloat16(1 + 0x1p-8F)) == 1);
  CHECK(float(Bfloat16(1 + 3 * 0x1p-8F)) == 1 + 4 * 0x1p-8F);
  CHECK(float(Bfloat16(std::numeric_limits<float>::max())) == std::numeric_limits<float>::infinity());
}

TEST_CASE("Float16: widens to what IEEE 754 says, every number of it") {
  for (std::uint32_t i = 0; i < 65536; ++i) {
    const float x = moxie::detail::Float16{std::uint16_t(i)};
    const int exponent = int((i >> 10U) & 31U);
    const auto fraction = double(i & 1023U);
    const double magnitude = exponent == 0    ? std::ldexp(fraction, -24)
                             : exponent == 31 ? (fraction == 0 ? double(INFINITY) : std::nan(""))
                                              : std::ldexp(1024 + fraction, exponent - 25);
    REQUIRE(std::isnan(x) == std::isnan(magnitude));
    REQUIRE(std::signbit(x) == (i >= 32768));
    REQUIRE((std::isnan(magnitude) || double(std::abs(x)) == magnitude));
  }
}
