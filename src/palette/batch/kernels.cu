// Palettes of numbers on a CUDA device: every layer of a network in each launch.
//
// What the passes of src/palette/scalar do on the CPU, with the same codes and formulas (clustering.rs has them, and their
// symbols). A segment is the weights that share one palette: a layer, or a group of its channels. A tile is a piece of a
// segment for one block. Weights are seen through multiples of a power of two; a bin is one of these.
//
//   extent              the largest magnitude of each segment: from it the host finds how many bins there are
//   count               how many weights each bin has
//   cluster             T iterations of differentiable k-means on the bins of every segment; the soft value of each bin
//   look_up             the soft weight
//   gradient_extent     the largest magnitude of the gradient in each segment; clears the sums
//   add_up              sums over each bin of the gradient and of its square
//   way_back            from these the line (slope, offset) of each bin, and the square of the whole gradient
//   combine_and_step    the gradient of each weight by its bin's line, AdamW's step with it, and the next counts
//
// Results do not depend on how many blocks there are, nor on their order, nor on how many empty bins there are beside those
// with weights, of which a resumed run may have others: what blocks add to the same place are integers, and the first bin's
// multiple is one of LANES, so that a lane has the same bins.
// Gradients become integers beside the largest of their segment, of 36 bits and more. Floats are added by one block, in a
// fixed order. Compiled without fused multiplication and addition, the same source gives the same bits on the host
// (tests/stand_in/kernels.cpp): what differs there are the macros below. A block's work comes in phases of one loop over its
// lanes each; what outlives a phase is the same in all lanes, or shared.

#define LANES 256
#ifndef ON_HOST
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
#define KERNEL(name) extern "C" __global__ void __launch_bounds__(LANES) name
#define DEVICE __device__ inline
#define SHARED __shared__
#define EACH_LANE(lane) for (int lane = threadIdx.x, more = 1; more; more = 0, __syncthreads())
#define WAIT() __syncthreads()
#define BLOCK blockIdx.x
#define BLOCKS gridDim.x
DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
DEVICE u64 bits_of(double x) { return __double_as_longlong(x); }
DEVICE float float_of(u32 x) { return __uint_as_float(x); }
DEVICE double double_of(u64 x) { return __longlong_as_double(x); }
DEVICE void add(u32* to, u32 x) { atomicAdd(to, x); }
DEVICE void add(u64* to, u64 x) { atomicAdd(to, x); }
DEVICE void raise(u32* to, u32 x) { atomicMax(to, x); }
#endif

// ---- what the host lays out; the same in kernels.rs

// Weights that share a palette.
struct Segment {
  u64 count;      // weights
  u64 bin;        // its first in `counts` and `cells`
  u32 entry;      // its first in `entries`
  u32 entries;    // of its palette
  u32 layer;
  int low;        // the first bin stands for the multiple of this number
  u32 bins;
  float step;     // what they are multiples of
  float per_step; // 1 / step
  int bits;       // of integers that as many can be added as there are weights
};

// One tensor. Of bf16 where `brain` is not 0.
struct Layer {
  void* weight;
  void* soft;
  void* exp_avg;
  void* exp_avg_sq;
  u64 brain;
};

struct Tile {
  u64 from, to;  // elements of the layer
  u32 segment;
  u32 unused;
};

// AdamW (Loshchilov and Hutter 2019, algorithm 2): AdamWStep in src/palette/scalar/passes.rs. `key`: of random bits for bf16.
struct Step {
  float factor, decay, rate_of_mean, beta2, rate_of_square, size, root, eps;
  u32 key;
  u32 unused;
};

// What a bin has, one after the other.
union Cell {
  float soft;                                // from cluster to look_up
  struct { u64 sum, square; } of_gradient;   // from add_up to way_back, in integers
  struct { float slope, offset; } line;      // from way_back to combine_and_step
};

struct Plan {
  const Segment* segments;
  const Layer* layers;
  const Tile* tiles;
  u32* counts;
  Cell* cells;
  double* entries;            // ascending
  double* trail;              // of each entry: c⁰ … c^T, then S¹ … S^T, then L¹ … L^T
  double* scratch;            // 5 arrays of `scratch_bins` for each block
  const double* temperatures; // of each segment
  const void* const* gradients; // of each layer; null without
  const Step* steps;          // of each layer
  u32* extents;               // of each segment: bits of the largest magnitude, and how many are not finite
  u32* gradient_extents;      // of each segment
  u32* escaped;               // of each segment: weights that are in no bin
  double* squares;            // of each segment: Σ (∂L/∂w)²
  double* errors;             // of each segment: mean squared distance to the nearest entry
  u64 cell_count;
  u64 scratch_bins;
  u32 tile_count, segment_count, iterations, unused;
};

