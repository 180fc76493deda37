// SPDX-License-Identifier: MIT
#pragma once

#include <algorithm>
#include <cmath>
#include <dit/gnuplot.hpp>
#include <dit/text.hpp>
#include <filesystem>
#include <moxie/core/matrix.hpp>
#include <string>
#include <vector>

/// Heat maps of a routing, drawn by gnuplot (Debian: gnuplot-nox) and written as PNG.
///
/// Every function throws moxie::ShapeError or moxie::ValueError for data that cannot be drawn, and std::runtime_error if
/// gnuplot is missing or fails. A picture replaces the old file only when it is complete.
namespace dit {

using moxie::Index;
using moxie::Matrix;
using moxie::RowView;

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
  const double canvas_width = std::max(left + axes_width + right, 11.0 * double(letter_count(title)));
  const double canvas_height = top + axes_height + 56.0;
  const double axes_left = left + 0.5 * (canvas_width - left - axes_width - right);

  detail::Script script(canvas_width, canvas_height);
  script.place_axes(axes_left, top, axes_width, axes_height);
  script.title(title, 0.5 * top);
  script << "unset border\nunset key\nset xlabel 'expert'\nset ylabel 'layer'\nset xtics scale 0 1\nset ytics scale 0 1\n"
         << "set xrange [-0.5:" << experts - 1 << ".5]\nset yrange [" << layers - 1 << ".5:-0.5]\n"
         << "set cbrange [0:" << 100.0 * largest << "]\nset cbtics "
         << (axes_height < 150.0 ? fixed(50.0 * largest, 6) : "autofreq") << "\nset format cb '%.3g %%'\n";
  script.colorbox(axes_left + axes_width + 16.0, top, 14.0, axes_height);
  script << detail::palette
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
      const bool on_dark = shares(l, e) < 0.55 * largest;
      script << e << " " << l << " " << fixed(100.0 * shares(l, e), 1) << " " << (on_dark ? "0xFFFFFF" : "0x202020") << "\n";
    }
  }
  script << "e\n";
  script.draw(path);
}

/// A heat map among others.
struct HeatMap {
  std::string title;
  Matrix<double> shares;  ///< in [0, 1]; NaN is left white
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

/// Where the maps of a wall are, in pixels.
struct Wall {
  static constexpr double gap_x = 8;

  bool titled;
  double gap_y;
  Index across;
  Index down = 0;
  double map_width = 0;
  double map_height = 0;
  double width = 0;
  double height = 0;
  std::vector<std::string> row_names;
  double names_width = 24;

  Wall(const std::vector<HeatMap>& maps, const HeatMapAxes& axes)
      : titled(std::any_of(maps.begin(), maps.end(), [](const HeatMap& map) { return !map.title.empty(); })),
        gap_y(gap_x + (titled ? 18 : 0)),
        across(std::min(axes.across == 0 ? 6 : axes.across, Index(maps.size()))) {
    lay_out(maps, axes.cell);
    while (axes.across == 0 && across < Index(maps.size()) && height > width) {
      ++across;
      lay_out(maps, axes.cell);
    }
    for (const std::string& name : axes.row_names) {
      row_names.push_back(shown(name));
      names_width = titled ? std::max(names_width, 7.0 * double(letter_count(row_names.back()))) : names_width;
    }
  }
  /// Of a map, from the left and the upper edge of the wall.
  double x(Index map) const { return double(map % across) * (map_width + gap_x); }
  double y(Index map) const { return double(map / across) * (map_height + gap_y); }

