# Decides whether the CUDA backend is built: sets BINCONV_WITH_CUDA, enables the language, and defines
# the interface target binconv_cutlass.

set(BINCONV_WITH_CUDA OFF)
if(BINCONV_CUDA)  # ON or AUTO
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(BINCONV_WITH_CUDA ON)
  elseif(NOT BINCONV_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "BINCONV_CUDA is ON, but no CUDA compiler was found. Put nvcc on the PATH, give "
                        "-DCMAKE_CUDA_COMPILER=<nvcc>, or build for the CPU with -DBINCONV_CUDA=OFF.")
  endif()
endif()

if(NOT BINCONV_WITH_CUDA)
  message(STATUS "binconv: building for the CPU only (BINCONV_CUDA=${BINCONV_CUDA}, no CUDA backend)")
  return()
endif()

# Machine code for Ampere, Ada and Hopper, and PTX that every other GPU from sm_75 up, older or newer
# than these, compiles when it loads the library.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "75-virtual;80-real;86-real;89-real;90a-real")
endif()
enable_language(CUDA)

# The library selects its kernels by this list: a name becomes the numbers that it stands for, and 90 becomes
# 90a, which runs on the same GPUs and has the instructions of cuda_sm90.
set(_given "${CMAKE_CUDA_ARCHITECTURES}")
if(_given MATCHES "^(native|all|all-major)$")
  string(TOUPPER ${_given} _name)
  string(REPLACE "-" "_" _name ${_name})
  set(CMAKE_CUDA_ARCHITECTURES ${CMAKE_CUDA_ARCHITECTURES_${_name}})
endif()
if(NOT CMAKE_CUDA_ARCHITECTURES MATCHES "^[0-9]")
  message(FATAL_ERROR "CMAKE_CUDA_ARCHITECTURES: got ${_given}, expected numbers such as 80-real;90a-real, all, "
                      "all-major or, where there is a GPU, native.")
endif()
if(NOT CMAKE_CUDA_ARCHITECTURES MATCHES "90a(-real)?(;|$)")
  list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "^90$" "90a-real;90-virtual")
  list(TRANSFORM CMAKE_CUDA_ARCHITECTURES REPLACE "^90-real$" "90a-real")
endif()
find_package(CUDAToolkit REQUIRED)

# CUTLASS, header only: the given folder, else the submodule, else the Python package.
set(BINCONV_CUTLASS_VERSION 4.2.0)
set(Python3_FIND_STRATEGY LOCATION)  # The python on the PATH, not the newest there is.
find_package(Python3 COMPONENTS Interpreter QUIET)
set(_python_cutlass "")
if(NOT BINCONV_CUTLASS_DIR AND Python3_FOUND)
  execute_process(
    COMMAND ${Python3_EXECUTABLE} -c "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0] + '/source')"
    OUTPUT_VARIABLE _python_cutlass OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
find_path(
  BINCONV_CUTLASS_INCLUDE_DIR cutlass/version.h NO_CACHE NO_DEFAULT_PATH
  HINTS ${BINCONV_CUTLASS_DIR} ${PROJECT_SOURCE_DIR}/third_party/cutlass ${_python_cutlass}
  PATH_SUFFIXES include)
if(BINCONV_CUTLASS_DIR AND NOT BINCONV_CUTLASS_INCLUDE_DIR MATCHES "^${BINCONV_CUTLASS_DIR}/")
  message(FATAL_ERROR "BINCONV_CUTLASS_DIR: ${BINCONV_CUTLASS_DIR} has no include/cutlass/version.h.")
endif()
if(NOT BINCONV_CUTLASS_INCLUDE_DIR)
  message(FATAL_ERROR
    "CUTLASS ${BINCONV_CUTLASS_VERSION} was not found. Do one of these:\n"
    "  git submodule update --init third_party/cutlass\n"
    "  pip install nvidia-cutlass==${BINCONV_CUTLASS_VERSION}.0\n"
    "  cmake -DBINCONV_CUTLASS_DIR=<folder with include/cutlass>\n"
    "or build for the CPU with -DBINCONV_CUDA=OFF.")
endif()
file(STRINGS ${BINCONV_CUTLASS_INCLUDE_DIR}/cutlass/version.h _lines REGEX "#define CUTLASS_(MAJOR|MINOR|PATCH) ")
list(TRANSFORM _lines REPLACE "#define CUTLASS_[A-Z]+ +" "")
list(JOIN _lines "." _found)
if(NOT _found VERSION_EQUAL BINCONV_CUTLASS_VERSION)
  message(FATAL_ERROR "CUTLASS in ${BINCONV_CUTLASS_INCLUDE_DIR}: got version ${_found}, expected ${BINCONV_CUTLASS_VERSION}.")
endif()
add_library(binconv_cutlass INTERFACE)
target_include_directories(binconv_cutlass SYSTEM INTERFACE ${BINCONV_CUTLASS_INCLUDE_DIR})
message(STATUS "binconv: CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}, CUTLASS in ${BINCONV_CUTLASS_INCLUDE_DIR}")
