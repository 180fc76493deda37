// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <moxie/core/parameters.hpp>
#include <mutex>
#include <nlohmann/json.hpp>
#include <random>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace moxie {

static_assert(std::endian::native == std::endian::little,
              "safetensors files are little-endian, and are read and written as is");

/// A file that breaks the format, lacks what is asked of it, or cannot be read or written. The message names the file, the
/// tensor where there is one, and what is wrong.
struct SafetensorsError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// The element types that are read, of those that the format knows; all but F16 are written, too.
enum class DType { F32, F64, F16, BF16, I32, I64, U8 };

/// Bytes of one element.
constexpr Index dtype_size(DType dtype) {
  switch (dtype) {
    case DType::F64:
    case DType::I64:
      return 8;
    case DType::F32:
    case DType::I32:
      return 4;
    case DType::F16:
    case DType::BF16:
      return 2;
    case DType::U8:
      break;
  }
  return 1;
}

/// The name that the format gives it.
constexpr std::string_view dtype_name(DType dtype) {
  switch (dtype) {
    case DType::F32:
      return "F32";
    case DType::F64:
      return "F64";
    case DType::F16:
      return "F16";
    case DType::BF16:
      return "BF16";
    case DType::I32:
      return "I32";
    case DType::I64:
      return "I64";
    case DType::U8:
      break;
  }
  return "U8";
}

/// What a file says of one of its tensors.
struct StoredTensor {
  DType dtype = DType::F32;
  std::vector<Index> shape;
  Index count = 0;   ///< elements: the product of the shape, 1 for a scalar
  Index offset = 0;  ///< in bytes, from the start of the file's data
};

namespace detail {

template <class T>
concept StoredScalar = std::same_as<T, float> || std::same_as<T, double> || std::same_as<T, std::int32_t> ||
    std::same_as<T, std::int64_t> || std::same_as<T, std::uint8_t>;

template <StoredScalar T>
inline constexpr DType dtype_of = std::same_as<T, float>          ? DType::F32
                                  : std::same_as<T, double>       ? DType::F64
                                  : std::same_as<T, std::int32_t> ? DType::I32
                                  : std::same_as<T, std::int64_t> ? DType::I64
                                                                  : DType::U8;

/// Floats read as floats, integers as integers at least as wide.
template <StoredScalar T>
constexpr bool reads_as(DType dtype) {
  const bool floating = dtype == DType::F32 || dtype == DType::F64 || dtype == DType::F16 || dtype == DType::BF16;
  return floating == std::is_floating_point_v<T> && (floating || dtype_size(dtype) <= Index{sizeof(T)});
}

/// The upper half of a float.
struct Bfloat16 {
  std::uint16_t bits;

  Bfloat16() = default;
  /// Rounds to nearest, ties to even; a NaN stays one.
  explicit Bfloat16(float x) {
    const auto word = std::bit_cast<std::uint32_t>(x);
    const std::uint32_t upper = word >> 16U;
    const bool nan = (word & 0x7FFFFFFFU) > 0x7F800000U;
    bits = static_cast<std::uint16_t>(nan ? upper | 0x40U : (word + 0x7FFFU + (upper & 1U)) >> 16U);
  }
  operator float() const { return std::bit_cast<float>(std::uint32_t{bits} << 16U); }
};

/// IEEE 754's binary16: a sign, 5 bits of exponent, 10 of fraction.
struct Float16 {
  std::uint16_t bits;

  operator float() const {
    const std::uint32_t sign = (bits & 0x8000U) << 16U;
    const std::uint32_t exponent = (bits >> 10U) & 0x1FU;
    const std::uint32_t fraction = bits & 0x3FFU;
    if (exponent == 0) {  // fraction · 2⁻²⁴
      return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(static_cast<float>(fraction) * 0x1p-24F));
    }
    const std::uint32_t wide = exponent == 0x1FU ? 0xFFU : exponent + 127U - 15U;
    return std::bit_cast<float>(sign | wide << 23U | fraction << 13U);
  }
};

// Names and numbers come from files that anyone may have written: printed short, and without control characters.
inline std::string printable(std::string_view text) {
  constexpr std::size_t longest = 100;
  const bool cut = text.size() > longest;
  const std::string json =
      nlohmann::json(std::string(text.substr(0, longest))).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  return json.substr(1, json.size() - 2) + (cut ? "..." : "");
}
inline std::string tensor_named(std::string_view name) { return "tensor '" + printable(name) + "'"; }

inline std::string shape_text(std::span<const Index> shape) {
  constexpr std::size_t most = 8;
  std::string text = "(";
  for (std::size_t i = 0; i < (std::min)(shape.size(), most); ++i) {
    text += i == 0 ? "" : ",";
    text += std::to_string(shape[i]);
  }
  return text + (shape.size() > most ? ",...)" : ")");
}

