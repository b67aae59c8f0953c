#include "plan.h"

#include <pthread.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <span>
#include <unordered_map>

// Weak, so that the extension also loads with a torch without CUDA, which never calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace neumuter::launch {

namespace {

using Key = std::span<const int64_t>;

struct Hash {
  using is_transparent = void;
  std::size_t operator()(Key key) const {
    uint64_t hash = key.size();
    for (int64_t x : key) {
      hash = (hash ^ static_cast<uint64_t>(x)) * 0x9E3779B97F4A7C15u;
      hash ^= hash >> 32;
    }
    return hash;
  }
};

struct Equal {
  using is_transparent = void;
  bool operator()(Key a, Key b) const { return std::equal(a.begin(), a.end(), b.begin(), b.end()); }
};

class Plans {
 public:
  std::shared_ptr<const Plan> find(Key key) {
    // In a child process the lock may be held by a thread that is not there; and CUDA does not work in it.
    if (forked_) return nullptr;
    const std::shared_lock lock(mutex_);
    const auto found = plans_.find(key);
    return found == plans_.end() ? nullptr : found->second;
  }

  void learn(std::vector<int64_t> key, Plan plan) {
    if (forked_) return;
    const std::unique_lock lock(mutex_);
    if (plans_.size() >= kMostPlans) plans_.clear();
    plans_[std::move(key)] = std::make_shared<const Plan>(std::move(plan));
  }

  void forget() {
    const std::unique_lock lock(mutex_);
    plans_.clear();
  }

  std::size_t size() {
    const std::shared_lock lock(mutex_);
    return plans_.size();
  }

  static Plans& all() {
    // Never destroyed: threads may outlive the end of main.
    static Plans& plans = *new Plans;
    return plans;
  }

 private:
  Plans() {
    pthread_atfork(nullptr, nullptr, [] { forked_ = true; });
  }

  static inline std::atomic<bool> forked_ = false;
  std::shared_mutex mutex_;
  std::unordered_map<std::vector<int64_t>, std::shared_ptr<const Plan>, Hash, Equal> plans_;
};

bool is_aligned(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % kAlignment == 0; }

Stream current_stream(int32_t device) {
  Stream stream = nullptr;
  const AOTITorchError error = aoti_torch_get_current_cuda_stream(device, &stream);
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "cannot get the current CUDA stream of device ", device);
  return stream;
}

// Nothing if torch cannot allocate it.
std::optional<Tensor> allocate(const Allocation& x, int32_t device) {
  AtenTensorHandle made = nullptr;
  const AOTITorchError error =
      aoti_torch_empty_strided(static_cast<int64_t>(x.sizes.size()), x.sizes.data(), x.strides.data(),
                               static_cast<int32_t>(x.dtype), aoti_torch_device_type_cuda(), device, &made);
  if (error != AOTI_TORCH_SUCCESS) return std::nullopt;
  return Tensor(made);
}

}  // namespace

void Call::add(const Tensor& x) {
  const int64_t dim = x.dim();
  const int64_t *sizes = x.sizes().data(), *strides = x.strides().data();
  const int32_t device = x.get_device_index();
  if (device_ < 0) device_ = device;
  char* address = static_cast<char*>(x.data_ptr());
  addresses_.push_back(address);
  add(dim);
  add(static_cast<int64_t>(x.scalar_type()));
  add(static_cast<int64_t>(x.is_cuda()));
  add(static_cast<int64_t>(device));
  add(is_aligned(address));
  for (int64_t i = 0; i < dim; ++i) add(sizes[i]);
  for (int64_t i = 0; i < dim; ++i) add(strides[i]);
}

void Call::add(const std::optional<Tensor>& x) {
  if (x) return add(*x);
  addresses_.push_back(nullptr);
  add(int64_t{-1});
}

std::optional<std::vector<Tensor>> Call::repeat() const {
  const auto plan = length_ <= kLongest ? Plans::all().find(Key(key_.data(), length_)) : nullptr;
  if (plan == nullptr) return std::nullopt;
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (torch::stable::accelerator::getCurrentDeviceIndex() != device_) guard.emplace(device_);

  std::vector<char*> addresses = addresses_;
  std::vector<Tensor> made;
  made.reserve(plan->allocations.size());
  for (const Allocation& allocation : plan->allocations) {
    std::optional<Tensor> x = allocate(allocation, device_);
    if (!x) return std::nullopt;
    char* address = static_cast<char*>(x->data_ptr());
    if (is_aligned(address) != allocation.aligned) return std::nullopt;
    addresses.push_back(address);
    made.push_back(std::move(*x));
  }
  const Stream stream = current_stream(device_);
  std::vector<uint64_t> values;
  std::vector<void*> pointers;
  for (const Launch& launch : plan->launches) {
    const std::size_t n = launch.parameters.size();
    values.resize(n);
    pointers.resize(n);
    for (std::size_t i = 0; i < n; ++i) {
      const Parameter& parameter = launch.parameters[i];
      const uint64_t start =
          parameter.tensor == kNoTensor ? 0 : reinterpret_cast<std::uintptr_t>(addresses[parameter.tensor]);
      values[i] = start + parameter.value;
      pointers[i] = &values[i];  // little-endian: a narrower number is in its first bytes
    }
    launch_kernel(launch.kernel, launch.shape, device_, stream, pointers.data());
  }
  std::vector<Tensor> outputs;
  outputs.reserve(plan->outputs.size());
  for (int output : plan->outputs) outputs.push_back(made[output]);
  return outputs;
}

void learn(std::vector<int64_t> key, Plan plan) { Plans::all().learn(std::move(key), std::move(plan)); }
void forget() { Plans::all().forget(); }
std::size_t known() { return Plans::all().size(); }

}  // namespace neumuter::launch
