// A thread pool for parallel loops. Without OpenMP, there is no second runtime next to torch's.
#pragma once

#include <cstdint>
#include <functional>

namespace fastrag {

// Calls task(i) once for each i in [0, n_tasks), on at most n_threads threads including the caller,
// and returns when all calls have returned. The first exception of a task is rethrown by the
// caller; tasks that have not started by then are dropped. A task must not call parallel_for. If
// the threads are busy with a loop of another thread, the caller runs all tasks itself. Every task
// runs in the floating-point mode of the caller: its rounding, and whether it flushes denormals.
//
// A forked child starts threads of its own, because the threads of its parent do not exist in it.
void parallel_for(int n_threads, int64_t n_tasks, const std::function<void(int64_t)>& task);

}  // namespace fastrag