/// The number of elements, or -1 if a dimension is negative or their bytes do not fit an Index (zeros aside, so that no part
/// of the product overflows either).
inline Index element_count(std::span<const Index> shape, Index element_size) {
  Index limit = (std::numeric_limits<Index>::max)() / element_size;
  Index count = 1;
  bool empty = false;
  for (const Index n : shape) {
    if (n < 0 || n > limit) {
      return -1;
    }
    if (n == 0) {
      empty = true;
    } else {
      count *= n;
      limit /= n;
    }
  }
  return empty ? 0 : count;
}

inline std::string system_message(int error) { return std::generic_category().message(error); }

/// Reads the JSON header of a file as events, keeping only what the format allows: nothing is built, and no stack used, for
/// anything else, however deep.
class SafetensorsHeader {
 public:
  using Json = nlohmann::json;
  static constexpr std::uint64_t largest = 100'000'000;  // bytes; the format's limit

  /// Returns what is wrong, empty if nothing is. `data_size` is the number of bytes after the header.
  std::string parse(std::string_view text, Index data_size) {
    // The parser takes a zero byte for the end, and skips a byte-order mark and white space before the object.
    if (text.empty() || text.front() != '{') {
      return "the header does not start with '{'";
    }
    if (text.find('\0') != std::string_view::npos) {
      return "the header is not JSON: it has a zero byte";
    }
    if (!Json::sax_parse(text.begin(), text.end(), this)) {
      return problem_;
    }
    return check_offsets(data_size);
  }

  std::map<std::string, StoredTensor, std::less<>> tensors;
  std::map<std::string, std::string> metadata;

  // The events. Each returns whether to go on.
  bool null() { return unexpected("null"); }
  bool boolean(bool /*value*/) { return unexpected("a boolean"); }
  bool number_integer(Json::number_integer_t value) { return unexpected(std::to_string(value)); }
  bool number_float(Json::number_float_t /*value*/, const std::string& token) { return unexpected(printable(token)); }
  bool binary(Json::binary_t& /*value*/) { return unexpected("binary data"); }

  bool number_unsigned(Json::number_unsigned_t value) {
    if (place_ != Place::List || value > std::uint64_t((std::numeric_limits<Index>::max)())) {
      return unexpected(std::to_string(value));
    }
    (key_ == "shape" ? tensor_->shape : offsets_).push_back(static_cast<Index>(value));
    return true;
  }

  bool string(std::string& value) {
    if (place_ == Place::Metadata) {
      metadata[key_] = std::move(value);
      return true;
    }
    if (place_ != Place::Tensor || key_ != "dtype") {
      return unexpected("a string");
    }
    for (const DType dtype : {DType::F32, DType::F64, DType::F16, DType::BF16, DType::I32, DType::I64, DType::U8}) {
      if (dtype_name(dtype) == value) {
        tensor_->dtype = dtype;
        return true;
      }
    }
    return fail(where() + " '" + printable(value) + "' is not one of F32, F64, F16, BF16, I32, I64, U8");
  }

  bool start_object(std::size_t /*size*/) {
    if (place_ == Place::Start) {
      place_ = Place::Top;
    } else if (place_ == Place::Top && name_ == "__metadata__") {
      place_ = Place::Metadata;
    } else if (place_ == Place::Top) {
      place_ = Place::Tensor;
      fields_ = {};
      offsets_.clear();
    } else {
      return unexpected("an object");
    }
    return true;
  }

  bool key(std::string& key) {
    bool fresh = true;
    if (place_ == Place::Top) {
      name_ = std::move(key);
      if (name_ == "__metadata__") {
        fresh = !std::exchange(metadata_seen_, true);
      } else {
        const auto [position, inserted] = tensors.try_emplace(name_);
        tensor_ = &position->second;
        fresh = inserted;
      }
    } else if (place_ == Place::Metadata) {
      key_ = std::move(key);
      fresh = metadata.try_emplace(key_).second;
    } else {
      key_ = std::move(key);
      const auto field = std::find(field_names.begin(), field_names.end(), key_);
      if (field == field_names.end()) {
        return fail(where() + " is not a field of the format");
      }
      fresh = !std::exchange(fields_[static_cast<std::size_t>(field - field_names.begin())], true);
    }
    return fresh || fail(where() + " is there twice");
  }

  bool end_object() {
    const bool tensor = place_ == Place::Tensor;
    place_ = Place::Top;
    return !tensor || finish_tensor();
  }

  bool start_array(std::size_t /*size*/) {
    if (place_ != Place::Tensor || key_ == "dtype") {
      return unexpected("an array");
    }
    place_ = Place::List;
    return true;
  }

