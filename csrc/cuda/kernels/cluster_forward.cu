// The whole block of a sample in one kernel: squeeze, excitation, rescale.
#include "cluster.cuh"
#include "prologue.cuh"

namespace se_ext::cuda {
namespace {

template <class T>
using Plain = WriteRescale<T, Any>;
template <class T>
using BehindPrologue = WritePrologueRescale<T, Any, Any>;

RowPlan row_plan(const Layer& l) {
  const DotPlan plan(l.columns, l.type);
  return {l.bias, plan.access, plan.lanes, l.activation};
}

}  // namespace

bool forward_can_launch(const ClusterTask& task, Cluster cluster) {
  return with_type(task.dtype, [&]<class T>(T) {
    return task.op == ClusterOp::Forward
               ? can_launch_cluster<SumInput<T>, Plain<T>, ExciteForward<T>>(task, cluster)
               : can_launch_cluster<SumPrologue<T>, BehindPrologue<T>, ExciteForward<T>>(task, cluster);
  });
}

cudaError_t write_by_cluster(const Batch& batch, Cluster cluster, const ClusterExcitation& e, const RescaleMaps& m,
                             const Prologue* prologue, const void* drop) {
  const ClusterTask task{prologue ? ClusterOp::ForwardBehindPrologue : ClusterOp::Forward, batch.dtype, batch.slab,
                         e.first.rows, 1};
  const auto points = static_cast<double>(batch.slab.points);
  return with_type(batch.dtype, [&]<class T>(T) {
    using A = acc_t<T>;
    const T* x = static_cast<const T*>(m.x);
    const ExciteForward<T> excite{
        {e.first.weight, e.second.weight, e.first.columns, e.first.rows, e.first.type != batch.dtype},
        row_plan(e.first),
        row_plan(e.second),
        static_cast<A*>(e.z),
        static_cast<A*>(e.hidden),
        static_cast<A*>(e.scale)};
    if (prologue) {
      const SumPrologue<T> sum{
          {x}, static_cast<const A*>(prologue->a), static_cast<const A*>(prologue->b), Any(prologue->pre)};
      const auto write = make_rescale<T>(batch, *prologue, drop, m, Any(prologue->pre), Any(m.post));
      return launch_cluster(batch, task, cluster, points, sum, write, excite);
    }
    const Plain<T> write{x,
                         nullptr,
                         static_cast<const T*>(m.residual),
                         static_cast<T*>(m.y),
                         Any(m.post),
                         batch.slab.channels,
                         batch.streaming};
    return launch_cluster(batch, task, cluster, points, SumInput<T>{x}, write, excite);
  });
}

}  // namespace se_ext::cuda
