// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <io/files.hpp>
#include <moxie/core/random.hpp>
#include <string>
#include <string_view>
#include <vector>

/// Damaged safetensors files, each a function of a seed and a number only.
namespace moxie::test {

/// Valid files that are damaged.
inline std::vector<std::string> whole_files() {
  const std::string parameters = R"({"__metadata__":{"step":"3"},"bias":{"dtype":"F32","shape":[5],"data_offsets":[0,20]},)"
                                 R"("experts":{"dtype":"F32","shape":[2,3,4],"data_offsets":[20,116]},)"
                                 R"("gate/w":{"dtype":"F32","shape":[4,3],"data_offsets":[116,164]},)"
                                 R"("none":{"dtype":"F32","shape":[0,7],"data_offsets":[164,164]},)"
                                 R"("scale":{"dtype":"F32","shape":[],"data_offsets":[164,168]}})";
  const std::string formats =
      R"({"a.w":{"dtype":"F8_E4M3","shape":[2,2],"data_offsets":[0,4]},"b":{"dtype":"U16","shape":[1],"data_offsets":[4,6]},)"
      R"("module.c":{"dtype":"NEW","shape":[3],"data_offsets":[6,7]},"d":{"dtype":"F4","shape":[2,3],"data_offsets":[7,10]},)"
      R"("e":{"dtype":"F16","shape":[3],"data_offsets":[10,16]}})";
  return {python_file(), with_header(parameters, 168), with_header(formats, 16), with_header("{}")};
}

/// Damages a file in one to three places, mostly of its header. Half of the time the header's length
/// follows, so that the damage reaches what lies behind that check.
class SafetensorsDamage {
 public:
  SafetensorsDamage(std::uint64_t seed, std::uint64_t number) : rng_(Rng(seed).split(number)) {}

  std::string damaged(std::string bytes) {
    for (std::size_t places = below(3) + 1; places > 0; --places) {
      std::uint64_t header_size = 0;
      std::memcpy(&header_size, bytes.data(), std::min(bytes.size(), sizeof header_size));
      const std::size_t inside = std::min<std::size_t>(header_size, bytes.size());
      const std::size_t at = below(4) == 0 ? below(bytes.size()) : 8 + below(inside);
      if (at >= bytes.size()) {
        continue;
      }
      const std::size_t before = bytes.size();
      damage(bytes, at);
      if (bytes.size() >= 8 && below(2) == 0) {
        bytes.replace(0, 8, length_prefix(header_size + bytes.size() - before));
      }
    }
    return bytes;
  }

 private:
  std::size_t below(std::size_t n) {
    return static_cast<std::size_t>(rng_.below(static_cast<Index>(std::max<std::size_t>(n, 1)), drawn_++));
  }
  template <std::size_t n>
  std::string one_of(const std::array<std::string_view, n>& choices) {
    return std::string(choices[below(n)]);
  }

  void damage(std::string& bytes, std::size_t at) {
    static constexpr std::array<std::string_view, 12> numbers{"0",
                                                              "1",
                                                              "4",
                                                              "2147483648",
                                                              "9223372036854775807",
                                                              "9223372036854775808",
                                                              "18446744073709551615",
                                                              "-1",
                                                              "1.0",
                                                              "1e99",
                                                              "00",
                                                              "77777777777777777777777777777777777777777"};
    static constexpr std::array<std::string_view, 12> formats{"F32", "F64",  "BF16", "F16",     "I64", "U8",
                                                              "F4",  "BOOL", "C64",  "F6_E2M3", "",    "NEW"};
    static constexpr std::array<std::string_view, 8> parts{"module.", "_orig_mod.", "\\u0000", "\\\"",
                                                           "\xff",    "{}",         "[1]",     "\"__metadata__\""};
    switch (below(13)) {
      case 0:
        bytes[at] = static_cast<char>(bytes[at] ^ (1 << below(8)));
        break;
      case 1:
        bytes[at] = static_cast<char>(below(256));
        break;
      case 2:
        bytes[std::min(bytes.find_first_of("0123456789", at), bytes.size() - 1)] = static_cast<char>('0' + below(10));
        break;
      case 3:
        bytes.erase(at, below(20));
        break;
      case 4:
        bytes.insert(at, bytes.substr(below(bytes.size()), below(60)));
        break;
      case 5:
        bytes.insert(at, 1, "{}[],:\"\\0-9eE. "[below(15)]);
        break;
      case 6:
        bytes.resize(at);
        break;
      case 7: {
        const std::size_t digit = bytes.find_first_of("0123456789", at);
        if (digit != std::string::npos) {
          bytes.replace(digit, bytes.find_first_not_of("0123456789", digit) - digit, one_of(numbers));
        }
        break;
      }
      case 8: {
        constexpr std::string_view field = "\"dtype\":\"";
        const std::size_t dtype = bytes.find(field, at);
        if (dtype != std::string::npos) {
          const std::size_t begin = dtype + field.size();
          bytes.replace(begin, bytes.find('"', begin) - begin, one_of(formats));
        }
        break;
      }
      case 9:
        bytes.insert(at, one_of(parts));
        break;
      case 10: {
        const std::string copied = bytes.substr(at, below(12) + 1);
        for (std::size_t times = below(300); times > 0; --times) {
          bytes.insert(at, copied);
        }
        break;
      }
      case 11: {  // an entry again, perhaps in another place
        const std::size_t begin = bytes.find("\"", at);
        const std::size_t end = bytes.find("},", at);
        if (begin < end && end != std::string::npos) {
          bytes.insert(begin, bytes.substr(begin, end + 2 - begin));
        }
        break;
      }
      default:
        bytes.replace(0, std::min<std::size_t>(bytes.size(), 8), length_prefix(below(2) == 0 ? below(300) : ~below(300)));
        break;
    }
  }

  Rng rng_;
  std::uint64_t drawn_ = 0;
};

}  // namespace moxie::test
