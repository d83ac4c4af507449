#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <vector>

#include "decode_step.h"

namespace server {

/// Somebody asks: `num_prompt` tokens are given, `num_wanted` are to be generated.
struct Request {
  int id;
  int arrives_at_step;
  int num_prompt;
  int num_wanted;
  int num_cached;                   // tokens in the cache
  std::vector<std::int32_t> pages;  // that hold them, in order
};

/// What happened while serving.
struct Statistics {
  int num_steps = 0;
  int num_tokens = 0;
  int num_served = 0;
  int num_checked = 0;  // layers of sampled tokens, compared with the reference
  int num_wrong = 0;
  std::map<int, int> steps_of_size;  // by batch size, padding included
};

/// Continuous batching: in every step each running request gets one token, whatever its length; requests join as soon
/// as there is room and leave as soon as they are done.
class Server {
 public:
  explicit Server(Runtime& runtime);

  /// Serves all requests, which come in the order of their arrival.
  Statistics serve(std::deque<Request> requests);

 private:
  void admit();
  void prefill(const Request& request);
  void write_inputs();
  void check_sample(int padded_size);
  void retire();

  DecodeStep step_;
  std::vector<std::int32_t> free_pages_;
  std::deque<Request> waiting_;
  std::vector<Request> running_;  // rows of the batch
  Statistics statistics_;
};

}  // namespace server
