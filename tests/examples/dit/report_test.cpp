// SPDX-License-Identifier: MIT
#include "dit/report.hpp"

#include <doctest/doctest.h>
#include <sys/resource.h>

#include <array>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <moxie/core/random.hpp>
#include <stdexcept>
#include <string>
#include <temporary_folder.hpp>
#include <utility>
#include <vector>

namespace {

constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

namespace fs = std::filesystem;
using dit::Index;
using dit::Matrix;
using dit::Report;
using dit::RoutingCounts;
using nlohmann::json;

using moxie::test::TemporaryFolder;

bool vega_is_missing() {
  if (fs::exists(dit::vega_directory)) {
    return false;
  }
  MESSAGE("skipped: libjs-vega is not installed");
  return true;
}

std::string bytes_of(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

std::size_t count(const std::string& text, const std::string& part) {
  std::size_t n = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) {
    ++n;
  }
  return n;
}

/// The text without what stands between `first` and `last`, everywhere.
std::string without(std::string text, const std::string& first, const std::string& last) {
  for (std::size_t at = text.find(first); at != std::string::npos; at = text.find(first, at + first.size())) {
    const std::size_t begin = at + first.size();
    text.erase(begin, text.find(last, begin) - begin);
  }
  return text;
}

json specs_of(const std::string& html) {
  const std::string start = "<script type=\"application/json\" id=\"specs\">";
  const std::size_t at = html.find(start) + start.size();
  return json::parse(html.substr(at, html.find("</script>", at) - at));
}

/// One pixel, as bytes and in base64.
constexpr std::array<unsigned char, 70> pixel = {
    0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a, 0x00, 0x00, 0x00, 0x0d, 0x49, 0x48, 0x44, 0x52, 0x00, 0x00,
    0x00, 0x01, 0x00, 0x00, 0x00, 0x01, 0x08, 0x06, 0x00, 0x00, 0x00, 0x1f, 0x15, 0xc4, 0x89, 0x00, 0x00, 0x00,
    0x0d, 0x49, 0x44, 0x41, 0x54, 0x78, 0xda, 0x63, 0x64, 0xf8, 0xcf, 0x50, 0x0f, 0x00, 0x03, 0x86, 0x01, 0x80,
    0x5a, 0x34, 0x7d, 0x6b, 0x00, 0x00, 0x00, 0x00, 0x49, 0x45, 0x4e, 0x44, 0xae, 0x42, 0x60, 0x82};
const std::string pixel_base64 =
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==";

void write_pixel(const fs::path& path) {
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(pixel.data()), pixel.size());
}

/// Routing of two images of each class, by random combine weights that differ from layer to layer and bin to bin.
struct RandomRouting {
  RoutingCounts counts;
  std::vector<Index> labels;
  std::vector<Matrix<double>> weights;  ///< (tokens, experts) of each layer and bin

  explicit RandomRouting(const RoutingCounts::Shape& shape) : counts(shape) {
    for (Index i = 0; i < 2 * shape.classes; ++i) {
      labels.push_back(i % shape.classes);
    }
    const Index tokens = Index(labels.size()) * shape.positions;
    for (Index at = 0; at < shape.layers * shape.bins; ++at) {
      Matrix<double> table(tokens, shape.experts);
      moxie::Rng{1}.split(std::uint64_t(at)).fill_uniform(moxie::RowView<double>(table), 0.1, 1.0);
      moxie::DensePlan<double> plan;
      plan.resize(moxie::Sequences(shape.positions).over(tokens), shape.experts, 1);
      plan.combine().eigen() = table;
      counts.add(at / shape.bins, at % shape.bins, plan, labels);
      weights.push_back(std::move(table));
    }
  }
};

