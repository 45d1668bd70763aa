// The backward of the whole block of a sample in one kernel, up to the gradients of the weights, which are sums over
// the batch.
#include "cluster.cuh"

namespace se_ext::cuda {
namespace {

template <class T>
using Sum = SumRescaleBackward<T, Any>;
template <class T>
using Write = WriteRescaleBackward<T, Any>;

// Rows, columns and every share of them are multiples of kSide.
bool is_whole(const ClusterLayout& layout, const Layer& l) {
  return l.rows % kSide == 0 && l.columns % kSide == 0 && layout.unit % kSide == 0;
}

}  // namespace

bool backward_can_launch(const ClusterTask& task, Cluster cluster) {
  return with_type(task.dtype,
                   [&]<class T>(T) { return can_launch_cluster<Sum<T>, Write<T>, ExciteBackward<T>>(task, cluster); });
}

cudaError_t write_backward_by_cluster(const Batch& batch, Cluster cluster, const ClusterExcitationBackward& e,
                                      const RescaleBackward& m) {
  const ClusterTask task{ClusterOp::Backward, batch.dtype, batch.slab, e.first.rows, m.saved ? 3 : 2};
  const bool whole = is_whole(ClusterLayout::of(task, cluster), e.first);
  return with_type(batch.dtype, [&]<class T>(T) {
    using A = acc_t<T>;
    const ExciteBackward<T> excite{
        {e.first.weight, e.second.weight, e.first.columns, e.first.rows, e.first.type != batch.dtype},
        whole,
        e.first.activation,
        e.second.activation,
        static_cast<A>(batch.slab.points),
        static_cast<const A*>(e.hidden),
        static_cast<const A*>(m.scale),
        static_cast<A*>(e.grad_t),
        static_cast<A*>(e.activated),
        static_cast<A*>(e.grad_hidden)};
    const Gradient<T, Any> maps{static_cast<const T*>(m.grad), static_cast<const T*>(m.x),
                                static_cast<const T*>(m.saved), Any(m.post), slope_from_output(m.post)};
    const Sum<T> sum{maps, nullptr, batch.slab.channels};
    const Write<T> write{maps,
                         nullptr,
                         nullptr,
                         static_cast<T*>(m.grad_x),
                         static_cast<T*>(m.grad_residual),
                         batch.slab.channels,
                         batch.streaming};
    return launch_cluster(batch, task, cluster, 1, sum, write, excite);
  });
}

}  // namespace se_ext::cuda
