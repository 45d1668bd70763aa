# Finds torch, and checks that OpenMP as the compiler knows it is served by the runtime that torch loads.
find_package(Torch 2.10 QUIET)
if(NOT Torch_FOUND)
  message(FATAL_ERROR "se_ext: no torch 2.10 or newer found. Name the torch that the programs will run with:\n"
                      "-DCMAKE_PREFIX_PATH=$(python -c \"import torch; print(torch.utils.cmake_prefix_path)\")\n"
                      "or, for an unpacked libtorch archive, -DCMAKE_PREFIX_PATH=/path/to/libtorch")
endif()

include(CheckCXXSourceCompiles)
get_target_property(torch_cpu torch_cpu LOCATION)
set(CMAKE_REQUIRED_QUIET ON)
set(CMAKE_REQUIRED_DEFINITIONS -fopenmp) # compiled with, not linked with
set(CMAKE_REQUIRED_LIBRARIES -Wl,--no-as-needed,--copy-dt-needed-entries ${torch_cpu})
check_cxx_source_compiles("int n; void f() { ++n; }\nint main() {\n#pragma omp parallel\n  f();\n}" SE_EXT_OPENMP)
if(NOT SE_EXT_OPENMP)
  message(FATAL_ERROR "se_ext: what ${CMAKE_CXX_COMPILER} (${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}) "
                      "makes of an OpenMP loop does not link with the OpenMP runtime that ${torch_cpu} loads. "
                      "Build with GCC, in a new build folder: -DCMAKE_CXX_COMPILER=g++")
endif()
