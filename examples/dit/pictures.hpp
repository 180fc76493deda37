// SPDX-License-Identifier: MIT
#pragma once

#include <sys/wait.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <locale>
#include <moxie/core/matrix.hpp>
#include <numeric>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

/// Pictures of a training run, drawn by gnuplot (Debian: gnuplot-nox) and written as PNG.
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

/// A word of the shell's language.
inline std::string shell_quoted(const std::string& text) {
  std::string quoted = "'";
  for (const char c : text) {
    quoted += c == '\'' ? "'\\''" : std::string(1, c);
  }
  return quoted + "'";
}

/// A string of gnuplot's language, on one line.
inline std::string gnuplot_quoted(const std::string& text) {
  std::string quoted = "'";
  for (const char c : text) {
    quoted += c == '\'' ? "''" : static_cast<unsigned char>(c) < ' ' ? " " : std::string(1, c);
  }
  return quoted + "'";
}

/// Letters of UTF-8 text: what its width on paper is estimated from.
inline double letter_count(const std::string& text) {
  return double(
      std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0U) != 0x80U; }));
}

inline bool is_whole_png(const std::filesystem::path& path) {
  const std::string first = "\x89PNG\r\n\x1A\n";
  const std::string last = "IEND\xAE\x42\x60\x82";
  std::ifstream in(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(in), {}};
  return bytes.starts_with(first) && bytes.ends_with(last);
}

/// A gnuplot script for a canvas of width x height pixels, to which the caller appends commands.
class Script {
 public:
  Script(double width, double height) : width_(width), height_(height) {
    text_.imbue(std::locale::classic());
    text_.precision(10);
    text_ << "set encoding utf8\n"
          << "set terminal pngcairo noenhanced font 'DejaVu Sans,11' background rgb 'white' size " << std::ceil(width) << ","
          << std::ceil(height) << "\n"
          << "set border lc rgb '#808080'\n"
          << "set tics textcolor rgb '#303030'\n";
  }

  template <class T>
  Script& operator<<(const T& part) {
    text_ << part;
    return *this;
  }

  /// The rectangle that the axes enclose, in pixels from the canvas's upper left corner.
  void place_axes(double left, double top, double width, double height) {
    *this << "set lmargin at screen " << left / width_ << "\nset rmargin at screen " << (left + width) / width_
          << "\nset tmargin at screen " << 1.0 - top / height_ << "\nset bmargin at screen " << 1.0 - (top + height) / height_
          << "\n";
  }

  /// A title in the middle of the canvas, `y` pixels from its upper edge.
  void title(const std::string& text, double y) {
    *this << "set label " << gnuplot_quoted(text) << " at screen 0.5, screen " << 1.0 - y / height_
          << " center font ',13' textcolor rgb '#202020'\n";
  }

  /// Lets gnuplot draw the script and moves the result to `path`.
  void draw(const std::filesystem::path& path) const {
    struct Temporary {
      std::filesystem::path path;
      ~Temporary() {
        std::error_code ignored;
        std::filesystem::remove(path, ignored);
      }
    };
    const Temporary script{path.string() + ".gnuplot.part"};
    const Temporary picture{path.string() + ".part"};
    const auto fail = [&](const std::string& why) { throw std::runtime_error(path.string() + " was not drawn: " + why); };

    std::ofstream out(script.path, std::ios::binary);
    out << text_.str();
    out.close();
    if (!out) {
      fail("cannot write " + script.path.string());
    }

    // gnuplot writes the picture to its standard output, and what it has to say comes through the pipe.
    const std::string command =
        "gnuplot -d " + shell_quoted(script.path.string()) + " 2>&1 >" + shell_quoted(picture.path.string());
    std::FILE* pipe = popen(command.c_str(), "r");
    if (pipe == nullptr) {
      fail("cannot start a shell");
    }
    std::string messages;
    std::array<char, 256> buffer{};
    while (std::fgets(buffer.data(), int(buffer.size()), pipe) != nullptr) {
      messages += buffer.data();
    }
    const int status = pclose(pipe);
    if (status != -1 && WIFEXITED(status) && WEXITSTATUS(status) == 127) {
      fail("gnuplot was not found (Debian: apt install gnuplot-nox)");
    }
    if (status != 0 || !is_whole_png(picture.path)) {
      fail("gnuplot failed" + (messages.empty() ? "" : ": " + messages));
    }
    std::error_code error;
    std::filesystem::rename(picture.path, path, error);
    if (error) {
      fail(error.message());
    }
  }

