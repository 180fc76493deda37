// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <dit/analysis.hpp>
#include <dit/files.hpp>
#include <dit/pictures.hpp>
#include <filesystem>
#include <limits>
#include <moxie/io/safetensors.hpp>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

/// A run as one HTML file that needs no network: facts, curves, pictures and who was routed where. The charts are drawn in the
/// reader's browser by Vega (Debian: libjs-vega), whose text goes into the file.
namespace dit {

/// Where Debian's package libjs-vega has its files, and under which licence they are.
inline constexpr const char* vega_directory = "/usr/share/javascript/vega";
inline constexpr const char* vega_licence = "/usr/share/doc/libjs-vega/copyright";

/// What a report shows, in this order. Bytes that are not UTF-8 become U+FFFD.
struct Report {
  struct Curve {
    std::string title;
    std::string x_label;
    std::string y_label;
    std::vector<Series> series;  ///< of more than 2000 points, the means of 2000 equal stretches are drawn
  };
  struct Picture {
    std::string title;
    std::string alt;  ///< the picture in words
    std::filesystem::path png;
  };

  std::string title;
  std::vector<std::pair<std::string, std::string>> facts;  ///< name and value
  std::vector<Curve> curves;
  std::vector<Picture> pictures;
  const RoutingCounts* routing = nullptr;  ///< if there is one
  std::vector<std::string> class_names;    ///< of `routing`
};

namespace detail {

using nlohmann::json;

/// A whole file, which belongs to a package of Debian.
inline std::string file_text(const std::filesystem::path& path, const std::string& package = "") {
  std::optional<std::string> bytes = read_file_if_there(path);
  if (!bytes || bytes->empty()) {
    throw std::runtime_error(path.string() + " cannot be read" +
                             (package.empty() ? "" : " (Debian: apt install " + package + ")"));
  }
  return *std::move(bytes);
}

/// JSON in ASCII that cannot end the <script> it is in.
inline std::string script_text(const json& value) {
  std::string text;
  for (const char c : value.dump(-1, ' ', true, json::error_handler_t::replace)) {
    text += c == '<' ? "\\u003c" : std::string(1, c);
  }
  return text;
}

/// Text between tags or in a quoted attribute.
inline std::string html_text(const std::string& text) {
  std::string html;
  for (const char c : utf8(text)) {
    html += c == '&' ? "&amp;" : c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '"' ? "&quot;" : std::string(1, c);
  }
  return html;
}

inline std::string base64(const std::string& bytes) {
  constexpr const char* digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    std::uint32_t three = 0;
    for (std::size_t j = i; j < i + 3; ++j) {
      three = three << 8U | (j < bytes.size() ? static_cast<unsigned char>(bytes[j]) : 0U);
    }
    for (std::size_t j = 0; j < 4; ++j) {
      text += i + j > bytes.size() ? '=' : digits[three >> (18 - 6 * j) & 63U];
    }
  }
  return text;
}

/// At most `most` points: means of the finite ones in equal stretches. A stretch that has none is a gap.
inline Series thinned(const Series& series, std::size_t most = 2000) {
  const std::size_t n = series.x.size();
  if (n <= most) {
    return series;
  }
  Series result{series.name, {}, {}};
  for (std::size_t k = 0; k < most; ++k) {
    double x = 0;
    double y = 0;
    double finite = 0;
    for (std::size_t i = k * n / most; i < (k + 1) * n / most; ++i) {
      if (std::isfinite(series.x[i]) && std::isfinite(series.y[i])) {
        x += series.x[i];
        y += series.y[i];
        ++finite;
      }
    }
    result.x.push_back(finite > 0 ? x / finite : series.x[k * n / most]);
    result.y.push_back(finite > 0 ? y / finite : std::numeric_limits<double>::quiet_NaN());
  }
  return result;
}

/// A chart as wide as the page, described to those who do not see it.
inline json chart(const std::string& title, const char* text) {
  json spec = json::parse(text);
  spec["description"] = title;
  spec["autosize"] = {{"type", "fit-x"}, {"contains", "padding"}};
  spec["padding"] = 5;
  spec["signals"].push_back(json::parse(R"({"name": "width", "init": "containerSize()[0]",
    "on": [{"events": "window:resize", "update": "containerSize()[0]"}]})"));
  return spec;
}

/// Lines over a common x, or null if there is nothing finite to draw. The y axis is logarithmic if `may_be_logarithmic`, all
/// values are positive and they span more than a factor of 10.
inline json line_chart(const Report::Curve& curve, bool may_be_logarithmic) {
  json rows = json::array();
  json names = json::array();
  double low = std::numeric_limits<double>::infinity();
  double high = -low;
  std::size_t most_points = 0;
  for (const Series& full : curve.series) {
    if (full.x.size() != full.y.size()) {
      throw moxie::ShapeError("write_report: '" + full.name + "' has " + std::to_string(full.x.size()) + " x for " +
                              std::to_string(full.y.size()) + " y");
    }
    const Series series = thinned(full);
    rows.push_back({{"series", names.size()}, {"x", series.x}, {"y", series.y}});  // what is not finite becomes null
    names.push_back(series.name);
    most_points = std::max(most_points, series.x.size());
    for (std::size_t i = 0; i < series.x.size(); ++i) {
      if (std::isfinite(series.x[i]) && std::isfinite(series.y[i])) {
        low = std::min(low, series.y[i]);
        high = std::max(high, series.y[i]);
      }
    }
  }
  if (low > high) {
    return nullptr;
  }
  json spec = chart(curve.title, R"json({
    "height": 280,
    "signals": [{"name": "names"}, {"name": "x_label"}, {"name": "y_label"}],
    "data": [
      {"name": "points", "transform": [
        {"type": "flatten", "fields": ["x", "y"]},
        {"type": "formula", "as": "finite", "expr": "isValid(datum.x) && isValid(datum.y)"}]},
      {"name": "finite", "source": "points", "transform": [{"type": "filter", "expr": "datum.finite"}]}],
    "scales": [
      {"name": "x", "range": "width", "zero": false, "domain": {"data": "finite", "field": "x"}},
      {"name": "y", "range": "height", "zero": false, "domain": {"data": "finite", "field": "y"}},
      {"name": "color", "type": "ordinal", "range": {"scheme": "tableau10"}, "domain": {"data": "points", "field": "series"}}],
    "axes": [{"orient": "bottom", "scale": "x", "title": {"signal": "x_label"}, "labelOverlap": true, "labelFlush": true},
             {"orient": "left", "scale": "y", "title": {"signal": "y_label"}, "labelOverlap": true, "tickCount": 6,
              "grid": true}],
    "legends": [{"stroke": "color", "orient": "top", "direction": "horizontal", "symbolType": "stroke", "symbolStrokeWidth": 3,
                 "encode": {"labels": {"update": {"text": {"signal": "names[datum.value]"}}}}}],
    "marks": [
      {"type": "group", "from": {"facet": {"name": "line", "data": "points", "groupby": "series"}},
       "marks": [{"type": "line", "aria": false, "from": {"data": "line"}, "encode": {"update": {
         "x": {"scale": "x", "field": "x"}, "y": {"scale": "y", "field": "y"},
         "stroke": {"scale": "color", "field": "series"}, "defined": {"field": "finite"}}}}]},
      {"type": "symbol", "aria": false, "from": {"data": "finite"}, "encode": {"update": {
        "x": {"scale": "x", "field": "x"}, "y": {"scale": "y", "field": "y"}, "fill": {"scale": "color", "field": "series"},
        "size": {"value": 50}, "tooltip": {"signal":
          "names[datum.series] + ': ' + format(datum.y, '.4~g') + ' (' + x_label + ' ' + format(datum.x, '.6~g') + ')'"}}}}]
  })json");
  spec["data"][0]["values"] = std::move(rows);
  spec["signals"][0]["value"] = names;
  spec["signals"][1]["value"] = curve.x_label;
  spec["signals"][2]["value"] = curve.y_label;
  const bool logarithmic = may_be_logarithmic && low > 0 && high > 10 * low;
  spec["scales"][1]["type"] = logarithmic ? "log" : "linear";
  spec["scales"][1]["nice"] = !logarithmic;  // else a whole power of 10
  if (names.size() < 2) {
    spec.erase("legends");
  }
  spec["marks"][1]["encode"]["update"]["opacity"]["value"] = most_points <= 50 ? 1 : 0;  // invisible ones still have tooltips
  return spec;
}

