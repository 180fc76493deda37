// SPDX-License-Identifier: MIT
#pragma once

#include <charconv>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <moxie/core/parameters.hpp>
#include <moxie/io/safetensors.hpp>
#include <set>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace golden {

using moxie::Index;
using moxie::Matrix;
using moxie::RowView;

/// A golden file that contradicts itself, or lacks what its family needs.
struct GoldenError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// How far a result may be from the reference, relative to the largest element of the reference tensor.
template <class Scalar>
inline constexpr double tolerance = 1e-9;
template <>
inline constexpr double tolerance<float> = 2e-5;

/// The numbers of a matrix, row by row.
template <class Scalar>
std::vector<double> values(RowView<Scalar> m) {
  std::vector<double> v;
  v.reserve(std::size_t(m.size()));
  for (Index i = 0; i < m.rows(); ++i) {
    v.insert(v.end(), m.row(i), m.row(i) + m.cols());
  }
  return v;
}
template <class Scalar>
std::vector<double> values(const Matrix<Scalar>& m) {
  return values(RowView<const Scalar>(m));
}

/// Not a number everywhere: an output that starts so shows the elements that nobody wrote.
template <class Scalar>
Matrix<Scalar> unwritten(Index rows, Index cols) {
  return Matrix<Scalar>::Constant(rows, cols, std::numeric_limits<Scalar>::quiet_NaN());
}

/// ⟨y, dy⟩, summed in double.
template <class Scalar>
double inner_product(const Matrix<Scalar>& y, const Matrix<Scalar>& dy) {
  return y.template cast<double>().cwiseProduct(dy.template cast<double>()).sum();
}

/// The backend of a family: the layer of the CPU itself, or `moxie::test::OnDevice`.
template <class Layer>
using OnCpu = Layer;

/// One golden file under verification: hyper-parameters, shapes and inputs to read, results to compare, and the record of both.
///
/// Every tensor of the file has to be read, compared or excused, in the end `failures` names those that were not.
class GoldenCase {
 public:
  /// Tensors that are compared together: one line of the report.
  struct Group {
    std::string name;
    Index tensors = 0;
    double error = 0;
    double tolerance = 0;
    std::string note;

    bool ok() const { return error <= tolerance; }
  };

  /// Throws GoldenError if a number of the file is not finite.
  GoldenCase(const moxie::SafetensorsFile& file, double tolerance) : file_(file), tolerance_(tolerance) {
    for (const std::string& name : file.names()) {
      if (moxie::reads_as<double>(file.info(name).dtype)) {
        expect_finite(name, file.read<double>(name));
      }
    }
  }

  const moxie::SafetensorsFile& file() const { return file_; }
  double tolerance() const { return tolerance_; }
  /// A file in the same folder.
  std::filesystem::path beside(const std::string& name) const {
    if (name.empty() || std::filesystem::path(name).filename() != name) {
      throw GoldenError("'" + moxie::printable(name) + "' is not the name of a file beside this one");
    }
    return file_.path().parent_path() / name;
  }

  // The metadata. Each throws GoldenError if the entry is missing or reads as something else.

  const std::string& text(const std::string& key) const {
    const auto found = file_.metadata().find(key);
    if (found == file_.metadata().end()) {
      throw GoldenError("metadata '" + key + "' is missing");
    }
    return found->second;
  }
  Index integer(const std::string& key, Index least = 1, Index most = Index{1} << 24) const {
    const auto value = parse<Index>(key);
    if (value < least || value > most) {
      throw GoldenError("metadata '" + key + "' is " + std::to_string(value) + ", expected " + std::to_string(least) + " to " +
                        std::to_string(most));
    }
    return value;
  }
  double number(const std::string& key) const {
    const auto value = parse<double>(key);
    if (!std::isfinite(value)) {
      throw GoldenError("metadata '" + key + "' is not finite");
    }
    return value;
  }
  bool boolean(const std::string& key) const {
    const std::string& value = text(key);
    if (value != "True" && value != "False") {
      throw GoldenError("metadata '" + key + "' is '" + moxie::printable(value) + "', expected True or False");
    }
    return value == "True";
  }

  // The tensors.

  bool contains(std::string_view name) const { return file_.contains(name); }
  const std::vector<Index>& shape(std::string_view name) const { return file_.info(name).shape; }

  /// The first size of a tensor. Throws GoldenError if it is a single number.
  Index first_size(std::string_view name) const {
    if (shape(name).empty()) {
      throw GoldenError(moxie::tensor_named(name) + " is a single number");
    }
    return shape(name).front();
  }

