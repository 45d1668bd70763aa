// What `se_ext._C` and `python -m se_ext` report. Exported from libse_ext; no torch types.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace se_ext {

#define SE_EXT_API __attribute__((visibility("default")))

SE_EXT_API std::string cpu_capability();                 // the instruction set in use
SE_EXT_API std::vector<std::string> cpu_capabilities();  // those built in that this CPU can run
SE_EXT_API std::string compiler();                       // what built the library
SE_EXT_API std::string torch_version();                  // the torch it was built against
SE_EXT_API std::int64_t cache_bytes(
    int level);                           // of CPU 0's data cache; what the schedule assumes where Linux is silent
SE_EXT_API int num_threads();             // torch's intra-op threads
SE_EXT_API std::string openmp_runtime();  // path of the OpenMP library that answers here

// csrc/cuda, or csrc/no_cuda.cpp in a build without it.
SE_EXT_API std::string cuda_toolkit();                     // "13.0"; "" without CUDA
SE_EXT_API std::vector<std::string> cuda_architectures();  // "8.0", "9.0+PTX"; none without CUDA
SE_EXT_API void set_cuda_path(const std::string& path);    // "auto", "cluster", "chunked" or "whole"; to test, measure
SE_EXT_API std::string cuda_path();                        // the last one set, at first "auto"; "" without CUDA
SE_EXT_API std::string last_cuda_path();  // what the last op with a choice took, forced or not; "" before one

}  // namespace se_ext
