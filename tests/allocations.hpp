// SPDX-License-Identifier: MIT
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define MOXIE_TEST_SANITIZED 1
#endif
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define MOXIE_TEST_SANITIZED 1
#endif

/// Counts what the program allocates. The sanitizers report it; with glibc, including this replaces the C allocation functions,
/// through which all else goes; elsewhere it replaces the operators `new`, which sees everything but Eigen's own matrices.
/// Replacements are weak, so that several test files of one program may include this.
namespace moxie::test {

inline std::atomic<std::size_t> allocation_count{0};

}  // namespace moxie::test

#if defined(MOXIE_TEST_SANITIZED)

extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*allocated)(const volatile void*, std::size_t),
                                                         void (*freed)(const volatile void*));

namespace moxie::test {

inline const int allocation_hooks = __sanitizer_install_malloc_and_free_hooks(
    [](const volatile void* /*block*/, std::size_t /*size*/) { ++allocation_count; }, [](const volatile void* /*block*/) {});

}  // namespace moxie::test

#elif defined(__GLIBC__)

extern "C" {
// NOLINTBEGIN(bugprone-reserved-identifier): glibc's names
void* __libc_malloc(std::size_t size);
void* __libc_calloc(std::size_t count, std::size_t size);
void* __libc_realloc(void* block, std::size_t size);
void* __libc_memalign(std::size_t alignment, std::size_t size);

[[gnu::weak]] void* malloc(std::size_t size) noexcept {
  ++moxie::test::allocation_count;
  return __libc_malloc(size);
}
[[gnu::weak]] void* calloc(std::size_t count, std::size_t size) noexcept {
  ++moxie::test::allocation_count;
  return __libc_calloc(count, size);
}
[[gnu::weak]] void* realloc(void* block, std::size_t size) noexcept {
  ++moxie::test::allocation_count;
  return __libc_realloc(block, size);
}
[[gnu::weak]] void* aligned_alloc(std::size_t alignment, std::size_t size) noexcept {
  ++moxie::test::allocation_count;
  return __libc_memalign(alignment, size);
}
// NOLINTEND(bugprone-reserved-identifier)
}

#else

#if defined(__GNUC__) && !defined(__clang__)
// g++ 12 looks through the operators and warns of pairs that do match, and of destructors of empty optionals.
#pragma GCC diagnostic ignored "-Wmismatched-new-delete"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace moxie::test {

inline void* count_and_allocate(std::size_t size, std::size_t alignment) {
  ++allocation_count;
  void* const block = std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
  return block != nullptr ? block : throw std::bad_alloc();
}

}  // namespace moxie::test

// NOLINTBEGIN(misc-definitions-in-headers): weak
[[gnu::weak]] void* operator new(std::size_t size) { return moxie::test::count_and_allocate(size, alignof(std::max_align_t)); }
[[gnu::weak]] void* operator new(std::size_t size, std::align_val_t alignment) {
  return moxie::test::count_and_allocate(size, static_cast<std::size_t>(alignment));
}
[[gnu::weak]] void operator delete(void* block) noexcept { std::free(block); }
[[gnu::weak]] void operator delete(void* block, std::size_t /*size*/) noexcept { std::free(block); }
[[gnu::weak]] void operator delete(void* block, std::align_val_t /*alignment*/) noexcept { std::free(block); }
[[gnu::weak]] void operator delete(void* block, std::size_t /*size*/, std::align_val_t /*alignment*/) noexcept {
  std::free(block);
}
// NOLINTEND(misc-definitions-in-headers)

#endif