/// A report that has everything.
Report full_report(const fs::path& folder, const RandomRouting& routing) {
  write_pixel(folder / "pixel.png");
  dit::Series loss{"loss", {}, {}};
  for (int i = 1; i <= 5000; ++i) {
    loss.x.push_back(i);
    loss.y.push_back(i < 1000 || i > 1100 ? 1.0 / i : std::numeric_limits<double>::quiet_NaN());
  }
  const double infinity = std::numeric_limits<double>::infinity();
  Report report;
  report.title = "A run";
  report.facts = {{"Parameters", "1,234"}, {"Time", "4:49"}};
  report.curves = {{"Loss", "step", "loss", {loss}},
                   {"Others", "step", "", {{"balance", {1, 2, 3, 4}, {1, not_a_number, infinity, -1}}, {"one", {2}, {0.5}}}},
                   {"Nothing", "step", "", {{"nan", {1, 2}, {not_a_number, -infinity}}, {"none", {}, {}}}}};
  report.pictures = {{"Samples", "One pixel", folder / "pixel.png"}};
  report.routing = &routing.counts;
  for (Index c = 0; c < routing.counts.shape().classes; ++c) {
    report.class_names.push_back("class " + std::to_string(c));
  }
  return report;
}

/// What `write` complains about, or "".
template <class Write>
std::string complaint(Write&& write) {
  try {
    write();
    return "";
  } catch (const std::exception& e) {
    return e.what();
  }
}

const RoutingCounts::Shape some_shape = {.layers = 3, .experts = 4, .classes = 5, .positions = 9, .bins = 2};

}  // namespace

TEST_CASE("report: one page with everything, which fetches nothing") {
  if (vega_is_missing()) {
    return;
  }
  const TemporaryFolder dir;
  const RandomRouting routing(some_shape);
  const fs::path path = dir.path / "report.html";
  dit::write_report(path, full_report(dir.path, routing));
  const std::string html = bytes_of(path);
  CHECK(dir.entries() == 2);  // and the pixel
  CHECK(html.starts_with("<!doctype html>\n<html lang=\"en\">"));
  CHECK(contains(html, "<title>A run</title>"));
  CHECK(contains(html, "<tr><th scope=\"row\">Parameters</th><td>1,234</td></tr>"));
  CHECK(contains(html, "\nth { opacity: 0.75; overflow-wrap: normal; }\n"));  // a column of names is as wide as its words
  CHECK(contains(html, "<img alt=\"One pixel\" src=\"data:image/png;base64," + pixel_base64 + "\">"));
  CHECK(count(html, "class=\"chart\"") == 2 + 5);
  CHECK(specs_of(html).size() == 2 + 5);
  CHECK(count(html, "There is nothing finite to draw") == 1);
  CHECK(contains(html, "UW Interactive Data Lab"));

  CHECK(contains(html, "default-src 'none'"));
  const std::string page = without(without(html, "<script>", "</script>"), "<pre>", "</pre>");
  CHECK(!contains(page, "http:"));
  CHECK(!contains(page, "https:"));
  CHECK(!contains(page, "href"));
  CHECK(!contains(page, "url("));
  CHECK(!contains(page, "@import"));
  CHECK(count(page, "src=") == 1);
  CHECK(!contains(html, "sourceMappingURL"));
}

