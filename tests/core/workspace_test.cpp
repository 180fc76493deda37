// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <core/resident_memory.hpp>
#include <cstdint>
#include <moxie/core/workspace.hpp>

namespace {

using moxie::Index;
using moxie::RowView;
using moxie::Workspace;

bool apart(const RowView<double>& a, const RowView<double>& b) { return !moxie::overlaps(a, b); }

// Takes and fills three matrices in two nested frames, and says whether they kept what was written.
bool use(Workspace& workspace, Index n) {
  const Workspace::Frame outer(workspace);
  const RowView<double> a = workspace.matrix<double>(n, 3);
  a.eigen().setConstant(1);
  bool inside = true;
  {
    const Workspace::Frame inner(workspace);
    const RowView<double> b = workspace.matrix<double>(2 * n, 3);
    const RowView<double> c = workspace.matrix<double>(n, 7);
    b.eigen().setConstant(2);
    c.eigen().setConstant(3);
    inside = apart(a, b) && apart(a, c) && apart(b, c) && (b.eigen().array() == 2).all() && (c.eigen().array() == 3).all();
  }
  const RowView<double> d = workspace.matrix<double>(n, 5);
  d.eigen().setConstant(4);
  return inside && apart(a, d) && (a.eigen().array() == 1).all() && (d.eigen().array() == 4).all();
}

TEST_CASE("workspace: matrices of open frames do not overlap, in the first step and later, growing and shrinking") {
  Workspace workspace;
  for (const Index n : {5, 5, 5, 100, 100, 3, 0, 200, 200}) {
    CHECK(use(workspace, n));
  }
}

TEST_CASE("workspace: matrices start at a cache line") {
  Workspace workspace;
  for (int step = 0; step < 3; ++step) {
    const Workspace::Frame frame(workspace);
    for (const Index n : {1, 3, 5}) {
      CHECK(reinterpret_cast<std::uintptr_t>(workspace.matrix<float>(n, n).data()) % 64 == 0);
    }
  }
}

TEST_CASE("workspace: a closed frame gives its memory back") {
  Workspace workspace;
  use(workspace, 10);
  const Workspace::Frame outer(workspace);
  const double* first = nullptr;
  for (int i = 0; i < 5; ++i) {
    const Workspace::Frame inner(workspace);
    const double* data = workspace.matrix<double>(4, 4).data();
    CHECK((i == 0 || data == first));
    first = data;
  }
}

TEST_CASE("workspace: nothing is allocated after the first step of a shape") {
  Workspace workspace;
  use(workspace, 50);
  const std::size_t before = moxie::test::allocation_count;
  for (int step = 0; step < 5; ++step) {
    use(workspace, 50);
    use(workspace, 20);
  }
  const std::size_t after = moxie::test::allocation_count;
  CHECK(after == before);
}

TEST_CASE("workspace: the allocations that the tests count are counted") {
  const std::size_t before = moxie::test::allocation_count;
  Workspace workspace;
  use(workspace, 50);
  const std::size_t after = moxie::test::allocation_count;
  CHECK(after > before);
}

TEST_CASE("workspace: a copy starts empty, an assigned one keeps its own memory") {
  Workspace a;
  const Workspace::Frame frame(a);
  const RowView<double> kept = a.matrix<double>(4, 4);
  kept.eigen().setConstant(5);
  Workspace b = a;
  CHECK(use(b, 10));
  b = a;
  CHECK(use(b, 10));
  a = b;
  CHECK((kept.eigen().array() == 5).all());
  CHECK(apart(kept, a.matrix<double>(4, 4)));
}

TEST_CASE("workspace: a moved one goes on") {
  Workspace a;
  use(a, 10);
  Workspace b = std::move(a);
  CHECK(use(b, 10));
}

TEST_CASE("workspace: spread rows are an odd number of cache lines apart") {
  Workspace workspace;
  const Workspace::Frame frame(workspace);
  const auto m = workspace.spread<double>(5, 16);
  CHECK(m.rows() == 5);
  CHECK(m.cols() == 16);
  CHECK(m.stride() == 24);
  CHECK(apart(m, workspace.spread<double>(2, 3)));
}

TEST_CASE("workspace: what a first step takes goes with its frames, and what the outer ones hold stays") {
  Workspace workspace;
  const auto before = moxie::test::resident_kib();
  const Workspace::Frame outer(workspace);
  const RowView<double> first = workspace.matrix<double>(3, 3);
  const RowView<double> piece = workspace.matrix<double>(5, 5);
  first.eigen().setConstant(1);
  piece.eigen().setConstant(2);
  for (int i = 0; i < 32; ++i) {
    const Workspace::Frame inner(workspace);
    const RowView<double> large = workspace.matrix<double>(1 << 10, 1 << 10);
    large.eigen().setConstant(3);
    CHECK(apart(large, piece));
  }
  CHECK(moxie::test::resident_kib() - before < 64 << 10);
  CHECK((first.eigen().array() == 1).all());
  CHECK((piece.eigen().array() == 2).all());
}

TEST_CASE("workspace: takes its memory from a resource, and keeps its block from step to step") {
  // One that hands out what it has, and counts.
  struct Counting : std::pmr::memory_resource {
    void* do_allocate(std::size_t bytes, std::size_t aligned) override {
      if (taken + bytes > most) {
        throw std::bad_alloc();
      }
      taken += bytes;
      ++allocations;
      return std::pmr::new_delete_resource()->allocate(bytes, aligned);
    }
    void do_deallocate(void* block, std::size_t bytes, std::size_t aligned) override {
      taken -= bytes;
      std::pmr::new_delete_resource()->deallocate(block, bytes, aligned);
    }
    bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }
    std::size_t taken = 0;
    std::size_t most = std::size_t{1} << 20;
    int allocations = 0;
  } resource;
  {
    Workspace workspace(&resource);
    CHECK(use(workspace, 50));
    const int first = resource.allocations;
    CHECK(first > 0);
    CHECK(use(workspace, 50));
    CHECK(resource.allocations == first);
    {
      const Workspace::Frame frame(workspace.tapes());
      CHECK(use(workspace.tapes(), 10));
    }
    CHECK(resource.allocations > first);

    // Memory runs out: nothing is taken, and the workspace goes on.
    const Workspace::Frame outer(workspace);
    const RowView<double> kept = workspace.matrix<double>(3, 3);
    kept.eigen().setConstant(5);
    CHECK_THROWS_AS(workspace.matrix<double>(1 << 10, 1 << 10), std::bad_alloc);
    CHECK_THROWS_AS(workspace.matrix<double>(Index{1} << 40, Index{1} << 40), std::bad_alloc);
    const RowView<double> next = workspace.matrix<double>(3, 3);
    CHECK(next.data() - kept.data() == 16);  // as if nothing had been asked for
    CHECK((kept.eigen().array() == 5).all());
  }
  CHECK(resource.taken == 0);
}