/// How the assignments of each key (a class, a position, ...) divide among the experts, with a slider for the layer if there
/// are several, and one for the timestep bin if `bins` > 1. A colour means the same wherever the sliders are.
///
/// @param drawing height, scales and marks; the data set `shown` has key, expert, share and tooltip
/// @param counts `counts(layer, bin)` is (keys, experts); a key without any is left out
template <class Counts>
json share_chart(const std::string& key_name, const std::vector<std::string>& key_names, Index experts, Index layers,
                 Index bins, const char* drawing, Counts&& counts) {
  json rows = json::array();
  double largest = std::min(1.0, 2.0 / double(experts));  // an equal share is not above the middle of the colours
  for (Index layer = 0; layer < layers; ++layer) {
    for (Index bin = RoutingCounts::all; bin < (bins > 1 ? bins : 0); ++bin) {
      const Matrix<double> table = counts(layer, bin);
      for (Index key = 0; key < table.rows(); ++key) {
        const double sum = table.row(key).sum();
        if (sum > 0) {
          std::vector<double> shares;
          for (Index e = 0; e < experts; ++e) {
            shares.push_back(std::round(1e6 * table(key, e) / sum) / 1e6);
            largest = std::max(largest, shares.back());
          }
          rows.push_back({{"layer", layer}, {"bin", bin}, {"key", key}, {"count", std::round(sum)}, {"shares", shares}});
        }
      }
    }
  }
  json spec = chart("Experts by " + key_name, R"json({
    "signals": [{"name": "layer", "value": 0}, {"name": "bin", "value": -1}],
    "data": [
      {"name": "table"},
      {"name": "shown", "source": "table", "transform": [
        {"type": "filter", "expr": "datum.layer === layer && datum.bin === bin"},
        {"type": "flatten", "fields": ["shares"], "as": ["share"], "index": "expert"},
        {"type": "formula", "as": "cell", "expr": "key_name + ' ' + key_names[datum.key] + ', expert ' + datum.expert"},
        {"type": "formula", "as": "tooltip", "expr": "datum.cell + ': ' + format(datum.share, '.1%') + ' of ' + datum.count"}
      ]}],
    "scales": [{"name": "color", "type": "linear", "range": {"scheme": "viridis"}, "domain": [0, {"signal": "largest"}]}],
    "legends": [{"fill": "color", "orient": "top", "direction": "horizontal", "format": ".1~%", "gradientLength": 160}]
  })json");
  spec["data"][0]["values"] = std::move(rows);
  const auto slider = [](const char* label, Index first, Index last) {
    return json{{"input", "range"}, {"name", label}, {"min", first}, {"max", last}, {"step", 1}};
  };
  if (layers > 1) {
    spec["signals"][0]["bind"] = slider("layer", 0, layers - 1);
  }
  if (bins > 1) {
    spec["signals"][1]["bind"] = slider("timestep bin (-1: all)", RoutingCounts::all, bins - 1);
  }
  const json values = {{"key_name", key_name}, {"key_names", key_names}, {"experts", experts}, {"largest", largest}};
  for (const auto& [name, value] : values.items()) {
    spec["signals"].push_back({{"name", name}, {"value", value}});
  }
  const json parts = json::parse(drawing);
  for (const auto& [name, part] : parts.items()) {
    for (const json& item : part) {
      spec[name].push_back(item);
    }
  }
  return spec;
}

