// What the device was asked to do, counted; written as JSON when the program ends.
#include "stand_in.h"

#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>

namespace stand_in {
namespace {

struct Count {
  int64_t number = 0, bytes = 0;
  void add(int64_t more) { number++, bytes += more; }
};
std::mutex mutex;
std::map<std::string, Count> by_name;
std::array<Count, 3> copies;
int64_t scalars = 0, now = 0, peak = 0;

void write() {
  std::FILE* file = std::fopen(options().report.c_str(), "w");
  if (!file) return;
  std::lock_guard<std::mutex> lock(mutex);
  Count all;
  for (auto& [name, count] : by_name) all.number += count.number, all.bytes += count.bytes;
  auto field = [&](const char* name, const Count& count) {
    std::fprintf(file, "\"%s\": {\"number\": %ld, \"bytes\": %ld}, ", name, count.number, count.bytes);
  };
  std::fprintf(file, "{");
  field("operators", all);
  field("up", copies[0]);
  field("down", copies[1]);
  field("within", copies[2]);
  std::fprintf(file, "\"scalars\": %ld, \"peak\": %ld, \"by_name\": {", scalars, peak);
  const char* comma = "";
  for (auto& [name, count] : by_name) {
    std::fprintf(file, "%s\"%s\": {\"number\": %ld, \"bytes\": %ld}", comma, name.c_str(), count.number, count.bytes);
    comma = ", ";
  }
  std::fprintf(file, "}}\n");
  std::fclose(file);
}

}  // namespace

void count_operator(const std::string& name, int64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  by_name[name].add(bytes);
}
void count_copy(Way way, int64_t bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  copies[static_cast<size_t>(way)].add(bytes);
}
void count_scalar() {
  std::lock_guard<std::mutex> lock(mutex);
  scalars++;
}
void count_memory(int64_t change) {
  std::lock_guard<std::mutex> lock(mutex);
  now += change;
  peak = std::max(peak, now);
}
int64_t in_use() {
  std::lock_guard<std::mutex> lock(mutex);
  return now;
}

void start_counts() {
  if (!options().report.empty()) std::atexit(write);
}

}  // namespace stand_in
