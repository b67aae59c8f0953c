// CUDA's driver as Triton and csrc/launch use it, for GPUs that are not there: it reads what a compiled kernel says
// of itself, and notes launches instead of making them. It is libcuda.so.1 where its folder comes first.
#include <cuda.h>
#include <elf.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MOST_PARAMETERS 64
#define MOST_NOTED 64

struct CUfunc_st {
  int registers, parameters, more;
  size_t offsets[MOST_PARAMETERS], sizes[MOST_PARAMETERS];
};

struct stub_launch {
  uint64_t kernel, stream, device;
  uint32_t grid[3], block[3], shared, parameters;
  uint64_t values[MOST_PARAMETERS];
};

// The last launches, and how many there were in all. A test may set stub_error, which the next launch returns, and
// stub_more_parameters, how many more than they have kernels that are loaded then say they have.
struct stub_launch stub_noted[MOST_NOTED];
uint64_t stub_count;
int stub_note = 1, stub_error, stub_more_parameters;

static __thread uintptr_t context;  // 1 + the device; 0: none

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = 2, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *c) { return *c = (CUcontext)context, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext c) { return context = (uintptr_t)c, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = (int)context - 1, CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice device) {
  return *c = (CUcontext)(uintptr_t)(device + 1), CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = "a stub's error", CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult error, const char **name) {
  return *name = error == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR_LAUNCH_FAILED",
         CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr p) {
  return *(CUdeviceptr *)data = p, CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: *value = 48 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = 227 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 228 << 10; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 1; break;
  }
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) { return *module = (CUmodule)image, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }

// Of .nv.info.KERNEL: records of a format, an attribute and 16 bits, which format 4 uses for a length.
static void read_parameters(CUfunction f, const unsigned char *at, const unsigned char *end) {
  while (at < end) {
    const unsigned length = at[2] | at[3] << 8;
    if (at[0] == 4 && at[1] == 0x17) {  // a parameter: index, ordinal and offset, bits of which 14 are the size
      uint16_t place[2];
      uint32_t bits;
      memcpy(place, at + 8, 4);
      memcpy(&bits, at + 12, 4);
      f->offsets[place[0]] = place[1];
      f->sizes[place[0]] = bits >> 18;
      if (f->parameters <= place[0]) f->parameters = place[0] + 1;
    }
    at += at[0] == 4 ? 4 + length : 4;
  }
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  const char *image = (const char *)module;
  const Elf64_Ehdr *header = (const Elf64_Ehdr *)image;
  const Elf64_Shdr *sections = (const Elf64_Shdr *)(image + header->e_shoff);
  const char *names = image + sections[header->e_shstrndx].sh_offset;
  CUfunction f = calloc(1, sizeof *f);
  for (int i = 0; i < header->e_shnum; ++i) {
    const char *section = names + sections[i].sh_name;
    const unsigned char *start = (const unsigned char *)image + sections[i].sh_offset;
    if (!strncmp(section, ".nv.info.", 9) && !strcmp(section + 9, name)) {
      read_parameters(f, start, start + sections[i].sh_size);
    } else if (!strncmp(section, ".text.", 6) && !strcmp(section + 6, name)) {
      f->registers = sections[i].sh_info >> 24;
    }
  }
  f->more = stub_more_parameters;
  return *function = f, CUDA_SUCCESS;
}

CUresult cuFuncGetParamInfo(CUfunction f, size_t index, size_t *offset, size_t *size) {
  if (index >= (size_t)(f->parameters + f->more)) return CUDA_ERROR_INVALID_VALUE;
  *offset = f->offsets[index];
  *size = index < (size_t)f->parameters ? f->sizes[index] : 8;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction f) {
  *value = attribute == CU_FUNC_ATTRIBUTE_NUM_REGS               ? f->registers
           : attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
                                                                  : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                        unsigned bz, unsigned shared, CUstream stream, void **parameters, void **extra) {
  const CUresult error = stub_error;
  if (error != CUDA_SUCCESS) return stub_error = 0, error;
  const uint64_t count = __sync_fetch_and_add(&stub_count, 1);
  if (!stub_note) return CUDA_SUCCESS;
  struct stub_launch *noted = &stub_noted[count % MOST_NOTED];
  *noted = (struct stub_launch){(uintptr_t)f, (uintptr_t)stream, context - 1, {gx, gy, gz}, {bx, by, bz}, shared};
  noted->parameters = f->parameters;
  for (int i = 0; i < f->parameters; ++i) memcpy(&noted->values[i], parameters[i], f->sizes[i]);
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **parameters, void **extra) {
  return cuLaunchKernel(f, c->gridDimX, c->gridDimY, c->gridDimZ, c->blockDimX, c->blockDimY, c->blockDimZ,
                        c->sharedMemBytes, c->hStream, parameters, extra);
}
