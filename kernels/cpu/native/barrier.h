// A barrier for a team inside one OpenMP region.
//
// OpenMP's own spins for milliseconds before it sleeps. Where the machine's cores are also another
// process's, a thread waiting so keeps the very thread it waits for from running; this one sleeps
// after a few dozen microseconds.
#pragma once

#include <atomic>
#include <thread>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace native {

class Barrier {
  public:
    // Returns once `count` threads have called it. What they wrote before is visible after.
    void wait(int count) {
        if (count == 1) return;
        const int round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1);
            if (sleepers_.load()) wake();
            return;
        }
        for (int i = 0; i < kSpins; i++) {
            if (round_.load(std::memory_order_acquire) != round) return;
            pause();
        }
        sleepers_.fetch_add(1);
        while (round_.load() == round) sleep(round);
        sleepers_.fetch_sub(1);
    }

  private:
    static constexpr int kSpins = 2000;  // some tens of microseconds

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("isb");
#endif
    }

#if defined(__linux__)
    void sleep(int round) {
        syscall(SYS_futex, reinterpret_cast<int*>(&round_), FUTEX_WAIT_PRIVATE, round, nullptr);
    }
    void wake() {
        syscall(SYS_futex, reinterpret_cast<int*>(&round_), FUTEX_WAKE_PRIVATE, INT32_MAX);
    }
#else
    void sleep(int) { std::this_thread::yield(); }
    void wake() {}
#endif

    std::atomic<int> arrived_{0}, round_{0}, sleepers_{0};
};

}  // namespace native
