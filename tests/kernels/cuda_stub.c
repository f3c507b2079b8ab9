// A CUDA driver without a GPU: it takes what Triton hands to a driver, refuses what a real one
// would refuse, and runs nothing. FASTRAG_STUB_ARCH is the compute capability, such as 90;
// FASTRAG_STUB_LOG names the file that gets a line for each launch and each tensor descriptor.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include "cuda.h"

// A wrong one would only be found by a launch.
#undef cuDevicePrimaryCtxRetain

typedef struct {
  char name[256];
} Function;

static int shared_limit(void) {
  int arch = atoi(getenv("FASTRAG_STUB_ARCH"));
  return (arch == 80 ? 163 : arch == 86 ? 99 : 227) << 10;
}

static void say(const char* text, const char* why) {
  FILE* log = fopen(getenv("FASTRAG_STUB_LOG"), "a");
  fprintf(log, "%s%s%s\n", text, why ? " refused: " : "", why ? why : "");
  fclose(log);
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = error == CUDA_ERROR_INVALID_VALUE ? "invalid argument" : "unknown";
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = shared_limit();
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = shared_limit() + 1024;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      *value = 65536;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = 132;
      break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      break;
    default:
      *value = 1 << 20;
  }
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }

CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return cuCtxGetCurrent(context);
}

CUresult cuCtxGetLimit(size_t* value, CUlimit limit) {
  *value = 1 << 20;
  return CUDA_SUCCESS;
}

CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  Function* made = malloc(sizeof(Function));
  snprintf(made->name, sizeof(made->name), "%s", name);
  *function = (CUfunction)made;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction function) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) {
  return value < 0 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction function, const CUlaunchConfig* config) {
  *n = 1;
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* data, CUpointer_attribute which, CUdeviceptr pointer) {
  *(CUdeviceptr*)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** parameters,
                          void** extra) {
  const char* why = NULL;
  if (!config->gridDimX || !config->gridDimY || !config->gridDimZ) why = "an empty grid";
  if (config->gridDimX > INT32_MAX || config->gridDimY > 65535 || config->gridDimZ > 65535)
    why = "a grid too large";
  if (config->blockDimX > 1024) why = "a block too large";
  if (config->sharedMemBytes > (unsigned)shared_limit()) why = "more shared memory than there is";
  char text[512];
  snprintf(text, sizeof(text), "launch %s grid %u,%u,%u block %u shared %u",
           ((Function*)function)->name, config->gridDimX, config->gridDimY, config->gridDimZ,
           config->blockDimX, config->sharedMemBytes);
  say(text, why);
  return why ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

// What the manual of the driver demands of its arguments.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* address, const cuuint64_t* sizes, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* element_strides,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  static const unsigned kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
  const unsigned span[] = {0, 32, 64, 128};
  const char* why = NULL;
  const unsigned inner = box[0] * kBytes[type];
  if ((uintptr_t)map % 64) why = "an unaligned descriptor";
  if ((uintptr_t)address % 16) why = "an unaligned address";
  if (rank != 2) why = "no matrix";
  for (unsigned i = 0; i < rank; ++i) {
    if (!sizes[i] || sizes[i] > 1ull << 32) why = "a size out of range";
    if (!box[i] || box[i] > 256) why = "a box out of range";
    if (element_strides[i] != 1) why = "strided elements";
  }
  if (strides[0] % 16 || strides[0] >= 1ull << 40) why = "a stride out of range";
  if (strides[0] < sizes[0] * kBytes[type]) why = "rows that overlap";
  if (inner % 16) why = "a box whose rows are no multiple of 16 bytes";
  if (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && inner > span[swizzle])
    why = "a box wider than the swizzle";
  char text[256];
  snprintf(text, sizeof(text), "descriptor %llu,%llu box %u,%u type %d",
           (unsigned long long)sizes[1], (unsigned long long)sizes[0], box[1], box[0], type);
  say(text, why);
  return why ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
