// A loop over independent tasks on a few threads. One pool a process, created on first use; a call from a
// second thread while the pool is busy runs its own loop alone, so callers never wait for each other.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

namespace hsr {

int num_threads();
void set_num_threads(int count);  // >= 1

// Run on the threads of the OpenMP run-time that is already in the process (the address of its
// GOMP_parallel), or on our own pool again (0). Two pools on the same cores slow each other: libgomp's
// threads spin for a while after each of their loops.
void set_openmp(uintptr_t gomp_parallel);
bool uses_openmp();

// Calls body(task) for every task in [0, tasks). The first exception thrown by a task is thrown again here,
// after all tasks have ended.
// At most `threads` threads take part.
void parallel_for(size_t tasks, int threads, const std::function<void(size_t task)>& body);
inline void parallel_for(size_t tasks, const std::function<void(size_t task)>& body) {
    parallel_for(tasks, num_threads(), body);
}

// Loops one after another, without a wait between them: calls body(phase, task) for every task in [0, tasks[phase]). A
// thread goes on to the next phase once no task is left to take, while others may still be at their last ones. So a
// task may wait for tasks of earlier phases, and for no others. Exceptions as above; `failed` is true once there is
// one.
using PhaseTask = std::function<void(size_t phase, size_t task, const std::atomic<bool>& failed)>;
void parallel_phases(const std::vector<size_t>& tasks, const PhaseTask& body);

// How far something came that tasks wait for: numbers that only grow.
class Progress {
public:
    void reach(int stage) { stage_.store(stage, std::memory_order_release); }
    // False where `failed` became true first.
    bool wait_for(int stage, const std::atomic<bool>& failed) const;

private:
    std::atomic<int> stage_{0};
};

}  // namespace hsr
