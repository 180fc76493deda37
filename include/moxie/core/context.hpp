// SPDX-License-Identifier: MIT
#pragma once

#include <moxie/core/exec.hpp>
#include <moxie/core/workspace.hpp>

namespace moxie::inline MOXIE_NAMESPACE {

/// What a call runs with: its scratch memory and its threads.
///
///     layer.forward(p, x, y, tape, {workspace, exec});
///
/// Calls that run at the same time need a workspace each. No memory resource is here: it belongs to
/// what owns memory, a `Workspace` or a tape.
struct Context {
  // Not explicit: where only scratch is given, the threads are the default ones.
  Context(Workspace& scratch, const Exec& threads = {}) : workspace(scratch), exec(threads) {}

  Workspace& workspace;
  Exec exec;
};

}  // namespace moxie::inline MOXIE_NAMESPACE