 private:
  double width_;
  double height_;
  std::ostringstream text_;
};

/// Dark for little, light for much.
inline constexpr const char* palette =
    "set palette defined (0 '#440154', 1 '#472d7b', 2 '#3b528b', 3 '#2c728e', 4 '#21918c', 5 '#28ae80', 6 '#5ec962', "
    "7 '#addc30', 8 '#fde725')\n";

/// A position of `set xtics` or `set ytics` with its label, and the comma before all but the first.
inline void add_tic(Script& script, bool first, const std::string& label, double position) {
  script << (first ? "" : ", ") << gnuplot_quoted(label) << " " << position;
}

}  // namespace detail

/// A grid with a row for each class, its name at the left, and the first `columns` images of the class in their order.
///
/// @param images (n, C·H·W) in [-1, 1], a row as in `DataSet`: channel after channel. C is 1 (gray) or 3 (red, green, blue).
///               Values outside are drawn as the nearest inside, NaN in magenta.
/// @param labels (n), in [0, class_names.size())
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

  // The grid in pixels of the images: one white pixel between neighbours, and around.
  const Index grid_height = classes * (height + 1) + 1;
  const Index grid_width = columns * (width + 1) + 1;
  constexpr unsigned white = 0xFFFFFF;
  constexpr unsigned magenta = 0xFF00FF;
  std::vector<unsigned> grid(static_cast<std::size_t>(grid_height * grid_width), white);
  std::vector<Index> drawn(class_names.size(), 0);
  for (Index i = 0; i < images.rows(); ++i) {
    const std::int64_t label = labels[static_cast<std::size_t>(i)];
    moxie::detail::expect_value(
        label >= 0 && label < classes, "draw_samples",
        "label " + std::to_string(i) + " is " + std::to_string(label) + ", expected less than " + std::to_string(classes));
    const Index column = drawn[static_cast<std::size_t>(label)]++;
    if (column >= columns) {
      continue;
    }
    for (Index row = 0; row < height; ++row) {
      for (Index col = 0; col < width; ++col) {
        unsigned rgb = 0;
        bool is_nan = false;
        for (Index c = 0; c < 3; ++c) {
          const float value = images(i, ((channels == 1 ? 0 : c) * height + row) * width + col);
          is_nan = is_nan || std::isnan(value);
          rgb =
              rgb << 8U | (is_nan ? 0U : static_cast<unsigned>(std::lround(127.5F * (std::clamp(value, -1.0F, 1.0F) + 1.0F))));
        }
        grid[static_cast<std::size_t>((label * (height + 1) + 1 + row) * grid_width + column * (width + 1) + 1 + col)] =
            is_nan ? magenta : rgb;
      }
    }
  }

  const double scale = std::max(1.0, std::round(84.0 / double(std::max(height, width))));
  double longest_name = 0.0;
  for (const std::string& name : class_names) {
    longest_name = std::max(longest_name, detail::letter_count(name));
  }
  const double left = 24.0 + 9.0 * longest_name;
  const double top = 44.0;
  const double axes_width = scale * double(grid_width);
  const double axes_height = scale * double(grid_height);
  const double canvas_width = std::max(left + axes_width + 16.0, 11.0 * detail::letter_count(title));

  detail::Script script(canvas_width, top + axes_height + 16.0);
  script.place_axes(left, top, axes_width, axes_height);
  script.title(title, 0.5 * top);
  script << "unset border\nunset key\nunset xtics\nset ytics scale 0 (";
  for (Index c = 0; c < classes; ++c) {
    detail::add_tic(script, c == 0, class_names[static_cast<std::size_t>(c)],
                    double(c * (height + 1) + 1) + 0.5 * double(height - 1));
  }
  script << ")\nset xrange [-0.5:" << grid_width - 1 << ".5]\nset yrange [" << grid_height - 1 << ".5:-0.5]\n";
  script << "plot '-' using 1:2:3:4:5 with rgbimage\n";
  for (Index row = 0; row < grid_height; ++row) {
    for (Index col = 0; col < grid_width; ++col) {
      const unsigned rgb = grid[static_cast<std::size_t>(row * grid_width + col)];
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

}  // namespace detail

/// Curves over a common x: each pale as it is, and smoothed above. The y axis is logarithmic if all values are positive and the
/// smoothed curves span more than a factor of 10; single outliers do not stretch it.
///
/// Throws moxie::ShapeError if x and y differ in length, moxie::ValueError if there is nothing finite to draw.
inline void draw_curve(const std::filesystem::path& path, const std::string& title, const std::string& x_label,
                       const std::vector<Series>& series) {
  std::vector<double> values;  // all the finite ones
  std::vector<std::vector<double>> smooth;
  constexpr double infinity = std::numeric_limits<double>::infinity();
  double low = infinity;
  double high = -infinity;
  double first = infinity;
  double last = -infinity;
  for (const Series& s : series) {
    if (s.x.size() != s.y.size()) {
      throw moxie::ShapeError("draw_curve: '" + s.name + "' has " + std::to_string(s.x.size()) + " x for " +
                              std::to_string(s.y.size()) + " y");
    }
    smooth.push_back(detail::smoothed(s.y));
    for (std::size_t i = 0; i < s.y.size(); ++i) {
      if (std::isfinite(s.x[i]) && std::isfinite(s.y[i])) {
        values.push_back(s.y[i]);
        low = std::min(low, smooth.back()[i]);
        high = std::max(high, smooth.back()[i]);
        first = std::min(first, s.x[i]);
        last = std::max(last, s.x[i]);
      }
    }
  }
  moxie::detail::expect_value(!values.empty(), "draw_curve", "there is no finite value to draw");

  std::sort(values.begin(), values.end());
  const bool logarithmic = values.front() > 0.0 && high > 10.0 * low;
  const std::size_t outliers = values.size() / 100;
  low = std::min(low, values[outliers]);
  high = std::max(high, values[values.size() - 1 - outliers]);
  if (logarithmic) {
    low /= 1.1;
    high *= 1.1;
  } else {
    const double margin = high > low ? 0.04 * (high - low) : std::max(0.1 * std::abs(high), 1e-3);
    low -= margin;
    high += margin;
  }
  if (first == last) {
    first -= 0.5;
    last += 0.5;
  }

  const std::array<std::string, 6> colors = {"4477AA", "EE6677", "228833", "AA3377", "66CCEE", "CCBB44"};
  detail::Script script(900, 540);
  script.title(title, 24);
  script << "set tmargin at screen 0.91\nset rmargin at screen 0.97\nset border 3\nset tics nomirror out\n"
         << "set grid lc rgb '#E0E0E0' lt 1\nset key top right samplen 2 spacing 1.2\nset format '%g'\n"
         << "set xlabel " << detail::gnuplot_quoted(x_label) << "\nset xrange [" << first << ":" << last << "]\n"
         << "set yrange [" << low << ":" << high << "]\n";
  if (series.size() == 1) {
    script << "unset key\nset ylabel " << detail::gnuplot_quoted(series.front().name) << "\n";
  }
  if (logarithmic) {
    script << "set logscale y\nset ytics (";
    bool is_first = true;
    for (int power = int(std::floor(std::log10(low))); power <= int(std::floor(std::log10(high))); ++power) {
      for (const double digit : {1.0, 2.0, 5.0}) {
        const double tic = digit * std::pow(10.0, power);
        std::ostringstream label;
        label.imbue(std::locale::classic());
        label << tic;
        detail::add_tic(script, is_first, label.str(), tic);
        is_first = false;
      }
    }
    script << ")\n";
  }
  const auto add_points = [&](const std::vector<double>& x, const std::vector<double>& y) {
    for (std::size_t i = 0; i < x.size(); ++i) {
      script << x[i] << " " << (std::isfinite(y[i]) ? y[i] : std::numeric_limits<double>::quiet_NaN()) << "\n";
    }
    script << "e\n";
  };
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
    add_points(s.x, s.y);
  }
  for (std::size_t i = 0; i < series.size(); ++i) {
    add_points(series[i].x, smooth[i]);
  }
  script.draw(path);
}