static_assert(sizeof(Segment) == 48 && sizeof(Layer) == 40 && sizeof(Tile) == 24 && sizeof(Step) == 40, "as in kernels.rs");
static_assert(sizeof(Cell) == 16 && sizeof(Plan) == 160, "as in kernels.rs");

// ---- numbers

DEVICE float load(const void* from, u64 i, u64 brain) {
  return brain ? float_of((u32)((const u16*)from)[i] << 16) : ((const float*)from)[i];
}

// To nearest, ties to even.
DEVICE void store(void* to, u64 i, float x, u64 brain) {
  if (!brain) {
    ((float*)to)[i] = x;
    return;
  }
  const u32 bits = bits_of(x);
  const bool none = (bits & 0x7FFFFFFF) > 0x7F800000;
  ((u16*)to)[i] = (u16)(none ? bits >> 16 | 0x40 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// In bf16 at random, above or below: src/torch/rounding.rs.
DEVICE void store_at_random(void* to, u64 i, float x, u64 brain, u32 key) {
  if (!brain) {
    ((float*)to)[i] = x;
    return;
  }
  u32 hash = (u32)i * 0x9E3779B9u ^ key;
  hash = (hash ^ hash >> 16) * 0x7FEB352Du;
  hash = (hash ^ hash >> 15) * 0x846CA68Bu;
  hash ^= hash >> 16;
  const u32 bits = bits_of(x);
  const bool finite = (bits & 0x7F800000) != 0x7F800000;
  ((u16*)to)[i] = (u16)((bits + (finite ? hash & 0xFFFF : 0)) >> 16);
}

// eˣ to 5e-16; below −700 as at −700, and not for x > 700: `exp` of src/palette/scalar/attention.rs.
DEVICE double power(double x) {
  x = x < -700.0 ? -700.0 : x;
  const double ROUND = 6755399441055744.0;  // 1.5 · 2⁵²
  const double rounded = x * 1.4426950408889634 + ROUND;
  const double k = rounded - ROUND;
  const double r = (x - k * 0.6931471803691238) - k * 1.9082149292705877e-10;
  const double r2 = r * r, r4 = r2 * r2;
  const double low = ((1.0 + 1.0 * r) + (1.0 / 2.0 + 1.0 / 6.0 * r) * r2)
      + ((1.0 / 24.0 + 1.0 / 120.0 * r) + (1.0 / 720.0 + 1.0 / 5040.0 * r) * r2) * r4;
  const double high = ((1.0 / 40320.0 + 1.0 / 362880.0 * r) + (1.0 / 3628800.0 + 1.0 / 39916800.0 * r) * r2)
      + (1.0 / 479001600.0 + 1.0 / 6227020800.0 * r) * r4;
  return (low + high * (r4 * r4)) * double_of((bits_of(rounded) << 52) + (1023ull << 52));
}

// As many steps a weight is at most: src/palette/scalar/code.rs.
#define MOST_STEPS 32766

// The bin of a weight, or one past the last: it is in none.
DEVICE u32 bin_of(const Segment& s, float weight) {
  // Adding it leaves the nearest whole number, ties to even, in the lowest bits.
  const float ROUND = 12582912.0f;  // 1.5 · 2²³
  float steps = weight * s.per_step;
  steps = steps > -40000.0f ? steps : -40000.0f;  // also what is no number
  steps = steps < 40000.0f ? steps : 40000.0f;
  const int code = (int)(bits_of(steps + ROUND) - 0x4B400000u);
  const u32 bin = (u32)(code - s.low);
  return bin < s.bins && code >= -MOST_STEPS && code <= MOST_STEPS ? bin : s.bins;
}

// The bin of a weight that may be in none: then the first or the last.
DEVICE u32 nearest_bin(const Segment& s, float weight) {
  const u32 bin = bin_of(s, weight);
  return bin < s.bins ? bin : (weight > 0.0f ? s.bins - 1 : 0);
}

DEVICE double value_of(const Segment& s, u32 bin) { return (double)((int)bin + s.low) * (double)s.step; }

// magnitude · 2^by, to nearest.
DEVICE u64 shifted(u64 magnitude, int by) {
  if (by >= 0) return magnitude << by;
  return by < -62 ? 0 : (magnitude + (1ull << (-by - 1))) >> -by;
}

DEVICE double two_to(int exponent) { return double_of((u64)(exponent + 1023) << 52); }

// Into sums[0], in a fixed order; the same for `others` where there are any.
DEVICE void total(double* sums, double* others) {
  for (int half = LANES / 2; half > 0; half /= 2) {
    EACH_LANE(lane) {
      if (lane < half) {
        sums[lane] += sums[lane + half];
        if (others) others[lane] += others[lane + half];
      }
    }
  }
}

// ---- passes over weights

KERNEL(extent)(Plan p) {
  SHARED u32 most, bad;
  for (u32 t = BLOCK; t < p.tile_count; t += BLOCKS) {
    const Tile tile = p.tiles[t];
    const Layer layer = p.layers[p.segments[tile.segment].layer];
    EACH_LANE(lane) if (lane == 0) most = bad = 0;
    EACH_LANE(lane) {
      u32 own = 0, none = 0;
      for (u64 i = tile.from + lane; i < tile.to; i += LANES) {
        const u32 bits = bits_of(load(layer.weight, i, layer.brain)) & 0x7FFFFFFF;
        if (bits >= 0x7F800000) none++;
        else if (bits > own) own = bits;
      }
      raise(&most, own);
      if (none) add(&bad, none);
    }
    EACH_LANE(lane) {
      if (lane == 0) {
        raise(&p.extents[2 * tile.segment], most);
        if (bad) add(&p.extents[2 * tile.segment + 1], bad);
      }
    }
  }
}

// Bins that a block counts by itself, those around the middle; others, of which few have many weights, in the device's memory.
#define OWN_COUNTS 4096

struct Own {
  u32 first, bins;
};

// None where a tile has too few weights to pay for it.
DEVICE Own own_of(const Segment& s, const Tile& tile, u32 most) {
  const u32 bins = s.bins < most ? s.bins : most;
  Own own = {(s.bins - bins) / 2, tile.to - tile.from < 2 * bins ? 0 : bins};
  return own;
}

DEVICE void count_one(const Plan& p, const Tile& tile, const Segment& s, const Own& own, u32* counts, float weight) {
  const u32 bin = bin_of(s, weight);
  if (bin == s.bins) add(&p.escaped[tile.segment], 1);
  else if (bin - own.first < own.bins) add(&counts[bin - own.first], 1);
  else add(&p.counts[s.bin + bin], 1);
}

KERNEL(count)(Plan p) {
  SHARED u32 counts[OWN_COUNTS];
  for (u32 t = BLOCK; t < p.tile_count; t += BLOCKS) {
    const Tile tile = p.tiles[t];
    const Segment s = p.segments[tile.segment];
    const Layer layer = p.layers[s.layer];
    const Own own = own_of(s, tile, OWN_COUNTS);
    EACH_LANE(lane) for (u32 b = lane; b < own.bins; b += LANES) counts[b] = 0;
    EACH_LANE(lane) {
      for (u64 i = tile.from + lane; i < tile.to; i += LANES)
        count_one(p, tile, s, own, counts, load(layer.weight, i, layer.brain));
    }
    EACH_LANE(lane) {
      for (u32 b = lane; b < own.bins; b += LANES)
        if (counts[b]) add(&p.counts[s.bin + own.first + b], counts[b]);
    }
  }
}

KERNEL(look_up)(Plan p) {
  for (u32 t = BLOCK; t < p.tile_count; t += BLOCKS) {
    const Tile tile = p.tiles[t];
    const Segment s = p.segments[tile.segment];
    const Layer layer = p.layers[s.layer];
    EACH_LANE(lane) {
      for (u64 i = tile.from + lane; i < tile.to; i += LANES) {
        const float weight = load(layer.weight, i, layer.brain);
        store(layer.soft, i, p.cells[s.bin + nearest_bin(s, weight)].soft, layer.brain);
      }
    }
  }
}

KERNEL(gradient_extent)(Plan p) {
  SHARED u32 most;
  EACH_LANE(lane) {
    for (u64 i = (u64)BLOCK * LANES + lane; i < p.cell_count; i += (u64)BLOCKS * LANES)
      p.cells[i].of_gradient.sum = p.cells[i].of_gradient.square = 0;
  }
  for (u32 t = BLOCK; t < p.tile_count; t += BLOCKS) {
    const Tile tile = p.tiles[t];
    const u32 place = p.segments[tile.segment].layer;
    const Layer layer = p.layers[place];
    const void* gradient = p.gradients[place];
    if (!gradient) continue;
    EACH_LANE(lane) if (lane == 0) most = 0;
    EACH_LANE(lane) {
      u32 own = 0;
      for (u64 i = tile.from + lane; i < tile.to; i += LANES) {
        const u32 bits = bits_of(load(gradient, i, layer.brain)) & 0x7FFFFFFF;
        own = bits > own ? bits : own;
      }
      raise(&most, own);
    }
    EACH_LANE(lane) if (lane == 0) raise(&p.gradient_extents[tile.segment], most);
  }
}

// Bins whose sums a block has by itself.
#define OWN_SUMS 2048

KERNEL(add_up)(Plan p) {
  SHARED u64 sums[OWN_SUMS], squares[OWN_SUMS];
  for (u32 t = BLOCK; t < p.tile_count; t += BLOCKS) {
    const Tile tile = p.tiles[t];
    const Segment s = p.segments[tile.segment];
    const Layer layer = p.layers[s.layer];
    const void* gradient = p.gradients[s.layer];
    const int most = (int)(p.gradient_extents[tile.segment] >> 23);
    // Without a gradient, or with one that is no number, there is nothing to add up.
    if (!gradient || most == 255) continue;
    const Own own = own_of(s, tile, OWN_SUMS);
    EACH_LANE(lane) for (u32 b = lane; b < own.bins; b += LANES) sums[b] = squares[b] = 0;
    EACH_LANE(lane) {
      for (u64 i = tile.from + lane; i < tile.to; i += LANES) {
        const u32 bin = nearest_bin(s, load(layer.weight, i, layer.brain));
        const u32 bits = bits_of(load(gradient, i, layer.brain));
        // magnitude · 2^(exponent − 150), less than 2^(most − 126).
        const int exponent = (int)(bits >> 23 & 255);
        const u64 magnitude = (bits & 0x7FFFFF) | (exponent ? 0x800000 : 0);
        const int below = most - (exponent ? exponent : 1);
        const u64 sum = shifted(magnitude, s.bits - 24 - below);
        const u64 square = shifted(magnitude * magnitude, s.bits - 48 - 2 * below);
        const u64 with_sign = bits >> 31 ? 0 - sum : sum;
        if (bin - own.first < own.bins) {
          add(&sums[bin - own.first], with_sign);
          add(&squares[bin - own.first], square);
        } else {
          add(&p.cells[s.bin + bin].of_gradient.sum, with_sign);
          add(&p.cells[s.bin + bin].of_gradient.square, square);
        }
      }
    }
    EACH_LANE(lane) {
      for (u32 b = lane; b < own.bins; b += LANES) {
        Cell& cell = p.cells[s.bin + own.first + b];
        if (sums[b]) add(&cell.of_gradient.sum, sums[b]);
        if (squares[b]) add(&cell.of_gradient.square, squares[b]);
      }
    }
  }
}

KERNEL(combine_and_step)(Plan p) {
  SHARED u32 counts[OWN_COUNTS];
  for (u32 t = BLOCK; t < p.tile_count; t += BLOCKS) {
    const Tile tile = p.tiles[t];
    const Segment s = p.segments[tile.segment];
    const Layer layer = p.layers[s.layer];
    const void* gradients = p.gradients[s.layer];
    if (!gradients) continue;
    const Step step = p.steps[s.layer];
    const Own own = own_of(s, tile, OWN_COUNTS);
    EACH_LANE(lane) for (u32 b = lane; b < own.bins; b += LANES) counts[b] = 0;
    EACH_LANE(lane) {
      for (u64 i = tile.from + lane; i < tile.to; i += LANES) {
        const float weight = load(layer.weight, i, layer.brain);
        const Cell cell = p.cells[s.bin + nearest_bin(s, weight)];
        const float gradient = (cell.line.slope * load(gradients, i, layer.brain) + cell.line.offset) * step.factor;
        float mean = load(layer.exp_avg, i, layer.brain), square = load(layer.exp_avg_sq, i, layer.brain);
        mean += (gradient - mean) * step.rate_of_mean;
        square = square * step.beta2 + gradient * gradient * step.rate_of_square;
        const float away = mean * step.size / (sqrtf(square) * step.root + step.eps);
        store_at_random(layer.weight, i, weight * step.decay - away, layer.brain, step.key);
        store_at_random(layer.exp_avg, i, mean, layer.brain, step.key + 1);
        store_at_random(layer.exp_avg_sq, i, square, layer.brain, step.key + 2);
        count_one(p, tile, s, own, counts, load(layer.weight, i, layer.brain));
      }
    }
    EACH_LANE(lane) {
      for (u32 b = lane; b < own.bins; b += LANES)
        if (counts[b]) add(&p.counts[s.bin + own.first + b], counts[b]);
    }
  }
}

// ---- clustering, on the bins of a segment

#define MOST_ENTRIES 256
// Logits further than this below the largest of their row count as minus infinity.
#define FLOOR 38.0
// Entries of less mass than this part of all weights are summed relative to the largest of their terms, e^L: so small are
// these that what of them matters to any weight may be nothing, and yet is all that decides where the entry lies.
#define FAINT 1e-6

// One segment: what all lanes of a block know.
struct Clustering {
  Segment s;
  double tau;
  u32* counts;
  Cell* cells;
  double* entries;
  double* trail;
  u32 iterations;
};

DEVICE Clustering clustering_of(const Plan& p, u32 segment) {
  const Segment s = p.segments[segment];
  Clustering c = {s, p.temperatures[segment], p.counts + s.bin, p.cells + s.bin, p.entries + s.entry,
                  p.trail + (u64)s.entry * (3 * p.iterations + 1), p.iterations};
  return c;
}
DEVICE double* centroids_of(const Clustering& c, u32 t) { return c.trail + (u64)t * c.s.entries; }
DEVICE double* masses_of(const Clustering& c, u32 t) { return c.trail + (u64)(c.iterations + t) * c.s.entries; }
DEVICE double* shifts_of(const Clustering& c, u32 t) { return c.trail + (u64)(2 * c.iterations + t) * c.s.entries; }

// Of `entries` (ascending) the nearest to u; of two as near the higher.
DEVICE int nearest_to(const double* entries, int count, double u) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (entries[middle] / 2.0 + entries[middle + 1] / 2.0 <= u) low = middle + 1;
    else high = middle;
  }
  return low;
}