 private:
  void lay_out(const std::vector<HeatMap>& maps, double cell) {
    const Index rows = maps.front().shares.rows();
    const Index cols = maps.front().shares.cols();
    down = (Index(maps.size()) + across - 1) / across;
    map_width = map_size(cols, cell, across, gap_x);
    map_height = map_size(rows, cell, down, gap_y);
    if (rows == cols) {
      map_width = map_height = std::min(map_width, map_height);
    }
    width = double(across) * (map_width + gap_x) - gap_x;
    height = double(down) * (map_height + gap_y) - gap_y;
  }
};

/// The largest share of all maps, 1 where there is none above 0. Throws for maps and axes that do not fit.
inline double largest_share(const std::vector<HeatMap>& maps, const HeatMapAxes& axes) {
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
  return largest > 0 ? std::min(largest, 1.0) : 1.0;
}

/// A text of the wall; x and y in pixels from the canvas's upper left corner.
inline void add_label(Script& script, const std::string& text, double x, double y, const char* how) {
  script << "set label " << gnuplot_quoted(text) << " at screen " << x / script.width() << ", screen "
         << 1 - y / script.height() << " " << how << " textcolor rgb '#303030'\n";
}

/// Numbers of the wall's columns and rows, whose upper left corner is (left, top).
inline void add_wall_numbers(Script& script, const Wall& wall, double left, double top) {
  for (Index x = 0, step = tic_step(wall.across, wall.width, 24); x < wall.across; x += step) {
    add_label(script, std::to_string(x), left + wall.x(x) + wall.map_width / 2, top + wall.height + 9, "center font ',8'");
  }
  for (Index y = 0, step = tic_step(wall.down, wall.height, 14); y < wall.down; y += step) {
    add_label(script, std::to_string(y), left - 7, top + wall.y(y * wall.across) + wall.map_height / 2, "right font ',8'");
  }
}

/// The numbers or names of a map's rows or columns: of `lines` in `pixels`, each as high or wide as `line`.
inline void add_map_tics(Script& script, char axis, Index lines, double pixels, double line,
                         const std::vector<std::string>& names) {
  script << "set " << axis << "tics scale 0 offset 0," << (axis == 'x' ? "0.5" : "0") << " font ',8' textcolor rgb '#303030' (";
  for (Index i = 0, step = tic_step(lines, pixels, line); i < lines; i += step) {
    add_tic(script, i == 0, names.empty() ? std::to_string(i) : names[std::size_t(i)], lines == 1 ? 0.5 : double(i));
  }
  script << ")\n";
}

/// An image of gnuplot has two rows and two columns at least: what is alone is drawn twice.
inline Index drawn_lines(Index lines) { return std::max(lines, Index{2}); }

inline void add_map(Script& script, const Matrix<double>& shares) {
  script << "plot '-' matrix with image\n";
  for (Index r = 0; r < drawn_lines(shares.rows()); ++r) {
    for (Index c = 0; c < drawn_lines(shares.cols()); ++c) {
      const double share = shares(std::min(r, shares.rows() - 1), std::min(c, shares.cols() - 1));
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

}  // namespace detail

/// A wall of heat maps of equal size, from left to right and then down, with one scale of colours, numbers in percent.
inline void draw_heat_maps(const std::filesystem::path& path, const std::string& title, const std::vector<HeatMap>& maps,
                           const HeatMapAxes& axes) {
  const double largest = detail::largest_share(maps, axes);
  const detail::Wall wall(maps, axes);
  const Index rows = maps.front().shares.rows();
  const Index cols = maps.front().shares.cols();

  const double bar_height = std::clamp(wall.height, 90.0, 240.0);
  const double body_height = std::max({wall.height, bar_height, 8.0 * double(letter_count(axes.rows))});
  const double top = wall.titled ? 62 : 44;
  const double right = 90;
  const double needed_width = 30 + wall.names_width + wall.width + right;
  const double canvas_width = std::max(needed_width, 11.0 * double(letter_count(title)));
  const double left = 30 + wall.names_width + 0.5 * (canvas_width - needed_width);

  detail::Script script(canvas_width, top + std::max(wall.height + 50, body_height + 20));
  script.title(title, 22);
  detail::add_label(script, axes.columns, left + wall.width / 2, top + wall.height + 32, "center");
  detail::add_label(script, axes.rows, left - wall.names_width - 16, top + body_height / 2, "center rotate by 90");
  if (!wall.titled) {
    detail::add_wall_numbers(script, wall, left, top);
  }
  script << "set multiplot\nunset key\nset cbrange [0:" << 100 * largest
         << "]\nset format cb '%.3g %%'\nset xrange [-0.5:" << detail::drawn_lines(cols) - 1 << ".5]\nset yrange ["
         << detail::drawn_lines(rows) - 1 << ".5:-0.5]\n";
  script.colorbox(left + wall.width + 16, top, 12, bar_height);
  script << "set cbtics scale 0 autofreq\n" << detail::palette;
  for (Index i = 0; i < Index(maps.size()); ++i) {
    const HeatMap& map = maps[std::size_t(i)];
    const double x = left + wall.x(i);
    const double y = top + wall.y(i);
    script.place_axes(x, y, wall.map_width, wall.map_height);
    script << "unset xtics\nunset ytics\n";
    if (wall.titled) {
      detail::add_label(script, map.title, x + wall.map_width / 2, y - 9, "center font ',9'");
      if (i % wall.across == 0) {
        detail::add_map_tics(script, 'y', rows, wall.map_height, 11, wall.row_names);
      }
      if (i + wall.across >= Index(maps.size())) {  // none below
        detail::add_map_tics(script, 'x', cols, wall.map_width, 18, {});
      }
    }
    detail::add_map(script, map.shares);
  }
  script << "unset multiplot\n";
  script.draw(path);
}

}  // namespace dit
