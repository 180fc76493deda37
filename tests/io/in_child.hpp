// SPDX-License-Identifier: MIT
#pragma once

#if defined(__unix__) || defined(__APPLE__)
#include <sys/wait.h>
#include <unistd.h>

namespace moxie::test {

/// Runs `child`, which returns a number from 0 to 255, in a process that fork makes, and `parent` at
/// the same time in this one. Returns the child's number, -1 if it did not end by itself.
template <class Child, class Parent>
int in_child(Child&& child, Parent&& parent) {
  const pid_t process = ::fork();
  if (process == 0) {
    int result = 255;
    try {
      result = child();
    } catch (...) {
    }
    ::_exit(result);
  }
  parent();
  int status = 0;
  return process > 0 && ::waitpid(process, &status, 0) == process && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

}  // namespace moxie::test

#endif