// ln a_bj − ln a_bnear = ((u − c_near)² − (u − c_j)²) / τ, without cancellation.
DEVICE double logit(const double* entries, int near, int j, double u, double tau) {
  return (entries[near] + entries[j] - 2.0 * u) * (entries[near] - entries[j]) / tau;
}

// The entries that a bin sees: from `from` up to `to`, without it.
struct Seen {
  int near, from, to;
};

DEVICE Seen seen_from(const double* entries, int count, double u, double tau) {
  Seen seen;
  seen.near = nearest_to(entries, count, u);
  seen.from = seen.near;
  seen.to = seen.near + 1;
  while (seen.from > 0 && logit(entries, seen.near, seen.from - 1, u, tau) > -FLOOR) seen.from--;
  while (seen.to < count && logit(entries, seen.near, seen.to, u, tau) > -FLOOR) seen.to++;
  return seen;
}

// norms[b] = 1 / Σ_j e^logit of each bin that has weights.
DEVICE void norms_of(const Clustering& c, const double* entries, double* norms) {
  EACH_LANE(lane) {
    for (u32 b = lane; b < c.s.bins; b += LANES) {
      if (c.counts[b] == 0) continue;
      const double u = value_of(c.s, b);
      const Seen seen = seen_from(entries, c.s.entries, u, c.tau);
      double sum = 0.0;
      for (int j = seen.from; j < seen.to; j++) sum += power(logit(entries, seen.near, j, u, c.tau));
      norms[b] = 1.0 / sum;
    }
  }
}

