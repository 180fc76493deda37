// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <algorithm>
#include <moxie/cuda/exec.hpp>
#include <new>
#include <numeric>
#include <vector>

namespace {

using moxie::Index;
using moxie::cuda::DeviceBuffer;
using moxie::cuda::DeviceExec;
using moxie::cuda::Lanes;

struct AddIndex {
  int* to;
  MOXIE_HOST_DEVICE void operator()(Index i) const { to[i] += int(i) + 1; }
  MOXIE_HOST_DEVICE void operator()(Index i, Lanes lanes) const {
    if (lanes.first() == 0) {
      to[i] += int(i) + 1;
    }
  }
};

TEST_CASE("exec: loops call their function once for every index, rows too, and none for nothing") {
  DeviceExec exec;
  std::vector<int> seen(1000, 0);
  exec.for_each(1000, AddIndex{seen.data()});
  std::vector<int> expected(1000);
  std::iota(expected.begin(), expected.end(), 1);
  CHECK(seen == expected);
  std::fill(seen.begin(), seen.end(), 0);
  exec.for_each_row(1000, AddIndex{seen.data()});
  CHECK(seen == expected);
  CHECK(exec.counts().launches == 2);
  exec.for_each(0, AddIndex{nullptr});
  exec.for_each_row(0, AddIndex{nullptr});
  CHECK(exec.counts().launches == 2);
}

TEST_CASE("exec: what goes to the device comes back") {
  DeviceExec exec;
  const DeviceExec::Frame frame(exec);
  const std::vector<double> numbers{1, 2, 3};
  double* a = exec.scratch<double>(3);
  double* b = exec.scratch<double>(3);
  exec.upload(numbers.data(), a, 3);
  exec.zero(b, 3);
  std::vector<double> back(3, -1);
  exec.read(b, back.data(), 3);
  CHECK(back == std::vector<double>{0, 0, 0});
  exec.copy(a, b, 2);
  exec.read(b, back.data(), 3);
  CHECK(back == std::vector<double>{1, 2, 0});
  CHECK(exec.counts().synchronizations == 2);
}

TEST_CASE("exec: scratch is given back by frames, and after the first time one allocation serves all of them") {
  DeviceExec exec;
  const auto step = [&] {
    const DeviceExec::Frame outer(exec);
    char* first = exec.scratch<char>(1000);
    char* again = nullptr;
    {
      const DeviceExec::Frame inner(exec);
      again = exec.scratch<char>(5000);
      CHECK((again >= first + 1000 || again + 5000 <= first));
      std::fill_n(again, 5000, 'x');
    }
    {
      const DeviceExec::Frame inner(exec);
      std::fill_n(exec.scratch<char>(5000), 5000, 'y');
    }
    std::fill_n(first, 1000, 'z');
  };
  step();
  CHECK(exec.counts().allocations > 0);
  exec.reset_counts();
  step();
  step();
  CHECK(exec.counts().allocations == 0);
}

TEST_CASE("exec: a buffer grows, keeps what it has when it shrinks, and moves") {
  DeviceExec exec;
  DeviceBuffer<int> buffer;
  int* data = buffer.resize(exec, 10);
  CHECK(buffer.resize(exec, 4) == data);
  CHECK(buffer.size() == 4);
  CHECK(buffer.resize(exec, 10) == data);
  CHECK(exec.counts().allocations == 1);
  CHECK(exec.counts().bytes == 40);
  DeviceBuffer<int> other = std::move(buffer);
  CHECK(other.data() == data);
  CHECK(other.size() == 10);
}

// The address sanitizer ends the program instead.
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define MOXIE_TEST_ADDRESS_SANITIZER
#endif
#endif
#if !defined(__SANITIZE_ADDRESS__) && !defined(MOXIE_TEST_ADDRESS_SANITIZER)
TEST_CASE("exec: after a request that no memory can serve, others are served, and it is not asked for again") {
  DeviceExec exec;
  const auto huge = Index{1} << 60;
  const auto ask = [&](Index n) {
    const DeviceExec::Frame frame(exec);
    std::fill_n(exec.scratch<char>(n), std::min<Index>(n, 10), 'x');
  };
  CHECK_THROWS_AS(ask(huge), std::bad_alloc);  // the very first request
  ask(512);
  CHECK_THROWS_AS(ask(huge), std::bad_alloc);
  ask(512);
  exec.reset_counts();
  ask(512);
  CHECK(exec.counts().allocations == 0);
  CHECK(exec.scratch_bytes() < huge);
}
#endif

}  // namespace
