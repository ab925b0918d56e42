// A function that several threads run together, waiting for each other at barriers.

#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

namespace genkit {

// Where all of some threads wait until the last has come.
class Barrier {
  public:
    void meet(int64_t count);

  private:
    std::atomic<int64_t> arrived_{0}, round_{0};
};

// One of the threads that run a function together.
struct Worker {
    int64_t index, count;
    Barrier* barrier;

    void meet() const { barrier->meet(count); }

    // This thread's share of a range: first and last + 1.
    int64_t first(int64_t items) const { return items * index / count; }
    int64_t last(int64_t items) const { return items * (index + 1) / count; }
};

// The functions of the OpenMP that torch uses. Its threads wait for work by spinning: threads of
// another pool would have to share the cores with them.
struct OpenMP {
    void (*parallel)(void (*function)(void*), void* data, unsigned threads, unsigned flags);
    int (*thread)();
    int (*threads)();
};

// Use these from now on, in this process; until then a function runs on one thread.
void use_openmp(const OpenMP& functions);

// Run a function on so many threads at most, this one included.
void run_together(int64_t threads, const std::function<void(const Worker&)>& function);

}  // namespace genkit
