// The tiles of the wgmma kernels: what a CTA computes of y^T = W @ x^T, and beside which others.
#pragma once

#include "../linear_24_kernels.h"

namespace wanda_ext {
namespace cuda {

// A CTA's two consumer warpgroups each work on a tile of their own and take turns on the tensor
// cores and the epilogue (kPingpong), or share one (kCooperative).
enum class WgmmaSchedule { kPingpong, kCooperative };

// kN rows of W times kM tokens. Of the CTAs in a cluster, the kClusterN along n read the same
// tokens and the kClusterM along m the same weights, which the cluster fetches once.
template <int kN_, int kM_, int kClusterN_, int kClusterM_, WgmmaSchedule kSchedule_>
struct WgmmaTile {
  static constexpr int kN = kN_, kM = kM_;
  static constexpr int kClusterN = kClusterN_, kClusterM = kClusterM_;
  static constexpr WgmmaSchedule kSchedule = kSchedule_;
};
using Wgmma64x64 = WgmmaTile<64, 64, 1, 1, WgmmaSchedule::kPingpong>;
using Wgmma64x128 = WgmmaTile<64, 128, 2, 1, WgmmaSchedule::kPingpong>;
using Wgmma128x128 = WgmmaTile<128, 128, 2, 1, WgmmaSchedule::kCooperative>;
using Wgmma128x256 = WgmmaTile<128, 256, 2, 1, WgmmaSchedule::kCooperative>;
// As large, but less to fetch, where clusters of four fill the device.
using Wgmma256x128c4 = WgmmaTile<256, 128, 2, 2, WgmmaSchedule::kCooperative>;
using Wgmma128x256c4 = WgmmaTile<128, 256, 4, 1, WgmmaSchedule::kCooperative>;

// A Linear24Kernel::run, for both dtypes. Instantiated in linear_24_wgmma_<tile>.cu.
template <typename Tile>
Status run_wgmma(const Linear24Problem& problem, int splits, void* workspace, cudaStream_t stream);

}  // namespace cuda
}  // namespace wanda_ext