// The bins that may see each entry: from froms[j] up to tos[j], without it.
DEVICE void reaches_of(const Clustering& c, const double* entries, u32* froms, u32* tos) {
  EACH_LANE(lane) {
    for (int j = lane; j < (int)c.s.entries; j += LANES) {
      const double reach = FLOOR * c.tau / 2.0;
      double low = -1e300, high = 1e300;
      for (int k = 0; k < (int)c.s.entries; k++) {
        const double apart = entries[k] - entries[j];
        if (apart == 0.0) continue;
        const double edge = entries[j] / 2.0 + entries[k] / 2.0 + reach / apart;
        if (apart > 0.0 && edge < high) high = edge;
        if (apart < 0.0 && edge > low) low = edge;
      }
      // A bin more on both sides: of what rounding makes of the edge.
      const double first = low / (double)c.s.step - (double)c.s.low - 2.0;
      const double last = high / (double)c.s.step - (double)c.s.low + 3.0;
      froms[j] = first > 0.0 ? (first < (double)c.s.bins ? (u32)first : c.s.bins) : 0;
      tos[j] = last < (double)c.s.bins ? (last > 0.0 ? (u32)last : 0) : c.s.bins;
    }
  }
}

// a_bj, from the norm of the bin; 0 where the bin does not see the entry.
DEVICE double attention(const double* entries, int near, int j, double u, double tau, double norm) {
  const double below = logit(entries, near, j, u, tau);
  return below > -FLOOR ? power(below) * norm : 0.0;
}