TEST_CASE("report: text is text, whatever is in it") {
  if (vega_is_missing()) {
    return;
  }
  const TemporaryFolder dir;
  const fs::path path = dir.path / "report.html";
  const std::string script = "<script>alert(1)</script>";
  const std::string quotes = "\"><img src=x onerror='alert(2)'> &amp; ${x} \\ \n";
  const std::string comment = "<!--<script> ]]> \xE2\x80\xA8 \xE2\x80\xA9 \xC3\xA4";
  const std::string no_utf8 = "a\xFF<\xC3";
  const std::string replaced = "a\xEF\xBF\xBD<\xEF\xBF\xBD";
  const std::string no_text = std::string("a\0b", 3);
  const RandomRouting routing(some_shape);
  Report report = full_report(dir.path, routing);
  report.class_names = {script, quotes, comment, no_utf8, no_text};
  report.title = script + no_utf8;
  report.facts = {{script, quotes}, {comment, no_utf8}};
  report.curves = {{script, quotes, comment, {{no_utf8, {1, 2}, {1, 2}}, {script, {1, 2}, {1, 2}}}}};
  report.pictures[0].title = quotes;
  report.pictures[0].alt = quotes;
  dit::write_report(path, report);
  const std::string html = bytes_of(path);

  CHECK(count(html, "<script") == 2);
  CHECK(count(html, "</script") == 2);
  CHECK(count(html, "<img") == 1);
  CHECK(!contains(html, "<!--"));
  CHECK(complaint([&] { static_cast<void>(json(html).dump()); }).empty());  // it is UTF-8
  CHECK(contains(html, "<h1>&lt;script&gt;alert(1)&lt;/script&gt;a\xEF\xBF\xBD&lt;\xEF\xBF\xBD</h1>"));
  CHECK(contains(html, "<td>&quot;&gt;&lt;img src=x onerror='alert(2)'&gt; &amp;amp; ${x} \\ \n</td>"));
  CHECK(contains(html, "<img alt=\"&quot;&gt;"));

  const json specs = specs_of(html);
  const auto signal = [&](std::size_t chart, const std::string& name) {
    for (const json& each : specs[chart]["signals"]) {
      if (each["name"] == name) {
        return each["value"];
      }
    }
    return json();
  };
  CHECK(signal(0, "names") == json{replaced, script});
  CHECK(signal(0, "x_label") == quotes);
  CHECK(signal(0, "y_label") == comment);
  CHECK(signal(3, "key_names") == json{script, quotes, comment, replaced, no_text});
}

TEST_CASE("report: the shares are those of the routing") {
  if (vega_is_missing()) {
    return;
  }
  const TemporaryFolder dir;
  const auto& [layers, experts, classes, positions, bins] = some_shape;
  const RandomRouting routing(some_shape);
  Report report = full_report(dir.path, routing);
  report.curves.clear();
  dit::write_report(dir.path / "report.html", report);
  const json specs = specs_of(bytes_of(dir.path / "report.html"));
  REQUIRE(specs.size() == 5);

  // A chart's key for a token, in a layer and a bin. `all` has every bin.
  const auto check = [&](const json& spec, std::size_t rows, auto&& key_of) {
    CAPTURE(spec["description"]);
    CHECK(spec["data"][0]["values"].size() == rows);
    for (const json& row : spec["data"][0]["values"]) {
      std::vector<double> sums(std::size_t(some_shape.experts));
      double total = 0;
      for (Index layer = 0; layer < some_shape.layers; ++layer) {
        for (Index bin = 0; bin < some_shape.bins; ++bin) {
          const Matrix<double>& table = routing.weights[std::size_t(layer * some_shape.bins + bin)];
          for (Index token = 0; token < table.rows(); ++token) {
            if (key_of(row["layer"], row["bin"], layer, bin, token) == row["key"]) {
              for (Index e = 0; e < table.cols(); ++e) {
                sums[std::size_t(e)] += table(token, e);
                total += table(token, e);
              }
            }
          }
        }
      }
      CHECK(row["count"] == std::round(total));
      REQUIRE(row["shares"].size() == sums.size());
      for (std::size_t e = 0; e < sums.size(); ++e) {
        CHECK(std::abs(row["shares"][e].get<double>() - sums[e] / total) < 1e-6);
      }
    }
  };
  const auto matches = [](const json& shown_layer, const json& shown_bin, Index layer, Index bin) {
    return shown_layer == layer && (shown_bin == RoutingCounts::all || shown_bin == bin);
  };
  check(specs[0], std::size_t(layers), [](const json&, const json&, Index layer, Index, Index) { return layer; });
  check(specs[2], std::size_t(layers * (bins + 1) * classes),
        [&](const json& l, const json& b, Index layer, Index bin, Index token) {
          return matches(l, b, layer, bin) ? routing.labels[std::size_t(token / some_shape.positions)] : -1;
        });
  check(specs[3], std::size_t(layers * (bins + 1) * positions),
        [&](const json& l, const json& b, Index layer, Index bin, Index token) {
          return matches(l, b, layer, bin) ? token % some_shape.positions : -1;
        });
  check(specs[4], std::size_t(layers * bins),
        [&](const json& l, const json&, Index layer, Index bin, Index) { return l == layer ? bin : -1; });

  const json& lines = specs[1]["data"][0]["values"];
  REQUIRE(lines.size() == 3);
  for (Index layer = 0; layer < layers; ++layer) {
    const auto at = std::size_t(layer);
    CHECK(lines[0]["y"][at] == dit::mutual_information(routing.counts.by_class(layer)));
    CHECK(lines[1]["y"][at] == dit::mutual_information(routing.counts.by_position(layer)));
    CHECK(lines[2]["y"][at] == dit::mutual_information(routing.counts.by_timestep(layer)));
  }
}

