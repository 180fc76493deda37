// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cerrno>
#include <moxie/io/error.hpp>
#include <stdexcept>
#include <string>
#include <type_traits>

TEST_CASE("FileError: one type serves all of io, under both names") {
  static_assert(std::is_same_v<moxie::SafetensorsError, moxie::FileError>);
  static_assert(std::is_base_of_v<std::runtime_error, moxie::FileError>);
  CHECK(std::string(moxie::FileError("a: b").what()) == "a: b");
  CHECK(moxie::detail::system_message(ENOENT) == "No such file or directory");
}
