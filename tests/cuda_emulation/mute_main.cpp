// Runs mute.cuh in the emulator: mute_main forward|reverse|random < case > result
//
// A case: int64 tokens, width, stride, sets, layers, layer, pool, whether there are rows; int32 indptr
// [sets · (layers + 1)]; int32 indices [pool]; float32 gains [pool]; int64 rows [tokens]; float32 hidden
// [tokens · stride]. The result is hidden.
#include <cstdio>
#include <string>
#include <vector>

#include "mute.cuh"

template <typename T>
static std::vector<T> read(int64_t size) {
  std::vector<T> data(size);
  if (fread(data.data(), sizeof(T), size, stdin) != static_cast<size_t>(size))
    throw std::runtime_error("short");
  return data;
}

int main(int, char** arguments) {
  using cuda_emulation::Schedule;
  const std::string order = arguments[1];
  cuda_emulation::schedule = order == "forward"   ? Schedule::forward
                             : order == "reverse" ? Schedule::reverse
                                                  : Schedule::random;
  const auto n = read<int64_t>(8);
  const int64_t tokens = n[0], stride = n[2], sets = n[3], layers = n[4], pool = n[6];
  const auto indptr = read<int32_t>(sets * (layers + 1));
  const auto indices = read<int32_t>(pool);
  const auto gains = read<float>(pool);
  const auto rows = read<int64_t>(tokens);
  auto hidden = read<float>(tokens * stride);
  neumuter::cuda::mute<float, float>(hidden.data(), tokens, n[1], stride, indptr.data(), sets, layers, n[5],
                                     indices.data(), gains.data(), pool, n[7] ? rows.data() : nullptr,
                                     nullptr);
  fwrite(hidden.data(), sizeof(float), hidden.size(), stdout);
}