  bool end_array() {
    place_ = Place::Tensor;
    return true;
  }

  bool parse_error(std::size_t position, const std::string& /*token*/, const Json::exception& /*error*/) {
    return fail("the header is not JSON in UTF-8: wrong at its byte " + std::to_string(position));
  }

 private:
  enum class Place { Start, Top, Metadata, Tensor, List };
  static constexpr std::array<std::string_view, 3> field_names{"dtype", "shape", "data_offsets"};

  bool fail(std::string problem) {
    problem_ = std::move(problem);
    return false;
  }

  std::string where() const {
    switch (place_) {
      case Place::Start:
        return "the header";
      case Place::Top:
        return name_ == "__metadata__" ? name_ : tensor_named(name_);
      case Place::Metadata:
        return "metadata '" + printable(key_) + "'";
      case Place::Tensor:
      case Place::List:
        break;
    }
    return tensor_named(name_) + ": " + printable(key_);
  }

  bool unexpected(const std::string& found) {
    std::string expected = "an object";
    if (place_ == Place::List) {
      expected = "integers from 0 to 2^63 - 1";
    } else if (place_ == Place::Metadata || (place_ == Place::Tensor && key_ == "dtype")) {
      expected = "a string";
    } else if (place_ == Place::Tensor) {
      expected = "an array of integers";
    }
    return fail(where() + " has " + found + ", expected " + expected);
  }

  bool finish_tensor() {
    const std::string tensor = tensor_named(name_);
    for (std::size_t i = 0; i < fields_.size(); ++i) {
      if (!fields_[i]) {
        return fail(tensor + " has no " + std::string(field_names[i]));
      }
    }
    if (offsets_.size() != 2) {
      return fail(tensor + ": data_offsets has " + std::to_string(offsets_.size()) + " elements, expected 2");
    }
    const Index size = dtype_size(tensor_->dtype);
    const std::string shape = shape_text(tensor_->shape);
    tensor_->count = element_count(tensor_->shape, size);
    if (tensor_->count < 0) {
      return fail(tensor + ": shape " + shape + " has more bytes than can be counted");
    }
    const std::string span = "data_offsets " + shape_text(offsets_);
    if (offsets_[0] > offsets_[1]) {
      return fail(tensor + ": " + span + " end before they begin");
    }
    if (offsets_[1] - offsets_[0] != tensor_->count * size) {
      return fail(tensor + ": shape " + shape + " of " + std::string(dtype_name(tensor_->dtype)) + " takes " +
                  std::to_string(tensor_->count * size) + " bytes, but " + span + " hold " +
                  std::to_string(offsets_[1] - offsets_[0]));
    }
    tensor_->offset = offsets_[0];
    return true;
  }

  // The tensors have to cover the data, each byte once.
  std::string check_offsets(Index data_size) const {
    struct Span {
      Index begin;
      Index end;
      const std::string* name;
    };
    std::vector<Span> spans;
    spans.reserve(tensors.size());
    for (const auto& [name, tensor] : tensors) {
      spans.push_back({tensor.offset, tensor.offset + tensor.count * dtype_size(tensor.dtype), &name});
    }
    std::sort(spans.begin(), spans.end(),
              [](const Span& a, const Span& b) { return std::pair(a.begin, a.end) < std::pair(b.begin, b.end); });
    Index covered = 0;
    for (const Span& span : spans) {
      if (span.end > data_size) {
        return tensor_named(*span.name) + " ends at byte " + std::to_string(span.end) + " of the data, but the file has only " +
               std::to_string(data_size);
      }
      if (span.begin != covered) {
        return tensor_named(*span.name) + " begins at byte " + std::to_string(span.begin) +
               " of the data, but the one before " + "ends at " + std::to_string(covered) +
               (span.begin < covered ? ": they overlap" : ": there is a hole");
      }
      covered = span.end;
    }
    if (covered != data_size) {
      return "there are " + std::to_string(data_size - covered) + " bytes of data that belong to no tensor";
    }
    return {};
  }

  Place place_ = Place::Start;
  std::string name_;                // the key at the top: a tensor's name
  std::string key_;                 // the key one level below
  StoredTensor* tensor_ = nullptr;  // that of name_
  std::array<bool, 3> fields_{};    // which of field_names it has
  std::vector<Index> offsets_;
  bool metadata_seen_ = false;
  std::string problem_;
};

#if defined(__unix__) || defined(__APPLE__)