/// A row for each key, a column for each expert.
inline constexpr const char* key_by_expert = R"json({
  "signals": [{"name": "height", "update": "key_names.length * clamp(900 / key_names.length, 4, 24)"}],
  "scales": [{"name": "x", "type": "band", "range": "width", "domain": {"signal": "sequence(experts)"}},
             {"name": "y", "type": "band", "range": "height", "domain": {"signal": "sequence(key_names.length)"}}],
  "axes": [{"orient": "bottom", "scale": "x", "title": "expert", "labelOverlap": true, "ticks": false, "domain": false},
           {"orient": "left", "scale": "y", "title": {"signal": "key_name"}, "labelOverlap": true, "labelLimit": 120,
            "ticks": false, "domain": false, "encode": {"labels": {"update": {"text": {"signal": "key_names[datum.value]"}}}}}],
  "marks": [
    {"type": "rect", "name": "shares", "aria": false, "from": {"data": "shown"}, "encode": {"update": {
      "x": {"scale": "x", "field": "expert"}, "width": {"scale": "x", "band": 1},
      "y": {"scale": "y", "field": "key"}, "height": {"scale": "y", "band": 1},
      "fill": {"scale": "color", "field": "share"}, "tooltip": {"field": "tooltip"}}}},
    {"type": "text", "aria": false, "interactive": false, "from": {"data": "shown"}, "encode": {"update": {
      "x": {"scale": "x", "field": "expert", "band": 0.5}, "y": {"scale": "y", "field": "key", "band": 0.5},
      "align": {"value": "center"}, "baseline": {"value": "middle"}, "fontSize": {"value": 10},
      "fill": {"signal": "datum.share < 0.55 * largest ? 'white' : '#202020'"},
      "text": {"signal": "bandwidth('x') < 20 || bandwidth('y') < 14 ? '' : format(100 * datum.share, '.0f')"}}}}]
})json";

