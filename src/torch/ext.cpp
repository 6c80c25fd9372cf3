// A small shim over libtorch: what tch does not offer. Every function returns null, or a message that the
// caller frees; no C++ exception leaves this file. The Rust side, with the safety arguments, is mod.rs.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <dlfcn.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/version.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

template <class F>
char* guarded(F&& body) {
  try {
    body();
    return nullptr;
  } catch (const c10::Error& error) {
    return strdup(error.what_without_backtrace());
  } catch (const std::exception& error) {
    return strdup(error.what());
  } catch (...) {
    return strdup("unknown C++ exception");
  }
}

// Given the gradient of a value, writes that of each input: a new at::Tensor, or nothing. Null, or a message from strdup.
using Backward = char* (*)(void* closure, const at::Tensor* upstream, at::Tensor** gradients, size_t count);
using Drop = void (*)(void* closure);

// A step of the backward pass that the caller's closure computes. Drops the closure once: when the engine says that
// there will be no other pass, else with the graph.
struct Custom final : torch::autograd::Node {
  Custom(void* closure, Backward backward, Drop drop) : closure(closure), backward(backward), drop(drop) {}
  ~Custom() override { release(); }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& upstream) override {
    std::lock_guard<std::mutex> lock(mutex_);
    torch::autograd::variable_list gradients(num_outputs());
    if (!upstream[0].defined()) return gradients;
    if (!closure) throw std::runtime_error("a second backward pass through the same graph");
    std::vector<at::Tensor*> written(gradients.size(), nullptr);
    char* message = backward(closure, &upstream[0], written.data(), written.size());
    for (size_t i = 0; i < written.size(); i++) {
      if (written[i]) gradients[i] = std::move(*written[i]);
      delete written[i];
    }
    if (message) {
      std::string text(message);
      free(message);
      throw std::runtime_error(text);
    }
    return gradients;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    release();
  }

 private:
  void release() {
    if (closure) drop(closure);
    closure = nullptr;
  }

  void* closure;
  Backward backward;
  Drop drop;
};

}  // namespace

extern "C" {

// One argument of a boxed call; `kind` says which field counts. The same layout as `RawArg` in mod.rs.
struct ExtArg {
  int32_t kind;  // 0 none, 1 tensor, 2 tensor list, 3 int, 4 double, 5 bool, 6 int list
  int64_t integer;
  double real;
  const void* pointer;  // at::Tensor*, at::Tensor**, int64_t*
  size_t length;
};

// Calls the operator `name.overload` through the dispatcher. Tensors among its results are written to `outputs`
// (new at::Tensor objects that the caller owns), at most `capacity`.
char* palettist_call(const char* name, const char* overload, const ExtArg* arguments, size_t count, at::Tensor** outputs,
                     size_t capacity, size_t* written) {
  return guarded([&] {
    *written = 0;
    auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, overload);
    torch::jit::Stack stack;
    for (size_t i = 0; i < count; i++) {
      const ExtArg& a = arguments[i];
      switch (a.kind) {
        case 1: stack.emplace_back(*static_cast<const at::Tensor*>(a.pointer)); break;
        case 2: {
          auto items = static_cast<at::Tensor* const*>(a.pointer);
          c10::List<at::Tensor> list;
          for (size_t k = 0; k < a.length; k++) list.push_back(*items[k]);
          stack.emplace_back(std::move(list));
          break;
        }
        case 3: stack.emplace_back(a.integer); break;
        case 4: stack.emplace_back(a.real); break;
        case 5: stack.emplace_back(a.integer != 0); break;
        case 6: {
          auto items = static_cast<const int64_t*>(a.pointer);
          stack.emplace_back(std::vector<int64_t>(items, items + a.length));
          break;
        }
        default: stack.emplace_back();
      }
    }
    op.callBoxed(&stack);
    for (auto& value : stack) {
      if (value.isTensor()) {
        if (*written == capacity) throw std::runtime_error("more results than expected");
        outputs[(*written)++] = new at::Tensor(value.toTensor());
      }
    }
  });
}

// Writes to `output` a new handle to `value`, whose gradient goes to `inputs` through `backward`; without gradients where
// they are off or no input asks for one. Takes the closure in any case.
char* palettist_custom_gradient(const at::Tensor* value, at::Tensor* const* inputs, size_t count, void* closure,
                                Backward backward, Drop drop, at::Tensor** output) {
  return guarded([&] {
    std::shared_ptr<Custom> node(new Custom(closure, backward, drop), torch::autograd::deleteNode);
    torch::autograd::variable_list variables;
    bool wanted = false;
    for (size_t i = 0; i < count; i++) {
      variables.push_back(*inputs[i]);
      wanted = wanted || inputs[i]->requires_grad();
    }
    at::Tensor result = value->detach();
    if (wanted && at::GradMode::is_enabled()) {
      node->set_next_edges(torch::autograd::collect_next_edges(variables));
      torch::autograd::create_gradient_edge(result, node);
    }
    *output = new at::Tensor(std::move(result));
  });
}

// Given the gradient of `value`, writes those of `variables` (new at::Tensor objects); nothing where it does not depend
// on one. Frees the graph.
char* palettist_gradients(const at::Tensor* value, const at::Tensor* upstream, at::Tensor* const* variables, size_t count,
                          at::Tensor** gradients) {
  return guarded([&] {
    if (!value->requires_grad() || count == 0) return;
    torch::autograd::variable_list list;
    for (size_t i = 0; i < count; i++) list.push_back(*variables[i]);
    auto found = torch::autograd::grad({*value}, list, {*upstream}, std::nullopt, false, true);
    for (size_t i = 0; i < count; i++) {
      if (found[i].defined()) gradients[i] = new at::Tensor(std::move(found[i]));
    }
  });
}

// The version of the libtorch that this was compiled against. Static: not freed.
const char* palettist_torch_version() { return TORCH_VERSION; }

// The folder of the libtorch_cpu.so in use, for the caller to free; null where it is not known.
char* palettist_library_folder() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(&at::globalContext), &info) || !info.dli_fname) return nullptr;
  const std::string path(info.dli_fname);
  const auto slash = path.rfind('/');
  return slash == std::string::npos ? nullptr : strdup(path.substr(0, slash).c_str());
}

// Loads libtorch_cuda.so from the folder of the libtorch_cpu.so in use, if it lies there.
int palettist_load_cuda() {
  char* folder = palettist_library_folder();
  if (!folder) return 0;
  const std::string path = std::string(folder) + "/libtorch_cuda.so";
  free(folder);
  return dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) != nullptr;
}

// The stream on which libtorch queues work for CUDA device `index` now, as CUDA's own handle (CUstream).
char* palettist_cuda_stream(int64_t index, void** stream) {
  return guarded([&] {
    const c10::impl::VirtualGuardImpl guard(c10::DeviceType::CUDA);
    const c10::Device device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index));
    *stream = guard.getStreamNativeHandle(guard.getStream(device));
  });
}

}  // extern "C"