// A new file, or null and errno; with the permissions of `like` if there is such a file, else those of any new file.
inline std::FILE* create_file(const std::filesystem::path& path, const std::filesystem::path& like) {
  struct stat status {};
  const bool replaces = ::stat(like.c_str(), &status) == 0;
  const mode_t mode = replaces ? status.st_mode & 0777U : 0666U;
  const int descriptor = ::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
  if (descriptor < 0) {
    return nullptr;
  }
  static_cast<void>(::flock(descriptor, LOCK_EX | LOCK_NB));  // tells it from what a killed program has left
  if (replaces) {
    // What the umask took away. A file system that knows no permissions may refuse, and none are lost.
    static_cast<void>(::fchmod(descriptor, mode));
  }
  std::FILE* file = ::fdopen(descriptor, "wb");
  if (file == nullptr) {
    const int error = errno;
    ::close(descriptor);
    ::unlink(path.c_str());
    errno = error;
  }
  return file;
}

inline constexpr bool renames_open_files = true;
inline bool sync_file(std::FILE* file) { return ::fsync(::fileno(file)) == 0; }

// Makes a rename last. There is nothing to undo if it cannot be had, and some file systems refuse: no error.
inline void sync_directory(const std::filesystem::path& path) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor >= 0) {
    static_cast<void>(::fsync(descriptor));
    ::close(descriptor);
  }
}

#else

inline std::FILE* create_file(const std::filesystem::path& path, const std::filesystem::path& /*like*/) {
  return std::fopen(path.string().c_str(), "wbx");
}
inline constexpr bool renames_open_files = false;
inline bool sync_file(std::FILE* /*file*/) { return true; }
inline void sync_directory(const std::filesystem::path& /*path*/) {}

#endif

/// A new file that takes the place of `path` when it is complete: until `commit` returns, and for ever if it throws or is not
/// called, the old one is as it was. A symbolic link stays, and the file that it leads to is replaced.
class ReplacementFile {
 public:
  explicit ReplacementFile(const std::filesystem::path& path) : path_(path), target_(path) {
    std::error_code error;
    constexpr int most_links = 40;
    for (int links = 0; std::filesystem::is_symlink(std::filesystem::symlink_status(target_, error)); ++links) {
      const std::filesystem::path link = std::filesystem::read_symlink(target_, error);
      if (error || links == most_links) {
        fail(error ? error.message() : "too many symbolic links");
      }
      target_ = link.is_absolute() ? link : target_.parent_path() / link;
    }
    const std::filesystem::file_status status = std::filesystem::status(target_, error);
    if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status)) {
      fail("it exists and is not a regular file");
    }
    create();
  }
  ReplacementFile(const ReplacementFile&) = delete;
  ReplacementFile& operator=(const ReplacementFile&) = delete;
  ~ReplacementFile() {
    if (file_ != nullptr) {
      std::fclose(file_);
    }
    if (!temporary_.empty()) {
      std::error_code ignored;
      std::filesystem::remove(temporary_, ignored);
    }
  }

  void write(const void* data, std::size_t bytes) {
    if (bytes > 0 && std::fwrite(data, 1, bytes, file_) != bytes) {
      fail(system_message(errno));
    }
  }

  void commit() {
    if (std::fflush(file_) != 0 || !sync_file(file_)) {
      fail(system_message(errno));
    }
    const auto close = [&] {
      if (file_ != nullptr && std::fclose(std::exchange(file_, nullptr)) != 0) {
        fail(system_message(errno));
      }
    };
    if (!renames_open_files) {
      close();
    }
    std::error_code error;
    std::filesystem::rename(temporary_, target_, error);
    if (error) {
      fail(error.message());
    }
    temporary_.clear();
    close();  // and with it the lock
    sync_directory(directory());
  }

 private:
  [[noreturn]] void fail(const std::string& problem) const {
    throw SafetensorsError(path_.string() + ": cannot be written: " + problem);
  }

  std::filesystem::path directory() const { return target_.has_parent_path() ? target_.parent_path() : "."; }

  void create() {
    // Not derived from the target's name, which may be as long as a name can be.
    std::random_device random;
    constexpr int attempts = 100;
    int error = EEXIST;
    for (int i = 0; i < attempts && error == EEXIST; ++i) {
      std::array<char, 40> name{};
      std::snprintf(name.data(), name.size(), ".moxie-%08x%08x.tmp", random(), random());
      std::filesystem::path path = directory() / name.data();
      file_ = create_file(path, target_);
      error = file_ == nullptr ? errno : 0;
      if (error == 0) {
        temporary_ = std::move(path);
      }
    }
    if (error != 0) {
      fail(system_message(error));
    }
  }

  std::filesystem::path path_;       // as the caller named it
  std::filesystem::path target_;     // where it leads
  std::filesystem::path temporary_;  // empty when there is none to remove
  std::FILE* file_ = nullptr;
};

}  // namespace detail

