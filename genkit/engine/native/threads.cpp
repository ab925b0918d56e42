#include "threads.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace genkit {

namespace {

// Looks before a thread gives its core away: about as long as a step's shares may differ.
constexpr int SPINS = 2000;

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

class Barrier {
  public:
    explicit Barrier(int64_t count) : count_(count) {}

    void meet() {
        int64_t round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
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

  private:
    const int64_t count_;
    std::atomic<int64_t> arrived_{0}, round_{0};
};

void Worker::meet() const {
    if (barrier) barrier->meet();
}

namespace {

// Threads that sleep between calls.
class Pool {
  public:
    explicit Pool(int64_t count) : count_(count), barrier_(count) {
        for (int64_t index = 1; index < count; ++index) {
            std::thread([this, index] { serve(index); }).detach();
        }
    }

    void run(const std::function<void(const Worker&)>& function) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            function_ = &function;
            call_.fetch_add(1, std::memory_order_release);
        }
        wake_.notify_all();
        function(Worker{0, count_, &barrier_});
        barrier_.meet();  // nobody uses the function any more
    }

  private:
    void serve(int64_t index) {
        for (int64_t done = 0;; ++done) {
            for (int spin = 0; spin < SPINS && call_.load(std::memory_order_acquire) == done; ++spin)
                pause();
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return call_.load(std::memory_order_acquire) != done; });
            }
            (*function_)(Worker{index, count_, &barrier_});
            barrier_.meet();
        }
    }

    const int64_t count_;
    Barrier barrier_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<int64_t> call_{0};
    const std::function<void(const Worker&)>* function_ = nullptr;
};

// Never destroyed: threads may outlive what a process tears down when it ends.
struct Pools {
    const pid_t process = getpid();
    std::mutex mutex;
    std::map<int64_t, Pool*> by_count;
};

// A fork copies no threads, and perhaps a mutex that nobody will unlock: it gets others.
Pools& of_this_process() {
    static std::atomic<Pools*> current{new Pools};
    Pools* pools = current.load();
    if (pools->process != getpid()) {
        Pools* fresh = new Pools;
        if (current.compare_exchange_strong(pools, fresh)) return *fresh;
        delete fresh;  // another thread of this process was first
    }
    return *pools;
}

}  // namespace

void run_together(int64_t threads, const std::function<void(const Worker&)>& function) {
    if (threads <= 1) {
        function(Worker{0, 1, nullptr});
        return;
    }
    Pools& pools = of_this_process();
    std::lock_guard<std::mutex> lock(pools.mutex);
    Pool*& pool = pools.by_count[threads];
    if (!pool) pool = new Pool(threads);
    pool->run(function);
}

}  // namespace genkit
