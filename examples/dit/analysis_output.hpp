// SPDX-License-Identifier: MIT
#pragma once

#include <cmath>
#include <dit/analysis.hpp>
#include <dit/heat_maps.hpp>
#include <dit/text.hpp>
#include <filesystem>
#include <limits>
#include <locale>
#include <moxie/io/safetensors.hpp>
#include <ostream>
#include <sstream>

/// What `dit analyse` writes of the counts of a routing: files for other programs, a table, and heat maps.
namespace dit {

/// Tensors `by_class` (layers, bins, classes, experts) and `by_position` (layers, bins, positions, experts), F64. Atomic.
/// Throws SafetensorsError.
inline void save_counts(const std::filesystem::path& path, const RoutingCounts& counts) {
  const RoutingCounts::Shape& shape = counts.shape();
  std::vector<double> by_class;
  std::vector<double> by_position;
  const auto append = [](std::vector<double>& to, const Matrix<double>& m) {
    to.insert(to.end(), m.data(), m.data() + m.size());
  };
  for (Index layer = 0; layer < shape.layers; ++layer) {
    for (Index bin = 0; bin < shape.bins; ++bin) {
      append(by_class, counts.by_class(layer, bin));
      append(by_position, counts.by_position(layer, bin));
    }
  }
  moxie::SafetensorsWriter writer;
  writer.add("by_class", {shape.layers, shape.bins, shape.classes, shape.experts}, std::span<const double>(by_class));
  writer.add("by_position", {shape.layers, shape.bins, shape.positions, shape.experts}, std::span<const double>(by_position));
  writer.save(path);
}

/// A line `key,layer,bin,index,expert,count` for each count, key `class` or `position`; bin 0 is the stretch next to the image.
/// Complete or not at all. Throws std::runtime_error.
inline void write_counts_csv(const std::filesystem::path& path, const RoutingCounts& counts) {
  const RoutingCounts::Shape& shape = counts.shape();
  std::ostringstream out;
  out.imbue(std::locale::classic());
  out.precision(std::numeric_limits<double>::max_digits10);
  out << "key,layer,bin,index,expert,count\n";
  for (const char* key : {"class", "position"}) {
    for (Index layer = 0; layer < shape.layers; ++layer) {
      for (Index bin = 0; bin < shape.bins; ++bin) {
        const Matrix<double> m = *key == 'c' ? counts.by_class(layer, bin) : counts.by_position(layer, bin);
        for (Index r = 0; r < m.rows(); ++r) {
          for (Index e = 0; e < m.cols(); ++e) {
            out << key << ',' << layer << ',' << bin << ',' << r << ',' << e << ',' << m(r, e) << '\n';
          }
        }
      }
    }
  }
  const std::string text = out.str();
  moxie::ReplacementFile file(path);
  file.write(text.data(), text.size());
  file.commit();
}

/// What a layer's routing says of its keys, in bits.
struct LayerInformation {
  double of_class = 0;     ///< I(class; expert)
  double of_position = 0;  ///< I(position; expert)
  double of_timestep = 0;  ///< I(stretch of timesteps; expert)
  double load = 0;         ///< entropy of the experts' shares, at most log2 E
};

inline std::vector<LayerInformation> information_by_layer(const RoutingCounts& counts) {
  std::vector<LayerInformation> layers;
  for (Index layer = 0; layer < counts.shape().layers; ++layer) {
    LayerInformation info{mutual_information(counts.by_class(layer)), mutual_information(counts.by_position(layer)),
                          mutual_information(counts.by_timestep(layer)), 0};
    const Eigen::RowVectorXd share = counts.load().row(layer);
    for (const double p : share) {
      info.load -= p > 0 ? p * std::log2(p) : 0;
    }
    layers.push_back(info);
  }
  return layers;
}

/// A table by layer, which Markdown reads as a table too, and below it what DiT-MoE's paper says of routing, with the numbers
/// of this model: each time the mean over the first and the last third of the layers.
inline void print_information(std::ostream& out, const RoutingCounts& counts) {
  const std::vector<LayerInformation> layers = information_by_layer(counts);
  const auto padded = [](const std::string& text, std::size_t width) {
    return std::string(width - std::min(width, text.size()), ' ') + text;
  };
  const auto number = [&](double bits) { return padded(fixed(bits, 4), 8); };
  out << "Bits that a token's key says about its expert:\n\n| layer |    class | position | timestep | entropy of load, of "
      << number(std::log2(double(counts.shape().experts))) << " |\n|------:|---------:|---------:|---------:|"
      << std::string(29, '-') << ":|\n";
  for (std::size_t i = 0; i < layers.size(); ++i) {
    out << "| " << padded(std::to_string(i), 5) << " | " << number(layers[i].of_class) << " | " << number(layers[i].of_position)
        << " | " << number(layers[i].of_timestep) << " | " << std::string(20, ' ') << number(layers[i].load) << " |\n";
  }
  const std::size_t third = std::max<std::size_t>(layers.size() / 3, 1);
  const auto mean = [&](double LayerInformation::*bits, std::size_t first) {
    double sum = 0;
    for (std::size_t i = first; i < first + third; ++i) {
      sum += layers[i].*bits;
    }
    return number(sum / double(third));
  };
  const auto line = [&](const char* claim, double LayerInformation::*bits) {
    out << "  " << claim << mean(bits, 0) << " bits in the first third of the layers," << mean(bits, layers.size() - third)
        << " in the last\n";
  };
  out << "\nDiT-MoE's paper, and this model:\n";
  line("\"on patch position, in shallow layers\":", &LayerInformation::of_position);
  line("\"on the timestep\":                     ", &LayerInformation::of_timestep);
  line("\"hardly on the class\":                 ", &LayerInformation::of_class);
  line("\"deeper is more uniform\", the load:    ", &LayerInformation::load);
}

namespace detail {

/// Each row's shares of its sum; NaN where nothing was counted.
inline Matrix<double> shares_of_rows(Matrix<double> counts) {
  for (Index r = 0; r < counts.rows(); ++r) {
    const double sum = counts.row(r).sum();
    counts.row(r) = counts.row(r) / (sum > 0 ? sum : std::numeric_limits<double>::quiet_NaN());
  }
  return counts;
}

}  // namespace detail

/// The paper's first family: for each layer, the shares of the experts (columns) in the choices of a class (rows).
inline void draw_routing_by_class(const std::filesystem::path& path, const RoutingCounts& counts,
                                  const std::vector<std::string>& class_names) {
  std::vector<HeatMap> maps;
  for (Index layer = 0; layer < counts.shape().layers; ++layer) {
    maps.push_back({"layer " + std::to_string(layer), detail::shares_of_rows(counts.by_class(layer))});
  }
  draw_heat_maps(path, "Experts of each class", maps, {"class", "expert", class_names});
}

/// The third: in the choices of a stretch of timesteps, the one next to noise, with which drawing begins, on top.
inline void draw_routing_by_timestep(const std::filesystem::path& path, const RoutingCounts& counts) {
  const Index bins = counts.shape().bins;
  std::vector<HeatMap> maps;
  for (Index layer = 0; layer < counts.shape().layers; ++layer) {
    const Matrix<double> shares = detail::shares_of_rows(counts.by_timestep(layer));
    maps.push_back({"layer " + std::to_string(layer), shares.colwise().reverse()});
  }
  std::vector<std::string> names;
  for (Index bin = bins; bin > 0; --bin) {
    names.push_back(general(double(bin) / double(bins), 3));
  }
  draw_heat_maps(path, "Experts of each stretch of timesteps", maps, {"noise: 1, image: 0", "expert", names});
}

/// The second: a row of maps for each layer, a map for each expert: its share in the choices of each position of the image.
inline void draw_routing_by_position(const std::filesystem::path& path, const RoutingCounts& counts) {
  const RoutingCounts::Shape& shape = counts.shape();
  const Index side = std::lround(std::sqrt(double(shape.positions)));
  const Index rows = side * side == shape.positions ? side : 1;
  std::vector<HeatMap> maps;
  for (Index layer = 0; layer < shape.layers; ++layer) {
    const Matrix<double> shares = detail::shares_of_rows(counts.by_position(layer));
    for (Index e = 0; e < shape.experts; ++e) {
      const Eigen::VectorXd of_expert = shares.col(e);
      maps.push_back({"", Eigen::Map<const Matrix<double>>(of_expert.data(), rows, shape.positions / rows)});
    }
  }
  draw_heat_maps(path, "Where in the image each expert is chosen", maps,
                 {"layer", "expert", {}, shape.experts, std::min(8.0, 72.0 / double(rows))});
}

}  // namespace dit