/// A map of the positions for each expert. If their number is no square, they are in one row.
inline constexpr const char* position_by_expert = R"json({
  "signals": [
    {"name": "rows", "update": "sqrt(key_names.length) % 1 ? 1 : sqrt(key_names.length)"},
    {"name": "columns", "update": "key_names.length / rows"},
    {"name": "map_height", "update": "rows > 1 ? 104 : 20"},
    {"name": "maps", "update": "max(1, floor((width + 12) / 116))"},
    {"name": "height", "update": "ceil(experts / maps) * (map_height + 28)"}],
  "marks": [{
    "type": "group", "from": {"facet": {"name": "map", "data": "shown", "groupby": "expert"}}, "encode": {"update": {
      "x": {"signal": "datum.expert % maps * 116"}, "width": {"value": 104},
      "y": {"signal": "floor(datum.expert / maps) * (map_height + 28) + 20"}, "height": {"signal": "map_height"}}},
    "marks": [
      {"type": "text", "aria": false, "encode": {"update": {
        "y": {"value": -5}, "fontSize": {"value": 12}, "fill": {"value": "currentColor"},
        "text": {"signal": "'expert ' + parent.expert"}}}},
      {"type": "rect", "name": "shares", "aria": false, "from": {"data": "map"}, "encode": {"update": {
        "x": {"signal": "datum.key % columns * 104 / columns"}, "width": {"signal": "104 / columns"},
        "y": {"signal": "floor(datum.key / columns) * map_height / rows"}, "height": {"signal": "map_height / rows"},
        "fill": {"scale": "color", "field": "share"}, "tooltip": {"field": "tooltip"}}}}]}]
})json";

