#include "threads.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hsr {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

int threads_from_environment() {
    const char* text = std::getenv("HSR_NUM_THREADS");
    if (!text || !*text) return std::max(1u, std::thread::hardware_concurrency());
    char* end = nullptr;
    const long count = std::strtol(text, &end, 10);
    if (*end || count < 1 || count > 1024)
        throw std::invalid_argument(std::string("HSR_NUM_THREADS must be an integer in [1, 1024], got '") + text + "'");
    return int(count);
}

std::atomic<int>& thread_count() {
    static std::atomic<int> count{threads_from_environment()};
    return count;
}
std::atomic<GompParallel> gomp{nullptr};

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
}

// A number for each thread that ever took part: the same thread gets the same share of equal loops, and
// finds what it wrote in the last one in its own cache.
unsigned own_number() {
    static std::atomic<unsigned> next{0};
    static thread_local const unsigned number = next++;
    return number;
}

constexpr size_t kMaxShares = 64;

struct Phase {
    struct alignas(64) Share {
        std::atomic<size_t> next{0};
        size_t end = 0;
    };
    Share share[kMaxShares];
};

struct Job {
    const PhaseTask* body;
    size_t shares;
    std::vector<Phase> phases;
    std::atomic<bool> failed{false};
    std::exception_ptr error;
    std::mutex error_mutex;

    Job(const PhaseTask& function, const std::vector<size_t>& tasks, size_t threads)
        : body(&function), shares(std::max<size_t>(1, std::min(threads, kMaxShares))), phases(tasks.size()) {
        for (size_t p = 0; p < tasks.size(); ++p)
            for (size_t s = 0; s < shares; ++s) {
                phases[p].share[s].next = tasks[p] * s / shares;
                phases[p].share[s].end = tasks[p] * (s + 1) / shares;
            }
    }
    // Of each phase its own share first, then what others left.
    void work() {
        const size_t first = own_number() % shares;
        for (size_t p = 0; p < phases.size(); ++p)
            for (size_t i = 0; i < shares; ++i) {
                Phase::Share& from = phases[p].share[(first + i) % shares];
                for (size_t task; (task = from.next++) < from.end;) {
                    try {
                        (*body)(p, task, failed);
                    } catch (...) {
                        std::lock_guard<std::mutex> lock(error_mutex);
                        if (!failed.exchange(true)) error = std::current_exception();
                    }
                }
            }
    }
};

class Pool {
public:
    // A system that refuses more threads leaves the pool with fewer.
    explicit Pool(int wanted) : wanted_(wanted) {
        try {
            for (int i = 0; i < wanted; ++i) threads_.emplace_back([this] { loop(); });
        } catch (const std::system_error&) {
        } catch (const std::bad_alloc&) {}
    }
    int wanted() const { return wanted_; }
    ~Pool() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
            ++generation_;
        }
        wake_.notify_all();
        for (auto& thread : threads_) thread.join();
    }
    int workers() const { return int(threads_.size()); }

    void run(Job& job) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = &job;
            pending_ = workers();
            ++generation_;
        }
        wake_.notify_all();
        job.work();
        while (pending_.load(std::memory_order_acquire) > 0) relax();
    }

private:
    void loop() {
        uint64_t seen = 0;
        for (;;) {
            // A short spin catches the next loop of the same call; then sleep, to leave the core alone.
            for (int i = 0; i < 2000 && generation_.load(std::memory_order_acquire) == seen; ++i) relax();
            {
                std::unique_lock<std::mutex> lock(mutex_);
                wake_.wait(lock, [&] { return generation_ != seen; });
                seen = generation_;
                if (stop_) return;
            }
            job_->work();
            pending_.fetch_sub(1, std::memory_order_release);
        }
    }

    const int wanted_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<uint64_t> generation_{0};
    std::atomic<int> pending_{0};
    Job* job_ = nullptr;
    bool stop_ = false;
};

std::mutex pool_mutex;
// Never destroyed: worker threads may outlive static destructors at exit.
Pool* pool = nullptr;

// In a forked child the workers do not exist; forget the pool and start a new one on demand.
void forget_pool() {
    new (&pool_mutex) std::mutex;
    pool = nullptr;
}

}  // namespace

int num_threads() { return thread_count(); }

void set_num_threads(int count) {
    if (count < 1 || count > 1024)
        throw std::invalid_argument("num_threads must be in [1, 1024], got " + std::to_string(count));
    thread_count() = count;
}

void set_openmp(uintptr_t address) { gomp = reinterpret_cast<GompParallel>(address); }
bool uses_openmp() { return gomp.load() != nullptr; }

namespace {

void run(const std::vector<size_t>& tasks, int threads, const PhaseTask& body) {
    const size_t most = tasks.empty() ? 0 : *std::max_element(tasks.begin(), tasks.end());
    const int wanted = int(std::min<size_t>(most, size_t(std::min(threads, num_threads()))));
    Job job(body, tasks, size_t(wanted));
    if (wanted <= 1) {
        job.work();
    } else if (const GompParallel parallel = gomp.load()) {
        parallel([](void* data) { static_cast<Job*>(data)->work(); }, &job, unsigned(wanted), 0);
    } else {
        std::unique_lock<std::mutex> lock(pool_mutex, std::try_to_lock);
        if (!lock.owns_lock()) {
            job.work();
        } else {
            static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
            (void)registered;
            if (pool && pool->wanted() != num_threads() - 1) {
                delete pool;
                pool = nullptr;
            }
            if (!pool) pool = new Pool(num_threads() - 1);
            pool->run(job);
        }
    }
    if (job.failed) std::rethrow_exception(job.error);
}

}  // namespace

void parallel_for(size_t tasks, int threads, const std::function<void(size_t)>& body) {
    run({tasks}, threads, [&](size_t, size_t task, const std::atomic<bool>&) { body(task); });
}

void parallel_phases(const std::vector<size_t>& tasks, const PhaseTask& body) { run(tasks, num_threads(), body); }

bool Progress::wait_for(int stage, const std::atomic<bool>& failed) const {
    constexpr int kSpins = 4096;  // then others may need this core to get there
    for (int spins = 0; stage_.load(std::memory_order_acquire) < stage; ++spins) {
        if (failed.load(std::memory_order_relaxed)) return false;
        if (spins < kSpins)
            relax();
        else
            std::this_thread::yield();
    }
    return true;
}

}  // namespace hsr