KERNEL(cluster)(Plan p) {
  SHARED double old[MOST_ENTRIES], now[MOST_ENTRIES], sums[LANES], moments[LANES];
  SHARED u32 froms[MOST_ENTRIES], tos[MOST_ENTRIES];
  double* norms = p.scratch + (u64)BLOCK * 5 * p.scratch_bins;
  for (u32 segment = BLOCK; segment < p.segment_count; segment += BLOCKS) {
    const Clustering c = clustering_of(p, segment);
    const Segment& s = c.s;
    const int count = s.entries;
    EACH_LANE(lane) {
      for (int j = lane; j < count; j += LANES) old[j] = centroids_of(c, 0)[j] = c.entries[j];
      if (lane == 0) p.gradient_extents[segment] = 0;
    }
    for (u32 t = 1; t <= c.iterations; t++) {
      double *masses = masses_of(c, t), *shifts = shifts_of(c, t);
      norms_of(c, old, norms);
      reaches_of(c, old, froms, tos);
      for (int j = 0; j < count; j++) {
        EACH_LANE(lane) {
          double mass = 0.0, moment = 0.0;
          for (u32 b = froms[j] / LANES * LANES + lane; b < tos[j]; b += LANES) {
            if (c.counts[b] == 0) continue;
            const double u = value_of(s, b);
            const double a = attention(old, nearest_to(old, count, u), j, u, c.tau, norms[b]) * (double)c.counts[b];
            mass += a;
            moment += a * (u - old[j]);
          }
          sums[lane] = mass;
          moments[lane] = moment;
        }
        total(sums, moments);
        double mass = sums[0], shift = 0.0, middle = old[j], moment = moments[0];
        WAIT();
        if (mass < FAINT * (double)s.count) {
          EACH_LANE(lane) {
            double most = -1e300, at = 0.0;
            for (u32 b = lane; b < s.bins; b += LANES) {
              if (c.counts[b] == 0) continue;
              const double u = value_of(s, b), one = logit(old, nearest_to(old, count, u), j, u, c.tau);
              if (one > most) {
                most = one;
                at = u;
              }
            }
            sums[lane] = most;
            moments[lane] = at;
          }
          // The largest; of equal ones that of the least value.
          for (int half = LANES / 2; half > 0; half /= 2) {
            EACH_LANE(lane) {
              if (lane >= half) continue;
              const double other = sums[lane + half], at = moments[lane + half];
              if (other > sums[lane] || (other == sums[lane] && at < moments[lane])) {
                sums[lane] = other;
                moments[lane] = at;
              }
            }
          }
          shift = sums[0];
          // From amid the weights: the entry may be so far away that nothing of their differences is left.
          middle = moments[0];
          WAIT();
          EACH_LANE(lane) {
            double part = 0.0, moved = 0.0;
            for (u32 b = lane; b < s.bins; b += LANES) {
              if (c.counts[b] == 0) continue;
              const double u = value_of(s, b), one = logit(old, nearest_to(old, count, u), j, u, c.tau) - shift;
              const double a = one > -700.0 ? power(one) * norms[b] * (double)c.counts[b] : 0.0;
              part += a;
              moved += a * (u - middle);
            }
            sums[lane] = part;
            moments[lane] = moved;
          }
          total(sums, moments);
          mass = sums[0];
          moment = moments[0];
          WAIT();
        }
        EACH_LANE(lane) {
          if (lane == 0) {
            masses[j] = mass;
            shifts[j] = shift;
            // Without weights entries stay where they are.
            now[j] = mass > 0.0 ? middle + moment / mass : old[j];
          }
        }
      }
      EACH_LANE(lane) {
        // Rounding may put an entry a little past its neighbour.
        if (lane == 0)
          for (int j = 1; j < count; j++) now[j] = now[j] > now[j - 1] ? now[j] : now[j - 1];
      }
      EACH_LANE(lane) {
        for (int j = lane; j < count; j += LANES) {
          centroids_of(c, t)[j] = now[j];
          // The soft value is read with the attention on c^(T−1).
          if (t < c.iterations) old[j] = now[j];
          else c.entries[j] = now[j];
        }
      }
    }
    EACH_LANE(lane) {
      double error = 0.0;
      for (u32 b = lane; b < s.bins; b += LANES) {
        if (c.counts[b] == 0) continue;
        const double u = value_of(s, b);
        const Seen seen = seen_from(old, count, u, c.tau);
        double soft = 0.0;
        for (int j = seen.from; j < seen.to; j++)
          soft += power(logit(old, seen.near, j, u, c.tau)) * norms[b] * now[j];
        c.cells[b].soft = (float)soft;
        const double away = u - now[nearest_to(now, count, u)];
        error += (double)c.counts[b] * away * away;
      }
      sums[lane] = error;
    }
    total(sums, 0);
    EACH_LANE(lane) if (lane == 0) p.errors[segment] = s.count ? sums[0] / (double)s.count : 0.0;
  }
}

