// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/config.hpp>
#include <stdexcept>
#include <string>
#include <system_error>

namespace moxie::inline MOXIE_VERSION_NAMESPACE {

/// A file breaks its format, lacks what is asked of it, or cannot be read or written. The message
/// names the file, the tensor where there is one, and the problem.
struct FileError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The same type: everything in `io` throws one kind of error.
using SafetensorsError = FileError;

}  // namespace moxie::inline MOXIE_VERSION_NAMESPACE

namespace moxie::inline MOXIE_NAMESPACE::detail {

/// The operating system's words for an error number.
inline std::string system_message(int number) { return std::generic_category().message(number); }

}  // namespace moxie::inline MOXIE_NAMESPACE::detail
