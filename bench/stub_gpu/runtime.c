// CUDA's runtime as torch uses it, for GPUs that are not there: memory is the processor's, kernels do not run, and
// whatever waits returns at once. Preloaded, it takes the place of libcudart. What torch does above it is real, so
// the processor's time of torch can be measured without a GPU, less the driver's own.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEVICES 2
#define ALIGNMENT 512
#define OK cudaSuccess
#define RETURNS_OK(name, ...) \
  cudaError_t name(__VA_ARGS__) { return OK; }

static __thread int current;
// Bytes that may be allocated at most; a test may change it.
size_t stub_memory = (size_t)8 << 30;
static size_t allocated;
static enum cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;

cudaError_t cudaGetDeviceCount(int *count) { return *count = DEVICES, OK; }
cudaError_t cudaGetDevice(int *device) { return *device = current, OK; }
cudaError_t cudaSetDevice(int device) { return current = device, OK; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { return *can = a != b, OK; }
RETURNS_OK(cudaDeviceEnablePeerAccess, int device, unsigned flags)
RETURNS_OK(cudaDeviceSynchronize, void)
RETURNS_OK(cudaGetLastError, void)
RETURNS_OK(cudaPeekAtLastError, void)
cudaError_t cudaDriverGetVersion(int *version) { return *version = CUDART_VERSION, OK; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = CUDART_VERSION, OK; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "a GPU that is not there");
  p->major = 9;
  p->minor = 0;
  p->warpSize = 32;
  p->multiProcessorCount = 132;
  p->totalGlobalMem = stub_memory;
  p->sharedMemPerBlock = 48 << 10;
  p->sharedMemPerBlockOptin = 227 << 10;
  p->sharedMemPerMultiprocessor = 228 << 10;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->l2CacheSize = 50 << 20;
  for (int i = 0; i < 3; ++i) {
    p->maxThreadsDim[i] = i < 2 ? 1024 : 64;
    p->maxGridSize[i] = i ? 65535 : 2147483647;
  }
  return OK;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  struct cudaDeviceProp p;
  cudaGetDeviceProperties(&p, device);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: return *value = p.major, OK;
    case cudaDevAttrComputeCapabilityMinor: return *value = p.minor, OK;
    case cudaDevAttrMultiProcessorCount: return *value = p.multiProcessorCount, OK;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return *value = p.maxThreadsPerMultiProcessor, OK;
    default: return *value = 1024, OK;
  }
}

// Each block is preceded by its size, so that what is free is known.
static cudaError_t allocate(void **p, size_t bytes) {
  if (allocated + bytes > stub_memory) return cudaErrorMemoryAllocation;
  char *start = aligned_alloc(ALIGNMENT, (bytes + 2 * ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
  *(size_t *)start = bytes;
  allocated += bytes;
  return *p = start + ALIGNMENT, OK;
}
static cudaError_t release(void *p) {
  if (p == NULL) return OK;
  char *start = (char *)p - ALIGNMENT;
  allocated -= *(size_t *)start;
  return free(start), OK;
}
cudaError_t cudaMalloc(void **p, size_t bytes) { return allocate(p, bytes); }
cudaError_t cudaFree(void *p) { return release(p); }
cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned flags) { return allocate(p, bytes); }
cudaError_t cudaFreeHost(void *p) { return release(p); }
cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
  return *unused = stub_memory - allocated, *total = stub_memory, OK;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
  memset(a, 0, sizeof *a);
  a->type = cudaMemoryTypeUnregistered;
  return OK;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
  return memcpy(to, from, bytes), OK;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, cudaStream_t s) {
  return memcpy(to, from, n), OK;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t s) {
  return memset(to, value, bytes), OK;
}

static cudaError_t create(void *made) {
  static size_t last = 0x5000;
  return *(size_t *)made = __sync_add_and_fetch(&last, 16), OK;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) { return create(s); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { return create(s); }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *most) { return *least = 0, *most = -5, OK; }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) { return *priority = 0, OK; }
RETURNS_OK(cudaStreamDestroy, cudaStream_t s)
RETURNS_OK(cudaStreamQuery, cudaStream_t s)
RETURNS_OK(cudaStreamSynchronize, cudaStream_t s)
RETURNS_OK(cudaStreamWaitEvent, cudaStream_t s, cudaEvent_t e, unsigned flags)
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { return create(e); }
RETURNS_OK(cudaEventDestroy, cudaEvent_t e)
RETURNS_OK(cudaEventQuery, cudaEvent_t e)
RETURNS_OK(cudaEventRecord, cudaEvent_t e, cudaStream_t s)
RETURNS_OK(cudaEventRecordWithFlags, cudaEvent_t e, cudaStream_t s, unsigned flags)
RETURNS_OK(cudaEventSynchronize, cudaEvent_t e)

RETURNS_OK(cudaThreadExchangeStreamCaptureMode, enum cudaStreamCaptureMode *mode)
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
  return *status = capturing, OK;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                     const cudaGraphEdgeData **edges, size_t *count) {
  if (id) *id = capturing != cudaStreamCaptureStatusNone;
  if (graph) *graph = NULL;
  if (count) *count = 0;
  return *status = capturing, OK;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) {
  return capturing = cudaStreamCaptureStatusActive, OK;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
  return capturing = cudaStreamCaptureStatusNone, create(graph);
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t graph, unsigned long long flags) {
  return create(made);
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) { return *count = 1, OK; }
RETURNS_OK(cudaGraphDestroy, cudaGraph_t graph)
RETURNS_OK(cudaGraphExecDestroy, cudaGraphExec_t graph)

cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t s) {
  return OK;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t s) {
  return OK;
}
RETURNS_OK(cudaLaunchKernelExC, const cudaLaunchConfig_t *config, const void *f, void **arguments)
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *f) { return *kernel = (cudaKernel_t)f, OK; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  return OK;
}
RETURNS_OK(cudaFuncSetAttribute, const void *f, enum cudaFuncAttribute attribute, int value)
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *f, int n, size_t shared) {
  return *blocks = 8, OK;
}

static __thread struct {
  dim3 grid, block;
  size_t shared;
  void *stream;
} configuration;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  configuration.grid = grid;
  configuration.block = block;
  configuration.shared = shared;
  configuration.stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *(void **)stream = configuration.stream;
  return OK;
}
void **__cudaRegisterFatBinary(void *binary) {
  static void *handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, void *t,
                            void *b, void *bd, void *gd, int *w) {}
void __cudaRegisterVar(void **handle, char *host, char *device, const char *name, int extern_, size_t size,
                       int constant, int global) {}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *found) {
  void *library = dlopen("libcuda.so.1", RTLD_LAZY);
  *f = library ? dlsym(library, name) : NULL;
  if (found) *found = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return OK;
}
