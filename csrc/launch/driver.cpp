#include "driver.h"

#include <dlfcn.h>
#include <torch/headeronly/util/Exception.h>

namespace neumuter::launch {

namespace {

using Status = int;  // CUresult
using Context = void*;
using Device = int;

constexpr Status kSuccess = 0, kInvalidValue = 1;

struct Driver {
  std::string missing;
  Status (*get_error_name)(Status, const char**) = nullptr;
  Status (*get_context)(Context*) = nullptr;
  Status (*set_context)(Context) = nullptr;
  Status (*get_device)(Device*, int) = nullptr;
  Status (*retain_context)(Context*, Device) = nullptr;
  Status (*parameter)(Function, std::size_t, std::size_t*, std::size_t*) = nullptr;
  Status (*launch)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Stream,
                   void**, void**) = nullptr;

  Driver() {
    // Never closed: kernels are launched until the process ends.
    void* library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
    if (library == nullptr) {
      const char* error = dlerror();
      missing = std::string("libcuda.so.1 does not load: ") + (error ? error : "no reason given");
      return;
    }
    find(library, "cuGetErrorName", get_error_name);
    find(library, "cuCtxGetCurrent", get_context);
    find(library, "cuCtxSetCurrent", set_context);
    find(library, "cuDeviceGet", get_device);
    find(library, "cuDevicePrimaryCtxRetain", retain_context);
    find(library, "cuFuncGetParamInfo", parameter);
    find(library, "cuLaunchKernel", launch);
  }

  void check(Status status, const char* what) const {
    if (status == kSuccess) return;
    const char* name = nullptr;
    if (get_error_name(status, &name) != kSuccess || name == nullptr) name = "an unknown error";
    STD_TORCH_CHECK(false, what, ": CUDA's driver says ", name, " (", status, ")");
  }

 private:
  template <typename F>
  void find(void* library, const char* name, F*& function) {
    function = reinterpret_cast<F*>(dlsym(library, name));
    if (function == nullptr) missing = std::string("libcuda.so.1 has no ") + name;
  }
};

const Driver& driver() {
  static const Driver found;
  return found;
}

}  // namespace

const std::string& why_no_driver() { return driver().missing; }

std::vector<std::pair<std::size_t, std::size_t>> parameters_of(Function kernel) {
  const Driver& d = driver();
  STD_TORCH_CHECK(d.missing.empty(), d.missing);
  std::vector<std::pair<std::size_t, std::size_t>> found;
  while (true) {
    std::size_t offset = 0, size = 0;
    const Status status = d.parameter(kernel, found.size(), &offset, &size);
    if (status == kInvalidValue) return found;  // there are no more
    d.check(status, "cuFuncGetParamInfo");
    found.emplace_back(offset, size);
  }
}

void launch_kernel(Function kernel, const Shape& shape, int32_t device, Stream stream, void** parameters) {
  const Driver& d = driver();
  // A thread in which nothing of CUDA has run yet has no context. CUDA's runtime would make it one.
  Context context = nullptr;
  d.check(d.get_context(&context), "cuCtxGetCurrent");
  if (context == nullptr) {
    Device number = 0;
    d.check(d.get_device(&number, device), "cuDeviceGet");
    d.check(d.retain_context(&context, number), "cuDevicePrimaryCtxRetain");
    d.check(d.set_context(context), "cuCtxSetCurrent");
  }
  d.check(d.launch(kernel, shape.grid[0], shape.grid[1], shape.grid[2], shape.threads, 1, 1, shape.shared,
                   stream, parameters, nullptr),
          "cuLaunchKernel");
}

}  // namespace neumuter::launch
