// A CUDA runtime without a GPU: stores the names of the kernels that a library registers, and passes each launch to a callback.
// Sufficient for libraries that only launch.
#include <cstddef>
#include <map>
#include <string>

namespace {

struct Dimensions {
  unsigned x, y, z;
};
struct Config {  // cudaLaunchConfig_t
  Dimensions grid, block;
  size_t shared_bytes;
  void* stream;
  void* attributes;
  unsigned num_attributes;
};
using Callback = int (*)(const char* kernel, const unsigned* grid_and_block, void** arguments);

constexpr int INVALID_CONFIGURATION = 9, INVALID_DEVICE_FUNCTION = 98;

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}

Callback callback = nullptr;
Config pushed{};

int start(const void* function, Dimensions grid, Dimensions block, void** arguments, size_t shared_bytes) {
  const auto found = kernels().find(function);
  if (found == kernels().end()) return INVALID_DEVICE_FUNCTION;
  const unsigned long long threads = 1ull * block.x * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535 || !threads || threads > 1024 ||
      block.z > 64 || shared_bytes > 227 * 1024)
    return INVALID_CONFIGURATION;
  const unsigned sizes[6] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  return callback(found->second.c_str(), sizes, arguments);
}

}  // namespace

extern "C" {
void set_launch_callback(Callback function) { callback = function; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kernels()[host] = name;
}
int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return 0;
}
int cudaLaunchKernelExC(const Config* config, const void* function, void** arguments) {
  return start(function, config->grid, config->block, arguments, config->shared_bytes);
}
int cudaLaunchKernel(const void* function, Dimensions grid, Dimensions block, void** arguments, size_t shared_bytes, void*) {
  return start(function, grid, block, arguments, shared_bytes);
}
int __cudaLaunchKernel(const void* function, Dimensions grid, Dimensions block, void** arguments, size_t shared_bytes, void*) {
  return start(function, grid, block, arguments, shared_bytes);
}
unsigned __cudaPushCallConfiguration(Dimensions grid, Dimensions block, size_t shared_bytes, void* stream) {
  pushed = {grid, block, shared_bytes, stream, nullptr, 0};
  return 0;
}
int __cudaPopCallConfiguration(Dimensions* grid, Dimensions* block, size_t* shared_bytes, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared_bytes = pushed.shared_bytes;
  *static_cast<void**>(stream) = pushed.stream;
  return 0;
}
}
