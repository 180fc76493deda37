// SPDX-License-Identifier: MIT
#pragma once

#include <cstddef>
#include <moxie/config.hpp>
#include <type_traits>
#include <utility>

namespace moxie::inline MOXIE_NAMESPACE {

namespace detail {

/// Stands for a field of any type; never called.
struct AnyField {
  template <class T>
  operator T() const;
};

template <class T, std::size_t... Fields>
constexpr bool takes_fields(std::index_sequence<Fields...> /*fields*/) {
  return requires { T{(static_cast<void>(Fields), AnyField{})...}; };
}

template <class T, std::size_t N>
constexpr std::size_t count_fields() {
  static_assert(std::is_aggregate_v<T> && N < 64, "field_count: the type is no aggregate of less than 64 fields");
  if constexpr (takes_fields<T>(std::make_index_sequence<N + 1>{})) {
    return count_fields<T, N + 1>();
  } else {
    return N;
  }
}

}  // namespace detail

/// The number of fields of an aggregate. Code that must treat every option of a struct contains
/// `static_assert(field_count<Config> == 13)`. A new option then does not compile until that code
/// treats it. Fields must not be arrays.
template <class T>
inline constexpr std::size_t field_count = detail::count_fields<T, 0>();

}  // namespace moxie::inline MOXIE_NAMESPACE
