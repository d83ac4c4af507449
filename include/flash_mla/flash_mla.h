#pragma once

// Multi-head latent attention (MLA) on NVIDIA Hopper: the umbrella header.

#include "flash_mla/dense_decode.h"  // IWYU pragma: export
#include "flash_mla/error.h"         // IWYU pragma: export
#include "flash_mla/merge_states.h"  // IWYU pragma: export
#include "flash_mla/plan.h"          // IWYU pragma: export
#include "flash_mla/tensor.h"        // IWYU pragma: export
