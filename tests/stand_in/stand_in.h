// A CUDA device for machines that have none, for the tests.
//
// Compiled to `libtorch_cuda.so` and laid beside the CPU build of libtorch_cpu.so, it registers what the real library
// would under the dispatch key CUDA, which a CPU build leaves free: an allocator, a device guard, hooks and kernels. The
// kernels are the CPU's, on the same bytes. What is "on the device" lies in host memory that only these kernels may
// touch: a read or write from elsewhere ends the program with a message.
//
// It cannot show what only a real card shows: streams, errors that arrive late, cuDNN, results that depend on the
// schedule, fragmentation of memory.
//
// Variables of the environment:
//   STAND_IN_REPORT=FILE   counts as one JSON object, written when the program ends
//   STAND_IN_LIMIT=BYTES   memory of the device; an allocation beyond it is "out of memory"
//   STAND_IN_FENCE=1       keeps the host out also where that is slow: the processor has no protection keys
//   STAND_IN_NO_F64=1      refuses tensors of f64, as Apple's GPUs do
//   STAND_IN_SHAPES=1      large operators give results of the right shapes and of no particular values: networks of any
//                          size in little memory and time, for counts and peaks
//   STAND_IN_MULTIPROCESSORS=N   so many, 4 without; a launch has a multiple of them in blocks
//   STAND_IN_NO_KERNELS=1    NVRTC fails: the program's own kernels cannot be had
//   STAND_IN_WRONG_KERNELS=1 one of them gives a wrong number
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace stand_in {

using at::Tensor;
using torch::jit::Stack;

inline const c10::Device DEVICE(c10::DeviceType::CUDA, 0);

struct Options {
  bool fence, no_f64, shapes_only, no_kernels, wrong_kernels;
  int multiprocessors;
  int64_t limit;
  std::string report;
};
const Options& options();

// ---- memory.cpp

// While one lives, this thread may touch the device's memory.
struct OnDevice {
  OnDevice();
  ~OnDevice();
};

c10::Allocator* allocator();
// Whether an address lies in memory that the device has, or had.
bool is_device_memory(const void* address);
void start_memory();

// ---- counts.cpp

void count_operator(const std::string& name, int64_t bytes);
enum class Way { Up, Down, Within };
// A copy by `copy_`. Scalars that the host reads are counted as downloads of their own.
void count_copy(Way way, int64_t bytes);
void count_scalar();
// `change` bytes more (or fewer) in use.
void count_memory(int64_t change);
int64_t in_use();
void start_counts();

// ---- views.cpp

// The same bytes, as a tensor of the CPU.
Tensor as_cpu(const Tensor& tensor);
// A copy in the device's memory.
Tensor to_device(const Tensor& cpu);
int64_t bytes_of(const Tensor& tensor);
// The address of the tensor's storage, without libtorch's checks.
char* storage_of(const Tensor& tensor);
void refuse_f64(const std::string& where, at::ScalarType type);

// ---- kernels.cpp

// Of the program's own, by their names.
bool is_kernel(const std::string& name);
void launch(const std::string& name, unsigned grid, unsigned lanes, const void* argument);

// ---- shapes.cpp

// Replaces the arguments on the stack, which begin at `first`, by results of the right shapes.
void run_for_shapes(const c10::OperatorHandle& op, const std::string& name, Stack* stack, size_t first);

}  // namespace stand_in
