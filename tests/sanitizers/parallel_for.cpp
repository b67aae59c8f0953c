// torch's parallel_for with threads that ThreadSanitizer knows, preloaded before torch's own.
//
// Torch runs on OpenMP, whose barriers are not instrumented: everything before and after a loop would look
// like a race with it. Here neighbouring indices run in different threads, whatever the grain, so that any
// two blocks that touch one another's memory are seen.
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

extern "C" __attribute__((visibility("default"))) int32_t torch_parallel_for(
    int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
  const int64_t count = std::min<int64_t>(end - begin, 8);
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < begin + count; ++first) {
    threads.emplace_back([=] {
      for (int64_t i = first; i < end; i += count) body(i, i + 1, context);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}
