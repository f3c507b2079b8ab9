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
// To sleep and be woken takes some fifty microseconds, and loops come one after another: who waits
// looks for so long first, and lets others have the processor between two looks.
constexpr std::chrono::microseconds kLooking{100};

template <class Condition>
void look_for(const Condition& condition) {
  const auto until = std::chrono::steady_clock::now() + kLooking;
  while (!condition() && std::chrono::steady_clock::now() < until) std::this_thread::yield();
}

// How a thread computes with floating point: the rounding mode, whether denormals are flushed,
// which exceptions trap. Each thread has its own, without the flags of what happened so far.
#if defined(__SSE2__)
using FloatMode = uint32_t;
constexpr FloatMode kHappened = 0x3f;
FloatMode float_mode() { return _mm_getcsr() & ~kHappened; }
void set_float_mode(FloatMode mode) { _mm_setcsr(mode | (_mm_getcsr() & kHappened)); }
#elif defined(__aarch64__)
using FloatMode = uint64_t;
FloatMode float_mode() {
  FloatMode mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
void set_float_mode(FloatMode mode) { asm volatile("msr fpcr, %0" : : "r"(mode)); }
#else
using FloatMode = int;  // the rounding mode is all that the standard knows
FloatMode float_mode() { return std::fegetround(); }
void set_float_mode(FloatMode mode) { std::fesetround(mode); }
#endif

// One loop: its tasks are taken from a counter by any thread that is free, and computed in the
// floating-point mode of the caller, so that no result depends on which thread it was.
class Loop {
 public:
  Loop(int64_t n_tasks, const std::function<void(int64_t)>& task)
      : n_tasks_(n_tasks), task_(task) {}

  // A helper only ever computes in loops: it keeps the mode until another one is wanted.
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

  // Only once nobody works on it any more.
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

// Linux may leave a thread that it wakes on the processor of the thread that woke it for all of a
// loop, and another one idle: helpers are kept off the processor that their caller is on.
class Processors {
 public:
  // Gives helpers the others that the calling thread may use, if these are enough for all of them.
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
  size_t n_set_ = 0;  // helpers that have been told
  cpu_set_t set_;
#endif
};

class ThreadPool {
 public:
  ThreadPool() : pid_(getpid()) {}

  pid_t pid() const { return pid_; }

  // False, and nothing done, if another loop has the threads.
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
      places_ = 0;  // who has not begun by now need not
    }
    look_for([this] { return working_ == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    idle_.wait(lock, [this] { return working_ == 0; });
    loop_ = nullptr;
    return true;
  }

 private:
  // As many as the machine gives; with none at all the caller does the work.
  void start(int n) {
    while (static_cast<int>(helpers_.size()) < n) {
      try {
        std::thread helper([this] { serve(); });
        helpers_.push_back(helper.native_handle());  // for ever: it never ends
        helper.detach();
      } catch (const std::system_error&) {
        return;
      }
    }
  }

  [[noreturn]] void serve() {
    for (;;) {
      look_for([this] { return places_ > 0; });
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
  std::mutex mutex_;  // guards changes of what follows
  std::condition_variable wake_, idle_;
  Loop* loop_ = nullptr;
  std::atomic<int> places_{0};   // helpers still wanted
  std::atomic<int> working_{0};  // helpers at work
};

std::atomic<ThreadPool*> g_pool{nullptr};

// Never destroyed, so that its threads may outlive main. The one that a fork left behind is
// forgotten as it is: its locks may be held by threads that do not exist here.
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