TEST_CASE("report: a slider only where there is a choice") {
  const std::vector<std::string> names = {"a"};
  const auto sliders = [&](Index layers, Index bins) {
    const json spec = dit::detail::share_chart("class", names, 2, layers, bins, "{}",
                                               [](Index, Index) { return Matrix<double>(Matrix<double>::Ones(1, 2)); });
    json result = json::array();
    for (const json& signal : spec["signals"]) {
      if (signal.contains("bind")) {
        result.push_back({signal["name"], signal["bind"]["min"], signal["bind"]["max"]});
      }
    }
    return result;
  };
  CHECK(sliders(1, 1).empty());
  CHECK(sliders(3, 1) == json::parse(R"([["layer", 0, 2]])"));
  CHECK(sliders(1, 4) == json::parse(R"([["bin", -1, 3]])"));
  CHECK(sliders(2, 2) == json::parse(R"([["layer", 0, 1], ["bin", -1, 1]])"));
}

TEST_CASE("report: a key that nothing was counted for is left out, not a share of 0 / 0") {
  Matrix<double> counts = Matrix<double>::Zero(3, 2);
  counts.row(1) << 1, 3;
  const json spec = dit::detail::share_chart("class", {"a", "b", "c"}, 2, 1, 1, "{}", [&](Index, Index) { return counts; });
  CHECK(spec["data"][0]["values"] == json::parse(R"([{"layer": 0, "bin": -1, "key": 1, "count": 4, "shares": [0.25, 0.75]}])"));
}

TEST_CASE("report: long curves are means of equal stretches, and what is not finite is a gap") {
  dit::Series series{"s", {}, {}};
  for (int i = 0; i < 10; ++i) {
    series.x.push_back(i);
    series.y.push_back(i == 4 || i == 5 || i == 7 ? double(not_a_number) : 10.0 * i);
  }
  const dit::Series same = dit::detail::thinned(series, 10);
  CHECK(same.x == series.x);
  const dit::Series thin = dit::detail::thinned(series, 5);
  CHECK(thin.x == std::vector<double>{0.5, 2.5, 4, 6, 8.5});
  REQUIRE(thin.y.size() == 5);
  CHECK(thin.y[1] == 25);
  CHECK(std::isnan(thin.y[2]));
  CHECK(thin.y[3] == 60);
  CHECK(dit::detail::thinned(series, 3).x.size() == 3);

  const auto chart = [](std::vector<double> y, bool may_be_logarithmic) {
    std::vector<double> x(y.size(), 1.0);
    return dit::detail::line_chart({"", "", "", {{"s", std::move(x), std::move(y)}}}, may_be_logarithmic);
  };
  CHECK(chart({1, not_a_number, -std::numeric_limits<double>::infinity()}, true)["data"][0]["values"][0]["y"].dump() ==
        "[1.0,null,null]");
  CHECK(chart({not_a_number}, true).is_null());
  CHECK(chart({}, true).is_null());
  CHECK(chart({1, 11}, true)["scales"][1]["type"] == "log");
  CHECK(chart({1, 11}, false)["scales"][1]["type"] == "linear");
  CHECK(chart({1, 9}, true)["scales"][1]["type"] == "linear");
  CHECK(chart({0, 11}, true)["scales"][1]["type"] == "linear");
}