/// A safetensors file, validated: 8 bytes of header length, a JSON header, the tensors without gaps
/// (https://github.com/huggingface/safetensors). The header is read at once, a tensor when it is asked for: memory is that of
/// the header and of what is read, whatever the file claims. The file stays open, so that one that takes its name is not mixed
/// up with it. Tensors can be read from several threads at once; they wait for each other.
///
/// The format's rules are all enforced, and more strictly than by readers that skip what they do not know: a duplicate key, an
/// unknown field or a type outside `DType` is an error.
///
///     const SafetensorsFile file("model.safetensors");
///     const std::vector<float> bias = file.read<float>("layer.0/bias");
class SafetensorsFile {
 public:
  /// Throws SafetensorsError.
  explicit SafetensorsFile(std::filesystem::path path) : path_(std::move(path)) {
    std::error_code error;
    const std::filesystem::file_status status = std::filesystem::status(path_, error);
    if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status)) {
      fail("is not a regular file");  // nor opened, which would wait for ever at a pipe
    }
    errno = 0;
    std::ifstream& stream = source_->stream;
    stream.open(path_, std::ios::binary);
    if (!stream) {
      fail("cannot be opened: " + detail::system_message(errno != 0 ? errno : EIO));
    }
    // The size of what is open: by now another file may have that name.
    stream.seekg(0, std::ios::end);
    const auto size = static_cast<std::int64_t>(stream.tellg());
    if (!stream.seekg(0)) {
      fail("cannot be read: it has no size");
    }
    std::uint64_t header_size = 0;
    constexpr Index prefix = sizeof header_size;
    if (size < prefix) {
      fail(size == 0 ? "is empty" : "is truncated: " + std::to_string(size) + " bytes are too few for a header's length");
    }
    read_bytes(0, &header_size, prefix);
    if (header_size > detail::SafetensorsHeader::largest) {
      fail("the header's length " + std::to_string(header_size) + " exceeds the format's limit of " +
           std::to_string(detail::SafetensorsHeader::largest) + ": is it a safetensors file?");
    }
    const Index data_size = size - prefix - static_cast<Index>(header_size);
    if (data_size < 0) {
      fail("is truncated: the header's length is " + std::to_string(header_size) + ", but only " +
           std::to_string(size - prefix) + " bytes follow");
    }
    std::string text(header_size, ' ');
    read_bytes(prefix, text.data(), static_cast<Index>(header_size));
    detail::SafetensorsHeader header;
    if (const std::string problem = header.parse(text, data_size); !problem.empty()) {
      fail(problem);
    }
    tensors_ = std::move(header.tensors);
    metadata_ = std::move(header.metadata);
    data_begin_ = size - data_size;
  }

  const std::filesystem::path& path() const { return path_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  /// Sorted, byte by byte.
  std::vector<std::string> names() const {
    std::vector<std::string> names;
    names.reserve(tensors_.size());
    for (const auto& [name, tensor] : tensors_) {
      names.push_back(name);
    }
    return names;
  }
  bool contains(std::string_view name) const { return tensors_.find(name) != tensors_.end(); }

  /// Throws SafetensorsError if there is no such tensor.
  const StoredTensor& info(std::string_view name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) {
      fail(detail::tensor_named(name) + " is missing");
    }
    return found->second;
  }

  /// The elements, row-major, as float, double, int32, int64 or uint8.
  ///
  /// F32, F64, F16 and BF16 read as floats, rounded to nearest where T is the narrower; I32, I64 and U8 as integers of the same
  /// or a larger size. Anything else, a name that is not there, and a file that has become shorter, throws SafetensorsError.
  template <detail::StoredScalar T>
  std::vector<T> read(std::string_view name) const {
    const StoredTensor& tensor = info(name);
    expect_type<T>(name, tensor);
    std::vector<T> values(static_cast<std::size_t>(tensor.count));
    copy(tensor, 0, tensor.count, values.data());
    return values;
  }

  /// The same, into a row-major matrix or a view that has the tensor's shape as a layout reads it: shape[0] rows, a vector one
  /// row, a scalar (1,1). Throws SafetensorsError if it has another; `to` is then left alone. A file that has become shorter
  /// since it was opened throws, too, and may leave `to` half read.
  template <class M>
  void read_into(std::string_view name, M&& to) const {
    using T = typename std::remove_cvref_t<M>::Scalar;
    const RowView<T> view(to);
    const StoredTensor& tensor = info(name);
    expect_type<T>(name, tensor);
    const Index rows = tensor.shape.size() > 1 ? tensor.shape.front() : 1;
    if (view.rows() != rows || view.size() != tensor.count) {
      fail(detail::tensor_named(name) + " has the shape " + detail::shape_text(tensor.shape) + ", and cannot be read into " +
           detail::dimensions(view.rows(), view.cols()));
    }
    if (view.stride() == view.cols()) {
      return copy(tensor, 0, view.size(), view.data());
    }
    for (Index i = 0; i < rows; ++i) {
      copy(tensor, i * view.cols(), view.cols(), view.row(i));
    }
  }

  /// Throws SafetensorsError if there is no such tensor, or it has another shape, or does not read as T.
  template <detail::StoredScalar T>
  void expect(std::string_view name, std::span<const Index> shape) const {
    const StoredTensor& tensor = info(name);
    expect_type<T>(name, tensor);
    if (!std::equal(shape.begin(), shape.end(), tensor.shape.begin(), tensor.shape.end())) {
      fail(detail::tensor_named(name) + " has the shape " + detail::shape_text(tensor.shape) + ", expected " +
           detail::shape_text(shape));
    }
  }

 private:
  [[noreturn]] void fail(const std::string& problem) const { throw SafetensorsError(path_.string() + ": " + problem); }

  void read_bytes(Index at, void* to, Index count) const {
    const std::lock_guard lock(source_->mutex);
    std::ifstream& stream = source_->stream;
    if (count > 0 && (!stream.seekg(at) || !stream.read(static_cast<char*>(to), count))) {
      stream.clear();
      fail("cannot be read to its end");
    }
  }

  template <class T>
  void expect_type(std::string_view name, const StoredTensor& tensor) const {
    if (!detail::reads_as<T>(tensor.dtype)) {
      fail(detail::tensor_named(name) + " is " + std::string(dtype_name(tensor.dtype)) + ", which cannot be read as " +
           std::string(dtype_name(detail::dtype_of<T>)));
    }
  }

  template <class T>
  void copy(const StoredTensor& tensor, Index first, Index count, T* to) const {
    const Index from = data_begin_ + tensor.offset + first * dtype_size(tensor.dtype);
    switch (tensor.dtype) {
      case DType::F32:
        return convert<float>(from, count, to);
      case DType::F64:
        return convert<double>(from, count, to);
      case DType::F16:
        return convert<detail::Float16>(from, count, to);
      case DType::BF16:
        return convert<detail::Bfloat16>(from, count, to);
      case DType::I32:
        return convert<std::int32_t>(from, count, to);
      case DType::I64:
        return convert<std::int64_t>(from, count, to);
      case DType::U8:
        return convert<std::uint8_t>(from, count, to);
    }
  }
  template <class Stored, class T>
  void convert(Index from, Index count, T* to) const {
    if constexpr (std::is_same_v<Stored, T>) {
      read_bytes(from, to, count * Index{sizeof(T)});
    } else {
      constexpr Index piece = 1 << 14;
      std::vector<Stored> values(static_cast<std::size_t>((std::min)(count, piece)));
      for (Index done = 0; done < count; done += piece) {
        const Index n = (std::min)(piece, count - done);
        read_bytes(from + done * Index{sizeof(Stored)}, values.data(), n * Index{sizeof(Stored)});
        std::transform(values.begin(), values.begin() + n, to + done, [](Stored value) { return static_cast<T>(value); });
      }
    }
  }

  struct Source {
    std::ifstream stream;
    std::mutex mutex;
  };

  std::filesystem::path path_;
  std::unique_ptr<Source> source_ = std::make_unique<Source>();
  std::map<std::string, StoredTensor, std::less<>> tensors_;
  std::map<std::string, std::string> metadata_;
  Index data_begin_ = 0;
};

