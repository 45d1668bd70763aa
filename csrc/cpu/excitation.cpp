#include "excitation.h"

namespace se_ext::cpu {
namespace {

at::Tensor contiguous(const OptionalTensor& t) {
  return t.has_value() ? t->contiguous() : at::Tensor();
}

const void* data(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr() : nullptr;
}

// f(offset, count) for columns [begin, end) of rows [first, first + rows): one call where they are contiguous.
template <class F>
void for_columns(std::int64_t first, std::int64_t rows, std::int64_t columns,
                 std::pair<std::int64_t, std::int64_t> part, const F& f) {
  const auto [begin, end] = part;
  if (end - begin == columns) {
    f(first * columns, rows * columns);
    return;
  }
  for (std::int64_t n = first; n < first + rows; ++n) f(n * columns + begin, end - begin);
}

}  // namespace

Excitation::Excitation(const ops::Excitation& e, const ops::Activations& activations)
    : w1_(e.w1.contiguous()),
      b1_(contiguous(e.b1)),
      w2_(e.w2.contiguous()),
      b2_(contiguous(e.b2)),
      channels_(e.w1.size(1)),
      hidden_channels_(e.w1.size(0)),
      activation_(activations.activation),
      gate_(activations.gate),
      dense_(kernels().dense[static_cast<int>(dtype_of(e.w1))]),
      vector_(e.w1.scalar_type() == at::kDouble ? kernels().vector_double : kernels().vector_float) {}

void Excitation::forward(Team team, std::int64_t first, std::int64_t samples, Pointer z, Pointer hidden, Pointer h,
                         Pointer scale) const {
  const std::int64_t C = channels_, M = hidden_channels_;
  const auto rows1 = team.share(M);
  dense_.matvec(samples, M, C, data(w1_), data(b1_), z.at(first * C), hidden.at(first * M), rows1.first, rows1.second);
  for_columns(first, samples, M, rows1, [&](std::int64_t i, std::int64_t count) {
    vector_.activation_forward(activation_, count, hidden.at(i), h.at(i));
  });
  team.barrier();
  const auto rows2 = team.share(C);
  dense_.matvec(samples, C, M, data(w2_), data(b2_), h.at(first * M), scale.at(first * C), rows2.first, rows2.second);
  for_columns(first, samples, C, rows2, [&](std::int64_t i, std::int64_t count) {
    vector_.activation_forward(gate_, count, scale.at(i), scale.at(i));
  });
  team.barrier();
}

void Excitation::activate(std::int64_t samples, Pointer hidden, Pointer h) const {
  vector_.activation_forward(activation_, samples * hidden_channels_, hidden.base, h.base);
}

void Excitation::backward(Team team, std::int64_t first, std::int64_t samples, std::int64_t points, Pointer scale,
                          Pointer hidden, Pointer h, Pointer grad, Pointer grad_hidden, Pointer grad_z) const {
  const std::int64_t C = channels_, M = hidden_channels_;
  const auto part_c = team.share(C);
  const auto part_m = team.share(M);
  for_columns(first, samples, C, part_c, [&](std::int64_t i, std::int64_t count) {
    vector_.activation_backward(gate_, count, grad.at(i), scale.at(i), grad.at(i));
  });
  team.barrier();
  dense_.vecmat(samples, C, M, data(w2_), grad.at(first * C), grad_hidden.at(first * M), part_m.first, part_m.second);
  const Pointer at = slope_from_output(activation_) ? h : hidden;
  for_columns(first, samples, M, part_m, [&](std::int64_t i, std::int64_t count) {
    vector_.activation_backward(activation_, count, grad_hidden.at(i), at.at(i), grad_hidden.at(i));
  });
  team.barrier();
  dense_.vecmat(samples, M, C, data(w1_), grad_hidden.at(first * M), grad_z.at(first * C), part_c.first, part_c.second);
  for_columns(first, samples, C, part_c,
              [&](std::int64_t i, std::int64_t count) { vector_.divide(count, points, grad_z.at(i)); });
  team.barrier();
}

void Excitation::weight_gradients(std::int64_t samples, Pointer z, Pointer h, Pointer grad_t, Pointer grad_hidden,
                                  const WeightGradients& to) const {
  const std::int64_t C = channels_, M = hidden_channels_;
  parallel(threads_for(weight_bytes() * samples), [&](Team team) {
    if (to.w1.defined()) {
      const auto [begin, end] = team.share(M);
      dense_.outer(samples, M, C, grad_hidden.base, z.base, to.w1.data_ptr(), begin, end);
    }
    if (to.w2.defined()) {
      const auto [begin, end] = team.share(C);
      dense_.outer(samples, C, M, grad_t.base, h.base, to.w2.data_ptr(), begin, end);
    }
    if (team.rank == 0) {
      if (to.b1.defined()) dense_.sum_samples(samples, M, grad_hidden.base, to.b1.data_ptr());
      if (to.b2.defined()) dense_.sum_samples(samples, C, grad_t.base, to.b2.data_ptr());
    }
  });
}

}  // namespace se_ext::cpu
