// What the driver asks of openmp.cpp, the stand-in for the OpenMP runtime.
#pragma once

#include <atomic>

namespace openmp {

extern std::atomic<int> teams;      // of two threads and more, that ran so far
extern bool barriers_are_left_out;  // on purpose, to see that the race is reported

}  // namespace openmp