  /// Throws GoldenError or SafetensorsError unless the file has this tensor in this shape. A family asks for all of its tensors
  /// before it computes anything: what fits the file then fits the memory.
  void require(std::string_view name, const std::vector<Index>& expected) const {
    if (shape(name) != expected) {
      throw GoldenError(moxie::tensor_named(name) + " is " + moxie::shape_text(shape(name)) + ", expected " +
                        moxie::shape_text(expected));
    }
  }
  /// The same if the file has it at all.
  void allow(std::string_view name, const std::vector<Index>& expected) const {
    if (contains(name)) {
      require(name, expected);
    }
  }
  /// Throws GoldenError for an intermediate result that no honest file would need; a product of sizes, each at least 1.
  static void limit(std::initializer_list<Index> sizes) {
    double elements = 1;
    for (const Index n : sizes) {
      elements *= double(n);
    }
    if (elements > double(Index{1} << 28)) {
      throw GoldenError("the sizes ask for more than 2^28 intermediate numbers");
    }
  }

  /// The elements of an input. Marks the tensor as used.
  template <class T>
  std::vector<T> read(const std::string& name) {
    used_.insert(name);
    std::vector<T> elements = file_.read<T>(name);
    if constexpr (std::is_floating_point_v<T>) {
      expect_finite(name, elements);  // a float has a smaller range than the file's numbers
    }
    return elements;
  }
  /// The same as a matrix of as many elements.
  template <class Scalar>
  Matrix<Scalar> matrix(const std::string& name, Index rows, Index cols) {
    const std::vector<Scalar> elements = read<Scalar>(name);
    if (Index(elements.size()) != rows * cols) {
      throw GoldenError(moxie::tensor_named(name) + " has " + std::to_string(elements.size()) + " elements, expected " +
                        std::to_string(rows * cols));
    }
    return Eigen::Map<const Matrix<Scalar>>(elements.data(), rows, cols);
  }

  /// Compares a result with a tensor of the file:
  ///
  ///     error = max |actual - expected| / max |expected|
  ///
  /// over the tensor. Where all that is expected is zero, so must be the result. NaN is an infinite error.
  void compare(const std::string& name, const std::vector<double>& actual) { compare(name, actual, {}); }

  /// For a result that is zero by algebra, where the reference has what rounding left of terms that cancel: the error is
  /// relative to the size of those terms, max |actual| and max |expected| both.
  void compare_cancelled(const std::string& name, const std::vector<double>& actual, double terms) {
    compare(name, actual, {terms, true, "zero but for rounding; relative to the terms that cancel"});
  }

  /// For the one number ⟨y, dy⟩ + aux, a signed sum: the error is relative to the sum of the absolute terms, since what cancels
  /// says nothing about the layer.
  template <class Scalar>
  void compare_total(const std::string& name, const Matrix<Scalar>& y, const Matrix<Scalar>& dy, double aux) {
    const double terms = inner_product<Scalar>(y.cwiseAbs(), dy.cwiseAbs()) + std::abs(aux);
    compare(name, {inner_product(y, dy) + aux}, {terms, false, "relative to the sum of absolute terms"});
  }

  /// Compares integers, which have to be equal.
  void compare_exactly(const std::string& name, const std::vector<std::int64_t>& actual) {
    const std::vector<std::int64_t> expected = read<std::int64_t>(name);
    double error = actual.size() == expected.size() ? 0 : infinity;
    for (std::size_t i = 0; error == 0 && i < actual.size(); ++i) {
      if (actual[i] != expected[i]) {
        error = infinity;
        fail(name + ": element " + std::to_string(i) + " is " + std::to_string(actual[i]) + ", expected " +
             std::to_string(expected[i]));
      }
    }
    record(name, error, 0, "exactly");
  }

  /// Compares what was chosen for each token: (T,K) indices and weights in any order within a token. The names are those of the
  /// file's tensors; an expected index that is not in [0, experts) or is there twice is a failure.
  void compare_choices(const std::string& index_name, const std::string& weight_name, Index experts,
                       const std::vector<std::int64_t>& index, const std::vector<double>& weight) {
    const std::vector<std::int64_t> expected_index = read<std::int64_t>(index_name);
    const std::vector<double> expected_weight = read<double>(weight_name);
    const Index tokens = first_size(index_name);
    const auto k = tokens == 0 ? Index{0} : Index(expected_index.size()) / tokens;
    if (index.size() != expected_index.size() || weight.size() != index.size() || expected_weight.size() != index.size()) {
      throw GoldenError(index_name + ": " + std::to_string(index.size()) + " choices, expected " +
                        std::to_string(expected_index.size()));
    }
    std::vector<double> matched(expected_weight.size());
    double error = 0;
    for (Index t = 0; t < tokens && error == 0; ++t) {
      const auto begin = std::size_t(t * k);
      const auto end = begin + std::size_t(k);
      std::set<std::int64_t> chosen;
      for (std::size_t i = begin; i < end; ++i) {
        std::size_t j = begin;
        while (j < end && index[j] != expected_index[i]) {
          ++j;
        }
        const bool fits = j < end && expected_index[i] >= 0 && expected_index[i] < experts;
        if (!fits || !chosen.insert(expected_index[i]).second) {
          error = infinity;
          fail(index_name + ": token " + std::to_string(t) + " has " + set_text(index, begin, end) + ", expected " +
               set_text(expected_index, begin, end));
          break;
        }
        matched[i] = weight[j];
      }
    }
    record(index_name, error, 0, "as sets");
    if (error == 0) {
      compare(weight_name, matched);
    } else {
      record(weight_name, infinity, tolerance_, "the choices differ");
    }
  }

