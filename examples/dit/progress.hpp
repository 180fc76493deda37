// SPDX-License-Identifier: MIT
#pragma once

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <dit/text.hpp>
#include <functional>
#include <iostream>
#include <limits>
#include <moxie/core/error.hpp>
#include <string>
#include <utility>

namespace dit {

using moxie::Index;

/// "9:58", "1:02:03", or "-:--" for a time that is not known.
inline std::string clock_time(double seconds) {
  if (!(seconds >= 0.0 && seconds < 1e7)) {
    return "-:--";
  }
  const int s = int(seconds);
  char text[32];
  if (s < 3600) {
    std::snprintf(text, sizeof text, "%d:%02d", s / 60, s % 60);
  } else {
    std::snprintf(text, sizeof text, "%d:%02d:%02d", s / 3600, s / 60 % 60, s % 60);
  }
  return text;
}

struct ProgressOptions {
  Index steps = 0;            ///< where training ends
  Index first_step = 0;       ///< where this run starts: more than 0 if it goes on from a checkpoint
  Index images_per_step = 0;  ///< the batch size
  std::ostream* out = &std::cout;
  bool terminal = isatty(STDOUT_FILENO) != 0;
  int columns = 0;  ///< the terminal's width; 0 asks it
  /// Seconds from any start.
  std::function<double()> clock = [] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  };
};

/// What a training run says about itself. On a terminal, one line that is rewritten in place; elsewhere (a file, a pipe),
/// a line every ten seconds. Either way a last one at the end.
///
///      42% [########............] 840/2000 loss 0.244 balance 0.0101 load 1.31 118 images/s 7:36, left 10:30
class Progress {
 public:
  explicit Progress(ProgressOptions options)
      : options_(std::move(options)), start_(options_.clock()), step_(options_.first_step) {}

  /// After a step: `step` steps are done in all. Losses are shown as means over about the last 50 steps, a loss that is not
  /// finite as it is.
  void update(Index step, double loss, double balance_loss, double max_load) {
    loss_.add(loss);
    balance_loss_.add(balance_loss);
    max_load_.add(max_load);
    has_losses_ = true;
    update(step);
  }

  /// The same for work that has no loss.
  void update(Index step) {
    step_ = step;
    const double now = options_.clock();
    if (now - last_shown_ >= (options_.terminal ? 0.1 : 10.0)) {
      last_shown_ = now;
      show(now);
    }
  }

  /// Shows the last state and ends the line: at the end of training, and before anything else is printed.
  void finish() {
    if (options_.terminal || step_ != shown_step_) {
      show(options_.clock());
    }
    if (options_.terminal) {
      *options_.out << std::endl;
      shown_length_ = 0;
    }
  }

 private:
  /// An exponential moving average that starts from the first values.
  struct Average {
    double sum = 0.0;
    double weight = 0.0;
    double latest = std::numeric_limits<double>::quiet_NaN();

    void add(double value) {
      latest = value;
      if (std::isfinite(value)) {
        sum = 0.98 * sum + value;
        weight = 0.98 * weight + 1.0;
      }
    }
    double value() const { return std::isfinite(latest) ? sum / weight : std::copysign(latest, 1.0); }
  };

  void show(double now) {
    shown_step_ = step_;
    const double done = options_.steps > 0 ? std::clamp(double(step_) / double(options_.steps), 0.0, 1.0) : 0.0;
    const double elapsed = now - start_;
    const double steps_per_second = elapsed > 0.0 ? double(step_ - options_.first_step) / elapsed : 0.0;
    const double left =
        steps_per_second > 0.0 ? double(std::max<Index>(options_.steps - step_, 0)) / steps_per_second : double(NAN);

    std::string numbers = std::to_string(step_) + "/" + std::to_string(options_.steps);
    if (has_losses_) {
      numbers += " loss " + fixed(loss_.value(), 3) + " balance " + general(balance_loss_.value(), 3) + " load " +
                 fixed(max_load_.value(), 2);
    }
    numbers += " " + fixed(steps_per_second * double(options_.images_per_step), 0) + " images/s " + clock_time(elapsed) +
               ", left " + clock_time(left);
    const std::string percent = std::to_string(int(100.0 * done)) + "% ";
    std::string line = std::string(5 - percent.size(), ' ') + percent;
    if (!options_.terminal) {
      *options_.out << line + numbers << std::endl;
      return;
    }

    // The bar takes what the line has left, and the line never wraps: "\r" could not rewrite it.
    const int columns = (options_.columns > 0 ? options_.columns : terminal_columns()) - 1;
    const int bar = std::min(30, columns - int(line.size() + numbers.size()) - 3);
    if (bar >= 5) {
      const auto full = static_cast<std::size_t>(done * bar);
      line.append("[").append(full, '#').append(static_cast<std::size_t>(bar) - full, '.').append("] ");
    }
    line += numbers;
    const std::size_t length = line.size();
    line.resize(std::max(length, shown_length_), ' ');  // over the rest of a longer line
    line.resize(std::min(line.size(), static_cast<std::size_t>(std::max(columns, 1))));
    shown_length_ = length;
    *options_.out << '\r' << line << std::flush;
  }

  static int terminal_columns() {
    winsize size{};
    return ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : 100;
  }

  ProgressOptions options_;
  double start_;
  double last_shown_ = -std::numeric_limits<double>::infinity();
  Index step_;
  Index shown_step_ = -1;
  Average loss_;
  Average balance_loss_;
  Average max_load_;
  bool has_losses_ = false;
  std::size_t shown_length_ = 0;
};

}  // namespace dit
