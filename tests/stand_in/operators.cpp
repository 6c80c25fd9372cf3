// Every operator that has no entry of its own here: the CPU's kernel, on the device's bytes.
#include "stand_in.h"

#include <torch/library.h>

#include <set>

namespace stand_in {
namespace {

// Arguments on the device, each with its view of the CPU and the sizes that it came with.
struct Argument {
  Tensor device, view;
  std::vector<int64_t> sizes;
};

class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack* stack)
      : op(op), schema(op.schema()), stack(stack), first(stack->size() - schema.arguments().size()) {
    name = schema.name();
    if (!schema.overload_name().empty()) name += "." + schema.overload_name();
  }

  void run() {
    for (size_t i = 0; i < schema.arguments().size(); i++) take((*stack)[first + i], schema.arguments()[i].name());
    // Small tensors have their values: indices, timesteps, learning rates.
    if (options().shapes_only && (bytes >= (1 << 16) || name == "aten::bincount")) {
      run_for_shapes(op, name, stack, first);
    } else {
      OnDevice here;
      at::AutoDispatchBelowADInplaceOrView below;
      op.callBoxed(stack);
    }
    for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); i++) give((*stack)[i]);
    count_operator(name, bytes);
  }

 private:
  // An argument, as the CPU's kernel takes it.
  void take(c10::IValue& value, const std::string& argument) {
    if (value.isTensor()) {
      value = cpu(value.toTensor(), argument);
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(cpu(tensor, argument));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector())
        list.push_back(tensor ? std::optional(cpu(*tensor, argument)) : std::nullopt);
      value = list;
    } else if (value.isDevice()) {
      value = c10::Device(at::kCPU);
    }
  }

  Tensor cpu(const Tensor& tensor, const std::string& argument) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_cuda()) {
      // As on a real card: numbers may be of the host, and indices.
      static const std::set<std::string> indexing{"aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_",
                                                  "aten::index.Tensor_out"};
      TORCH_CHECK(tensor.dim() == 0 || indexing.count(name),
                  "Expected all tensors to be on the same device, but got ", argument, " is on ", tensor.device(),
                  ", different from other tensors on ", DEVICE, " (when checking argument in method ", name, ")");
      return tensor;
    }
    refuse_f64(name, tensor.scalar_type());
    for (auto& known : arguments)
      if (known.device.is_same(tensor)) return known.view;
    bytes += bytes_of(tensor);
    arguments.push_back({tensor, as_cpu(tensor), tensor.sizes().vec()});
    return arguments.back().view;
  }

  // A result, as a tensor of the device.
  void give(c10::IValue& value) {
    if (value.isTensor()) {
      value = device(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(device(tensor));
      value = list;
    }
  }

  Tensor device(const Tensor& tensor) {
    if (!tensor.defined() || tensor.is_cuda()) return tensor;
    for (auto& argument : arguments) {
      if (!argument.view.is_same(tensor)) continue;
      if (tensor.sizes() != at::IntArrayRef(argument.sizes)) {
        // An output that was given another size: the kernel has put it into memory of the host.
        Tensor moved = to_device(tensor);
        argument.device.unsafeGetTensorImpl()->set_storage_keep_dtype(moved.storage());
        argument.device.unsafeGetTensorImpl()->set_sizes_and_strides(moved.sizes(), moved.strides(), 0);
      }
      return argument.device;
    }
    refuse_f64(name, tensor.scalar_type());
    bytes += bytes_of(tensor);
    const auto* start = static_cast<const char*>(tensor.const_data_ptr());
    if (tensor.numel() > 0 && is_device_memory(start)) {
      // A view of one of the arguments.
      for (auto& argument : arguments) {
        const char* storage = storage_of(argument.device);
        if (start < storage || start >= storage + argument.device.storage().nbytes()) continue;
        return argument.device.as_strided(tensor.sizes(), tensor.strides(), (start - storage) / tensor.element_size());
      }
    }
    return to_device(tensor);
  }

  const c10::OperatorHandle& op;
  const c10::FunctionSchema& schema;
  Stack* stack;
  size_t first;
  std::string name;
  std::vector<Argument> arguments;
  int64_t bytes = 0;
};

void fallback(const c10::OperatorHandle& op, Stack* stack) { Call(op, stack).run(); }

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  // What these have for all devices looks for code of this one.
  for (const char* name : {"convolution", "convolution_backward", "native_group_norm", "native_layer_norm"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

}  // namespace stand_in
