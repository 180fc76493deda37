// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <memory>
#include <moxie/core/function_ref.hpp>
#include <string>

namespace {

using moxie::FunctionRef;

int twice(int x) { return 2 * x; }

static_assert(std::is_trivially_copyable_v<FunctionRef<void()>>);
static_assert(!std::is_constructible_v<FunctionRef<int(std::string)>, int (&)(int)>);
static_assert(!std::is_constructible_v<FunctionRef<std::string()>, int (&)(int)>);

TEST_CASE("function reference: calls a lambda, a function, a functor, and the same one through a copy") {
  int calls = 0;
  const auto count = [&calls](int by) { calls += by; };
  const FunctionRef<void(int)> ref = count;
  const FunctionRef<void(int)> copy = ref;
  ref(1);
  copy(10);
  CHECK(calls == 11);
  CHECK(FunctionRef<int(int)>(twice)(21) == 42);
  struct Counter {
    int n = 0;
    int operator()() { return ++n; }
  } counter;
  const FunctionRef<int()> next = counter;
  next();
  CHECK(next() == 2);
  CHECK(counter.n == 2);  // a reference, no copy
}

TEST_CASE("function reference: passes what only moves, and references, on; a result may be dropped") {
  const auto take = [](std::unique_ptr<int> p, int& out) { return out = *p; };
  int out = 0;
  const FunctionRef<void(std::unique_ptr<int>, int&)> ref = take;
  ref(std::make_unique<int>(5), out);
  CHECK(out == 5);
}

}  // namespace