/// The page around its parts.
inline constexpr const char* page_start = R"html(<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'">
<style>
:root { color-scheme: light dark; }
body { max-width: 60rem; margin: 0 auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2 { line-height: 1.2; }
h2 { margin: 2.5rem 0 0.5rem; font-size: 1.25rem; }
p { margin: 0.5rem 0; }
table { border-collapse: collapse; }
th, td { padding: 0.2rem 1.5rem 0.2rem 0; border-bottom: 1px solid #8885; text-align: left; font-weight: normal; }
th { opacity: 0.75; overflow-wrap: normal; }
img { max-width: 100%; height: auto; }
.chart { overflow-x: auto; }
.chart svg { display: block; }
.shares path { shape-rendering: crispEdges; }
.sliders label { display: flex; align-items: center; gap: 0.7rem; }
.sliders .vega-bind-name { flex: 0 0 10.5rem; }
.sliders input { flex: 1 1 4rem; min-width: 0; max-width: 20rem; }
details { margin-top: 3rem; }
pre { white-space: pre-wrap; }
</style>
)html";
inline constexpr const char* draw_charts = R"js(
Object.assign(packages["vega-dataflow"].transforms, packages["vega-transforms"], packages["vega-view-transforms"],
              packages["vega-encode"]);
const ink = "currentColor";  // of the page, light or dark
const config = {
  axis: { labelColor: ink, titleColor: ink, tickColor: ink, domainColor: ink, gridColor: ink, gridOpacity: 0.15,
          labelFontSize: 12, titleFontSize: 12 },
  legend: { labelColor: ink, labelFontSize: 12 } };
const specs = JSON.parse(document.getElementById("specs").textContent);
document.querySelectorAll(".chart").forEach((chart, i) =>
  new (packages["vega-view"].View)(packages["vega-parser"].parse(specs[i], config), {
    container: chart, bind: chart.previousElementSibling, renderer: "svg", logLevel: packages["vega-util"].Warn }).runAsync());
)js";

/// The parts of Vega that the charts need, after those they depend on themselves. Debian has no file with all of it, and each
/// of these replaces the global `vega` of the one before: they are loaded as the modules of CommonJS that they are too.
inline std::string vega_text(const std::filesystem::path& directory) {
  std::string text = "const packages = {};\n";
  for (const std::string name :
       {"util", "canvas", "expression", "event-selector", "statistics", "time", "format", "loader", "scale", "scenegraph",
        "dataflow", "encode", "transforms", "view-transforms", "selection", "functions", "runtime", "parser", "view"}) {
    const std::string file = file_text(directory / ("vega-" + name + ".min.js"), "libjs-vega");
    // Debian's vega-functions asks for "vega-selections".
    text += "(function (exports, module, require) {\n" + file.substr(0, file.find("//# sourceMappingURL")) +
            "\n})(packages[\"vega-" + name + "\"] = {}, {}, name => packages[name.replace(\"selections\", \"selection\")]);\n";
  }
  return text;
}

/// The body of the page, part by part, and what its charts are drawn from.
struct Page {
  std::string html;
  json specs = json::array();

  void heading(const std::string& title, const std::string& text = "") {
    html += "<h2>" + html_text(title) + "</h2>\n" + (text.empty() ? "" : "<p>" + html_text(text) + "</p>\n");
  }
  void chart(json spec) {
    if (spec.is_null()) {
      html += "<p>There is nothing finite to draw.</p>\n";
    } else {
      html += "<div class=\"sliders\"></div><div class=\"chart\"></div>\n";
      specs.push_back(std::move(spec));
    }
  }
};

