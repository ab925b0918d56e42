// Threads that stay: all run the same function, and wait for each other at barriers.

#pragma once

#include <cstdint>
#include <functional>

namespace genkit {

class Barrier;

// One of the threads that run a function together.
struct Worker {
    int64_t index, count;
    Barrier* barrier;  // null where there is one thread

    // Wait until every thread has come here.
    void meet() const;

    // This thread's share of a range: first and last + 1.
    int64_t first(int64_t items) const { return items * index / count; }
    int64_t last(int64_t items) const { return items * (index + 1) / count; }
};

// Run a function on so many threads, this one included; one such call at a time.
void run_together(int64_t threads, const std::function<void(const Worker&)>& function);

}  // namespace genkit
