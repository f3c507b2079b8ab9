#include "thread_pool.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

namespace fastrag {
namespace {

constexpr int kMaxThreads = 256;

// One loop: its tasks are taken from a counter by whoever is free.
class Loop {
 public:
  Loop(int64_t n_tasks, const std::function<void(int64_t)>& task)
      : n_tasks_(n_tasks), task_(task) {}

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
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::exception_ptr error_;
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
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      loop_ = loop;
      places_ = std::min(n_helpers, n_threads_);
    }
    wake_.notify_all();
    loop->work();
    std::unique_lock<std::mutex> lock(mutex_);
    places_ = 0;  // who has not begun by now need not
    idle_.wait(lock, [this] { return working_ == 0; });
    loop_ = nullptr;
    return true;
  }

 private:
  // As many as the machine gives; with none at all the caller does the work.
  void start(int n) {
    for (; n_threads_ < n; ++n_threads_) {
      try {
        std::thread([this] { serve(); }).detach();
      } catch (const std::system_error&) {
        return;
      }
    }
  }

  [[noreturn]] void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return places_ > 0; });
      --places_;
      ++working_;
      Loop* loop = loop_;
      lock.unlock();
      loop->work();
      lock.lock();
      if (--working_ == 0) idle_.notify_one();
    }
  }

  const pid_t pid_;
  std::mutex owner_;  // held for a whole loop
  int n_threads_ = 0;
  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_, idle_;
  Loop* loop_ = nullptr;
  int places_ = 0;   // helpers still wanted
  int working_ = 0;  // helpers at work
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
