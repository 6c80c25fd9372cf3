// The device's memory: one range of addresses of the host, which the host may not touch. Pieces of it are handed out as
// CUDA's caching allocator does.
#include "stand_in.h"

#include <c10/core/Allocator.h>

#include <execinfo.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>

namespace stand_in {
namespace {

// Addresses only: what is never touched takes no memory.
constexpr size_t RESERVED = size_t(1) << 40;
char* begin = nullptr;

struct Piece {
  size_t size;
  int64_t counted;
};
std::mutex mutex;
std::map<char*, Piece> used;
std::multimap<size_t, char*> unused;
size_t handed_out = 0;

// Rights to the range: by a protection key (pkeys(7)), which each thread has for itself. Where the processor has no such
// keys, by mprotect(2), for all threads at once and a thousand times slower: on demand only.
int protection_key = -1;
thread_local int depth = 0;
std::mutex rights;
int inside = 0;

void open_to_all(bool open) {
  std::lock_guard<std::mutex> lock(rights);
  const bool change = open ? inside++ == 0 : --inside == 0;
  if (change && handed_out > 0) mprotect(begin, handed_out, open ? PROT_READ | PROT_WRITE : PROT_NONE);
}

size_t rounded(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

void release(void* address) {
  if (!address) return;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = used.find(static_cast<char*>(address));
  if (found == used.end()) return;
  auto [start, piece] = *found;
  used.erase(found);
  count_memory(-piece.counted);
  // Of results that nobody computes no byte is kept: the next ones are zeros again.
  if (options().shapes_only) madvise(start, piece.size, MADV_DONTNEED);
  unused.emplace(piece.size, start);
}

// A piece that nobody uses, or a new one.
char* take(size_t size) {
  if (auto found = unused.find(size); found != unused.end()) {
    char* start = found->second;
    unused.erase(found);
    return start;
  }
  std::lock_guard<std::mutex> lock(rights);
  TORCH_CHECK(handed_out + size <= RESERVED, "the stand-in has no more addresses");
  char* start = begin + handed_out;
  handed_out += size;
  if (protection_key < 0 && inside > 0) mprotect(start, size, PROT_READ | PROT_WRITE);
  return start;
}

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, DEVICE};
    const size_t size = rounded(bytes, 4096);
    // CUDA's caching allocator rounds to 512 bytes.
    const auto counted = static_cast<int64_t>(rounded(bytes, 512));
    char* start = nullptr;
    {
      std::lock_guard<std::mutex> lock(mutex);
      TORCH_CHECK_WITH(OutOfMemoryError, in_use() + counted <= options().limit, "CUDA out of memory. Tried to allocate ",
                       bytes, " bytes. GPU 0 has a total capacity of ", options().limit, " bytes (stand-in)");
      start = take(size);
      used[start] = {size, counted};
      count_memory(counted);
    }
    if (!options().shapes_only) {
      // What is read before it is written is NaN, or -1.
      OnDevice here;
      std::memset(start, 0xFF, bytes);
    }
    return {start, start, &release, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    OnDevice here;
    std::memcpy(to, from, bytes);
  }
} device_allocator;

void on_fault(int, siginfo_t* info, void*) {
  if (is_device_memory(info->si_addr)) {
    std::fprintf(stderr, "\nstand-in: the host touches memory of the device, at %p, from:\n", info->si_addr);
    void* frames[48];
    backtrace_symbols_fd(frames, backtrace(frames, 48), STDERR_FILENO);
  }
  signal(SIGSEGV, SIG_DFL);
  raise(SIGSEGV);
}

}  // namespace

OnDevice::OnDevice() {
  if (depth++ > 0) return;
  if (protection_key >= 0) pkey_set(protection_key, 0);
  else if (options().fence) open_to_all(true);
}
OnDevice::~OnDevice() {
  if (--depth > 0) return;
  if (protection_key >= 0) pkey_set(protection_key, PKEY_DISABLE_ACCESS);
  else if (options().fence) open_to_all(false);
}

c10::Allocator* allocator() { return &device_allocator; }

bool is_device_memory(const void* address) {
  auto* wanted = static_cast<const char*>(address);
  return wanted >= begin && wanted < begin + RESERVED;
}

void start_memory() {
  protection_key = pkey_alloc(0, PKEY_DISABLE_ACCESS);
  const int rights = protection_key < 0 && options().fence ? PROT_NONE : PROT_READ | PROT_WRITE;
  void* range = mmap(nullptr, RESERVED, rights, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  TORCH_CHECK(range != MAP_FAILED, "the stand-in cannot reserve addresses");
  begin = static_cast<char*>(range);
  if (protection_key >= 0) pkey_mprotect(range, RESERVED, rights, protection_key);
  struct sigaction action {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, nullptr);
  c10::SetAllocator(c10::DeviceType::CUDA, &device_allocator, /*priority=*/255);
}

}  // namespace stand_in
