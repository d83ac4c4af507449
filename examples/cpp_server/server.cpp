#include "server.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <utility>

namespace server {

using flash_mla::kHeadDimQk;
using model::kNumLayers;

Server::Server(Runtime& runtime) : step_(runtime), free_pages_(kNumPages) {
  std::iota(free_pages_.begin(), free_pages_.end(), 0);
}

Statistics Server::serve(std::deque<Request> requests) {
  waiting_ = std::move(requests);
  statistics_ = {};
  for (; !waiting_.empty() || !running_.empty(); ++statistics_.num_steps) {
    admit();
    if (running_.empty()) continue;
    write_inputs();
    const int padded_size = step_.run(static_cast<int>(running_.size()));
    ++statistics_.steps_of_size[padded_size];
    statistics_.num_tokens += static_cast<int>(running_.size());
    check_sample(padded_size);
    retire();
  }
  if (free_pages_.size() != kNumPages) throw std::logic_error("pages were lost");
  return statistics_;
}

/// Lets those in that have arrived, while there is a row for one more, and pages for all that it can grow to.
void Server::admit() {
  while (!waiting_.empty() && running_.size() < kMaxBatch) {
    Request& next = waiting_.front();
    const int num_pages = (next.num_prompt + next.num_wanted + kPageSize - 1) / kPageSize;
    if (num_pages > kMaxPages) throw std::invalid_argument("a request is longer than its row of the block table");
    if (next.arrives_at_step > statistics_.num_steps || num_pages > static_cast<int>(free_pages_.size())) return;
    next.pages.assign(free_pages_.end() - num_pages, free_pages_.end());
    free_pages_.resize(free_pages_.size() - num_pages);
    prefill(next);
    next.num_cached = next.num_prompt;
    running_.push_back(std::move(next));
    waiting_.pop_front();
  }
}

/// Puts a prompt's latents into the cache, page by page.
void Server::prefill(const Request& request) {
  std::vector<std::uint16_t> latents(std::size_t{kPageSize} * kHeadDimQk);
  for (int begin = 0; begin < request.num_prompt; begin += kPageSize) {
    const int count = std::min(kPageSize, request.num_prompt - begin);
    for (int layer = 0; layer < kNumLayers; ++layer) {
      for (int i = 0; i < count; ++i) {
        model::write_latent({request.id, layer, begin + i}, &latents[std::size_t(i) * kHeadDimQk]);
      }
      step_.write_latents(layer, request.pages[begin / kPageSize], 0, latents.data(), count);
    }
  }
}

/// The new token of each request: its latents go into the cache, its queries and its request's pages into the batch.
void Server::write_inputs() {
  std::vector<std::uint16_t> latent(kHeadDimQk);
  for (int row = 0; row < static_cast<int>(running_.size()); ++row) {
    Request& request = running_[row];
    const int position = request.num_cached++;
    for (int layer = 0; layer < kNumLayers; ++layer) {
      model::write_latent({request.id, layer, position}, latent.data());
      step_.write_latents(layer, request.pages[position / kPageSize], position % kPageSize, latent.data(), 1);
      model::write_query({request.id, layer, position}, step_.q.host(layer * kMaxBatch + row));
    }
    std::copy(request.pages.begin(), request.pages.end(), step_.block_table.host(row));
    *step_.cache_seqlens.host(row) = request.num_cached;
  }
}

/// Holds one request's token against the reference, another request each step. Padding gives 0 and +inf.
void Server::check_sample(int padded_size) {
  const int batch_size = static_cast<int>(running_.size());
  const int sample = statistics_.num_steps % batch_size;
  for (int layer = 0; layer < kNumLayers; ++layer) {
    const int row = layer * kMaxBatch;
    const model::Place place{running_[sample].id, layer, running_[sample].num_cached - 1};
    const bool is_right = model::is_attention(place, step_.out.host(row + sample), step_.lse.host(row + sample));
    const bool is_padded = std::all_of(step_.out.host(row + batch_size), step_.out.host(row + padded_size),
                                       [](std::uint16_t bits) { return (bits & 0x7fffU) == 0; }) &&
                           std::all_of(step_.lse.host(row + batch_size), step_.lse.host(row + padded_size),
                                       [](float lse) { return std::isinf(lse) && lse > 0; });
    ++statistics_.num_checked;
    statistics_.num_wrong += is_right && is_padded ? 0 : 1;
  }
}

/// Those that have all their tokens leave, and their pages are free; the rows of the others close up.
void Server::retire() {
  const auto is_done = [](const Request& r) { return r.num_cached == r.num_prompt + r.num_wanted; };
  for (const Request& request : running_) {
    if (!is_done(request)) continue;
    free_pages_.insert(free_pages_.end(), request.pages.begin(), request.pages.end());
    ++statistics_.num_served;
  }
  running_.erase(std::remove_if(running_.begin(), running_.end(), is_done), running_.end());
}

}  // namespace server