/// A heat map of how the routed rows divide among the experts, numbers in percent.
///
/// @param shares (layers, E): the part of a layer's rows that each expert got, in [0, 1]
inline void draw_expert_load(const std::filesystem::path& path, RowView<const double> shares,
                             const std::string& title = "Expert load") {
  const Index layers = shares.rows();
  const Index experts = shares.cols();
  moxie::detail::expect_at_least("draw_expert_load", "layers", layers, 1);
  moxie::detail::expect_at_least("draw_expert_load", "experts", experts, 1);
  double largest = 2.0 / double(experts);  // so an equal load has the colour in the middle
  for (Index l = 0; l < layers; ++l) {
    for (Index e = 0; e < experts; ++e) {
      moxie::detail::expect_value(shares(l, e) >= 0.0 && shares(l, e) <= 1.0 + 1e-9, "draw_expert_load",
                                  "the share of layer " + std::to_string(l) + ", expert " + std::to_string(e) + " is " +
                                      std::to_string(shares(l, e)) + ", expected 0 to 1");
      largest = std::max(largest, shares(l, e));
    }
  }
  largest = std::min(largest, 1.0);

  const double cell_width = std::clamp(480.0 / double(experts), 36.0, 96.0);
  const double cell_height = std::clamp(240.0 / double(layers), 22.0, 60.0);
  const double axes_width = cell_width * double(experts);
  const double axes_height = cell_height * double(layers);
  const double left = 64.0;
  const double top = 44.0;
  const double right = 100.0;
  const double canvas_width = std::max(left + axes_width + right, 11.0 * detail::letter_count(title));
  const double canvas_height = top + axes_height + 56.0;
  const double axes_left = left + 0.5 * (canvas_width - left - axes_width - right);

  detail::Script script(canvas_width, canvas_height);
  script.place_axes(axes_left, top, axes_width, axes_height);
  script.title(title, 0.5 * top);
  script << "unset border\nunset key\nset xlabel 'expert'\nset ylabel 'layer'\nset xtics scale 0 1\nset ytics scale 0 1\n"
         << "set xrange [-0.5:" << experts - 1 << ".5]\nset yrange [" << layers - 1 << ".5:-0.5]\n"
         << "set cbrange [0:" << 100.0 * largest << "]\nset cbtics "
         << (axes_height < 150.0 ? std::to_string(50.0 * largest) : "autofreq") << "\nset format cb '%.3g %%'\n"
         << "set colorbox user origin screen " << (axes_left + axes_width + 16.0) / canvas_width << ", screen "
         << 1.0 - (top + axes_height) / canvas_height << " size screen " << 14.0 / canvas_width << ", screen "
         << axes_height / canvas_height << " noborder\n"
         << detail::palette
         << "plot '-' using 1:2:($1-0.5):($1+0.5):($2-0.5):($2+0.5):3 with boxxyerror fill solid noborder fc palette, "
         << "'-' using 1:2:3:4 with labels font ',8' textcolor rgb variable\n";
  for (Index l = 0; l < layers; ++l) {
    for (Index e = 0; e < experts; ++e) {
      script << e << " " << l << " " << 100.0 * shares(l, e) << "\n";
    }
  }
  script << "e\n";
  for (Index l = 0; l < layers; ++l) {
    for (Index e = 0; e < experts; ++e) {
      std::array<char, 16> number{};
      std::snprintf(number.data(), number.size(), "%.1f", 100.0 * shares(l, e));
      const bool on_dark = shares(l, e) < 0.55 * largest;
      script << e << " " << l << " " << number.data() << " " << (on_dark ? "0xFFFFFF" : "0x202020") << "\n";
    }
  }
  script << "e\n";
  script.draw(path);
}

