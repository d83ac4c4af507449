#pragma once

namespace flash_mla::sm90 {

/// Where a CTA's part of the work comes from. Code is in the way of other code even where it does not run, so each has
/// an instantiation of the decode kernels, without what only the others need: docs/kernels/dense_decode.md, "Two
/// pieces, and code in the way".
enum class PlanSource {
  kGiven,        // a plan in global memory
  kLoneRequest,  // made by the kernel, for one request
  kBatch,        // made by the kernel, for several
};

/// Whether a CTA may keep its piece and merge all: SplitRequest::first_merges_all.
template <PlanSource kPlanSource>
constexpr bool kMayKeepPiece = kPlanSource == PlanSource::kGiven;

}  // namespace flash_mla::sm90