/// Collects named tensors, and writes them to a file.
///
/// `add` keeps a view: the numbers have to live, and are read, until `save`. It throws ShapeError if they do not fill the
/// shape, ValueError for a name that is taken, reserved ("__metadata__") or not UTF-8.
///
///     SafetensorsWriter writer;
///     writer.add_parameters(layer.parameters(), "weights.");
///     writer.add_parameters(averages, "ema.");
///     writer.metadata("step", std::to_string(step));
///     writer.save("model.safetensors");
class SafetensorsWriter {
 public:
  void add(std::string name, std::vector<Index> shape, std::span<const float> values) {
    add(std::move(name), std::move(shape), DType::F32, values);
  }
  void add(std::string name, std::vector<Index> shape, std::span<const double> values) {
    add(std::move(name), std::move(shape), DType::F64, values);
  }
  void add(std::string name, std::vector<Index> shape, std::span<const std::int32_t> values) {
    add(std::move(name), std::move(shape), DType::I32, values);
  }
  void add(std::string name, std::vector<Index> shape, std::span<const std::int64_t> values) {
    add(std::move(name), std::move(shape), DType::I64, values);
  }
  void add(std::string name, std::vector<Index> shape, std::span<const std::uint8_t> values) {
    add(std::move(name), std::move(shape), DType::U8, values);
  }
  /// Stored as BF16, rounded to nearest, ties to even, when it is saved; a NaN stays one.
  void add_bf16(std::string name, std::vector<Index> shape, std::span<const float> values) {
    add(std::move(name), std::move(shape), DType::BF16, values);
  }
  // A temporary would be gone by the time it is saved.
  template <class T>
  void add(std::string name, std::vector<Index> shape, std::vector<T>&& values) = delete;
  void add_bf16(std::string name, std::vector<Index> shape, std::vector<float>&& values) = delete;

