// Scaled dot-product attention as CUDA has it, "memory-efficient", by the CPU's flash attention.
#include "stand_in.h"

#include <torch/library.h>

namespace stand_in {

// libtorch asks which kind to take: with a mask its plain operators (0), otherwise the memory-efficient one (2).
int64_t choose_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>& mask, double, bool,
                         std::optional<double>, bool) {
  return mask ? 0 : 2;
}

namespace {

using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

void count(const char* name, std::initializer_list<Tensor> tensors) {
  int64_t bytes = 0;
  for (const Tensor& tensor : tensors) {
    TORCH_CHECK(!tensor.defined() || tensor.is_cuda(), "Expected all tensors to be on the same device (", name, ")");
    bytes += bytes_of(tensor);
  }
  count_operator(name, bytes);
}

Four forward(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>&, bool, double dropout,
             bool causal, std::optional<double> scale) {
  count("attention", {q, k, v, q});
  const Tensor seed = at::empty({}, at::TensorOptions().dtype(at::kLong));
  if (options().shapes_only) {
    // The CUDA kernel lays its output out as [B, T, H, C].
    Tensor out = at::empty({q.size(0), q.size(2), q.size(1), v.size(3)}, q.options()).transpose(1, 2);
    return {out, at::empty({q.size(0), q.size(1), q.size(2)}, q.options().dtype(at::kFloat)), seed, seed};
  }
  Tensor out, sums;
  {
    OnDevice here;
    at::AutoDispatchBelowADInplaceOrView below;
    std::tie(out, sums) = at::_scaled_dot_product_flash_attention_for_cpu(as_cpu(q), as_cpu(k), as_cpu(v), dropout,
                                                                          causal, {}, scale);
  }
  return {to_device(out), to_device(sums), seed, seed};
}

Four backward(const Tensor& gradient, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor&,
              const Tensor& out, const Tensor& sums, const Tensor&, const Tensor&, double dropout, std::array<bool, 4>,
              bool causal, std::optional<double> scale) {
  count("attention_backward", {gradient, q, k, v, out, q, k, v});
  if (options().shapes_only) return {at::empty_like(q), at::empty_like(k), at::empty_like(v), Tensor()};
  Tensor of_q, of_k, of_v;
  {
    OnDevice here;
    at::AutoDispatchBelowADInplaceOrView below;
    std::tie(of_q, of_k, of_v) = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        as_cpu(gradient), as_cpu(q), as_cpu(k), as_cpu(v), as_cpu(out), as_cpu(sums), dropout, causal, {}, scale);
  }
  return {to_device(of_q), to_device(of_k), to_device(of_v), Tensor()};
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("_scaled_dot_product_efficient_attention", TORCH_FN(forward));
  library.impl("_scaled_dot_product_efficient_attention_backward", TORCH_FN(backward));
}

}  // namespace stand_in