  /// Excuses a tensor if the file has it.
  void leave_out(const std::string& name, std::string reason) {
    if (contains(name)) {
      used_.insert(name);
      left_out_.push_back(name + " (" + std::move(reason) + ")");
    }
  }

  // The report.

  const std::vector<Group>& groups() const { return groups_; }
  const std::vector<std::string>& left_out() const { return left_out_; }

  /// What is wrong, tensors that nothing looked at among it; empty for a file that passes.
  std::vector<std::string> failures() const {
    std::vector<std::string> all = failures_;
    for (const std::string& name : file_.names()) {
      if (used_.count(name) == 0) {
        all.push_back(moxie::tensor_named(name) + " was not compared with anything");
      }
    }
    if (groups_.empty()) {
      all.emplace_back("nothing was compared");
    }
    return all;
  }

 private:
  static constexpr double infinity = std::numeric_limits<double>::infinity();

  template <class T>
  T parse(const std::string& key) const {
    const std::string& value = text(key);
    T result{};
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), result);
    if (error != std::errc{} || end != value.data() + value.size()) {
      throw GoldenError("metadata '" + key + "' is '" + moxie::printable(value) + "', expected a number");
    }
    return result;
  }

  template <class T>
  static void expect_finite(const std::string& name, const std::vector<T>& elements) {
    for (std::size_t i = 0; i < elements.size(); ++i) {
      if (!std::isfinite(elements[i])) {
        throw GoldenError(moxie::tensor_named(name) + " is not finite at element " + std::to_string(i));
      }
    }
  }

  static std::string set_text(const std::vector<std::int64_t>& index, std::size_t begin, std::size_t end) {
    std::string text = "{";
    for (const std::int64_t e : std::multiset<std::int64_t>(index.begin() + Index(begin), index.begin() + Index(end))) {
      text += (text.size() > 1 ? "," : "") + std::to_string(e);
    }
    return text + "}";
  }

  static std::string number_text(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.9g", value);
    return text;
  }

  struct Scale {
    double terms = 0;              // > 0: errors are relative to that instead of max |expected|
    bool zero_by_algebra = false;  // the numbers themselves are errors then
    std::string note;
  };

  void compare(const std::string& name, const std::vector<double>& actual, const Scale& scale) {
    const std::vector<double> expected = read<double>(name);
    if (actual.size() != expected.size()) {
      throw GoldenError(moxie::tensor_named(name) + ": " + std::to_string(actual.size()) + " elements, expected " +
                        std::to_string(expected.size()));
    }
    double largest = scale.terms;
    double worst = 0;
    std::size_t where = 0;
    for (std::size_t i = 0; i < actual.size(); ++i) {
      double difference = std::abs(actual[i] - expected[i]);
      if (scale.zero_by_algebra) {
        difference = std::max({difference, std::abs(actual[i]), std::abs(expected[i])});
      } else if (scale.terms == 0) {
        largest = std::max(largest, std::abs(expected[i]));
      }
      if (!(difference <= worst)) {
        worst = difference;
        where = i;
        if (std::isnan(worst)) {
          break;
        }
      }
    }
    double error = 0;
    if (worst != 0) {
      error = std::isnan(worst) || largest == 0 ? infinity : worst / largest;
    }
    if (!(error <= tolerance_)) {
      fail(name + ": element " + std::to_string(where) + " is " + number_text(actual[where]) + ", expected " +
           number_text(expected[where]));
    }
    record(name, error, tolerance_, scale.note);
  }

  // Tensors whose names differ in a number between dots are one group: experts.0.fc1.weight is in experts.{i}.fc1.weight.
  static std::string group_of(const std::string& name) {
    std::string group;
    for (std::size_t begin = 0; begin <= name.size();) {
      const std::size_t end = std::min(name.find('.', begin), name.size());
      const std::string part = name.substr(begin, end - begin);
      const bool number = begin > 0 && !part.empty() && part.find_first_not_of("0123456789") == std::string::npos;
      group += (begin > 0 ? "." : "") + (number ? "{i}" : part);
      begin = end + 1;
    }
    return group;
  }

  void record(const std::string& name, double error, double tolerance, const std::string& note) {
    const std::string group = group_of(name);
    auto found = std::find_if(groups_.begin(), groups_.end(), [&](const Group& g) { return g.name == group; });
    if (found == groups_.end()) {
      found = groups_.insert(groups_.end(), Group{group, 0, 0, tolerance, note});
    }
    ++found->tensors;
    found->error = std::max(found->error, error);
  }

  void fail(std::string message) { failures_.push_back(std::move(message)); }

  const moxie::SafetensorsFile& file_;
  double tolerance_;
  std::set<std::string, std::less<>> used_;
  std::vector<Group> groups_;
  std::vector<std::string> left_out_;
  std::vector<std::string> failures_;
};

}  // namespace golden