  /// All tensors of a block of parameters, their names prefixed.
  template <class Block>
  void add_parameters(const Block& block, std::string_view prefix = {}) {
    const auto view = detail::as_view(block);
    for (Index i = 0; i < view.layout().count(); ++i) {
      const TensorInfo& t = view.layout().tensors()[static_cast<std::size_t>(i)];
      const auto w = view[i];
      expect_value(view.has(i) && (w.rows() <= 1 || w.stride() == w.cols()), "SafetensorsWriter::add_parameters",
                   "the " + detail::tensor_named(t.name) + " is absent, or its rows are apart");
      const std::span values(w.data(), static_cast<std::size_t>(w.size()));
      add(std::string(prefix) + t.name, t.shape, dtype_of_view(view), values);
    }
  }

  /// Sets an entry of the file's `__metadata__`. Throws ValueError if either text is not UTF-8.
  void metadata(std::string key, std::string value) {
    detail::expect_value(is_utf8(key) && is_utf8(value), "SafetensorsWriter::metadata",
                         "'" + detail::printable(key) + "' or its value is not UTF-8");
    metadata_[std::move(key)] = std::move(value);
  }

  /// Writes the file, byte for byte as the reference implementation would: larger elements first, then by name, the data
  /// aligned to 8 bytes.
  ///
  /// An existing file is replaced when the new one is complete and on the disk, and keeps its permissions; a symbolic link is
  /// followed. Several processes may save to one path: the last one stays. Throws SafetensorsError if anything fails, and
  /// leaves what was there. A process that is killed meanwhile may leave a ".moxie-*.tmp" beside it.
  void save(const std::filesystem::path& path) const {
    const std::vector<const Entries::value_type*> order = file_order();
    std::string header = header_text(order);
    header.append((8 - header.size() % 8) % 8, ' ');
    const std::uint64_t header_size = header.size();
    if (header_size > detail::SafetensorsHeader::largest) {
      throw SafetensorsError(path.string() + ": cannot be written: its header would have " + std::to_string(header_size) +
                             " bytes, the format's limit is " + std::to_string(detail::SafetensorsHeader::largest));
    }
    detail::ReplacementFile file(path);
    file.write(&header_size, sizeof header_size);
    file.write(header.data(), header.size());
    for (const auto* entry : order) {
      write(entry->second, file);
    }
    file.commit();
  }

 private:
  struct Entry {
    DType dtype;
    std::vector<Index> shape;
    const void* values;  // floats for BF16
    Index count;
  };
  using Entries = std::map<std::string, Entry>;

  template <class T>
  static constexpr DType dtype_of_view(const ParameterView<T>& /*view*/) {
    return detail::dtype_of<std::remove_const_t<T>>;
  }

  template <class T>
  void add(std::string name, std::vector<Index> shape, DType dtype, std::span<T> values) {
    const std::string where = "SafetensorsWriter::add";
    const auto count = static_cast<Index>(values.size());
    detail::expect_value(is_utf8(name), where, "the name '" + detail::printable(name) + "' is not UTF-8");
    detail::expect_value(name != "__metadata__", where, "the name '__metadata__' is reserved");
    detail::expect_value(entries_.find(name) == entries_.end(), where, "there is a " + detail::tensor_named(name) + " already");
    if (detail::element_count(shape, Index{sizeof(T)}) != count) {
      throw ShapeError(where + ": " + detail::tensor_named(name) + " of shape " + detail::shape_text(shape) + " is given " +
                       std::to_string(count) + " elements");
    }
    entries_.emplace(std::move(name), Entry{dtype, std::move(shape), values.data(), count});
  }

  static bool is_utf8(const std::string& text) {
    try {
      static_cast<void>(json_text(text));
      return true;
    } catch (const nlohmann::json::type_error&) {
      return false;
    }
  }
  static std::string json_text(const std::string& text) { return nlohmann::json(text).dump(); }

  // Larger alignment first, so that every tensor is aligned; within it the order of types that the reference has.
  std::vector<const Entries::value_type*> file_order() const {
    std::vector<const Entries::value_type*> order;
    order.reserve(entries_.size());
    for (const DType dtype : {DType::I64, DType::F64, DType::F32, DType::I32, DType::BF16, DType::U8}) {
      for (const auto& entry : entries_) {
        if (entry.second.dtype == dtype) {
          order.push_back(&entry);
        }
      }
    }
    return order;
  }

