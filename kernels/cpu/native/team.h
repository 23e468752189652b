// Work sharing. An operator is written as the share of one thread out of several, so that it can
// run in a parallel region of its own or, between barriers, in one that spans a whole model step.
#pragma once

#include <omp.h>

#include <cstdint>

namespace native {

struct Share {
    int index;
    int count;
};

struct Range {
    int64_t begin;
    int64_t end;
};

// The contiguous part of `total` items that belongs to one share.
inline Range part(int64_t total, Share share) {
    return {total * share.index / share.count, total * (share.index + 1) / share.count};
}

// Below this many bytes touched (or multiply-adds done) a fork and join costs more than it saves.
constexpr int64_t kWorthSharing = 1 << 16;

template <class Work>
void parallel(int threads, int64_t work_size, Work work) {
    if (threads <= 1 || work_size < kWorthSharing) {
        work(Share{0, 1});
        return;
    }
#pragma omp parallel num_threads(threads)
    work(Share{omp_get_thread_num(), omp_get_num_threads()});
}

}  // namespace native
