// Instantiates every kernel for one instruction set. Included by baseline.cpp, avx2.cpp and avx512.cpp alone, each of
// which setup.py compiles with that set's flags.
#pragma once

#include "dense.h"
#include "kernels.h"
#include "map.h"
#include "normalization.h"
#include "prologue.h"

namespace se_ext::cpu::SE_EXT_ISA {

template <class T>
constexpr MapKernels map_kernels() {
  return {squeeze<T>, rescale<T>, rescale_backward_reduce<T>, rescale_backward_apply<T>};
}

template <class T>
constexpr PrologueKernels prologue_kernels() {
  return {moments<T>,          finish_moments<T>,         prologue_squeeze<T>,
          prologue_rescale<T>, prologue_backward_sums<T>, prologue_backward_apply<T>};
}

template <class T>
constexpr DenseKernels dense_kernels() {
  return {matvec<T>, vecmat<T>, outer<T>, sum_samples<T>};
}

template <class A>
constexpr VectorKernels vector_kernels() {
  return {add_rows<A>, divide<A>, activation_forward<A>, activation_backward<A>};
}

template <class A>
constexpr NormKernels norm_kernels() {
  return {batch_statistics<A>, coefficients<A>,      squeeze_from_mean<A>,      product<A>,
          scale_gradient<A>,   sums_behind_scale<A>, sums_behind_activation<A>, backward_coefficients<A>,
          offset_of_sample<A>};
}

const KernelTable& table() {
  // In the order of DType.
  static constexpr KernelTable kTable = {
      {map_kernels<float>(), map_kernels<double>(), map_kernels<bfloat16>(), map_kernels<float16>()},
      {prologue_kernels<float>(), prologue_kernels<double>(), prologue_kernels<bfloat16>(),
       prologue_kernels<float16>()},
      {dense_kernels<float>(), dense_kernels<double>(), dense_kernels<bfloat16>(), dense_kernels<float16>()},
      vector_kernels<float>(),
      vector_kernels<double>(),
      norm_kernels<float>(),
      norm_kernels<double>(),
  };
  return kTable;
}

}  // namespace se_ext::cpu::SE_EXT_ISA