KERNEL(way_back)(Plan p) {
  SHARED double old[MOST_ENTRIES], now[MOST_ENTRIES], masses[MOST_ENTRIES], shifts[MOST_ENTRIES], gamma[MOST_ENTRIES];
  SHARED double earlier[MOST_ENTRIES], sums[LANES], others[LANES];
  SHARED u32 froms[MOST_ENTRIES], tos[MOST_ENTRIES];
  double* norms = p.scratch + (u64)BLOCK * 5 * p.scratch_bins;
  double *means = norms + p.scratch_bins, *slopes = means + p.scratch_bins;
  double *offsets = slopes + p.scratch_bins, *upstream = offsets + p.scratch_bins;
  for (u32 segment = BLOCK; segment < p.segment_count; segment += BLOCKS) {
    const Clustering c = clustering_of(p, segment);
    const Segment& s = c.s;
    const int count = s.entries, most = (int)(p.gradient_extents[segment] >> 23);
    if (!p.gradients[s.layer]) continue;
    const double scale = 2.0 / c.tau;
    // What the integers of `add_up` are multiples of.
    const double unit = two_to(most - 126 - s.bits), unit_of_square = two_to(2 * (most - 126) - s.bits);
    EACH_LANE(lane) {
      for (int j = lane; j < count; j += LANES) {
        old[j] = centroids_of(c, c.iterations - 1)[j];
        now[j] = centroids_of(c, c.iterations)[j];
      }
    }
    norms_of(c, old, norms);
    reaches_of(c, old, froms, tos);
    // The soft value: f_b depends on c^T directly, and on c^(T−1) and the weight through the attention.
    EACH_LANE(lane) {
      for (u32 b = lane; b < s.bins; b += LANES) {
        if (c.counts[b] == 0) continue;
        const double u = value_of(s, b);
        const Seen seen = seen_from(old, count, u, c.tau);
        double soft = 0.0, slope = 0.0;
        for (int j = seen.from; j < seen.to; j++)
          soft += attention(old, seen.near, j, u, c.tau, norms[b]) * now[j];
        for (int j = seen.from; j < seen.to; j++)
          slope -= attention(old, seen.near, j, u, c.tau, norms[b]) * (now[j] - soft) * scale * (u - old[j]);
        means[b] = soft;
        slopes[b] = slope;
        offsets[b] = 0.0;
        upstream[b] = (double)(i64)c.cells[b].of_gradient.sum * unit;
      }
    }
    for (int j = 0; j < count; j++) {
      EACH_LANE(lane) {
        double to_last = 0.0, to_previous = 0.0;
        for (u32 b = froms[j] / LANES * LANES + lane; b < tos[j]; b += LANES) {
          if (c.counts[b] == 0) continue;
          const double u = value_of(s, b);
          const double a = attention(old, nearest_to(old, count, u), j, u, c.tau, norms[b]);
          to_last += upstream[b] * a;
          to_previous += upstream[b] * (a * (now[j] - means[b]) * scale * (u - old[j]));
        }
        sums[lane] = to_last;
        others[lane] = to_previous;
      }
      total(sums, others);
      EACH_LANE(lane) {
        if (lane == 0) {
          gamma[j] = sums[0];
          earlier[j] = others[0];
        }
      }
    }
    // Each update, from ∂L/∂c^t to its part of Ψ_b, and to ∂L/∂c^(t−1).
    for (u32 t = c.iterations; t >= 1; t--) {
      EACH_LANE(lane) {
        for (int j = lane; j < count; j += LANES) {
          old[j] = centroids_of(c, t - 1)[j];
          now[j] = centroids_of(c, t)[j];
          masses[j] = masses_of(c, t)[j];
          shifts[j] = shifts_of(c, t)[j];
          gamma[j] = masses[j] > 0.0 ? gamma[j] / masses[j] : 0.0;
        }
      }
      if (t < c.iterations) {
        norms_of(c, old, norms);
        reaches_of(c, old, froms, tos);
      }
      EACH_LANE(lane) {
        for (u32 b = lane; b < s.bins; b += LANES) {
          if (c.counts[b] == 0) continue;
          const double u = value_of(s, b);
          const Seen seen = seen_from(old, count, u, c.tau);
          double mean = 0.0, through = 0.0;
          // Of faint entries what they weigh beside their own terms, in all bins; of others the attention.
          for (int j = 0; j < count; j++) {
            if (shifts[j] == 0.0) continue;
            const double one = logit(old, seen.near, j, u, c.tau) - shifts[j];
            if (one > -700.0) mean += power(one) * norms[b] * gamma[j] * (u - now[j]);
          }
          for (int j = seen.from; j < seen.to; j++)
            if (shifts[j] == 0.0) mean += attention(old, seen.near, j, u, c.tau, norms[b]) * gamma[j] * (u - now[j]);
          for (int j = 0; j < count; j++) {
            if (shifts[j] == 0.0) continue;
            const double one = logit(old, seen.near, j, u, c.tau) - shifts[j];
            const double share = one > -700.0 ? power(one) * norms[b] * gamma[j] : 0.0;
            through += share - share * (u - now[j]) * scale * (u - old[j]);
          }
          for (int j = seen.from; j < seen.to; j++) {
            const double a = attention(old, seen.near, j, u, c.tau, norms[b]);
            const double share = shifts[j] == 0.0 ? gamma[j] : 0.0;
            through += a * share - a * (share * (u - now[j]) - mean) * scale * (u - old[j]);
          }
          means[b] = mean;
          offsets[b] += through;
        }
      }
      if (t == 1) break;  // c⁰ is held constant.
      for (int j = 0; j < count; j++) {
        const bool faint = shifts[j] != 0.0;
        const u32 from = faint ? 0 : froms[j], to = faint ? s.bins : tos[j];
        EACH_LANE(lane) {
          double sum = 0.0;
          for (u32 b = from / LANES * LANES + lane; b < to; b += LANES) {
            if (c.counts[b] == 0) continue;
            const double u = value_of(s, b);
            const int near = nearest_to(old, count, u);
            const double a = attention(old, near, j, u, c.tau, norms[b]);
            double of_mean = a * gamma[j];
            if (faint) {
              const double one = logit(old, near, j, u, c.tau) - shifts[j];
              of_mean = one > -700.0 ? power(one) * norms[b] * gamma[j] : 0.0;
            }
            sum += (double)c.counts[b] * ((of_mean * (u - now[j]) - a * means[b]) * scale * (u - old[j]));
          }
          sums[lane] = sum;
        }
        total(sums, 0);
        EACH_LANE(lane) if (lane == 0) earlier[j] += sums[0];
      }
      EACH_LANE(lane) {
        for (int j = lane; j < count; j += LANES) {
          gamma[j] = earlier[j];
          earlier[j] = 0.0;
        }
      }
    }
    // ∂L/∂w = slope · ∂L/∂ŵ + offset; its square, from the sums; and counts are cleared for the next.
    EACH_LANE(lane) {
      double square = 0.0;
      for (u32 b = lane; b < s.bins; b += LANES) {
        const double n = (double)c.counts[b], slope = slopes[b], offset = offsets[b];
        if (n == 0.0) continue;
        const double of_square = (double)c.cells[b].of_gradient.square * unit_of_square;
        square += slope * slope * of_square + offset * (2.0 * slope * upstream[b] + offset * n);
        c.cells[b].line.slope = (float)slope;
        c.cells[b].line.offset = (float)offset;
        c.counts[b] = 0;
      }
      sums[lane] = square;
      if (lane == 0) p.escaped[segment] = 0;
    }
    total(sums, 0);
    EACH_LANE(lane) {
      // What rounding leaves of nothing; what is no number stays none.
      if (lane == 0) p.squares[segment] = most == 255 ? double_of(0x7FF8ull << 48) : (sums[0] < 0.0 ? 0.0 : sums[0]);
    }
  }
}
