// A barrier for a team inside one OpenMP region.
//
// OpenMP's own spins for milliseconds before it sleeps. Where the machine's cores are also another
// process's, a thread waiting so keeps the very thread it waits for from running. This one sleeps
// after a few dozen microseconds, and at once when another thread of the team was last seen on the
// same core.
#pragma once

#include <atomic>
#include <memory>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace native {

class Barrier {
  public:
    explicit Barrier(int most_threads)
        : seats_(std::make_unique<Seat[]>(most_threads)) {}

    // Returns once threads 0 to count - 1 have called it. What they wrote before is visible after.
    void wait(int thread, int count) {
        if (count == 1) return;
        const int core = current_core(), round = round_.load(std::memory_order_acquire);
        seats_[thread].core.store(core, std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1);
            if (sleepers_.load()) wake();
            return;
        }
        const int spins = alone_on(core, thread, count) ? kSpins : 0;
        for (int i = 0; i < spins; i++) {
            if (round_.load(std::memory_order_acquire) != round) return;
            pause();
        }
        sleepers_.fetch_add(1);
        while (round_.load() == round) sleep(round);
        sleepers_.fetch_sub(1);
    }

  private:
    static constexpr int kSpins = 2000;  // some tens of microseconds

    // Where a thread stood when it last arrived; a cache line each.
    struct alignas(64) Seat {
        std::atomic<int> core{-1};
    };

    bool alone_on(int core, int thread, int count) const {
        for (int other = 0; core >= 0 && other < count; other++)
            if (other != thread && seats_[other].core.load(std::memory_order_relaxed) == core)
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
    void sleep(int round) {
        syscall(SYS_futex, reinterpret_cast<int*>(&round_), FUTEX_WAIT_PRIVATE, round, nullptr);
    }
    void wake() {
        syscall(SYS_futex, reinterpret_cast<int*>(&round_), FUTEX_WAKE_PRIVATE, INT32_MAX);
    }
#else
    static int current_core() { return -1; }
    void sleep(int) { std::this_thread::yield(); }
    void wake() {}
#endif

    std::unique_ptr<Seat[]> seats_;
    alignas(64) std::atomic<int> arrived_{0};
    std::atomic<int> round_{0}, sleepers_{0};
};

}  // namespace native