  std::string header_text(const std::vector<const Entries::value_type*>& order) const {
    std::string text = "{";
    const auto comma = [&text] { text += text.size() > 1 ? "," : ""; };
    if (!metadata_.empty()) {
      text += "\"__metadata__\":" + nlohmann::json(metadata_).dump();
    }
    Index offset = 0;
    for (const auto* entry : order) {
      const auto& [name, tensor] = *entry;
      const Index end = offset + tensor.count * dtype_size(tensor.dtype);
      comma();
      text += json_text(name) + ":{\"dtype\":\"" + std::string(dtype_name(tensor.dtype)) +
              "\",\"shape\":" + nlohmann::json(tensor.shape).dump() + ",\"data_offsets\":[" + std::to_string(offset) + "," +
              std::to_string(end) + "]}";
      offset = end;
    }
    return text + "}";
  }

  static void write(const Entry& entry, detail::ReplacementFile& file) {
    if (entry.dtype != DType::BF16) {
      file.write(entry.values, static_cast<std::size_t>(entry.count * dtype_size(entry.dtype)));
      return;
    }
    std::array<detail::Bfloat16, 4096> rounded;
    const auto* values = static_cast<const float*>(entry.values);
    for (Index done = 0; done < entry.count;) {
      const Index n = (std::min)(entry.count - done, Index{rounded.size()});
      std::transform(values + done, values + done + n, rounded.begin(), [](float x) { return detail::Bfloat16(x); });
      file.write(rounded.data(), static_cast<std::size_t>(n) * sizeof(detail::Bfloat16));
      done += n;
    }
  }

  Entries entries_;
  std::map<std::string, std::string> metadata_;
};

/// What a tensor in the file, under the prefix that is read, that the layout does not have is: an error, or none.
enum class ExtraTensors { Refuse, Ignore };

/// Throws SafetensorsError unless `load_parameters` would succeed: every tensor of the block is in the file, under its prefixed
/// name, in its shape and as floats, and no others are under that prefix. Where one file holds several blocks, checking all of
/// them before loading the first makes the whole all or nothing.
template <class Block>
void check_parameters(const SafetensorsFile& file, const Block& block, std::string_view prefix = {},
                      ExtraTensors extra = ExtraTensors::Refuse) {
  const auto view = detail::as_view(block);
  const Layout& layout = view.layout();
  for (const TensorInfo& t : layout.tensors()) {
    file.expect<typename decltype(view)::Scalar>(std::string(prefix) + t.name, t.shape);
  }
  if (extra == ExtraTensors::Ignore) {
    return;
  }
  std::vector<std::string> names = file.names();
  std::erase_if(names, [&](const std::string& name) { return !name.starts_with(prefix); });
  if (names.size() == layout.tensors().size()) {
    return;
  }
  for (const std::string& name : names) {
    if (layout.find(std::string_view(name).substr(prefix.size())) < 0) {
      throw SafetensorsError(file.path().string() + ": " + detail::tensor_named(name) + " is not among the parameters to load");
    }
  }
}

/// Reads a block of parameters (weights, averages, moments), all or nothing: nothing is written unless `check_parameters`
/// passes. F64 rounds to nearest into a block of floats.
///
///     const SafetensorsFile file("model.safetensors");
///     load_parameters(file, layer.parameters(), "weights.");
///     load_parameters(file, averages, "ema.");
template <class Block>
void load_parameters(const SafetensorsFile& file, Block&& block, std::string_view prefix = {},
                     ExtraTensors extra = ExtraTensors::Refuse) {
  check_parameters(file, block, prefix, extra);
  const auto view = detail::as_view(block);
  const std::vector<TensorInfo>& tensors = view.layout().tensors();
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    file.read_into(std::string(prefix) + tensors[i].name, view[Index(i)]);
  }
}
template <class Block>
void load_parameters(const std::filesystem::path& path, Block&& block, std::string_view prefix = {},
                     ExtraTensors extra = ExtraTensors::Refuse) {
  load_parameters(SafetensorsFile(path), block, prefix, extra);
}

/// Writes one block of parameters to a file, as `SafetensorsWriter::save` does.
template <class Block>
void save_parameters(const std::filesystem::path& path, const Block& block,
                     const std::map<std::string, std::string>& metadata = {}) {
  SafetensorsWriter writer;
  writer.add_parameters(block);
  for (const auto& [key, value] : metadata) {
    writer.metadata(key, value);
  }
  writer.save(path);
}

}  // namespace moxie