TEST_CASE("base64: the vectors of RFC 4648") {
  const std::vector<std::pair<std::string, std::string>> vectors = {{"", ""},
                                                                    {"f", "Zg=="},
                                                                    {"fo", "Zm8="},
                                                                    {"foo", "Zm9v"},
                                                                    {"foob", "Zm9vYg=="},
                                                                    {"fooba", "Zm9vYmE="},
                                                                    {"foobar", "Zm9vYmFy"}};
  for (const auto& [bytes, text] : vectors) {
    CHECK(dit::detail::base64(bytes) == text);
  }
  CHECK(dit::detail::base64("\xFB\xFF\xFE") == "+//+");
}

TEST_CASE("report: what cannot be shown is an error before anything is written") {
  if (vega_is_missing()) {
    return;
  }
  const TemporaryFolder dir;
  const RandomRouting routing(some_shape);
  const Report good = full_report(dir.path, routing);
  const fs::path path = dir.path / "report.html";
  std::ofstream(path) << "the old report";
  const auto failure = [&](auto&& change, const fs::path& vega = dit::vega_directory) {
    Report report = good;
    change(report);
    const std::string message = complaint([&] { dit::write_report(path, report, vega); });
    CHECK(bytes_of(path) == "the old report");
    CHECK(dir.entries() == 2);
    return message;
  };
  CHECK(contains(failure([&](Report& r) { r.pictures[0].png = dir.path / "absent.png"; }), "absent.png is no whole PNG"));
  CHECK(contains(failure([&](Report& r) { r.pictures[0].png = path; }), "report.html is no whole PNG"));
  CHECK(contains(failure([](Report& r) { r.class_names.pop_back(); }), "4 class names for 5 classes"));
  CHECK(contains(failure([](Report& r) { r.curves[1].series[0].x.pop_back(); }), "'balance' has 3 x for 4 y"));
  CHECK(contains(failure([](Report&) {}, dir.path), "vega-util.min.js cannot be read (Debian: apt install libjs-vega)"));
}

TEST_CASE("report: a file that cannot be written is an error, and leaves the old one and nothing else") {
  if (vega_is_missing()) {
    return;
  }
  const TemporaryFolder dir;
  const RandomRouting routing(some_shape);
  const Report report = full_report(dir.path, routing);
  const fs::path path = dir.path / "report.html";
  std::ofstream(path) << "the old report";
  const auto failure = [&](const fs::path& to) { return complaint([&] { dit::write_report(to, report); }); };
  CHECK(contains(failure(dir.path / "absent" / "report.html"), "cannot be written"));
  CHECK(contains(failure(dir.path), "cannot be written"));

  rlimit old_limit{};
  REQUIRE(getrlimit(RLIMIT_FSIZE, &old_limit) == 0);
  rlimit full = old_limit;
  full.rlim_cur = 100'000;  // as on a disk with as much space
  auto* const old_handler = std::signal(SIGXFSZ, SIG_IGN);
  REQUIRE(setrlimit(RLIMIT_FSIZE, &full) == 0);
  const std::string message = failure(path);
  setrlimit(RLIMIT_FSIZE, &old_limit);
  std::signal(SIGXFSZ, old_handler);
  CHECK(contains(message, path.string() + ": cannot be written: "));
  CHECK(bytes_of(path) == "the old report");
  CHECK(dir.entries() == 2);

  CHECK(failure(path).empty());
  CHECK(bytes_of(path).size() > 100'000);
  CHECK(dir.entries() == 2);
}

// report_browser.sh opens these; their names say how many sliders they have.
TEST_CASE("report: pages for the browser" * doctest::skip(std::getenv("MOXIE_REPORTS") == nullptr)) {
  const fs::path folder = std::getenv("MOXIE_REPORTS");
  const RandomRouting routing(some_shape);
  dit::write_report(folder / "5.html", full_report(folder, routing));
  const RandomRouting no_choice({.layers = 1, .experts = 40, .classes = 60, .positions = 8, .bins = 1});
  Report report = full_report(folder, no_choice);
  report.class_names[0] = "</script><script>alert(1)</script> with a name that is long, long, long and ends at last";
  dit::write_report(folder / "0.html", report);
  report.routing = nullptr;
  report.curves.clear();
  dit::write_report(folder / "0-without-charts.html", report);
}
