#include "pool/thread_pool.h"

#include <unistd.h>
#ifdef __SSE2__
#include <immintrin.h>
#elif !defined(__aarch64__)
#include <cfenv>
#endif
#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace fastrag {
namespace {

constexpr int kMaxThreads = 256;
// Sleeping and waking takes about fifty microseconds, and loops follow each other closely. So a
// waiting thread polls for this long first, and yields the processor between two polls.
constexpr std::chrono::microseconds kPolling{100};

template <class Condition>
void poll_for(const Condition& condition) {
  const auto until = std::chrono::steady_clock::now() + kPolling;
  while (!condition() && std::chrono::steady_clock::now() < until) std::this_thread::yield();
}

// The floating-point mode of a thread: the rounding mode, whether denormals are flushed, and which
// exceptions trap. It does not include the flags of exceptions that have occurred.
#if defined(__SSE2__)
using FloatMode = uint32_t;
constexpr FloatMode kFlags = 0x3f;
FloatMode float_mode() { return _mm_getcsr() & ~kFlags; }
void set_float_mode(FloatMode mode) { _mm_setcsr(mode | (_mm_getcsr() & kFlags)); }
#elif defined(__aarch64__)
using FloatMode = uint64_t;
FloatMode float_mode() {
  FloatMode mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
void set_float_mode(FloatMode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
using FloatMode = int;  // the standard only has the rounding mode
FloatMode float_mode() { return std::fegetround(); }
void set_float_mode(FloatMode mode) { std::fesetround(mode); }
#endif

// One loop. Each free thread takes the next task from a counter. All tasks run in the
// floating-point mode of the caller, so that no result depends on the thread.
class Loop {
 public:
  Loop(int64_t n_tasks, const std::function<void(int64_t)>& task)
      : n_tasks_(n_tasks), task_(task) {}

  // A helper only runs tasks, so it need not restore its mode afterwards.
  void help() noexcept {
    if (float_mode() != mode_) set_float_mode(mode_);
    work();
  }

  void work() noexcept {
    for (int64_t i = next_.fetch_add(1); i < n_tasks_; i = next_.fetch_add(1)) {
      try {
        task_(i);
      } catch (...) {
        next_.store(n_tasks_);
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
      }
    }
  }

  // Call this only after all threads have finished the loop.
  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  const int64_t n_tasks_;
  const std::function<void(int64_t)>& task_;
  const FloatMode mode_ = float_mode();
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::exception_ptr error_;
};

// Linux may run a thread on the processor of the thread that woke it for a whole loop, while
// another processor is idle. Therefore helpers are kept off the processor of their caller.
class Processors {
 public:
  // Restricts the helpers to the other processors that the calling thread may use, if there are
  // enough of them.
  void keep_off_caller(const std::vector<std::thread::native_handle_type>& helpers) {
#ifdef __linux__
    cpu_set_t others;
    const int caller = sched_getcpu();
    if (caller < 0 || sched_getaffinity(0, sizeof(others), &others) != 0) return;
    CPU_CLR(caller, &others);
    if (CPU_COUNT(&others) < static_cast<int>(helpers.size())) CPU_SET(caller, &others);
    if (n_set_ == helpers.size() && CPU_EQUAL(&others, &set_)) return;
    for (const pthread_t helper : helpers) pthread_setaffinity_np(helper, sizeof(others), &others);
    n_set_ = helpers.size();
    set_ = others;
#else
    (void)helpers;
#endif
  }

#ifdef __linux__
 private:
  size_t n_set_ = 0;  // helpers with the affinity set_
  cpu_set_t set_;
#endif
};

class ThreadPool {
 public:
  ThreadPool() : pid_(getpid()) {}

  pid_t pid() const { return pid_; }

  // Returns false, without running a task, if the threads are busy with another loop.
  bool run(Loop* loop, int n_helpers) {
    const std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    start(n_helpers);
    processors_.keep_off_caller(helpers_);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      loop_ = loop;
      places_ = std::min(n_helpers, static_cast<int>(helpers_.size()));
    }
    wake_.notify_all();
    loop->work();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      places_ = 0;  // helpers that have not started are no longer needed
    }
    poll_for([this] { return working_ == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    idle_.wait(lock, [this] { return working_ == 0; });
    loop_ = nullptr;
    return true;
  }

 private:
  // Starts helpers up to n, or as many as the system allows. Without any, the caller does the work.
  void start(int n) {
    while (static_cast<int>(helpers_.size()) < n) {
      try {
        std::thread helper([this] { serve(); });
        helpers_.push_back(helper.native_handle());  // stays valid, because the thread never ends
        helper.detach();
      } catch (const std::system_error&) {
        return;
      }
    }
  }

  [[noreturn]] void serve() {
    for (;;) {
      poll_for([this] { return places_ > 0; });
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return places_ > 0; });
      --places_;
      ++working_;
      Loop* loop = loop_;
      lock.unlock();
      loop->help();
      lock.lock();
      if (--working_ == 0) idle_.notify_one();
    }
  }

  const pid_t pid_;
  std::mutex owner_;  // held for a whole loop; guards the next two
  std::vector<std::thread::native_handle_type> helpers_;
  Processors processors_;
  std::mutex mutex_;  // guards changes of the following members
  std::condition_variable wake_, idle_;
  Loop* loop_ = nullptr;
  std::atomic<int> places_{0};   // helpers still wanted
  std::atomic<int> working_{0};  // helpers at work
};

std::atomic<ThreadPool*> g_pool{nullptr};

// A pool is never destroyed, so its threads may outlive main. The parent's pool is abandoned in a
// forked child: its locks may be held by threads that do not exist in the child.
ThreadPool* pool() {
  ThreadPool* current = g_pool.load();
  if (current && current->pid() == getpid()) return current;
  ThreadPool* fresh = new ThreadPool();
  if (g_pool.compare_exchange_strong(current, fresh)) return fresh;
  delete fresh;
  return current;
}

}  // namespace

void parallel_for(int n_threads, int64_t n_tasks, const std::function<void(int64_t)>& task) {
  const int64_t wanted = std::min<int64_t>({n_threads, n_tasks, kMaxThreads});
  Loop loop(n_tasks, task);
  if (wanted <= 1 || !pool()->run(&loop, static_cast<int>(wanted - 1))) loop.work();
  loop.rethrow();
}

}  // namespace fastrag
