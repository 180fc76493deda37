// SPDX-License-Identifier: MIT
//
// Fuzzes the IDX reader: it changes good pairs of files at random and reads them. A pair is either read, and then the images
// are as they should be, or refused with a std::runtime_error that begins with the path of one of the files. Anything else is
// a fault: another exception, a crash, images that break a promise, or memory that no file of this size needs.
//
//   idx_fuzz [EXECUTIONS [SEED]]       the same files for the same seed; exits with 1 at the first fault, whose files stay
#include <sys/resource.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <idx_files.hpp>
#include <nn/fashion_mnist.hpp>
#include <random>
#include <stdexcept>
#include <string>
#include <temporary_folder.hpp>
#include <utility>
#include <vector>

namespace {

namespace fs = std::filesystem;
using Random = std::mt19937_64;  // its numbers are the same everywhere, unlike those of std::uniform_int_distribution

struct Pair {
  std::string images;
  std::string labels;
};

std::size_t below(std::size_t n, Random& random) { return n == 0 ? 0 : random() % n; }

std::string compressed(const std::string& bytes, const moxie::test::TemporaryFolder& folder) {
  moxie::test::write_gz(folder / "packed", bytes);
  return moxie::test::file_bytes(folder / "packed");
}

/// Good pairs, plain and compressed: what changes begin with.
std::vector<Pair> good_pairs(const moxie::test::TemporaryFolder& folder) {
  std::vector<Pair> pairs;
  for (const std::vector<std::uint32_t>& sizes :
       std::vector<std::vector<std::uint32_t>>{{1, 1, 1}, {3, 4, 5}, {2, 3, 2, 2}, {40, 28, 28}}) {
    std::size_t count = 1;
    for (const std::uint32_t n : sizes) {
      count *= n;
    }
    std::string pixels(count, '\0');
    for (std::size_t i = 0; i < count; ++i) {
      pixels[i] = static_cast<char>(i * 2654435761U >> 13U);
    }
    std::string classes(sizes[0], '\0');
    for (std::size_t i = 0; i < classes.size(); ++i) {
      classes[i] = static_cast<char>(i % 10);
    }
    const Pair plain{moxie::test::idx(sizes, pixels), moxie::test::idx({sizes[0]}, classes)};
    const Pair packed{compressed(plain.images, folder), compressed(plain.labels, folder)};
    pairs.push_back(plain);
    pairs.push_back(packed);
    pairs.push_back({plain.images, packed.labels});
  }
  // Large sizes of zeros, which compress best.
  pairs.push_back({compressed(moxie::test::idx({16, 512, 512}, std::string(std::size_t{1} << 22U, '\0')), folder),
                   moxie::test::idx({16}, std::string(16, '\0'))});
  return pairs;
}

/// Changes a file in one place.
void mutate(std::string& bytes, const std::string& other, Random& random) {
  constexpr std::array<std::uint32_t, 8> sizes{0, 1, 2, 1024, 1025, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF};
  const std::size_t at = below(bytes.size(), random);
  switch (below(9, random)) {
    case 0:  // a bit
      if (!bytes.empty()) {
        bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8, random)));
      }
      break;
    case 1:  // a byte
      if (!bytes.empty()) {
        bytes[at] = static_cast<char>(random());
      }
      break;
    case 2:  // a byte of the header
      if (!bytes.empty()) {
        bytes[below(std::min<std::size_t>(20, bytes.size()), random)] = static_cast<char>(below(16, random));
      }
      break;
    case 3:  // a dimension
      for (std::size_t i = 4 + 4 * below(4, random), j = 0, n = sizes[below(sizes.size(), random)]; j < 4; ++j) {
        if (i + j < bytes.size()) {
          bytes[i + j] = static_cast<char>(n >> (24 - 8 * j));
        }
      }
      break;
    case 4:
      bytes.resize(at);
      break;
    case 5:  // bytes go
      bytes.erase(at, below(9, random));
      break;
    case 6:  // bytes come
      bytes.insert(at, std::string(below(9, random), static_cast<char>(random())));
      break;
    case 7:  // a part of it again
      bytes.insert(at, bytes.substr(below(bytes.size(), random), below(64, random)));
      break;
    default:  // the end of another file
      bytes.resize(at);
      bytes += other.substr(below(other.size(), random));
      break;
  }
}

