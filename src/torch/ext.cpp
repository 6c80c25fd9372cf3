// A small shim over libtorch: what tch does not offer. Every function returns null, or a message that the
// caller frees; no C++ exception leaves this file. The Rust side, with the safety arguments, is mod.rs.

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <torch/version.h>

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

// The version of the libtorch that this was compiled against. Static: not freed.
const char* palettist_torch_version() { return TORCH_VERSION; }

// Loads libtorch_cuda.so from the folder of the libtorch_cpu.so in use, if it lies there.
int palettist_load_cuda() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(&at::globalContext), &info) || !info.dli_fname) return 0;
  std::string path(info.dli_fname);
  path = path.substr(0, path.rfind('/') + 1) + "libtorch_cuda.so";
  return dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL) != nullptr;
}

}  // extern "C"
