#include "sm90/ceilings/ceilings.h"

#include <cstdint>

#include "bindings/dlpack.h"
#include "bindings/register.h"

namespace flash_mla::bindings {
namespace {

std::int64_t launch_hbm_read(nb::handle buffer, nb::handle stream) {
  const ArrayView view("buffer", buffer);
  return sm90::launch_hbm_read(view.tensor(), view.current_stream(stream));
}

double launch_mma_mix(nb::handle operands, nb::handle sink, std::int64_t iterations, nb::handle stream) {
  const ArrayView operands_view("operands", operands);
  const ArrayView sink_view("sink", sink, Access::kWrite);
  return sm90::launch_mma_mix(operands_view.tensor(), sink_view.tensor(), iterations,
                              operands_view.current_stream(stream));
}

}  // namespace

void register_ceilings(nb::module_& m) {
  using namespace nb::literals;
  m.def("launch_hbm_read", launch_hbm_read, "buffer"_a.none(), "stream"_a = nb::none(),
        "Reads an array of one dimension once, by bulk copies into shared memory; bytes read.");
  m.def("launch_mma_mix", launch_mma_mix, "operands"_a.none(), "sink"_a.none(), "iterations"_a, "stream"_a = nb::none(),
        "Runs the MMAs of decoding without its loads, `iterations` times on each SM; floating-point operations done.");
}

}  // namespace flash_mla::bindings
