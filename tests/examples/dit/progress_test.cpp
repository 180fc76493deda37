// SPDX-License-Identifier: MIT
#include "dit/progress.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <examples/dit/comma_locale.hpp>
#include <limits>
#include <sstream>
#include <string>

namespace {

/// A run of 2000 steps whose clock the test turns.
struct Run {
  double now = 1000.0;
  std::ostringstream out;
  dit::Progress progress;

  explicit Run(bool terminal, dit::Index first_step = 0, int columns = 100)
      : progress({.steps = 2000,
                  .first_step = first_step,
                  .images_per_step = 64,
                  .out = &out,
                  .terminal = terminal,
                  .columns = columns,
                  .clock = [this] { return now; }}) {}
  std::string text() const { return out.str(); }
  auto lines() const {
    const std::string s = text();
    return std::count(s.begin(), s.end(), '\n');
  }
};

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();
constexpr double infinity = std::numeric_limits<double>::infinity();

}  // namespace

TEST_CASE("clock_time: minutes and seconds, hours where needed, dashes for the unknown") {
  CHECK(dit::clock_time(0.0) == "0:00");
  CHECK(dit::clock_time(59.9) == "0:59");
  CHECK(dit::clock_time(598.0) == "9:58");
  CHECK(dit::clock_time(3723.0) == "1:02:03");
  CHECK(dit::clock_time(not_a_number) == "-:--");
  CHECK(dit::clock_time(infinity) == "-:--");
  CHECK(dit::clock_time(-1.0) == "-:--");
}

TEST_CASE("progress: says how far, how good, how fast and how long") {
  Run run(false);
  run.now += 100.0;
  run.progress.update(500, 0.25, 0.0101, 1.25);
  CHECK(run.text() == " 25% 500/2000 loss 0.250 balance 0.0101 load 1.25 320 images/s 1:40, left 5:00\n");
}

TEST_CASE("progress: the same in every locale") {
  const dit::test::CommaLocale comma;
  Run run(false);
  run.now += 100.0;
  run.progress.update(1500, 0.25, 0.0101, 1.25);
  CHECK(run.text() == " 75% 1500/2000 loss 0.250 balance 0.0101 load 1.25 960 images/s 1:40, left 0:33\n");
}

TEST_CASE("progress: says nothing of losses where there are none") {
  Run run(false);
  run.now += 100.0;
  run.progress.update(500);
  CHECK(run.text() == " 25% 500/2000 320 images/s 1:40, left 5:00\n");
}

TEST_CASE("progress: a resumed run counts its own steps for the rate, all steps for the rest") {
  Run run(false, 1000);
  run.now += 100.0;
  run.progress.update(1500, 0.25, 0.01, 1.25);
  CHECK(run.text() == " 75% 1500/2000 loss 0.250 balance 0.01 load 1.25 320 images/s 1:40, left 1:40\n");
}

TEST_CASE("progress: elsewhere than on a terminal, a plain line every ten seconds and one at the end") {
  Run run(false);
  for (int step = 1; step <= 2000; ++step) {
    run.now += 0.025;  // 50 seconds in all
    run.progress.update(step, 0.3, 0.01, 1.25);
  }
  run.progress.finish();
  CHECK(run.lines() == 6);
  CHECK(!contains(run.text(), "\r"));
  CHECK(contains(run.text(), "100% 2000/2000"));
  CHECK(contains(run.text(), "left 0:00\n"));
  run.progress.finish();
  CHECK(run.lines() == 6);
}

TEST_CASE("progress: on a terminal, one line rewritten in place and never wider than the terminal") {
  for (const int columns : {2, 20, 60, 80, 100, 200}) {
    CAPTURE(columns);
    Run run(true, 0, columns);
    for (int step = 1; step <= 2000; ++step) {
      run.now += 0.025;
      run.progress.update(step, step == 1000 ? 1e30 : 0.3, 0.01, 1.25);
    }
    CHECK(run.lines() == 0);
    run.progress.finish();
    CHECK(run.lines() == 1);
    CHECK(run.text().back() == '\n');

    std::istringstream frames(run.text());
    std::string frame;
    int count = 0;
    std::size_t widest = 0;
    while (std::getline(frames, frame, '\r')) {
      ++count;
      widest = std::max(widest, frame.find_last_not_of('\n') + 1);
    }
    CHECK(widest < static_cast<std::size_t>(columns));
    CHECK(count > 400);  // ten a second
    CHECK(count < 510);
  }
}

TEST_CASE("progress: on a terminal of 90 columns, there is room for the bar") {
  Run run(true, 0, 90);
  run.now += 100.0;
  run.progress.update(500, 0.25, 0.0101, 1.25);
  CHECK(run.text() == "\r 25% [##......] 500/2000 loss 0.250 balance 0.0101 load 1.25 320 images/s 1:40, left 5:00");
}

TEST_CASE("progress: a shorter line wipes what a longer one left") {
  Run run(true);
  run.now += 1.0;
  run.progress.update(1, 123456789.0, 0.01, 1.25);
  const std::size_t longer = run.text().size();
  run.out.str("");
  run.now += 1.0;
  run.progress.update(2, not_a_number, 0.01, 1.25);
  CHECK(run.text().size() >= longer);
}

TEST_CASE("progress: a loss that is not finite is shown, and forgotten when the next is finite") {
  Run run(false);
  const auto shown = [&](dit::Index step, double loss) {
    run.out.str("");
    run.now += 10.0;
    run.progress.update(step, loss, not_a_number, 1.25);
    return run.text();
  };
  CHECK(contains(shown(1, -not_a_number), " loss nan balance nan "));
  CHECK(contains(shown(2, 0.5), " loss 0.500 "));
  CHECK(contains(shown(3, infinity), " loss inf "));
  CHECK(contains(shown(4, 0.5), " loss 0.500 "));
}

TEST_CASE("progress: the time left is unknown before the first step, and without steps") {
  Run run(false);
  run.progress.update(0, 0.5, 0.01, 1.25);
  CHECK(contains(run.text(), "  0% 0/2000 loss 0.500 balance 0.01 load 1.25 0 images/s 0:00, left -:--\n"));

  std::ostringstream out;
  dit::Progress empty({.out = &out, .terminal = false, .clock = [] { return 0.0; }});
  empty.finish();
  CHECK(out.str() == "  0% 0/0 0 images/s 0:00, left -:--\n");
}
