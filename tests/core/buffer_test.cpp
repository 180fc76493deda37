// SPDX-License-Identifier: MIT
#include <doctest/doctest.h>

#include <cmath>
#include <core/resident_memory.hpp>
#include <cstring>
#include <limits>
#include <map>
#include <memory_resource>
#include <moxie/core/buffer.hpp>
#include <numeric>
#include <vector>

namespace {

using moxie::Buffer;
using moxie::Index;

TEST_CASE("buffer: starts at a cache line") {
  for (const Index n : {1, 3, 17, 1000}) {
    const Buffer<float> buffer(n);
    CHECK(reinterpret_cast<std::uintptr_t>(buffer.data()) % moxie::alignment == 0);
    CHECK(buffer.size() == n);
  }
}

TEST_CASE("buffer: a smaller size, and the first one again, allocate nothing") {
  Buffer<double> buffer(100);
  const double* data = buffer.data();
  const std::size_t before = moxie::test::allocation_count;
  buffer.resize(0);
  buffer.resize(7);
  buffer.assign(100, 2.5);
  const std::size_t after = moxie::test::allocation_count;
  CHECK(after == before);
  CHECK(buffer.data() == data);
  CHECK(std::all_of(buffer.begin(), buffer.end(), [](double v) { return v == 2.5; }));
  buffer.assign(101, 3.5);
  CHECK(buffer.size() == 101);
  CHECK(buffer[100] == 3.5);
}

TEST_CASE("buffer: reserve makes room and leaves the size of a buffer that has it") {
  Buffer<int> buffer;
  buffer.reserve(10);
  CHECK(buffer.size() == 0);
  const std::size_t before = moxie::test::allocation_count;
  buffer.resize(10);
  const std::size_t after = moxie::test::allocation_count;
  CHECK(after == before);
  buffer.reserve(5);
  CHECK(buffer.size() == 10);
}

TEST_CASE("buffer: copies are deep, moves are not") {
  Buffer<Index> a(5);
  std::iota(a.begin(), a.end(), Index{3});
  Buffer<Index> b = a;
  b[2] = 9;
  CHECK(a[2] == 5);
  CHECK(b[4] == 7);
  const Index* data = a.data();
  Buffer<Index> c = std::move(a);
  CHECK(c.data() == data);
  b = c;
  CHECK(b[2] == 5);
  CHECK(b.data() != c.data());
  b = Buffer<Index>();
  CHECK(b.size() == 0);
  Buffer<Index>& same = c;
  c = same;
  CHECK(c[4] == 7);
}

TEST_CASE("buffer: an empty one copies, spans and resizes to nothing") {
  const Buffer<double> empty;
  Buffer<double> copy = empty;
  CHECK(copy.span().empty());
  copy.resize(0);
  CHECK(copy.begin() == copy.end());
}

TEST_CASE("buffer: as a matrix it is row-major") {
  Buffer<float> buffer;
  const moxie::RowView<float> m = buffer.matrix(3, 4);
  m(2, 1) = 5;
  CHECK(buffer[9] == 5);
  CHECK(buffer.size() == 12);
  const Buffer<float>& read = buffer;
  CHECK(read.view(3, 4)(2, 1) == 5);
  CHECK(read.span().size() == 12);
}

TEST_CASE("buffer: spread rows start at a cache line, and an odd number of them apart") {
  Buffer<float> buffer;
  for (const moxie::Index cols : {1, 16, 17, 32, 384, 1536}) {
    const moxie::RowView<float> m = buffer.spread(3, cols);
    CHECK(m.cols() == cols);
    CHECK(m.stride() >= cols);
    CHECK(m.stride() % 32 == 16);
    CHECK(reinterpret_cast<std::uintptr_t>(m.row(1)) % moxie::alignment == 0);
    m(2, cols - 1) = float(cols);
    const Buffer<float>& read = buffer;
    CHECK(read.spread_view(3, cols)(2, cols - 1) == float(cols));
  }
}

TEST_CASE("buffer: a large one starts at a large page, zero as any other") {
  constexpr std::size_t page = moxie::detail::large_page;
  Buffer<double> buffer(moxie::Index(page / sizeof(double)) + 5);
  CHECK(reinterpret_cast<std::uintptr_t>(buffer.data()) % page == 0);
  CHECK(std::all_of(buffer.begin(), buffer.end(), [](double v) { return v == 0; }));
  buffer[buffer.size() - 1] = 7;
  const Buffer<double> copy = buffer;
  CHECK(copy[copy.size() - 1] == 7);
}

TEST_CASE("buffer: a copy has every byte, whatever lies between zeros") {
  for (const Index n : {1, 4095, 4096, 4097, 20000}) {
    for (const Index place : {Index{0}, n / 2, n - 1}) {
      Buffer<char> buffer(n);
      buffer[place] = 3;
      const Buffer<char> copy = buffer;
      CHECK(std::equal(copy.begin(), copy.end(), buffer.begin(), buffer.end()));
    }
  }
  Buffer<double> buffer(3);
  buffer[1] = -0.0;
  const Buffer<double> copy = buffer;
  CHECK(std::signbit(copy[1]));
}

TEST_CASE("buffer: memory that nobody has touched costs nothing, nor do copies of it") {
  constexpr Index n = 64 << 20;
  const auto before = moxie::test::resident_kib();
  Buffer<char> buffer(n);
  buffer[n - 1] = 3;
  const Buffer<char> copy = buffer;
  CHECK(copy[n - 1] == 3);
  CHECK(moxie::test::resident_kib() - before < 16 << 10);
}

TEST_CASE("buffer: large blocks give their memory back") {
  constexpr Index n = 5 << 20;
  const auto before = moxie::test::resident_kib();
  std::vector<Buffer<char>> kept;  // between the others, so that the heap cannot shrink
  for (int round = 0; round < 2; ++round) {
    std::vector<Buffer<char>> buffers;
    for (int i = 0; i < 16; ++i) {
      buffers.emplace_back().assign(n, 3);
      kept.emplace_back(1000);
    }
  }
  CHECK(moxie::test::resident_kib() - before < 32 << 10);
}

// Counts what is taken, fills it with ones, and can run out.
struct Counting : std::pmr::memory_resource {
  void* do_allocate(std::size_t bytes, std::size_t aligned) override {
    if (bytes > left) {
      throw std::bad_alloc();
    }
    void* const block = std::pmr::new_delete_resource()->allocate(bytes, aligned);
    std::memset(block, 0xFF, bytes);
    taken[block] = bytes;
    ++allocations;
    return block;
  }
  void do_deallocate(void* block, std::size_t bytes, std::size_t aligned) override {
    matched = matched && taken.erase(block) == 1;
    std::pmr::new_delete_resource()->deallocate(block, bytes, aligned);
  }
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }

  std::map<void*, std::size_t> taken;
  std::size_t left = std::numeric_limits<std::size_t>::max();
  int allocations = 0;
  bool matched = true;
};

TEST_CASE("buffer: takes its memory from a resource and gives it back there") {
  Counting resource;
  {
    Buffer<double> a(100, &resource);
    CHECK(a.resource() == &resource);
    CHECK(reinterpret_cast<std::uintptr_t>(a.data()) % moxie::alignment == 0);
    CHECK(resource.taken.at(a.data()) == 800);
    a.assign(200, 1.5);
    a.resize(10);
    CHECK(resource.taken.size() == 1);
    Buffer<double> b = std::move(a);
    CHECK(resource.taken.size() == 1);
    CHECK(b.resource() == &resource);
    a.assign(3, 2);  // a moved-from buffer is an empty one
    CHECK(resource.taken.size() == 2);
    const Buffer<double> copy = b;
    CHECK(copy.resource() == nullptr);
    CHECK(copy[9] == 1.5);
    CHECK(resource.taken.size() == 2);
    Buffer<double> c(0, &resource);
    c = copy;
    CHECK(c.resource() == &resource);
    CHECK(c[9] == 1.5);
    CHECK(resource.taken.size() == 3);
    Buffer<double> d(5);
    d = std::move(c);
    CHECK(d.resource() == &resource);
    CHECK(d[9] == 1.5);
  }
  CHECK(resource.taken.empty());
  CHECK(resource.matched);
}

TEST_CASE("buffer: where memory is out it is as before") {
  Counting resource;
  Buffer<double> a(0, &resource);
  a.assign(10, 4);
  const double* const data = a.data();
  resource.left = 100;
  CHECK_THROWS_AS(a.resize(1000), std::bad_alloc);
  CHECK(a.size() == 10);
  CHECK(a.data() == data);
  CHECK(a[9] == 4);
  Buffer<double> large(20);
  CHECK_THROWS_AS(a = large, std::bad_alloc);
  CHECK(a[9] == 4);
  CHECK_THROWS_AS(Buffer<double>(std::numeric_limits<Index>::max() / 4), std::bad_alloc);
  Buffer<double> b(2);
  CHECK_THROWS_AS(b.resize(std::numeric_limits<Index>::max() / 4), std::bad_alloc);
  CHECK(b.size() == 2);
}

}  // namespace
