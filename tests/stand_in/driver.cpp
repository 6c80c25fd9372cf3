// What the program asks of NVIDIA's driver (libcuda) and compiler (NVRTC), as far as it does: this library is laid beside
// itself under their names. The compiler "compiles" the one source that it was built with, and refuses any other.
#include "stand_in.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <set>

// The text of the kernels, as it was when this was compiled.
__asm__(
    ".pushsection .rodata\n"
    "kernels_text: .incbin \"" KERNELS "\"\n"
    "kernels_text_end: .byte 0\n"
    ".popsection\n");
extern "C" const char kernels_text[], kernels_text_end[];

namespace stand_in {
namespace {

struct Program {
  std::string source, log, image;
};
// Handles are addresses of these.
int context = 0, module = 0;
constexpr int SUCCESS = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, NOT_FOUND = 500, COMPILATION_FAILED = 6;
const char MAGIC[] = "stand-in image of ";

}  // namespace
}  // namespace stand_in

using namespace stand_in;

extern "C" {

int cuInit(unsigned) { return SUCCESS; }
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? SUCCESS : INVALID_VALUE;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  const std::map<int, int> values{{16, options().multiprocessors}, {75, 8}, {76, 9}};
  auto found = values.find(attribute);
  if (found == values.end()) return INVALID_VALUE;
  *value = found->second;
  return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void** made, int) {
  *made = &context;
  return SUCCESS;
}
int cuCtxSetCurrent(void* wanted) { return wanted == &context ? SUCCESS : INVALID_VALUE; }
int cuModuleLoadData(void** made, const void* image) {
  const std::string wanted = std::string(MAGIC) + "sm_89\n";
  if (std::strncmp(static_cast<const char*>(image), wanted.c_str(), wanted.size()) != 0) return INVALID_IMAGE;
  *made = &module;
  return SUCCESS;
}
int cuModuleGetFunction(void** function, void* of, const char* name) {
  if (of != &module || !is_kernel(name)) return NOT_FOUND;
  static std::set<std::string> names;
  *function = const_cast<std::string*>(&*names.insert(name).first);
  return SUCCESS;
}
int cuLaunchKernel(void* function, unsigned x, unsigned y, unsigned z, unsigned lanes, unsigned, unsigned, unsigned,
                   void*, void** arguments, void**) {
  if (x == 0 || y != 1 || z != 1) return INVALID_VALUE;
  launch(*static_cast<std::string*>(function), x, lanes, arguments[0]);
  return SUCCESS;
}
int cuGetErrorString(int, const char** text) {
  *text = "an error of the stand-in";
  return SUCCESS;
}

int nvrtcVersion(int* major, int* minor) {
  *major = 13, *minor = 0;
  return SUCCESS;
}
int nvrtcGetNumSupportedArchs(int* count) {
  *count = 3;
  return SUCCESS;
}
int nvrtcGetSupportedArchs(int* architectures) {
  architectures[0] = 75, architectures[1] = 89, architectures[2] = 90;
  return SUCCESS;
}
int nvrtcCreateProgram(void** made, const char* source, const char*, int, const char* const*, const char* const*) {
  *made = new Program{source, "", ""};
  return SUCCESS;
}
int nvrtcCompileProgram(void* handle, int count, const char* const* given) {
  auto* program = static_cast<Program*>(handle);
  count_operator("compiled", 0);
  bool fused = true, architecture = false;
  for (int i = 0; i < count; i++) {
    fused = fused && std::strcmp(given[i], "--fmad=false") != 0;
    architecture = architecture || std::strcmp(given[i], "--gpu-architecture=sm_89") == 0;
  }
  if (options().no_kernels) program->log = "kernels.cu(1): error: not today (stand-in)\n";
  else if (program->source != kernels_text) program->log = "the stand-in was compiled with other kernels\n";
  else if (fused || !architecture) program->log = "the stand-in compiles without --fmad, for sm_89\n";
  if (!program->log.empty()) return COMPILATION_FAILED;
  program->image = std::string(MAGIC) + "sm_89\n";
  return SUCCESS;
}
int nvrtcGetCUBINSize(void* program, size_t* size) {
  *size = static_cast<Program*>(program)->image.size();
  return SUCCESS;
}
int nvrtcGetCUBIN(void* program, char* to) {
  const std::string& image = static_cast<Program*>(program)->image;
  std::memcpy(to, image.data(), image.size());
  return SUCCESS;
}
int nvrtcGetProgramLogSize(void* program, size_t* size) {
  *size = static_cast<Program*>(program)->log.size() + 1;
  return SUCCESS;
}
int nvrtcGetProgramLog(void* program, char* to) {
  const std::string& log = static_cast<Program*>(program)->log;
  std::memcpy(to, log.c_str(), log.size() + 1);
  return SUCCESS;
}
int nvrtcDestroyProgram(void** program) {
  delete static_cast<Program*>(*program);
  *program = nullptr;
  return SUCCESS;
}
// For cards that are newer than the compiler, which this one is not.
int nvrtcGetPTXSize(void*, size_t*) { return INVALID_VALUE; }
int nvrtcGetPTX(void*, char*) { return INVALID_VALUE; }
const char* nvrtcGetErrorString(int) { return "an error of the stand-in"; }

}  // extern "C"
