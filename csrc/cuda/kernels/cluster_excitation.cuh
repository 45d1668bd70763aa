// The excitation of one sample by the thread blocks of a cluster, forward and backward: each has some of the channels
// and some of the hidden channels, and gives its results to the others. Sums are taken in the order of excitation.cu.
//
// An excitation of type E has
//   E::kOp                         the kernel that it is part of
//   bind(sum, write, vectors)      lets the visitors find their vectors, of this sample alone, in shared memory
//   begin(block, vectors)          before the map is read
//   run(block, vectors)            from the sums of the map, in vectors.channels, to what the visitor that writes
//   needs.
//                                  Starts with cluster_wait(), ends with all threads of the block together; nobody
//                                  writes to another block's memory afterwards
#pragma once

#include "../cluster_layout.h"
#include "dense.cuh"

namespace se_ext::cuda {

// A block's share of `items`, given out in units.
struct Share {
  std::int64_t begin, end;
  SE_EXT_HOST_DEVICE Share(std::int64_t items, std::int64_t unit, int rank, int ranks)
      : begin(items / unit * rank / ranks * unit),
        end(rank + 1 == ranks ? items : items / unit * (rank + 1) / ranks * unit) {}
};

// A thread block of the cluster that works on a sample.
struct Member {
  std::int64_t sample;
  int rank, ranks;
  Share channels, hidden;
};

// In the block's shared memory: all channels but of the second one, of which a block has its own.
template <class A>
struct MemberVectors {
  A *channels, *second_channels, *hidden, *scratch;
};

// Gives this block's share of a vector to the other blocks, which keep the vector at the same place. Stores to their
// memory wait for nothing; loads from it would, one block after another. The block's i-th item is its i-th thread's.
template <class A>
SE_EXT_DEVICE void push(A* vector, Share share, const Member& block) {
  for (std::int64_t i = share.begin + threadIdx.x; i < share.end; i += kThreads) {
    const A value = vector[i];
    for (int r = 0; r < block.ranks; ++r) {
      if (r != block.rank) *shared_of_rank(vector + i, r) = value;
    }
  }
}

// Asks for these rows of a matrix.
SE_EXT_DEVICE void prefetch_rows(const void* weight, std::int64_t row_bytes, Share rows) {
  constexpr std::int64_t kLine = 128;
  const char* bytes = static_cast<const char*>(weight);
  for (std::int64_t i = rows.begin * row_bytes + threadIdx.x * kLine; i < rows.end * row_bytes; i += kThreads * kLine) {
    prefetch(bytes + i);
  }
}

// Both matrices. Those beside half-typed maps may be wide: in the accumulation type.
template <class T>
struct Weights {
  using A = acc_t<T>;
  const void *first, *second;  // [M, C], [C, M]
  std::int64_t channels, hidden_channels;
  bool are_wide;

  SE_EXT_DEVICE void prefetch(const Member& block) const {
    const std::int64_t bytes = are_wide ? sizeof(A) : sizeof(T);
    prefetch_rows(first, channels * bytes, block.hidden);
    prefetch_rows(second, hidden_channels * bytes, block.channels);
  }

  // f(weight) with their type
  template <class F>
  SE_EXT_DEVICE void typed(const void* weight, const F& f) const {
    if constexpr (kIsHalf<T>) {
      if (are_wide) {
        f(static_cast<const A*>(weight));
        return;
      }
    }
    f(static_cast<const T*>(weight));
  }
};

// ---- forward ----

struct RowPlan {
  const void* bias;
  int access, lanes;
  Activation activation;
};

// Rows of a layer for one vector: put(row, hidden, activated) once per row.
template <int n, class W, class A, class Put>
SE_EXT_DEVICE void layer_rows(const W* weight, const RowPlan& plan, const A* vector, std::int64_t columns, Share rows,
                              const Put& put) {
  const W* bias = static_cast<const W*>(plan.bias);
  const int thread = static_cast<int>(threadIdx.x);
  for (std::int64_t start = rows.begin; start < rows.end; start += kThreads / plan.lanes) {
    const std::int64_t mine = start + thread / plan.lanes;
    const std::int64_t row = mine < rows.end ? mine : rows.end - 1;
    const A sum = dot<n, 1>(weight + row * columns, vector, 0, columns, plan.lanes)[0];
    if (mine < rows.end && (thread & (plan.lanes - 1)) == 0) {
      const A value = sum + (bias ? load<1>(bias + row)[0] : A(0));
      put(row, value, activate_one(plan.activation, value));
    }
  }
}

// vectors.channels: z, then the scale.
template <class T>
struct ExciteForward {
  using A = acc_t<T>;
  static constexpr ClusterOp kOp = ClusterOp::Forward;
  Weights<T> weights;
  RowPlan first, second;
  A *z, *hidden, *scale;  // in global memory; null: not wanted

  template <class Sum, class Write>
  SE_EXT_DEVICE void bind(Sum&, Write& write, const MemberVectors<A>& v) const {
    write.scale = v.channels;
    write.channels = 0;
  }

  SE_EXT_DEVICE void begin(const Member& block, const MemberVectors<A>&) const { weights.prefetch(block); }

