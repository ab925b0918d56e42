#include "threads.h"

#include <unistd.h>

#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace genkit {

namespace {

// Looks before a thread gives its core away: about as long as a step's shares may differ.
constexpr int SPINS = 2000;

OpenMP openmp{};
pid_t process = 0;  // that may use it: a fork copies no threads, and waiting for them never ends

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Team {
    const std::function<void(const Worker&)>* function;
    Barrier barrier;
};

void work(void* data) {
    Team& team = *static_cast<Team*>(data);
    (*team.function)(Worker{openmp.thread(), openmp.threads(), &team.barrier});
}

}  // namespace

void Barrier::meet(int64_t count) {
    if (count == 1) return;
    int64_t round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count) {
        arrived_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    for (int spin = 0; round_.load(std::memory_order_acquire) == round; ++spin) {
        if (spin < SPINS) {
            pause();
        } else {
            std::this_thread::yield();  // others may need this core
        }
    }
}

void use_openmp(const OpenMP& functions) { openmp = functions, process = getpid(); }

void run_together(int64_t threads, const std::function<void(const Worker&)>& function) {
    Team team{&function, {}};
    if (threads > 1 && openmp.parallel && process == getpid()) {
        openmp.parallel(work, &team, unsigned(threads), 0);
    } else {
        function(Worker{0, 1, &team.barrier});
    }
}

}  // namespace genkit