/// What is wrong with images that were read, or "".
std::string broken_promise(const nn::ImageSet& set) {
  if (set.count() < 1 || set.labels.size() != static_cast<std::size_t>(set.count()) ||
      set.images.cols() != set.channels * set.height * set.width) {
    return "shapes do not agree";
  }
  if (!(set.images.minCoeff() >= -1) || !(set.images.maxCoeff() <= 1)) {
    return "a pixel is not in [-1, 1]";
  }
  for (const std::int64_t label : set.labels) {
    if (label < 0 || label >= static_cast<std::int64_t>(set.class_names.size())) {
      return "a label has no class";
    }
  }
  return "";
}

/// What is wrong with how a pair was read, or "". `read` counts the pairs that were.
std::string fault_of(const fs::path& images, const fs::path& labels, std::int64_t& read) {
  try {
    const nn::ImageSet set = nn::read_idx(images, labels);
    ++read;
    return broken_promise(set);
  } catch (const std::runtime_error& error) {
    const std::string text = error.what();
    return text.rfind(images.string() + ": ", 0) == 0 || text.rfind(labels.string() + ": ", 0) == 0
               ? ""
               : "an error that names neither file: " + text;
  } catch (const std::exception& error) {
    return std::string("another exception: ") + error.what();
  }
}

// 16 MiB of elements may come from a file of any size; as bytes and floats they need 80 MiB.
#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define IDX_FUZZ_ADDRESS_SANITIZER
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define IDX_FUZZ_ADDRESS_SANITIZER
#endif
#if defined(IDX_FUZZ_ADDRESS_SANITIZER)
constexpr double allowed = 1000;  // it keeps freed memory for a while
#else
constexpr double allowed = 200;
#endif

double most_memory() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return double(usage.ru_maxrss) / 1024;  // MiB
}

}  // namespace

int main(int argc, char** argv) {
  const std::int64_t executions = argc > 1 ? std::atoll(argv[1]) : 20000;
  const std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  const moxie::test::TemporaryFolder folder;
  const std::vector<Pair> good = good_pairs(folder);
  const double before = most_memory();
  std::int64_t read = 0;
  for (std::int64_t i = 0; i < executions; ++i) {
    Random random(seed * 1000003 + std::uint64_t(i));
    Pair pair = good[below(good.size(), random)];
    const Pair& other = good[below(good.size(), random)];
    for (std::size_t changes = below(4, random); changes > 0; --changes) {
      const bool of_images = below(3, random) > 0;
      mutate(of_images ? pair.images : pair.labels, of_images ? other.images : other.labels, random);
    }
    moxie::test::write_plain(folder / "images", pair.images);
    moxie::test::write_plain(folder / "labels", pair.labels);
    std::string fault = fault_of(folder / "images", folder / "labels", read);
    if (fault.empty() && most_memory() > before + allowed) {
      fault = std::to_string(most_memory() - before) + " MiB of memory";
    }
    if (!fault.empty()) {
      std::printf("idx_fuzz: execution %lld of seed %llu: %s\n", static_cast<long long>(i),
                  static_cast<unsigned long long>(seed), fault.c_str());
      moxie::test::write_plain("idx_fuzz_images", pair.images);
      moxie::test::write_plain("idx_fuzz_labels", pair.labels);
      return 1;
    }
  }
  std::printf("idx_fuzz: %lld executions of seed %llu, %lld pairs read, %lld refused, %.0f MiB more than before\n",
              static_cast<long long>(executions), static_cast<unsigned long long>(seed), static_cast<long long>(read),
              static_cast<long long>(executions - read), most_memory() - before);
  // Both ways have to be taken: about a quarter of the pairs are unchanged.
  return executions < 100 || (read > executions / 20 && read < executions) ? 0 : 1;
}