/// A heat map among others.
struct HeatMap {
  std::string title;
  moxie::Matrix<double> shares;  ///< in [0, 1]; NaN is left white
};

/// What the axes of a wall of heat maps mean: the rows and columns of each map if the maps have titles, else those of the wall.
/// They are numbered from 0, as many as there is room for.
struct HeatMapAxes {
  std::string rows;
  std::string columns;
  std::vector<std::string> row_names;  ///< of each row of a map that has a title, instead of its number; none, or all
  Index across = 0;                    ///< maps beside each other; 0: 6, or more if the wall else is higher than wide
  double cell = 12;                    ///< pixels of a number, if the map then is between 36 and 180 pixels wide and high
};

namespace detail {

/// Pixels of `maps` maps beside or above each other, `cells` numbers each. They shrink where the canvas would go beyond 4000
/// pixels, but a number has a pixel at least.
inline double map_size(Index cells, double cell, Index maps, double gap) {
  constexpr double most = 3800;  // and what is around the wall
  const double size = std::clamp(cell * double(cells), 36.0, 180.0);
  return std::max(double(cells), std::min(size, std::floor(most / double(maps) - gap)));
}

/// Every how many lines of text there is room for one.
inline Index tic_step(Index lines, double pixels, double line) {
  Index step = 1;
  for (const Index next : {2, 5, 10, 20, 50, 100, 200, 500, 1000}) {
    step = pixels / double(lines) * double(step) < line ? next : step;
  }
  return step;
}

}  // namespace detail

