# The CUDA part of the build, with the flags of setup_cuda.py. CMAKE_CUDA_ARCHITECTURES says for which GPUs.

# Called before torch is found: torch's configuration would choose the architectures and add flags of its own.
macro(se_ext_enable_cuda)
  include(CheckLanguage)
  set(cuda_architectures 75-real 80-real 86-real 89-real 90-real 100-real 120)
  if(CMAKE_CUDA_ARCHITECTURES)
    set(cuda_architectures ${CMAKE_CUDA_ARCHITECTURES})
  endif()
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR "se_ext: SE_EXT_CUDA=ON, but there is no nvcc that works with ${CMAKE_CXX_COMPILER}; "
                        "name one with -DCMAKE_CUDA_COMPILER=/path/to/nvcc, or build with SE_EXT_CUDA=OFF")
  endif()
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)
  unset(CMAKE_CUDA_ARCHITECTURES)
  unset(CMAKE_CUDA_ARCHITECTURES CACHE)
  set(cuda_flags "${CMAKE_CUDA_FLAGS}")
endmacro()

# Adds csrc/cuda to the library.
function(se_ext_add_cuda)
  set(CMAKE_CUDA_FLAGS "${cuda_flags}")
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_EXTENSIONS OFF)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)

  # Without -fmad=false, nvcc would fuse multiplications and additions where the source does not.
  file(GLOB kernels CONFIGURE_DEPENDS csrc/cuda/kernels/*.cu)
  add_library(se_ext_cuda OBJECT ${kernels})
  set_target_properties(se_ext_cuda PROPERTIES CUDA_ARCHITECTURES "${cuda_architectures}")
  target_include_directories(se_ext_cuda PRIVATE csrc csrc/cuda/kernels)
  target_compile_options(se_ext_cuda PRIVATE -O3 -fmad=false -Xfatbin=-compress-all -Xcompiler=-Wall)

  file(GLOB adapters CONFIGURE_DEPENDS csrc/cuda/*.cpp)
  target_sources(se_ext PRIVATE ${adapters} $<TARGET_OBJECTS:se_ext_cuda>)
  set_source_files_properties(csrc/no_cuda.cpp PROPERTIES HEADER_FILE_ONLY ON) # not compiled
  target_link_libraries(se_ext PRIVATE CUDA::cudart)
  if(TARGET c10_cuda)
    target_link_libraries(se_ext PRIVATE c10_cuda)
  else()
    message(WARNING "se_ext: SE_EXT_CUDA=ON beside a torch without CUDA (${Torch_DIR}): the library is built, but "
                    "cannot be loaded with that torch")
    target_compile_definitions(se_ext PRIVATE C10_USING_CUSTOM_GENERATED_MACROS) # torch without CUDA lacks a header
  endif()

  # As python -m se_ext reports them: 80-real is 8.0, and 90, which holds PTX too, 9.0+PTX.
  string(REGEX REPLACE "([0-9]+)([0-9][af]?)(-virtual|-real)?" "\\1.\\2\\3" names "${cuda_architectures}")
  string(REGEX REPLACE "([0-9][af]?)(;|$)" "\\1+PTX\\2" names "${names}")
  string(REGEX REPLACE "-real" "" names "${names}")
  string(REGEX REPLACE "-virtual" "+PTX" names "${names}")
  string(REPLACE ";" " " names "${names}")
  set_source_files_properties(csrc/cuda/info.cpp PROPERTIES COMPILE_DEFINITIONS "SE_EXT_CUDA_ARCHITECTURES=\"${names}\"")
endfunction()
