// Serves a few dozen requests with continuous batching and checks a sample of the results.
//   cpp_server         on the first Hopper GPU, or on the CPU where there is none
//   cpp_server --cpu   on the CPU

#include <chrono>
#include <cstdlib>
#include <deque>
#include <exception>
#include <iostream>
#include <memory>
#include <random>
#include <string>

#include "server.h"

namespace {

constexpr int kNumRequests = 40;

/// Requests of 1 to 250 prompt tokens that want 1 to 60 more, arriving in bursts.
std::deque<server::Request> make_requests() {
  std::mt19937 random(1);
  const auto up_to = [&random](int high) { return 1 + static_cast<int>(random() % static_cast<unsigned>(high)); };
  std::deque<server::Request> requests;
  int step = 0;
  for (int id = 0; id < kNumRequests; ++id) {
    if (id % 8 == 0) step += up_to(40);
    requests.push_back({id, step, up_to(250), up_to(60), 0, {}});
  }
  return requests;
}

bool serve(bool cpu_only) {
  std::unique_ptr<server::Runtime> runtime = cpu_only ? nullptr : server::make_cuda_runtime();
  if (runtime == nullptr) runtime = server::make_cpu_runtime();
  server::Server server(*runtime);
  const auto begin = std::chrono::steady_clock::now();
  const server::Statistics done = server.serve(make_requests());
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;

  const bool on_gpu = runtime->device().type == flash_mla::DeviceType::kCuda;
  std::cout << done.num_served << " requests served on the " << (on_gpu ? "GPU" : "CPU") << ": " << done.num_tokens
            << " tokens in " << done.num_steps << " steps, " << seconds.count()
            << " s with the checks\nsteps by batch size:";
  for (const auto& [size, steps] : done.steps_of_size) std::cout << "  " << size << ": " << steps;
  std::cout << "\n" << done.num_checked << " layers of sampled tokens checked, " << done.num_wrong << " wrong\n";
  return done.num_served == kNumRequests && done.num_wrong == 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string option = argc > 1 ? argv[1] : "";
  if (argc > 2 || (!option.empty() && option != "--cpu")) {
    std::cerr << "usage: cpp_server [--cpu]\n";
    return 2;
  }
  try {
    return serve(option == "--cpu") ? EXIT_SUCCESS : EXIT_FAILURE;
  } catch (const std::exception& error) {
    std::cerr << "cpp_server: " << error.what() << "\n";
    return EXIT_FAILURE;
  }
}
