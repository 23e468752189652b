// Work in stages inside one parallel region.
//
// A stage is cut into pieces, which the threads take one after another; the next stage begins when
// all of them are done. So threads wait for pieces, never for a thread: one whose core another
// process has borrowed holds up the others by the piece it is at, and later passes over whatever was
// done without it. Between OpenMP's barriers everybody would stand still for it.
#pragma once

#include <atomic>
#include <cstdlib>
#include <memory>
#include <thread>

#include "team.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace native {

// One stage: which of its pieces are taken, and how many are done.
class alignas(64) Pieces {
  public:
    // The next `count` pieces that nobody has taken, of `total`; an empty range when there are none.
    Range take(int64_t total, int64_t count = 1) {
        const int64_t begin = next_.fetch_add(count, std::memory_order_relaxed);
        return {begin < total ? begin : total, begin + count < total ? begin + count : total};
    }

    // The first piece that nobody has taken, as of now; may be past the last.
    int64_t next() const { return next_.load(std::memory_order_relaxed); }

    // Called after pieces that were taken. What was written before is visible once they are awaited.
    void done(Range pieces) { done_.fetch_add(int(pieces.end - pieces.begin)); }

  private:
    friend class Stages;
    std::atomic<int64_t> next_{0};
    std::atomic<int> done_{0}, sleepers_{0};
};

class Stages {
  public:
    Stages(int most_threads, int64_t most_stages)
        : most_(most_stages), stages_(std::make_unique<Pieces[]>(most_stages)),
          seats_(std::make_unique<Seat[]>(most_threads)) {}

    // One thread's way through the stages; all threads make the same calls.
    class Walk {
      public:
        Walk(Stages& stages, Share share) : stages_(stages), share_(share) {}

        // Returns once `work(Share{piece, pieces})` was done for every piece, by whomever.
        template <class Work>
        void pieces(int64_t pieces, Work work) {
            taking(pieces, [&](Pieces& stage) {
                for (Range p; (p = stage.take(pieces)).begin < p.end; stage.done(p))
                    work(Share{int(p.begin), int(pieces)});
            });
        }

        // The same in as many pieces as there are threads.
        template <class Work>
        void shares(Work work) { pieces(share_.count, work); }

        // The same where `work(stage)` takes its pieces by itself, until there are none.
        template <class Work>
        void taking(int64_t pieces, Work work) {
            if (at_ == stages_.most_) std::abort();  // whoever added a stage did not count it
            Pieces& stage = stages_.stages_[at_++];
            work(stage);
            stages_.await(stage, int(pieces), share_);
        }

      private:
        Stages& stages_;
        const Share share_;
        int64_t at_ = 0;
    };

  private:
    static constexpr int kSpins = 2000;  // some tens of microseconds

    // Where a thread stood when it last waited; a cache line each.
    struct alignas(64) Seat {
        std::atomic<int> core{-1};
    };

    // OpenMP would spin for milliseconds, on the core of a thread it may be waiting for. This sleeps
    // after a few dozen microseconds, and at once when another thread was last seen on the same core.
    void await(Pieces& stage, int pieces, Share share) {
        if (stage.done_.load(std::memory_order_acquire) == pieces) {
            if (stage.sleepers_.load()) wake(stage);
            return;
        }
        const int core = current_core();
        seats_[share.index].core.store(core, std::memory_order_relaxed);
        const int spins = alone_on(core, share) ? kSpins : 0;
        for (int i = 0; i < spins; i++) {
            if (stage.done_.load(std::memory_order_acquire) == pieces) return;
            pause();
        }
        stage.sleepers_.fetch_add(1);
        for (int done; (done = stage.done_.load()) != pieces;) sleep(stage, done);
    }

    bool alone_on(int core, Share share) const {
        for (int other = 0; core >= 0 && other < share.count; other++)
            if (other != share.index && seats_[other].core.load(std::memory_order_relaxed) == core)
                return false;
        return true;
    }

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("isb");
#endif
    }

#if defined(__linux__)
    static int current_core() { return sched_getcpu(); }
    static void sleep(Pieces& stage, int done) {
        syscall(SYS_futex, reinterpret_cast<int*>(&stage.done_), FUTEX_WAIT_PRIVATE, done, nullptr);
    }
    static void wake(Pieces& stage) {
        syscall(SYS_futex, reinterpret_cast<int*>(&stage.done_), FUTEX_WAKE_PRIVATE, INT32_MAX);
    }
#else
    static int current_core() { return -1; }
    static void sleep(Pieces&, int) { std::this_thread::yield(); }
    static void wake(Pieces&) {}
#endif

    const int64_t most_;
    std::unique_ptr<Pieces[]> stages_;
    std::unique_ptr<Seat[]> seats_;
};

// `parallel` in pieces that the threads take one after another.
template <class Work>
void parallel_pieces(int threads, int64_t work_size, int64_t pieces, Work work) {
    Stages stages(threads, 1);
    parallel(threads, work_size,
             [&](Share share) { Stages::Walk(stages, share).pieces(pieces, work); });
}

}  // namespace native
