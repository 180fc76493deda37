// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <moxie/core/context.hpp>
#include <type_traits>

namespace {

using moxie::Context;
using moxie::Exec;
using moxie::Workspace;

int threads_of(const Context& context) { return context.exec.threads; }

TEST_CASE("Context: scratch alone converts, threads are the default ones then") {
  Workspace workspace;
  CHECK(threads_of(workspace) == Exec{}.threads);
  CHECK(threads_of({workspace, Exec{3}}) == 3);
  const Context context(workspace, Exec{2});
  CHECK(&context.workspace == &workspace);
  CHECK(threads_of(context) == 2);
}

TEST_CASE("Context: there is none without scratch, so that {} means threads where both are possible") {
  CHECK_FALSE(std::is_default_constructible_v<Context>);
  CHECK_FALSE(std::is_convertible_v<Exec, Context>);
}

TEST_CASE("Context: a copy has the same scratch") {
  Workspace workspace;
  const Context context(workspace);
  const Context copy = context;  // NOLINT(performance-unnecessary-copy-initialization): that is the point
  const Workspace::Frame frame(copy.workspace);
  CHECK(copy.workspace.matrix<double>(2, 3).rows() == 2);
  CHECK(&copy.workspace == &workspace);
}

}  // namespace
