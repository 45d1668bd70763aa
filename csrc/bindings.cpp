// se_ext._C: what the library is and runs on. The ops themselves are torch ops, in libse_ext.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "info.h"

// No function needs Python's lock: they read constants, what is initialised once, files and atomics (set_cuda_path).
PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.doc() = "Build and runtime information of se_ext.";
  m.def("cpu_capability", &se_ext::cpu_capability, "The CPU instruction set in use: baseline, avx2 or avx512.");
  m.def("cpu_capabilities", &se_ext::cpu_capabilities, "The instruction sets built in that this CPU can run.");
  m.def("compiler", &se_ext::compiler, "The compiler that built the library.");
  m.def("torch_version", &se_ext::torch_version, "The torch version the library was built against.");
  m.def("cache_bytes", &se_ext::cache_bytes, pybind11::arg("level"),
        "The size of the CPU's cache of that level (2 or 3), as the schedules of the kernels assume it.");
  m.def("num_threads", &se_ext::num_threads, "The threads that the CPU kernels may use.");
  m.def("openmp_runtime", &se_ext::openmp_runtime, "The path of the OpenMP runtime that serves the CPU kernels.");
  m.def("cuda_toolkit", &se_ext::cuda_toolkit, "The CUDA toolkit that built the library; empty without CUDA.");
  m.def("cuda_architectures", &se_ext::cuda_architectures, "The GPU architectures built for; empty without CUDA.");
  m.def("set_cuda_path", &se_ext::set_cuda_path, pybind11::arg("path"),
        "Which CUDA kernels run: auto, cluster, chunked or whole; for tests and measurements.");
  m.def("cuda_path", &se_ext::cuda_path, "What set_cuda_path last set; empty without CUDA.");
  m.def("last_cuda_path", &se_ext::last_cuda_path,
        "Which CUDA kernels the last op that has a choice ran: cluster, chunked or whole; empty before such an op.");
}
