// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <dit/gnuplot.hpp>
#include <dit/text.hpp>
#include <filesystem>
#include <limits>
#include <moxie/core/matrix.hpp>
#include <numeric>
#include <span>
#include <string>
#include <vector>

/// Pictures of a training run: images and curves, drawn by gnuplot (Debian: gnuplot-nox) and written as PNG.
///
/// Every function throws moxie::ShapeError or moxie::ValueError for data that cannot be drawn, and std::runtime_error if
/// gnuplot is missing or fails. A picture replaces the old file only when it is complete.
namespace dit {

using moxie::Index;
using moxie::RowView;

/// One curve: points (x[i], y[i]) in the order of x. A y that is not finite leaves a gap.
struct Series {
  std::string name;
  std::vector<double> x;
  std::vector<double> y;
};

namespace detail {

/// A canvas of pixels, of which the images of `draw_samples` are parts.
struct PixelGrid {
  Index height;
  Index width;
  std::vector<unsigned> rgb;

  static constexpr unsigned white = 0xFFFFFF;
  static constexpr unsigned magenta = 0xFF00FF;

  PixelGrid(Index height_, Index width_)
      : height(height_), width(width_), rgb(static_cast<std::size_t>(height_ * width_), white) {}
  unsigned& at(Index row, Index col) { return rgb[static_cast<std::size_t>(row * width + col)]; }
};

/// A pixel of an image (C·H·W) in [-1, 1], gray or in colour, as red, green and blue.
inline unsigned rgb_of(const float* image, Index channels, Index area, Index pixel) {
  unsigned rgb = 0;
  for (Index c = 0; c < 3; ++c) {
    const float value = image[(channels == 1 ? 0 : c) * area + pixel];
    if (std::isnan(value)) {
      return PixelGrid::magenta;
    }
    rgb = rgb << 8U | static_cast<unsigned>(std::lround(127.5F * (std::clamp(value, -1.0F, 1.0F) + 1.0F)));
  }
  return rgb;
}

/// The grid of `draw_samples`: one white pixel between neighbours, and around.
inline PixelGrid grid_of(RowView<const float> images, std::span<const std::int64_t> labels, Index classes, Index channels,
                         Index height, Index width, Index columns) {
  PixelGrid grid(classes * (height + 1) + 1, columns * (width + 1) + 1);
  std::vector<Index> drawn(static_cast<std::size_t>(classes), 0);
  for (Index i = 0; i < images.rows(); ++i) {
    const std::int64_t label = labels[static_cast<std::size_t>(i)];
    moxie::detail::expect_value(
        label >= 0 && label < classes, "draw_samples",
        "label " + std::to_string(i) + " is " + std::to_string(label) + ", expected less than " + std::to_string(classes));
    const Index column = drawn[static_cast<std::size_t>(label)]++;
    for (Index pixel = 0; pixel < height * width && column < columns; ++pixel) {
      grid.at(label * (height + 1) + 1 + pixel / width, column * (width + 1) + 1 + pixel % width) =
          rgb_of(images.row(i), channels, height * width, pixel);
    }
  }
  return grid;
}

}  // namespace detail

/// A grid with a row for each class, its name at the left, and the first `columns` images of the class in their order.
///
/// @param images (n, C·H·W) in [-1, 1], a row as in `DataSet`: channel after channel. C is 1 (gray) or 3 (red, green, blue).
///               Values outside are drawn as the nearest inside, NaN in magenta.
/// @param labels (n), in [0, class_names.size())
/// @param class_names in UTF-8; long ones are cut, and control characters replaced
inline void draw_samples(const std::filesystem::path& path, RowView<const float> images, std::span<const std::int64_t> labels,
                         const std::vector<std::string>& class_names, Index channels, Index height, Index width,
                         Index columns = 10, const std::string& title = "Samples") {
  const Index classes = Index(class_names.size());
  moxie::detail::expect_at_least("draw_samples", "class_names.size()", classes, 1);
  moxie::detail::expect_at_least("draw_samples", "height", height, 1);
  moxie::detail::expect_at_least("draw_samples", "width", width, 1);
  moxie::detail::expect_at_least("draw_samples", "columns", columns, 1);
  moxie::detail::expect_value(channels == 1 || channels == 3, "draw_samples",
                              "channels is " + std::to_string(channels) + ", expected 1 or 3");
  moxie::detail::expect_shape("draw_samples", "images", images, Index(labels.size()), channels * height * width);

  detail::PixelGrid grid = detail::grid_of(images, labels, classes, channels, height, width, columns);
  const double scale = std::max(1.0, std::round(84.0 / double(std::max(height, width))));
  std::vector<std::string> names;
  std::size_t longest_name = 0;
  for (const std::string& name : class_names) {
    names.push_back(shown(name));
    longest_name = std::max(longest_name, letter_count(names.back()));
  }
  const double left = 24.0 + 9.0 * double(longest_name);
  const double top = 44.0;
  const double axes_width = scale * double(grid.width);
  const double axes_height = scale * double(grid.height);
  const double canvas_width = std::max(left + axes_width + 16.0, 11.0 * double(letter_count(title)));

  detail::Script script(canvas_width, top + axes_height + 16.0);
  script.place_axes(left, top, axes_width, axes_height);
  script.title(title, 0.5 * top);
  script << "unset border\nunset key\nunset xtics\nset ytics scale 0 (";
  for (Index c = 0; c < classes; ++c) {
    detail::add_tic(script, c == 0, names[static_cast<std::size_t>(c)],
                    double(c * (height + 1) + 1) + 0.5 * double(height - 1));
  }
  script << ")\nset xrange [-0.5:" << grid.width - 1 << ".5]\nset yrange [" << grid.height - 1 << ".5:-0.5]\n";
  script << "plot '-' using 1:2:3:4:5 with rgbimage\n";
  for (Index row = 0; row < grid.height; ++row) {
    for (Index col = 0; col < grid.width; ++col) {
      const unsigned rgb = grid.at(row, col);
      script << col << " " << row << " " << (rgb >> 16U) << " " << (rgb >> 8U & 255U) << " " << (rgb & 255U) << "\n";
    }
  }
  script << "e\n";
  script.draw(path);
}

namespace detail {

/// The mean of the middle half of the finite values around each point, over a fortieth of the curve to either side, less at its
/// ends: single outliers leave no trace.
inline std::vector<double> smoothed(const std::vector<double>& y) {
  const std::size_t n = y.size();
  std::vector<double> result(y);
  std::vector<double> window;
  for (std::size_t i = 0; i < n; ++i) {
    // Never further to the right than to the left, so that a steep start is not cut off.
    const std::size_t reach = std::min({i, n / 40, std::size_t{500}});
    window.clear();
    for (std::size_t j = i - reach; j < std::min(n, i + reach + 1); ++j) {
      if (std::isfinite(y[j])) {
        window.push_back(y[j]);
      }
    }
    if (std::isfinite(y[i])) {
      const auto quarter = std::ptrdiff_t(window.size() / 4);
      const auto begin = window.begin() + quarter;
      const auto end = window.end() - quarter;
      std::nth_element(window.begin(), begin, window.end());
      std::nth_element(begin, end - 1, window.end());
      result[i] = std::accumulate(begin, end, 0.0) / double(end - begin);
    }
  }
  return result;
}

/// The part of the plane that a picture of curves shows.
struct CurveFrame {
  double first = std::numeric_limits<double>::infinity();  ///< of x
  double last = -std::numeric_limits<double>::infinity();
  double low = std::numeric_limits<double>::infinity();  ///< of y
  double high = -std::numeric_limits<double>::infinity();
  bool logarithmic = false;
};

/// The frame of curves and their smoothed ones.
inline CurveFrame frame_of(const std::vector<Series>& series, const std::vector<std::vector<double>>& smooth) {
  CurveFrame frame;
  std::vector<double> values;  // all the finite ones
  for (std::size_t k = 0; k < series.size(); ++k) {
    const Series& s = series[k];
    for (std::size_t i = 0; i < s.y.size(); ++i) {
      if (std::isfinite(s.x[i]) && std::isfinite(s.y[i])) {
        values.push_back(s.y[i]);
        frame.low = std::min(frame.low, smooth[k][i]);
        frame.high = std::max(frame.high, smooth[k][i]);
        frame.first = std::min(frame.first, s.x[i]);
        frame.last = std::max(frame.last, s.x[i]);
      }
    }
  }
  moxie::detail::expect_value(!values.empty(), "draw_curve", "there is no finite value to draw");

  std::sort(values.begin(), values.end());
  frame.logarithmic = values.front() > 0.0 && frame.high > 10.0 * frame.low;
  const std::size_t outliers = values.size() / 100;
  frame.low = std::min(frame.low, values[outliers]);
  frame.high = std::max(frame.high, values[values.size() - 1 - outliers]);
  if (frame.logarithmic) {
    frame.low /= 1.1;
    frame.high *= 1.1;
  } else {
    const double margin = frame.high > frame.low ? 0.04 * (frame.high - frame.low) : std::max(0.1 * std::abs(frame.high), 1e-3);
    frame.low -= margin;
    frame.high += margin;
  }
  if (frame.first == frame.last) {
    frame.first -= 0.5;
    frame.last += 0.5;
  }
  return frame;
}

/// 1, 2 and 5 times the powers of 10.
inline void add_logarithmic_tics(Script& script, const CurveFrame& frame) {
  script << "set logscale y\nset ytics (";
  bool is_first = true;
  for (int power = int(std::floor(std::log10(frame.low))); power <= int(std::floor(std::log10(frame.high))); ++power) {
    for (const double digit : {1.0, 2.0, 5.0}) {
      const double tic = digit * std::pow(10.0, power);
      add_tic(script, is_first, general(tic, 6), tic);
      is_first = false;
    }
  }
  script << ")\n";
}

inline void add_points(Script& script, const std::vector<double>& x, const std::vector<double>& y) {
  for (std::size_t i = 0; i < x.size(); ++i) {
    script << x[i] << " " << (std::isfinite(y[i]) ? y[i] : std::numeric_limits<double>::quiet_NaN()) << "\n";
  }
  script << "e\n";
}

}  // namespace detail

/// Curves over a common x: each pale as it is, and smoothed above. The y axis is logarithmic if all values are positive and the
/// smoothed curves span more than a factor of 10; single outliers do not stretch it.
///
/// Throws moxie::ShapeError if x and y differ in length, moxie::ValueError if there is nothing finite to draw.
inline void draw_curve(const std::filesystem::path& path, const std::string& title, const std::string& x_label,
                       const std::vector<Series>& series) {
  std::vector<std::vector<double>> smooth;
  for (const Series& s : series) {
    if (s.x.size() != s.y.size()) {
      throw moxie::ShapeError("draw_curve: '" + s.name + "' has " + std::to_string(s.x.size()) + " x for " +
                              std::to_string(s.y.size()) + " y");
    }
    smooth.push_back(detail::smoothed(s.y));
  }
  const detail::CurveFrame frame = detail::frame_of(series, smooth);
  const std::array<std::string, 6> colors = {"4477AA", "EE6677", "228833", "AA3377", "66CCEE", "CCBB44"};
  detail::Script script(900, 540);
  script.title(title, 24);
  script << "set tmargin at screen 0.91\nset rmargin at screen 0.97\nset border 3\nset tics nomirror out\n"
         << "set grid lc rgb '#E0E0E0' lt 1\nset key top right samplen 2 spacing 1.2\nset format '%g'\n"
         << "set xlabel " << detail::gnuplot_quoted(x_label) << "\nset xrange [" << frame.first << ":" << frame.last << "]\n"
         << "set yrange [" << frame.low << ":" << frame.high << "]\n";
  if (series.size() == 1) {
    script << "unset key\nset ylabel " << detail::gnuplot_quoted(series.front().name) << "\n";
  }
  if (frame.logarithmic) {
    detail::add_logarithmic_tics(script, frame);
  }
  script << "plot ";
  for (std::size_t i = 0; i < series.size(); ++i) {
    script << "'-' using 1:2 with lines lw 1 lc rgb '#B0" << colors[i % colors.size()] << "' notitle, ";
  }
  for (std::size_t i = 0; i < series.size(); ++i) {
    const bool few_points = series[i].x.size() <= 50;
    script << "'-' using 1:2 with " << (few_points ? "linespoints pt 7 ps 0.7" : "lines") << " lw 2.5 lc rgb '#"
           << colors[i % colors.size()] << "' title " << detail::gnuplot_quoted(series[i].name)
           << (i + 1 < series.size() ? ", " : "\n");
  }
  for (const Series& s : series) {
    detail::add_points(script, s.x, s.y);
  }
  for (std::size_t i = 0; i < series.size(); ++i) {
    detail::add_points(script, series[i].x, smooth[i]);
  }
  script.draw(path);
}

}  // namespace dit
