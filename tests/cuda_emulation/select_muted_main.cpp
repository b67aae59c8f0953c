// Runs select_muted.cuh in the emulator: select_muted_main forward|reverse|random < cases > results
//
// A case: int64 n, layers, budget, capacity; float32 threshold, gamma, zeta; int64 widths [layers];
// float32 scores [n]. Its result: int32 error; int32 indptr [layers + 1]; int32 indices [capacity];
// float32 gains [capacity]. Output and workspace have the sizes of the contract and begin as garbage.
#include <cstdio>
#include <exception>
#include <memory>
#include <string>

#include "select_muted.cuh"

template <typename T>
struct Buffer {
  size_t size;
  std::unique_ptr<T[]> data;
  explicit Buffer(size_t size) : size(size), data(new T[size]) { memset(data.get(), 0xA5, size * sizeof(T)); }
  bool read() { return fread(data.get(), sizeof(T), size, stdin) == size; }
  void write() const { fwrite(data.get(), sizeof(T), size, stdout); }
};

static void run_case(int64_t n, int64_t layers, int64_t budget, int64_t capacity) {
  Buffer<float> constants(3), scores(n), gains(capacity);
  Buffer<int64_t> widths(layers);
  Buffer<int32_t> error(1), indptr(layers + 1), indices(capacity);
  Buffer<char> workspace(neumuter::cuda::select_muted_workspace(n, layers));
  if (!constants.read() || !widths.read() || !scores.read()) throw std::runtime_error("truncated case");
  const float threshold = constants.data[0], gamma = constants.data[1], zeta = constants.data[2];
  error.data[0] = neumuter::cuda::select_muted(
      scores.data.get(), widths.data.get(), layers, n, budget, threshold, gamma, zeta, workspace.data.get(),
      indptr.data.get(), indices.data.get(), gains.data.get(), capacity, nullptr);
  error.write();
  indptr.write();
  indices.write();
  gains.write();
}

int main(int, char** arguments) {
  using cuda_emulation::Schedule;
  const std::string order = arguments[1];
  cuda_emulation::schedule = order == "forward"   ? Schedule::forward
                             : order == "reverse" ? Schedule::reverse
                                                  : Schedule::random;
  try {
    for (Buffer<int64_t> sizes(4); sizes.read();) {
      run_case(sizes.data[0], sizes.data[1], sizes.data[2], sizes.data[3]);
    }
  } catch (const std::exception& error) {
    fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
