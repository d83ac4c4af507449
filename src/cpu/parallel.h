#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace flash_mla::cpu {

/// FLASH_MLA_NUM_THREADS if set, else the number of cores.
/// @throws InvalidArgument where it is set to something else than a whole number above 0
std::int64_t max_num_threads();

/// Works on items 0 to num_items - 1, in any order, on up to max_num_threads() threads, this one among them. Each
/// thread calls make_worker() once and hands its items to the worker so made, which may keep scratch memory between
/// them. If one throws, the items not yet begun are left out and the first exception is thrown on.
template <class MakeWorker>
void parallel_for(std::int64_t num_items, const MakeWorker& make_worker) {
  std::atomic<std::int64_t> next_item{0};
  std::exception_ptr first_error;
  std::mutex error_mutex;
  const auto run = [&] {
    try {
      auto worker = make_worker();
      for (std::int64_t item; (item = next_item.fetch_add(1)) < num_items;) worker(item);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!first_error) first_error = std::current_exception();
      next_item = num_items;
    }
  };

  const std::int64_t num_others = std::min(num_items, max_num_threads()) - 1;
  std::vector<std::thread> others;
  if (num_others > 0) others.reserve(static_cast<std::size_t>(num_others));
  try {
    for (std::int64_t i = 0; i < num_others; ++i) others.emplace_back(run);
  } catch (const std::exception&) {
    // The system gives no more threads: those that run share the work.
  }
  run();
  for (std::thread& thread : others) thread.join();
  if (first_error) std::rethrow_exception(first_error);
}

}  // namespace flash_mla::cpu
