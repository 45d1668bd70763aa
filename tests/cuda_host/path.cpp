// For Python, which reaches this library through ctypes.
#include "../../csrc/cuda/plan.h"
#include "../../csrc/cuda/tiling.h"
#include "../../csrc/info.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void cuda_host_set_path(const char* path) {
  se_ext::set_cuda_path(path);
}

EXPORTED const char* cuda_host_last_path() {
  static thread_local std::string path;
  path = se_ext::last_cuda_path();
  return path.c_str();
}

namespace {

// The plain block: inference, or its backward.
se_ext::cuda::Work work_of(bool backward, bool is_half, bool is_last, long channels, long points, long samples,
                           long hidden) {
  using namespace se_ext;
  const DType type = is_half ? DType::BFloat16 : DType::Float32;
  const Slab slab{channels, points, is_last ? Layout::ChannelsLast : Layout::ChannelsFirst};
  const long weight_bytes = 2 * channels * hidden * (is_half ? 2 : 4);
  const auto op = backward ? cuda::ClusterOp::Backward : cuda::ClusterOp::Forward;
  return {type, slab, samples, backward ? 2 : 1, 1, hidden, weight_bytes, op, true};
}

}  // namespace

// The threads of a block that sum its share of a channels_last slab, the share being `columns` accesses wide.
EXPORTED int cuda_host_threads_that_sum(bool is_half, long channels, long points, long columns) {
  using namespace se_ext::cuda;
  const Tiling tiling = Tiling::of(work_of(false, is_half, true, channels, points, 1, 1).slab,
                                   is_half ? se_ext::DType::BFloat16 : se_ext::DType::Float32);
  const BandLayout layout = BandLayout::of_share(tiling, columns);
  return layout.width * layout.tiles * tiling.rows;
}

// The path that it would take: 0 cluster, 1 chunked, 2 whole.
EXPORTED int cuda_host_plan(bool backward, bool is_half, bool is_last, long channels, long points, long samples,
                            long hidden) {
  using namespace se_ext::cuda;
  const Work work = work_of(backward, is_half, is_last, channels, points, samples, hidden);
  return static_cast<int>(Plan::of(work, current_device()).path);
}

// Of the cluster that it would take: its blocks, the lines of a share that each keeps, and all of them.
EXPORTED void cuda_host_cluster(bool backward, bool is_half, bool is_last, long channels, long points, long samples,
                                long hidden, long* of_cluster) {
  using namespace se_ext::cuda;
  const Work work = work_of(backward, is_half, is_last, channels, points, samples, hidden);
  const Cluster cluster = Plan::of(work, current_device()).cluster;
  const ClusterTask task{*work.cluster_op, work.dtype, work.slab, work.hidden_channels, work.maps_read_twice};
  of_cluster[0] = cluster.blocks;
  of_cluster[1] = cluster.kept;
  of_cluster[2] = cluster.blocks > 0 ? ClusterLayout::of(task, cluster).lines : 0;
}

// The µs that the plan expects of each path, in this order.
EXPORTED void cuda_host_estimate(bool backward, bool is_half, bool is_last, long channels, long points, long samples,
                                 long hidden, double* us) {
  using namespace se_ext::cuda;
  const Work work = work_of(backward, is_half, is_last, channels, points, samples, hidden);
  const Estimate e = Estimate::of(work, current_device());
  us[0] = e.cluster_us;
  us[1] = e.chunked_us;
  us[2] = e.whole_us;
}
