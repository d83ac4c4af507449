#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

// A warp on the CPU, for device code that is plain C++ but for the functions of a warp. To be included before it.

#define __device__

namespace flash_mla {

/// Lanes take turns. Each runs until it calls a function of the warp, gives a value there, and goes on when all have.
class WarpOnCpu {
 public:
  static constexpr int kLanes = 32;
  using Values = std::array<std::uint64_t, kLanes>;

  /// Calls `code` in each lane. False where lanes have parted: not all called the same functions in the same order.
  static bool run(const std::function<void()>& code);

  enum class Function { kShuffle, kAll, kAny, kBallot, kAdd, kMax };
  /// What the lanes give to a function that all call.
  static const Values& exchange(Function function, std::uint64_t value);
  static int lane();

 private:
  struct State {
    std::array<ucontext_t, kLanes> lanes;
    ucontext_t caller;
    std::vector<char> stacks;
    const std::function<void()>* code;
    int lane;
    std::array<bool, kLanes> has_ended;
    std::array<int, kLanes> num_calls;
    // Of two calls in turn: a lane may be at its next one while others still read the last one's.
    std::array<Values, 2> values;
    std::array<std::array<Function, kLanes>, 2> functions;
    bool has_parted;
  };
  static State& state() {
    static State the_only_one;
    return the_only_one;
  }
  static void enter();
  static void go_to(int lane, bool has_ended);
};

}  // namespace flash_mla

/// CUDA's, of the lane whose turn it is.
struct ThreadIdxOfLane {
  unsigned x;
};
inline ThreadIdxOfLane threadIdx{};

namespace flash_mla {

inline int WarpOnCpu::lane() { return state().lane; }

inline bool WarpOnCpu::run(const std::function<void()>& code) {
  constexpr std::size_t kStackBytes = 256 << 10;
  State& s = state();
  s.stacks.resize(kLanes * kStackBytes);
  s.code = &code;
  s.has_ended = {};
  s.num_calls = {};
  s.has_parted = false;
  for (int i = 0; i < kLanes; ++i) {
    getcontext(&s.lanes[i]);
    s.lanes[i].uc_stack.ss_sp = s.stacks.data() + i * kStackBytes;
    s.lanes[i].uc_stack.ss_size = kStackBytes;
    s.lanes[i].uc_link = nullptr;
    makecontext(&s.lanes[i], enter, 0);
  }
  s.lane = 0;
  threadIdx.x = 0;
  swapcontext(&s.caller, &s.lanes[0]);
  return !s.has_parted;
}

inline void WarpOnCpu::enter() {
  State& s = state();
  (*s.code)();
  s.has_ended[s.lane] = true;
  if (s.lane + 1 == kLanes) {
    s.has_parted |= std::find(s.has_ended.begin(), s.has_ended.end(), false) != s.has_ended.end();
    setcontext(&s.caller);
  } else {
    go_to(s.lane + 1, true);
  }
}

/// Ends the run where the next lane has ended, and this one has not.
inline void WarpOnCpu::go_to(int lane, bool has_ended) {
  State& s = state();
  const int from = s.lane;
  if (s.has_ended[lane]) {
    s.has_parted = true;
    setcontext(&s.caller);
  }
  s.lane = lane;
  threadIdx.x = static_cast<unsigned>(lane);
  if (has_ended) {
    setcontext(&s.lanes[lane]);
  } else {
    swapcontext(&s.lanes[from], &s.lanes[lane]);
  }
}

inline const WarpOnCpu::Values& WarpOnCpu::exchange(Function function, std::uint64_t value) {
  State& s = state();
  const int call = s.num_calls[s.lane]++ % 2;
  s.values[call][s.lane] = value;
  s.functions[call][s.lane] = function;
  go_to((s.lane + 1) % kLanes, false);
  const auto& functions = s.functions[call];
  s.has_parted |= std::any_of(functions.begin(), functions.end(), [&](Function other) { return other != function; });
  return s.values[call];
}

template <class T>
T shuffle(T value, int from) {
  std::uint64_t bits = 0;
  static_assert(sizeof(T) <= sizeof(bits));
  std::memcpy(&bits, &value, sizeof(T));
  const WarpOnCpu::Values& values = WarpOnCpu::exchange(WarpOnCpu::Function::kShuffle, bits);
  std::memcpy(&value, &values[from], sizeof(T));
  return value;
}

}  // namespace flash_mla

// CUDA's functions of a warp, as far as they are needed, of all lanes together.

using std::max;
using std::min;

template <class T>
T __shfl_sync(unsigned /*mask*/, T value, int lane) {
  return flash_mla::shuffle(value, lane % flash_mla::WarpOnCpu::kLanes);
}
template <class T>
T __shfl_up_sync(unsigned /*mask*/, T value, int delta) {
  const int lane = flash_mla::WarpOnCpu::lane();
  return flash_mla::shuffle(value, lane >= delta ? lane - delta : lane);
}
template <class T>
T __shfl_xor_sync(unsigned /*mask*/, T value, int bits) {
  return flash_mla::shuffle(value, flash_mla::WarpOnCpu::lane() ^ bits);
}
inline bool __all_sync(unsigned /*mask*/, bool is_true) {
  const auto& values = flash_mla::WarpOnCpu::exchange(flash_mla::WarpOnCpu::Function::kAll, is_true ? 1 : 0);
  return std::all_of(values.begin(), values.end(), [](std::uint64_t value) { return value != 0; });
}
inline bool __any_sync(unsigned /*mask*/, bool is_true) {
  const auto& values = flash_mla::WarpOnCpu::exchange(flash_mla::WarpOnCpu::Function::kAny, is_true ? 1 : 0);
  return std::any_of(values.begin(), values.end(), [](std::uint64_t value) { return value != 0; });
}
inline unsigned __ballot_sync(unsigned /*mask*/, bool is_true) {
  const auto& values = flash_mla::WarpOnCpu::exchange(flash_mla::WarpOnCpu::Function::kBallot, is_true ? 1 : 0);
  unsigned lanes = 0;
  for (int i = 0; i < flash_mla::WarpOnCpu::kLanes; ++i) lanes |= static_cast<unsigned>(values[i]) << i;
  return lanes;
}
inline unsigned __reduce_add_sync(unsigned /*mask*/, unsigned value) {
  unsigned sum = 0;
  for (const std::uint64_t of_lane : flash_mla::WarpOnCpu::exchange(flash_mla::WarpOnCpu::Function::kAdd, value)) {
    sum += static_cast<unsigned>(of_lane);
  }
  return sum;
}
inline int __reduce_max_sync(unsigned /*mask*/, int value) {
  int most = value;
  const auto bits = static_cast<std::uint64_t>(static_cast<std::int64_t>(value));
  for (const std::uint64_t of_lane : flash_mla::WarpOnCpu::exchange(flash_mla::WarpOnCpu::Function::kMax, bits)) {
    most = max(most, static_cast<int>(of_lane));
  }
  return most;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