TEST_CASE("workspace: is a resource for buffers that go with its frame, and its second stack is another one") {
  Workspace workspace;
  use(workspace, 50);
  const std::size_t before = moxie::test::allocation_count;
  for (int step = 0; step < 3; ++step) {
    const Workspace::Frame frame(workspace);
    moxie::Buffer<double> tape(0, &workspace);
    tape.assign(100, 7);
    CHECK(reinterpret_cast<std::uintptr_t>(tape.data()) % moxie::alignment == 0);
    CHECK(use(workspace, 10));
    CHECK(std::all_of(tape.begin(), tape.end(), [](double v) { return v == 7; }));
    std::pmr::memory_resource& resource = workspace;
    CHECK(reinterpret_cast<std::uintptr_t>(resource.allocate(10, 256)) % 256 == 0);
  }
  CHECK(moxie::test::allocation_count == before);

  // On the second stack, a buffer that is filled inside a frame of the first stays.
  const Workspace::Frame outer(workspace.tapes());
  moxie::Buffer<double> tape(0, &workspace.tapes());
  {
    const Workspace::Frame inner(workspace);
    tape.assign(100, 9);
    CHECK(use(workspace, 10));
  }
  CHECK(use(workspace, 60));
  CHECK(std::all_of(tape.begin(), tape.end(), [](double v) { return v == 9; }));
}

}  // namespace
