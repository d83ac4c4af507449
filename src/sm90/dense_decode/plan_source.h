#pragma once

namespace flash_mla::sm90 {

/// Where a CTA's part of the work comes from. Code is in the way of other code even where it does not run, so there is
/// an instantiation of the decode kernels for each, without what only the others need: docs/kernels/dense_decode.md,
/// "Three kernels".
enum class PlanSource {
  kGiven,        // a plan of several requests, in global memory
  kLoneRequest,  // made by the kernel, for a request that is alone
  kBatch,        // made by the kernel, for several
};

/// Whether a CTA may keep its piece, and merge all: SplitRequest::first_merges_all. Plans made here have no such
/// pieces.
template <PlanSource kPlanSource>
constexpr bool kMayKeepPiece = kPlanSource == PlanSource::kGiven;

}  // namespace flash_mla::sm90
