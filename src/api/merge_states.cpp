#include "flash_mla/merge_states.h"

#include "api/check_merge_states.h"
#include "combine/merge_states.h"
#include "cpu/merge_states.h"
#include "cuda/device.h"

namespace flash_mla {

void merge_states(const MergeStatesArguments& args, CUstream_st* stream) {
  const MergeStatesShape shape = check_merge_states(args);
  if (shape.num_rows() == 0) return;
  if (args.out.device.type == DeviceType::kCpu) {
    cpu::merge_states(args, shape);
    return;
  }
  cuda::require_hopper(args.out.device.index);
  const cuda::DeviceGuard guard(args.out.device.index);
  combine::launch_merge_states(args, shape, stream);
}

}  // namespace flash_mla