  SE_EXT_DEVICE void run(const Member& block, const MemberVectors<A>& v) const {
    const std::int64_t C = weights.channels, M = weights.hidden_channels;
    cluster_wait();  // all blocks have begun: their memory may be written to
    push(v.channels, block.channels, block);
    cluster_barrier();
    layer(weights.first, first, v.channels, C, block.hidden, [&](std::int64_t row, A before, A after) {
      v.hidden[row] = after;
      if (hidden) hidden[block.sample * M + row] = before;
    });
    if (z) {
      for (std::int64_t c = block.channels.begin + threadIdx.x; c < block.channels.end; c += kThreads) {
        z[block.sample * C + c] = v.channels[c];
      }
    }
    __syncthreads();
    push(v.hidden, block.hidden, block);
    cluster_barrier();
    layer(weights.second, second, v.hidden, M, block.channels, [&](std::int64_t row, A, A after) {
      v.channels[row] = after;
      if (scale) scale[block.sample * C + row] = after;
    });
    __syncthreads();
  }

 private:
  template <class Put>
  SE_EXT_DEVICE void layer(const void* weight, const RowPlan& plan, const A* vector, std::int64_t columns, Share rows,
                           const Put& put) const {
    weights.typed(weight, [&]<class W>(const W* w) {
      if (plan.access == 1) {
        layer_rows<1>(w, plan, vector, columns, rows, put);
      } else {
        layer_rows<kFull<W>>(w, plan, vector, columns, rows, put);
      }
    });
  }
};

// ---- backward ----

// Columns of a product with a transposed weight, for one vector: put(column, sum) once per column. Each thread sums a
// piece of kSide columns; `partial` has room for all pieces of the share. Starts with all threads together; put is
// called by the thread that push() lets have the column.
template <bool whole, class W, class A, class Put>
SE_EXT_DEVICE void product_columns(const W* weight, const A* vector, std::int64_t rows, std::int64_t columns,
                                   Share share, A* partial, const Put& put) {
  const int sides = static_cast<int>((share.end - share.begin + kSide - 1) / kSide), wide = sides * kSide;
  const int pieces = static_cast<int>((rows + kPieceRows - 1) / kPieceRows);
  const Lanes<const A*, 1> vectors{{vector}};
  for (int i = static_cast<int>(threadIdx.x); i < pieces * sides; i += kThreads) {
    const int piece = i / sides, first = (i - piece * sides) * kSide;
    const auto sums = sum_piece<whole, kPieceRows>(weight, rows, columns, piece * std::int64_t{kPieceRows},
                                                   share.begin + first, vectors);
    store(partial + piece * wide + first, sums[0]);
  }
  __syncthreads();
  // A group's sum takes the place of its first piece.
  const int groups = piece_groups(rows);
  for (int i = static_cast<int>(threadIdx.x); i < groups * wide; i += kThreads) {
    A sum(0);
    for (int at = i; at < pieces * wide; at += kPieceGroups * wide) sum += partial[at];
    partial[i] = sum;
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); share.begin + i < share.end; i += kThreads) {
    A sum = groups > 0 ? partial[i] : A(0);
    for (int k = 1; k < groups; ++k) sum += partial[k * wide + i];
    put(share.begin + i, sum);
  }
}

// vectors.channels: the gradient of the scale, that before the gate, and the gradient of the mean / points;
// vectors.second_channels: the scale; vectors.hidden: the gradient before the activation.
template <class T>
struct ExciteBackward {
  using A = acc_t<T>;
  static constexpr ClusterOp kOp = ClusterOp::Backward;
  Weights<T> weights;
  bool whole;  // rows, columns and shares of both weights are multiples of kSide
  Activation activation, gate;
  A points;
  const A *hidden, *scale;              // in global memory, as all below
  A *grad_t, *activated, *grad_hidden;  // what the gradients of the weights need

  template <class Sum, class Write>
  SE_EXT_DEVICE void bind(Sum& sum, Write& write, const MemberVectors<A>& v) const {
    sum.scale = write.scale = v.second_channels;
    sum.channels = write.channels = 0;
    write.grad_mean = v.channels;
  }

  SE_EXT_DEVICE void begin(const Member& block, const MemberVectors<A>& v) const {
    weights.prefetch(block);
    for (std::int64_t c = block.channels.begin + threadIdx.x; c < block.channels.end; c += kThreads) {
      v.second_channels[c] = scale[block.sample * weights.channels + c];
    }
    __syncthreads();
  }

  SE_EXT_DEVICE void run(const Member& block, const MemberVectors<A>& v) const {
    const std::int64_t C = weights.channels, M = weights.hidden_channels;
    for (std::int64_t c = block.channels.begin + threadIdx.x; c < block.channels.end; c += kThreads) {
      const A s = v.second_channels[c], grad = gradient_one(gate, v.channels[c], s, s);
      v.channels[c] = grad_t[block.sample * C + c] = grad;
    }
    cluster_wait();  // all blocks have begun: their memory may be written to
    push(v.channels, block.channels, block);
    cluster_barrier();
    product(weights.second, v.channels, C, M, block.hidden, v.scratch, [&](std::int64_t m, A sum) {
      const std::int64_t at = block.sample * M + m;
      const A before = hidden[at], after = activate_one(activation, before);
      activated[at] = after;
      v.hidden[m] = grad_hidden[at] = gradient_one(activation, sum, before, after);
    });
    push(v.hidden, block.hidden, block);
    cluster_barrier();
    product(weights.first, v.hidden, M, C, block.channels, v.scratch,
            [&](std::int64_t c, A sum) { v.channels[c] = sum / points; });
    __syncthreads();
  }

 private:
  template <class Put>
  SE_EXT_DEVICE void product(const void* weight, const A* vector, std::int64_t rows, std::int64_t columns, Share share,
                             A* partial, const Put& put) const {
    weights.typed(weight, [&](const auto* w) {
      if (whole) {
        product_columns<true>(w, vector, rows, columns, share, partial, put);
      } else {
        product_columns<false>(w, vector, rows, columns, share, partial, put);
      }
    });
  }
};

}  // namespace se_ext::cuda
