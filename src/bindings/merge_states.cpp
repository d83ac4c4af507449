#include "flash_mla/merge_states.h"

#include <cstdint>
#include <string>
#include <vector>

#include "bindings/dlpack.h"
#include "bindings/register.h"
#include "flash_mla/error.h"

namespace flash_mla::bindings {
namespace {

/// Arrays of the states: a list or a tuple of them, or one array that holds them along its first dimension.
class States {
 public:
  /// @param rank  of one state's array
  States(const char* name, nb::handle arrays, int rank) {
    if (nb::isinstance<nb::list>(arrays) || nb::isinstance<nb::tuple>(arrays)) {
      for (const nb::handle array : arrays) {
        const std::string element = std::string(name) + "[" + std::to_string(views_.size()) + "]";
        views_.emplace_back(element.c_str(), array);
        tensors_.push_back(views_.back().tensor());
      }
    } else {
      const Tensor& stacked = views_.emplace_back(name, arrays).tensor();
      if (stacked.rank != rank + 1) {
        throw InvalidArgument(std::string(name) + ": expected " + std::to_string(rank + 1) +
                              " dimensions, the first over states, got " + std::to_string(stacked.rank));
      }
      check_count(name, stacked.shape[0]);
      tensors_ = unstack(stacked);
    }
    check_count(name, static_cast<std::int64_t>(tensors_.size()));
  }

  const Tensor* data() const { return tensors_.data(); }
  std::int64_t size() const { return static_cast<std::int64_t>(tensors_.size()); }
  CUstream_st* current_stream(nb::handle stream) const { return views_[0].current_stream(stream); }

 private:
  static void check_count(const char* name, std::int64_t count) {
    if (count >= 1 && count <= kMaxMergeStates) return;
    throw InvalidArgument(std::string(name) + ": expected 1 to " + std::to_string(kMaxMergeStates) + " states, got " +
                          std::to_string(count));
  }

  std::vector<ArrayView> views_;
  std::vector<Tensor> tensors_;
};

void merge(nb::handle outs, nb::handle lses, nb::handle out, nb::handle lse, nb::handle stream) {
  constexpr int kOutRank = 4;
  constexpr int kLseRank = 3;
  const States state_outs("outs", outs, kOutRank);
  const States state_lses("lses", lses, kLseRank);
  if (state_lses.size() != state_outs.size()) {
    throw InvalidArgument("lses: expected " + std::to_string(state_outs.size()) + " states as outs, got " +
                          std::to_string(state_lses.size()));
  }
  const ArrayView out_view("out", out, Access::kWrite);
  const ArrayView lse_view("lse", lse, Access::kWrite);
  const MergeStatesArguments args{state_outs.data(), state_lses.data(), state_outs.size(), out_view.tensor(),
                                  lse_view.tensor()};
  CUstream_st* const cuda_stream = state_outs.current_stream(stream);
  const nb::gil_scoped_release no_gil;
  merge_states(args, cuda_stream);
}

}  // namespace

void register_merge_states(nb::module_& m) {
  using namespace nb::literals;
  m.def("merge_states", merge, "outs"_a.none(), "lses"_a.none(), "out"_a.none(), "lse"_a.none(),
        "stream"_a = nb::none(),
        "Merges states into out and lse. `outs` and `lses` are lists of arrays, or arrays that hold all states.");
}

}  // namespace flash_mla::bindings
