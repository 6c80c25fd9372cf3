// Tensors of the device seen as tensors of the CPU, and the operators that make and change views.
#include "stand_in.h"

#include <ATen/EmptyTensor.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include <cstring>
#include <optional>

namespace stand_in {

char* storage_of(const Tensor& tensor) {
  return static_cast<char*>(tensor.storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks().get());
}

int64_t bytes_of(const Tensor& tensor) {
  return tensor.defined() ? tensor.numel() * static_cast<int64_t>(tensor.element_size()) : 0;
}

void refuse_f64(const std::string& where, at::ScalarType type) {
  TORCH_CHECK(!options().no_f64 || (type != at::kDouble && type != at::kComplexDouble), where,
              ": this device has no float64 (stand-in)");
}

Tensor as_cpu(const Tensor& tensor) {
  const auto offset = tensor.storage_offset() * static_cast<int64_t>(tensor.element_size());
  const auto whole = static_cast<int64_t>(tensor.storage().nbytes());
  char* start = storage_of(tensor);
  auto storage = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), std::max<int64_t>(whole - offset, 0),
      c10::DataPtr(start ? start + offset : nullptr, at::kCPU), c10::GetAllocator(c10::kCPU),
      // As an output may be: the CPU's kernel then gives it memory of the host, and `operators.cpp` moves that.
      /*resizable=*/true);
  Tensor view = at::detail::make_tensor<c10::TensorImpl>(c10::Storage(std::move(storage)),
                                                         c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), 0);
  return view;
}

Tensor to_device(const Tensor& cpu) {
  Tensor made = at::empty_strided(cpu.sizes(), cpu.strides(), cpu.options().device(DEVICE));
  const auto bytes = at::detail::computeStorageNbytes(cpu.sizes(), cpu.strides(), cpu.element_size());
  if (bytes > 0) {
    OnDevice here;
    std::memcpy(storage_of(made), cpu.const_data_ptr(), bytes);
  }
  return made;
}

namespace {

at::ScalarType type_or_default(std::optional<at::ScalarType> type) {
  return type.value_or(at::get_default_dtype_as_scalartype());
}
const c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);

Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  refuse_f64("empty", type_or_default(type));
  return at::detail::empty_generic(size, allocator(), KEYS, type_or_default(type), format);
}

Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef strides, std::optional<at::ScalarType> type,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  refuse_f64("empty_strided", type_or_default(type));
  return at::detail::empty_strided_generic(size, strides, allocator(), KEYS, type_or_default(type));
}

Tensor& copy_(Tensor& self, const Tensor& from, bool) {
  const bool up = self.is_cuda() && !from.is_cuda(), down = !self.is_cuda();
  if (self.is_cuda()) refuse_f64("copy_", self.scalar_type());
  // Of values that nobody computed there is nothing to copy, but what comes from the host is kept where it is small.
  const bool real = !options().shapes_only || down || bytes_of(self) < (1 << 16);
  if (real) {
    Tensor target = self.is_cuda() ? as_cpu(self) : self;
    OnDevice here;
    at::AutoDispatchBelowADInplaceOrView below;
    target.copy_(from.is_cuda() ? as_cpu(from) : from);
  }
  if (up || down) count_copy(up ? Way::Up : Way::Down, bytes_of(self));
  else count_copy(Way::Within, bytes_of(self) + bytes_of(from));
  return self;
}

at::Scalar local_scalar(const Tensor& self) {
  count_scalar();
  OnDevice here;
  at::AutoDispatchBelowADInplaceOrView below;
  return at::_local_scalar_dense(as_cpu(self));
}

const Tensor& resize_(const Tensor& self, c10::IntArrayRef size, std::optional<at::MemoryFormat> format) {
  auto* impl = self.unsafeGetTensorImpl();
  if (self.sizes() != size) {
    const auto bytes =
        at::detail::computeStorageNbytesContiguous(size, self.element_size(), self.storage_offset());
    auto* storage = self.storage().unsafeGetStorageImpl();
    if (bytes > storage->nbytes()) {
      c10::DataPtr memory = allocator()->allocate(bytes);
      if (storage->nbytes() > 0) allocator()->copy_data(memory.get(), storage_of(self), storage->nbytes());
      storage->set_data_ptr_noswap(std::move(memory));
      storage->set_nbytes(bytes);
    }
    impl->set_sizes_contiguous(size);
  }
  if (format) impl->empty_tensor_restride(*format);
  return self;
}

Tensor view(const Tensor& self, c10::IntArrayRef size) { return at::native::view(self, size); }

}  // namespace

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("copy_", TORCH_FN(copy_));
  library.impl("_local_scalar_dense", TORCH_FN(local_scalar));
  library.impl("resize_", TORCH_FN(resize_));
  library.impl("view", TORCH_FN(view));
  library.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  library.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  library.impl("unfold", TORCH_FN(at::native::unfold));
}

}  // namespace stand_in
