// Calls of an op on GPU tensors that were seen before, repeated without Python.
//
// The kernels are Triton's, and Python knows how to launch them. At the first call of each kind it does, and
// notes what it did: which tensors it allocated, which kernels it launched, and where every argument came
// from. That is a plan. A later call of the same kind (the same dtypes, sizes, strides, alignments and
// numbers, which is all that Python and Triton look at) allocates and launches the same with the addresses of
// its own tensors.
#pragma once

#include <array>
#include <bit>
#include <optional>
#include <string>
#include <vector>

#include "../tensors.h"
#include "driver.h"

namespace neumuter::launch {

// A contiguous or strided tensor to allocate. aligned: whether its address is a multiple of kAlignment.
struct Allocation {
  std::vector<int64_t> sizes, strides;
  ScalarType dtype;
  bool aligned;
};

// Triton compiles other code for addresses that are multiples of it.
constexpr std::uintptr_t kAlignment = 16;
constexpr int kNoTensor = -1;

// A number (kNoTensor), or an address in tensor number `tensor`: first the call's tensors, then the
// allocations.
struct Parameter {
  int tensor;
  uint64_t value;  // the number's bits, or the distance from the tensor's first element in bytes
};

struct Launch {
  Function kernel;
  Shape shape;
  std::vector<Parameter> parameters;
};

struct Plan {
  std::vector<Allocation> allocations;
  std::vector<Launch> launches;
  std::vector<int> outputs;  // numbers of allocations
};

// What a call of an op is, in numbers.
class Call {
 public:
  explicit Call(int64_t op) { add(op); }

  void add(const Tensor& x);
  void add(const std::optional<Tensor>& x);
  void add(int64_t x) {
    if (length_ < kLongest) key_[length_] = x;
    ++length_;
  }
  void add(bool x) { add(static_cast<int64_t>(x)); }
  void add(double x) { add(std::bit_cast<int64_t>(x)); }

  // Empty for tensors of so many dimensions that there is no plan for them.
  std::vector<int64_t> key() const {
    return length_ <= kLongest ? std::vector<int64_t>{key_.begin(), key_.begin() + length_}
                               : std::vector<int64_t>{};
  }

  // The outputs, or nothing if there is no plan or no memory.
  std::optional<std::vector<Tensor>> repeat() const;

 private:
  static constexpr std::size_t kLongest = 128;

  std::array<int64_t, kLongest> key_;
  std::size_t length_ = 0;
  std::vector<char*> addresses_;  // null: not given
  int32_t device_ = -1;           // of the first tensor
};

// The plan of the calls with that key. Past kMostPlans, all are forgotten.
constexpr std::size_t kMostPlans = 4096;
void learn(std::vector<int64_t> key, Plan plan);
void forget();
std::size_t known();

}  // namespace neumuter::launch
