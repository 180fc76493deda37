// SPDX-License-Identifier: MIT
#pragma once

#include <memory>
#include <moxie/config.hpp>
#include <type_traits>
#include <utility>

namespace moxie::inline MOXIE_NAMESPACE {

template <class Signature>
class FunctionRef;

/// A reference to a callable, like `std::function_ref` of C++26: two pointers, no allocation. The
/// callable must outlive all calls. So use it as a parameter and do not store it.
template <class R, class... Arguments>
class FunctionRef<R(Arguments...)> {
 public:
  template <class F>
  requires(!std::is_same_v<std::remove_cvref_t<F>, FunctionRef> && std::is_invocable_r_v<R, F&, Arguments...>)
      FunctionRef(F&& f)  // NOLINT(bugprone-forwarding-reference-overload): constrained; an implicit reference is the point
      : call_([](Object object, Arguments... arguments) -> R {
          using Target = std::remove_reference_t<F>;
          if constexpr (std::is_function_v<Target>) {
            return R(reinterpret_cast<Target*>(object.function)(std::forward<Arguments>(arguments)...));
          } else {
            return R((*static_cast<Target*>(object.data))(std::forward<Arguments>(arguments)...));
          }
        }) {
    if constexpr (std::is_function_v<std::remove_reference_t<F>>) {
      object_.function = reinterpret_cast<void (*)()>(&f);
    } else {
      object_.data = const_cast<void*>(static_cast<const volatile void*>(std::addressof(f)));
    }
  }

  R operator()(Arguments... arguments) const { return call_(object_, std::forward<Arguments>(arguments)...); }

 private:
  union Object {
    void* data;
    void (*function)();
  };

  Object object_;
  R (*call_)(Object, Arguments...);
};

}  // namespace moxie::inline MOXIE_NAMESPACE
