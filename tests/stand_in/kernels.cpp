// The program's own CUDA kernels on the stand-in: their source, compiled for the host. A block is a loop over its lanes for
// each phase, in an order that changes; blocks come one after the other, from either end.
#include "stand_in.h"

#include <cmath>
#include <cstring>
#include <map>

namespace stand_in {
namespace {

typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int64_t i64;

thread_local u32 block = 0, blocks = 0, launches = 0;

#define ON_HOST
#define KERNEL(name) void name
#define DEVICE inline
#define SHARED static thread_local
#define EACH_LANE(lane) for (int turn_ = 0, lane = lane_at(0); turn_ < LANES; lane = lane_at(++turn_))
#define WAIT()
#define BLOCK block
#define BLOCKS blocks
int lane_at(int place) { return (place ^ (launches * 37)) & 255; }
template <class To, class From>
To same_bits(From from) {
  To to;
  static_assert(sizeof to == sizeof from, "bits of one size");
  std::memcpy(&to, &from, sizeof to);
  return to;
}
u32 bits_of(float x) { return same_bits<u32>(x); }
u64 bits_of(double x) { return same_bits<u64>(x); }
float float_of(u32 x) { return same_bits<float>(x); }
double double_of(u64 x) { return same_bits<double>(x); }
void add(u32* to, u32 x) { *to += x; }
void add(u64* to, u64 x) { *to += x; }
void raise(u32* to, u32 x) { *to = x > *to ? x : *to; }

#include "kernels.cu"

static_assert(LANES == 256, "lane_at() goes through so many");

const std::map<std::string, void (*)(Plan)> BY_NAME = {
    {"extent", extent},   {"count", count},       {"cluster", cluster},   {"look_up", look_up},
    {"add_up", add_up},   {"way_back", way_back}, {"gradient_extent", gradient_extent},
    {"combine_and_step", combine_and_step},
};

}  // namespace

bool is_kernel(const std::string& name) { return BY_NAME.count(name) > 0; }

void launch(const std::string& name, unsigned grid, unsigned lanes, const void* argument) {
  TORCH_CHECK(lanes == LANES, "kernels are for blocks of ", LANES);
  Plan plan;
  std::memcpy(&plan, argument, sizeof plan);
  count_operator("kernel::" + name, 0);
  if (options().shapes_only) return;
  OnDevice here;
  launches++;
  blocks = grid;
  for (u32 i = 0; i < grid; i++) {
    block = launches % 2 ? i : grid - 1 - i;
    BY_NAME.at(name)(plan);
  }
  if (options().wrong_kernels && name == "look_up" && plan.segment_count > 0)
    static_cast<float*>(plan.layers[0].soft)[0] += 1.0f;
}

}  // namespace stand_in