/// A wall of heat maps of equal size, from left to right and then down, with one scale of colours, numbers in percent.
inline void draw_heat_maps(const std::filesystem::path& path, const std::string& title, const std::vector<HeatMap>& maps,
                           const HeatMapAxes& axes) {
  constexpr const char* where = "draw_heat_maps";
  moxie::detail::expect_at_least(where, "maps", Index(maps.size()), 1);
  moxie::detail::expect_at_least(where, "across", axes.across, 0);
  const Index rows = maps.front().shares.rows();
  const Index cols = maps.front().shares.cols();
  moxie::detail::expect_at_least(where, "rows", rows, 1);
  moxie::detail::expect_at_least(where, "columns", cols, 1);
  moxie::detail::expect_value(axes.row_names.empty() || Index(axes.row_names.size()) == rows, where,
                              "there must be a name for each row, or none");
  double largest = 0;
  for (const HeatMap& map : maps) {
    moxie::detail::expect_shape(where, "a map", RowView<const double>(map.shares), rows, cols);
    for (Index i = 0; i < map.shares.size(); ++i) {
      const double share = map.shares.data()[i];
      moxie::detail::expect_value(std::isnan(share) || (share >= 0 && share <= 1 + 1e-9), where,
                                  "a share is " + std::to_string(share) + ", expected 0 to 1");
      largest = std::isnan(share) ? largest : std::max(largest, share);
    }
  }
  largest = largest > 0 ? std::min(largest, 1.0) : 1.0;

  const auto count = Index(maps.size());
  const bool titled = std::any_of(maps.begin(), maps.end(), [](const HeatMap& map) { return !map.title.empty(); });
  const double gap_x = 8;
  const double gap_y = gap_x + (titled ? 18 : 0);
  Index across = std::min(axes.across == 0 ? 6 : axes.across, count);
  Index down = 0;
  double width = 0;
  double height = 0;
  double wall_width = 0;
  double wall_height = 0;
  const auto lay_out = [&] {
    down = (count + across - 1) / across;
    width = detail::map_size(cols, axes.cell, across, gap_x);
    height = detail::map_size(rows, axes.cell, down, gap_y);
    if (rows == cols) {
      width = height = std::min(width, height);
    }
    wall_width = double(across) * (width + gap_x) - gap_x;
    wall_height = double(down) * (height + gap_y) - gap_y;
  };
  lay_out();
  while (axes.across == 0 && across < count && wall_height > wall_width) {
    ++across;
    lay_out();
  }
  const double bar_height = std::clamp(wall_height, 90.0, 240.0);
  const double body_height = std::max({wall_height, bar_height, 8.0 * detail::letter_count(axes.rows)});

  double label_width = 24;
  for (const std::string& name : axes.row_names) {
    label_width = titled ? std::max(label_width, 7.0 * detail::letter_count(name)) : label_width;
  }
  const double top = titled ? 62 : 44;
  const double right = 90;
  const double canvas_width = std::max(30 + label_width + wall_width + right, 11.0 * detail::letter_count(title));
  const double canvas_height = top + std::max(wall_height + 50, body_height + 20);
  const double left = 30 + label_width + 0.5 * (canvas_width - 30 - label_width - wall_width - right);

  detail::Script script(canvas_width, canvas_height);
  script.title(title, 22);
  const auto label = [&](const std::string& text, double x, double y, const char* how) {
    script << "set label " << detail::gnuplot_quoted(text) << " at screen " << x / canvas_width << ", screen "
           << 1 - y / canvas_height << " " << how << " textcolor rgb '#303030'\n";
  };
  label(axes.columns, left + wall_width / 2, top + wall_height + 32, "center");
  label(axes.rows, left - label_width - 16, top + body_height / 2, "center rotate by 90");
  if (!titled) {
    for (Index x = 0, step = detail::tic_step(across, wall_width, 24); x < across; x += step) {
      label(std::to_string(x), left + double(x) * (width + gap_x) + width / 2, top + wall_height + 9, "center font ',8'");
    }
    for (Index y = 0, step = detail::tic_step(down, wall_height, 14); y < down; y += step) {
      label(std::to_string(y), left - 7, top + double(y) * (height + gap_y) + height / 2, "right font ',8'");
    }
  }
  // An image of gnuplot has two rows and two columns at least: what is alone is drawn twice.
  const Index drawn_rows = std::max(rows, Index{2});
  const Index drawn_cols = std::max(cols, Index{2});
  script << "set multiplot\nunset key\nset cbrange [0:" << 100 * largest
         << "]\nset format cb '%.3g %%'\nset xrange [-0.5:" << drawn_cols - 1 << ".5]\nset yrange [" << drawn_rows - 1
         << ".5:-0.5]\nset colorbox user origin screen " << (left + wall_width + 16) / canvas_width << ", screen "
         << 1 - (top + bar_height) / canvas_height << " size screen " << 12 / canvas_width << ", screen "
         << bar_height / canvas_height << " noborder\nset cbtics scale 0 autofreq\n"
         << detail::palette;
  const auto add_tics = [&](const char* axis, Index lines, double pixels, double line, const std::vector<std::string>& names) {
    script << "set " << axis << "tics scale 0 offset 0," << (*axis == 'x' ? "0.5" : "0")
           << " font ',8' textcolor rgb '#303030' (";
    for (Index i = 0, step = detail::tic_step(lines, pixels, line); i < lines; i += step) {
      detail::add_tic(script, i == 0, names.empty() ? std::to_string(i) : names[std::size_t(i)], lines == 1 ? 0.5 : double(i));
    }
    script << ")\n";
  };
  for (Index i = 0; i < count; ++i) {
    const Index row = i / across;
    const Index col = i % across;
    const double x = left + double(col) * (width + gap_x);
    const double y = top + double(row) * (height + gap_y);
    const HeatMap& map = maps[std::size_t(i)];
    script.place_axes(x, y, width, height);
    script << "unset xtics\nunset ytics\n";
    if (titled) {
      label(map.title, x + width / 2, y - 9, "center font ',9'");
      if (col == 0) {
        add_tics("y", rows, height, 11, axes.row_names);
      }
      if (i + across >= count) {  // none below
        add_tics("x", cols, width, 18, {});
      }
    }
    script << "plot '-' matrix with image\n";
    for (Index r = 0; r < drawn_rows; ++r) {
      for (Index c = 0; c < drawn_cols; ++c) {
        const double share = map.shares(std::min(r, rows - 1), std::min(c, cols - 1));
        script << (c == 0 ? "" : " ");
        if (std::isnan(share)) {
          script << "NaN";
        } else {
          script << 100 * share;
        }
      }
      script << "\n";
    }
    script << "e\nunset label\nunset colorbox\n";
  }
  script << "unset multiplot\n";
  script.draw(path);
}

}  // namespace dit
