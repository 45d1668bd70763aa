# The CUDA part of the build, with the flags of setup_cuda.py.
set(SE_EXT_CUDA_ARCHITECTURES "75-real;80-real;86-real;89-real;90-real;100-real;120"
    CACHE STRING "The GPUs that the CUDA kernels are compiled for, written as CMake's CUDA_ARCHITECTURES")

# Called before torch is found, whose configuration enables CUDA too, and adds flags of its own.
macro(se_ext_enable_cuda)
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    message(FATAL_ERROR "se_ext: SE_EXT_CUDA=ON, but there is no nvcc that works with ${CMAKE_CXX_COMPILER}; "
                        "name one with -DCMAKE_CUDA_COMPILER=/path/to/nvcc, or build with SE_EXT_CUDA=OFF")
  endif()
  enable_language(CUDA)
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20) # unknown to CMake 3.25
  find_package(CUDAToolkit REQUIRED)
  unset(CMAKE_CUDA_ARCHITECTURES) # torch's configuration warns where it is set
  unset(CMAKE_CUDA_ARCHITECTURES CACHE)
  set(cuda_flags "${CMAKE_CUDA_FLAGS}")
endmacro()

# Adds csrc/cuda to the library.
function(se_ext_add_cuda)
  set(CMAKE_CUDA_FLAGS "${cuda_flags}")
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_EXTENSIONS OFF)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)

  # Without -fmad=false, nvcc would fuse multiplications and additions where the source does not.
  file(GLOB kernels CONFIGURE_DEPENDS csrc/cuda/kernels/*.cu)
  add_library(se_ext_cuda OBJECT ${kernels})
  set_target_properties(se_ext_cuda PROPERTIES CUDA_ARCHITECTURES "${SE_EXT_CUDA_ARCHITECTURES}")
  target_include_directories(se_ext_cuda PRIVATE csrc csrc/cuda/kernels)
  target_compile_options(se_ext_cuda PRIVATE -O3 -fmad=false -Xfatbin=-compress-all -Xcompiler=-Wall)

  file(GLOB adapters CONFIGURE_DEPENDS csrc/cuda/*.cpp)
  target_sources(se_ext PRIVATE ${adapters} $<TARGET_OBJECTS:se_ext_cuda>)
  set_source_files_properties(${adapters} PROPERTIES SKIP_PRECOMPILE_HEADERS ON)
  set_source_files_properties(csrc/no_cuda.cpp PROPERTIES HEADER_FILE_ONLY ON) # not compiled
  target_link_libraries(se_ext PRIVATE CUDA::cudart)
  if(TARGET c10_cuda)
    target_link_libraries(se_ext PRIVATE c10_cuda)
  else()
    message(WARNING "se_ext: SE_EXT_CUDA=ON beside a torch without CUDA (${Torch_DIR}): the library is built, but "
                    "cannot be loaded with that torch")
    set_property(SOURCE ${adapters} APPEND PROPERTY COMPILE_DEFINITIONS # a torch without CUDA lacks that header
                 C10_USING_CUSTOM_GENERATED_MACROS)
  endif()

  # As python -m se_ext reports them: 80-real is 8.0, and 90, which holds PTX too, 9.0+PTX.
  set(names)
  foreach(architecture IN LISTS SE_EXT_CUDA_ARCHITECTURES)
    string(REGEX REPLACE "^([0-9]+)([0-9][af]?).*" "\\1.\\2" name ${architecture})
    if(NOT architecture MATCHES "-real$")
      string(APPEND name "+PTX")
    endif()
    list(APPEND names ${name})
  endforeach()
  list(JOIN names " " names)
  set_property(SOURCE ${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/info.cpp APPEND PROPERTY COMPILE_DEFINITIONS
               "SE_EXT_CUDA_ARCHITECTURES=\"${names}\"")
endfunction()
