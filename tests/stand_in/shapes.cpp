// Results of the right shapes without their values, for counts and peaks of networks of any size.
//
// Most operators have a function of shapes in libtorch, under the device "meta". A few have theirs in PyTorch's Python
// only: those are here.
#include "stand_in.h"

#include <ATen/WrapDimUtils.h>
#include <ATen/native/ConvUtils.h>

#include <unordered_map>

namespace stand_in {
namespace {

using Arguments = c10::ArrayRef<c10::IValue>;
using Results = std::vector<c10::IValue>;

Tensor fresh(at::IntArrayRef size, const Tensor& like) { return at::empty(size, like.options().device(DEVICE)); }
Tensor fresh_float(at::IntArrayRef size) { return at::empty(size, at::TensorOptions().dtype(at::kFloat).device(DEVICE)); }
Tensor where(bool wanted, at::IntArrayRef size, const Tensor& like) { return wanted ? fresh(size, like) : Tensor(); }

Results convolution(Arguments a) {
  Tensor x = a[0].toTensor(), weight = a[1].toTensor();
  return {fresh(at::native::conv_output_size(x.sizes(), weight.sizes(), a[4].toIntVector(), a[3].toIntVector(), a[5].toIntVector()), x)};
}
Results convolution_backward(Arguments a) {
  Tensor x = a[1].toTensor(), weight = a[2].toTensor();
  auto mask = a[10].toBoolList();
  return {where(mask[0], x.sizes(), x), where(mask[1], weight.sizes(), weight), where(mask[2], {weight.size(0)}, weight)};
}
Results index_select(Arguments a) {
  Tensor x = a[0].toTensor();
  auto size = x.sizes().vec();
  size[at::maybe_wrap_dim(a[1].toInt(), x.dim())] = a[2].toTensor().numel();
  return {fresh(size, x)};
}
Results group_norm(Arguments a) {
  Tensor x = a[0].toTensor();
  const int64_t batch = a[3].toInt(), groups = a[6].toInt();
  return {fresh(x.sizes(), x), fresh({batch, groups}, x), fresh({batch, groups}, x)};
}
Results group_norm_backward(Arguments a) {
  Tensor x = a[1].toTensor();
  const int64_t channels = a[6].toInt();
  auto mask = a[9].toBoolList();
  return {where(mask[0], x.sizes(), x), where(mask[1], {channels}, x), where(mask[2], {channels}, x)};
}
Results layer_norm(Arguments a) {
  Tensor x = a[0].toTensor();
  auto rows = x.sizes().vec();
  for (size_t i = 0; i < a[1].toIntVector().size(); i++) rows[rows.size() - 1 - i] = 1;
  return {fresh(x.sizes(), x), fresh_float(rows), fresh_float(rows)};
}
Results layer_norm_backward(Arguments a) {
  Tensor x = a[1].toTensor();
  auto size = a[2].toIntVector();
  auto mask = a[7].toBoolList();
  return {where(mask[0], x.sizes(), x), where(mask[1], size, x), where(mask[2], size, x)};
}
// As if all were in the bin of zero: the lowest of codes.
Results bincount(Arguments a) {
  const bool weighted = a[1].isTensor() && a[1].toTensor().defined();
  Tensor counts = at::zeros({std::max<int64_t>(a[2].toInt(), 1)}, at::TensorOptions().dtype(weighted ? at::kFloat : at::kLong));
  if (!weighted) counts[0] = a[0].toTensor().numel();
  return {to_device(counts)};
}

const std::unordered_map<std::string, Results (*)(Arguments)> BY_HAND{
    {"aten::convolution", convolution},
    {"aten::convolution_backward", convolution_backward},
    {"aten::index_select", index_select},
    {"aten::native_group_norm", group_norm},
    {"aten::native_group_norm_backward", group_norm_backward},
    {"aten::native_layer_norm", layer_norm},
    {"aten::native_layer_norm_backward", layer_norm_backward},
    {"aten::bincount", bincount},
};

Tensor meta(const Tensor& tensor) {
  if (!tensor.defined()) return tensor;
  return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kMeta));
}

// By the meta device.
Results by_meta(const c10::OperatorHandle& op, Arguments arguments) {
  Stack stack;
  for (const c10::IValue& value : arguments) {
    if (value.isTensor()) {
      stack.push_back(meta(value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(meta(tensor));
      stack.push_back(list);
    } else if (value.isDevice()) {
      stack.push_back(c10::Device(at::kMeta));
    } else {
      stack.push_back(value);
    }
  }
  at::AutoDispatchBelowADInplaceOrView below;
  op.callBoxed(&stack);
  Results results;
  for (const c10::IValue& value : stack) {
    const bool tensor = value.isTensor() && value.toTensor().defined();
    results.push_back(!tensor ? value
                              : c10::IValue(at::empty_strided(value.toTensor().sizes(), value.toTensor().strides(),
                                                              value.toTensor().options().device(DEVICE))));
  }
  return results;
}

}  // namespace

void run_for_shapes(const c10::OperatorHandle& op, const std::string& name, Stack* stack, size_t first) {
  const auto& schema = op.schema();
  Arguments arguments(stack->data() + first, schema.arguments().size());
  auto is_written = [](const c10::Argument& argument) {
    return argument.alias_info() && argument.alias_info()->isWrite();
  };
  const auto& returns = schema.returns();
  Results results;
  if (auto known = BY_HAND.find(name); known != BY_HAND.end()) {
    results = known->second(arguments);
  } else if (std::any_of(returns.begin(), returns.end(), is_written)) {
    // In place, or into an output: there is nothing to do.
    for (size_t i = 0; i < arguments.size(); i++)
      if (is_written(schema.arguments()[i])) results.push_back(arguments[i]);
  } else if (!returns.empty()) {
    results = by_meta(op, arguments);
  }
  torch::jit::drop(*stack, arguments.size());
  for (auto& result : results) stack->push_back(result);
}

}  // namespace stand_in
