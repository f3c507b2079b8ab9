// A few threads that wait for loops: no OpenMP, so no second runtime beside the one of torch.
#pragma once

#include <cstdint>
#include <functional>

namespace fastrag {

// Calls task(i) once for each i in [0, n_tasks), on at most n_threads threads of which the caller
// is one, and returns when all calls have. The first exception of a task is rethrown here; tasks
// that have not begun by then are dropped. A task must not call this. A call from a second thread
// while a loop runs does all of its tasks itself. Every task is computed in the floating-point mode
// of the caller: its rounding, and whether it flushes denormals.
//
// After a fork the child starts threads of its own: those of its parent did not come along.
void parallel_for(int n_threads, int64_t n_tasks, const std::function<void(int64_t)>& task);

}  // namespace fastrag
