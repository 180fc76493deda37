// SPDX-License-Identifier: MIT
#pragma once

#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <dit/text.hpp>
#include <filesystem>
#include <locale>
#include <memory>
#include <moxie/io/safetensors.hpp>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>

/// Scripts of gnuplot (Debian: gnuplot-nox), and the pictures that it draws of them.
namespace dit::detail {

/// Whether bytes begin and end as a PNG file does.
inline bool is_whole_png(std::string_view bytes) {
  return bytes.starts_with("\x89PNG\r\n\x1A\n") && bytes.ends_with("IEND\xAE\x42\x60\x82");
}

/// A string of gnuplot's language, on one line.
inline std::string gnuplot_quoted(const std::string& text) {
  std::string quoted = "'";
  for (const char c : text) {
    quoted += c == '\'' ? "''" : static_cast<unsigned char>(c) < ' ' ? " " : std::string(1, c);
  }
  return quoted + "'";
}

/// A file without a name: a program that is killed leaves nothing behind.
class NamelessFile {
 public:
  NamelessFile() : file_(std::tmpfile(), &std::fclose) {
    if (!file_) {
      throw std::runtime_error("no temporary file: " + std::generic_category().message(errno));
    }
  }
  int descriptor() const { return ::fileno(file_.get()); }
  /// What another process reads.
  void fill(const std::string& bytes) {
    if (std::fwrite(bytes.data(), 1, bytes.size(), file_.get()) != bytes.size() || std::fflush(file_.get()) != 0 ||
        ::lseek(descriptor(), 0, SEEK_SET) != 0) {
      throw std::runtime_error("a temporary file cannot be written: " + std::generic_category().message(errno));
    }
  }
  /// What another process wrote.
  std::string bytes() const {
    std::string bytes;
    std::array<char, 1 << 16> buffer{};
    for (ssize_t got = 0; (got = ::pread(descriptor(), buffer.data(), buffer.size(), off_t(bytes.size()))) > 0;) {
      bytes.append(buffer.data(), std::size_t(got));
    }
    return bytes;
  }

 private:
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file_;
};

/// What gnuplot writes when it runs a script. Throws std::runtime_error if it is missing or fails.
inline std::string run_gnuplot(const std::string& script) {
  NamelessFile in;
  const NamelessFile out;
  const NamelessFile messages;
  in.fill(script);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, in.descriptor(), STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, out.descriptor(), STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, messages.descriptor(), STDERR_FILENO);
  std::array<char, 8> name{"gnuplot"};
  std::array<char, 3> no_settings{"-d"};
  const std::array<char*, 3> arguments{name.data(), no_settings.data(), nullptr};
  pid_t child = 0;
  const int error = ::posix_spawnp(&child, name.data(), &actions, nullptr, arguments.data(), ::environ);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) {
    throw std::runtime_error(error == ENOENT ? "gnuplot was not found (Debian: apt install gnuplot-nox)"
                                             : "gnuplot cannot be started: " + std::generic_category().message(error));
  }
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  if (status != 0) {
    const std::string said = messages.bytes();
    throw std::runtime_error("gnuplot failed" + (said.empty() ? "" : ": " + said));
  }
  return out.bytes();
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
  std::string text() const { return text_.str(); }

  double width() const { return width_; }
  double height() const { return height_; }

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

  /// A scale of colours beside the axes: pixels from the canvas's upper left corner.
  void colorbox(double left, double top, double width, double height) {
    *this << "set colorbox user origin screen " << left / width_ << ", screen " << 1 - (top + height) / height_
          << " size screen " << width / width_ << ", screen " << height / height_ << " noborder\n";
  }

  /// Lets gnuplot draw the script. The picture replaces the file at `path` when it is complete.
  void draw(const std::filesystem::path& path) const {
    try {
      const std::string picture = run_gnuplot(text());
      if (!is_whole_png(picture)) {
        throw std::runtime_error("gnuplot failed: it wrote no whole picture");
      }
      moxie::ReplacementFile file(path);
      file.write(picture.data(), picture.size());
      file.commit();
    } catch (const std::exception& error) {
      throw std::runtime_error(path.string() + " was not drawn: " + error.what());
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

}  // namespace dit::detail
