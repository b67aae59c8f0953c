// One defect of each kind, to see that the alarms go off where the tests of the kernels run.
#include <cstdint>
#include <memory>
#include <vector>

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain,
                                      void (*body)(int64_t, int64_t, void*), void* context);

#define DEFECT(name) extern "C" __attribute__((visibility("default"))) void name(int64_t n)

static volatile int64_t sink;

DEFECT(out_of_bounds) {
  const std::unique_ptr<char[]> x(new char[n]);
  sink = x.get()[n];
}

DEFECT(outside_the_vector) {  // though within its memory
  std::vector<char> x(n);
  x.resize(n - 1);
  sink = x[n - 1];
}

DEFECT(signed_overflow) { sink = INT64_MAX - 1 + n; }

DEFECT(misaligned) {
  alignas(8) char x[16] = {};
  sink = *reinterpret_cast<const int32_t*>(x + n % 2 + 1);
}

DEFECT(float_too_large) { sink = static_cast<int8_t>(static_cast<float>(n) * 1e6f); }

DEFECT(race) {
  int64_t sum = 0;
  torch_parallel_for(0, n, 1, [](int64_t i, int64_t, void* x) { *static_cast<int64_t*>(x) += i; }, &sum);
  sink = sum;
}
