// SPDX-License-Identifier: MIT
#pragma once

#include <array>
#include <barrier>
#include <moxie/core/error.hpp>
#include <thread>
#include <vector>

/// Rows by several lanes on the host, each a thread: what a warp does on a device, so that a row's lanes can be seen to divide
/// the work, to agree, and to wait where one reads what another wrote. Included before the headers of the backend, it takes the
/// place of their loop over rows.
namespace moxie::test {

class EmulatedLanes {
 public:
  static constexpr int count = 4;

  struct Team {
    std::barrier<> barrier{count};
    std::array<double, count> value{};
    std::array<int, count> index{};
  };

  EmulatedLanes(Team& team, int lane) : team_(&team), lane_(lane) {}
  int first() const { return lane_; }
  int step() const { return count; }
  void sync() const { team_->barrier.arrive_and_wait(); }

  template <class T>
  T sum(T x) const {
    for (int other = count / 2; other > 0; other /= 2) {
      x += exchanged(x, other);
    }
    return x;
  }
  template <class T>
  T largest(T x) const {
    for (int other = count / 2; other > 0; other /= 2) {
      const T y = exchanged(x, other);
      x = y > x ? y : x;
    }
    return x;
  }
  template <class T>
  void best(T& value, int& index) const {
    for (int other = count / 2; other > 0; other /= 2) {
      team_->index[std::size_t(lane_)] = index;
      const T v = exchanged(value, other);
      const int i = team_->index[std::size_t(lane_ ^ other)];
      sync();
      if (i >= 0 && (index < 0 || v > value || (v == value && i < index))) {
        value = v;
        index = i;
      }
    }
  }

 private:
  template <class T>
  T exchanged(T x, int other) const {
    team_->value[std::size_t(lane_)] = double(x);
    sync();
    const T y = T(team_->value[std::size_t(lane_ ^ other)]);
    sync();
    return y;
  }

  Team* team_;
  int lane_;
};

template <class F>
void run_emulated_rows(Index rows, const F& f) {
  EmulatedLanes::Team team;
  std::vector<std::thread> lanes;
  for (int lane = 0; lane < EmulatedLanes::count; ++lane) {
    lanes.emplace_back([&, lane] {
      for (Index row = 0; row < rows; ++row) {
        f(row, EmulatedLanes(team, lane));
        team.barrier.arrive_and_wait();
      }
    });
  }
  for (std::thread& lane : lanes) {
    lane.join();
  }
}

}  // namespace moxie::test

#define MOXIE_CUDA_ROW_LOOP(rows, f) ::moxie::test::run_emulated_rows(rows, f)
