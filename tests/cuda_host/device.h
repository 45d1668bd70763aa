// The emulated device: the threads of a cluster are fibers, clusters run one after another. Which thread goes on at a
// barrier is drawn by a generator that SE_EXT_HOST_SEED seeds, so that a missing barrier gives a wrong result. What no
// correct kernel does ends the process with a message.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

struct uint4;

namespace cuda_host {

using Place = std::source_location;

enum class Barrier { Block, Cluster, Warp, ShuffleXor, ShuffleDown, ShuffleIndex };

// Until all threads of the block or cluster, exited ones included, have come to a barrier of this kind.
void wait(Barrier kind, Place where);
void arrive();  // before each wait at the cluster's barrier
void wait_warp(unsigned mask, Place where);

// A shuffle: the value that the lane `source` of the warp came with.
std::uint64_t exchange(Barrier kind, unsigned mask, std::uint64_t value, int source, Place where);
int lane();

// Shared memory of the block, 0xff in every byte at first; nullptr where the launch asked for none.
char* shared_memory();
void require_shared(const char* what, const void* address, std::size_t bytes);
void require_aligned(const char* what, const void* address, std::size_t alignment);

int cluster_size();
int cluster_rank();
void* shared_of_rank(const void* address, std::size_t bytes, int rank);

// A copy to shared memory that is seen there after the same thread has finished its group: all but the newest are.
void begin_copy(uint4* to, const uint4& value);
void commit_copies();
void finish_copies(std::size_t newest);

}  // namespace cuda_host