inline void add_routing(Page& page, const RoutingCounts& routing, const std::vector<std::string>& class_names) {
  const auto [layers, experts, classes, positions, bins] = routing.shape();
  for (const Index n : {layers, experts, positions, bins}) {
    moxie::detail::expect_at_least("write_report", "each of layers, experts, positions and bins", n, 1);
  }
  if (Index(class_names.size()) != classes) {
    throw moxie::ShapeError("write_report: " + std::to_string(class_names.size()) + " class names for " +
                            std::to_string(classes) + " classes");
  }
  const auto shares = [&](const std::string& key, const std::vector<std::string>& names, Index of_layers, Index of_bins,
                          const char* drawing, auto&& counts) {
    page.heading("Experts by " + key, "How the assignments of each " + key + " divide among the experts, in percent.");
    page.chart(share_chart(key, names, routing.shape().experts, of_layers, of_bins, drawing, counts));
  };
  const auto numbers = [](Index count) {
    std::vector<std::string> names;
    for (Index i = 0; i < count; ++i) {
      names.push_back(std::to_string(i));
    }
    return names;
  };
  std::vector<std::string> stretches = numbers(bins);
  stretches.front() += bins > 1 ? " (image)" : "";
  stretches.back() += bins > 1 ? " (noise)" : "";

  Report::Curve information{
      "Mutual information", "layer", "bits", {{"class", {}, {}}, {"position", {}, {}}, {"timestep", {}, {}}}};
  Matrix<double> loads(layers, experts);
  for (Index layer = 0; layer < layers; ++layer) {
    loads.row(layer) = routing.by_position(layer).colwise().sum();
    const std::array<Matrix<double>, 3> tables = {routing.by_class(layer), routing.by_position(layer),
                                                  routing.by_timestep(layer)};
    for (std::size_t i = 0; i < tables.size(); ++i) {
      information.series[i].x.push_back(double(layer));
      information.series[i].y.push_back(mutual_information(tables[i]));
    }
  }
  shares("layer", numbers(layers), 1, 1, key_by_expert, [&](Index, Index) { return loads; });
  page.heading(information.title, "How much the class, the position or the timestep of a token says about its expert.");
  json lines = line_chart(information, false);
  lines["axes"][0]["tickMinStep"] = 1;
  page.chart(std::move(lines));
  shares("class", class_names, layers, bins, key_by_expert, [&](Index l, Index bin) { return routing.by_class(l, bin); });
  shares("position", numbers(positions), layers, bins, position_by_expert,
         [&](Index l, Index bin) { return routing.by_position(l, bin); });
  shares("timestep bin", stretches, layers, 1, key_by_expert, [&](Index l, Index) { return routing.by_timestep(l); });
}

}  // namespace detail

/// Writes the report. An old file stays until the new one is complete.
///
/// Throws moxie::ShapeError for a curve whose x and y differ in length and for class names that are not as many as the classes
/// of `routing`, and std::runtime_error if a picture is no whole PNG, Vega is not where it should be, or writing fails.
inline void write_report(const std::filesystem::path& path, const Report& report,
                         const std::filesystem::path& vega = vega_directory) {
  using namespace detail;
  const std::string title = html_text(report.title);
  Page page{std::string(page_start) + "<title>" + title + "</title>\n</head>\n<body>\n<h1>" + title + "</h1>\n<table>\n"};
  for (const auto& [name, value] : report.facts) {
    page.html += "<tr><th scope=\"row\">" + html_text(name) + "</th><td>" + html_text(value) + "</td></tr>\n";
  }
  page.html += "</table>\n<noscript><p>The charts need JavaScript.</p></noscript>\n";
  for (const Report::Curve& curve : report.curves) {
    page.heading(curve.title);
    page.chart(line_chart(curve, true));
  }
  for (const Report::Picture& picture : report.pictures) {
    const std::string png = read_file_if_there(picture.png).value_or("");
    if (!is_whole_png(png)) {
      throw std::runtime_error(picture.png.string() + " is no whole PNG file");
    }
    page.heading(picture.title);
    page.html += "<img alt=\"" + html_text(picture.alt) + "\" src=\"data:image/png;base64," + base64(png) + "\">\n";
  }
  if (report.routing != nullptr) {
    add_routing(page, *report.routing, report.class_names);
  }
  page.html += "<details><summary>Licence of Vega, which draws the charts</summary>\n<pre>" +
               html_text(file_text(vega_licence, "libjs-vega")) +
               "\nVega contains parts of D3: Copyright 2010-2022 Mike Bostock, License: ISC (above)\n</pre></details>\n" +
               "<script type=\"application/json\" id=\"specs\">" + script_text(page.specs) + "</script>\n<script>\n" +
               vega_text(vega) + draw_charts + "</script>\n</body>\n</html>\n";

  moxie::ReplacementFile file(path);
  file.write(page.html.data(), page.html.size());
  file.commit();
}

}  // namespace dit
