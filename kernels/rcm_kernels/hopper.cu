// Attention on Hopper, with or without its tangent (kernels/README.md derives it; hopper.py compiles and launches it).
//
// A block holds one tile of 64 * GROUPS queries. One warp loads tiles of BN keys by TMA into a ring of STAGES buffers; each of
// GROUPS warpgroups owns 64 queries, which a warp of its own loads, and multiplies on wgmma. The consumers are not synchronised
// with each other: while one is in its softmax, or writes its results, another keeps the tensor cores busy. The grid is
// persistent: tiles of queries are dealt round robin, those of one head in a row, so that its keys stay in the L2 cache.
//
// hopper.py defines D (64 or 128), BN, STAGES, GROUPS, BUFFERS, QUERY_BUFFERS, TANGENT, K_TANGENT, V_TANGENT, WIDE_OUT, BF16,
// MAX_RISE, and prepends
// wgmma_ss_<n> (both operands in shared memory) and wgmma_rs_<n> (the first in registers), n columns wide.
//
// Names: O = P V and T = P V_dot + H V are the accumulators, P = exp2(S - m), H = P (S_dot - c); l = rowsum(P), r = rowsum(H).
// m follows the highest score, lazily: it moves when a score rises more than MAX_RISE (in powers of two) above it, so that O
// and T are hardly ever rescaled. c follows the mean of S_dot, at the same moments and at tiles 16, 256, ... (docs/adr/0002).

static constexpr int BM = 64 * GROUPS;
static constexpr int HALVES = D / 64;  // a row of a tile in shared memory is 128 bytes: 64 columns
static constexpr int Q_HALF = BM * 128, Q_BYTES = HALVES * Q_HALF;
static constexpr int KV_HALF = BN * 128, KV_BYTES = HALVES * KV_HALF;
static constexpr int K_BYTES = KV_BYTES * (1 + K_TANGENT), V_BYTES = KV_BYTES * (1 + V_TANGENT);
static constexpr int STAGE_BYTES = K_BYTES + V_BYTES;
// With two buffers for queries, results leave through the one whose queries are done with.
static constexpr int QUERY_BYTES = (1 + TANGENT) * Q_BYTES;
static constexpr int RESULT_HALF = QUERY_BUFFERS == 2 ? Q_HALF : 64 * 128, RESULT_BYTES = HALVES * RESULT_HALF;  // of one group
static constexpr int CONSUMER_WARPS = 4 * GROUPS;

struct alignas(64) TensorMap {
  char opaque[128];
};

struct Barriers {
  u64 q_full[GROUPS][QUERY_BUFFERS], q_empty[GROUPS][QUERY_BUFFERS], k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
};

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u64& bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&bar)), "r"(count));
}
__device__ __forceinline__ void barrier_expect(u64& bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&bar)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u64& bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&bar)) : "memory");
}
__device__ __forceinline__ void barrier_wait(u64& bar, u32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::"r"(
          shared_address(&bar)),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void tma_load(u32 to, const TensorMap& from, u64& bar, int column, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
          to),
      "l"(&from), "r"(shared_address(&bar)), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

__device__ __forceinline__ void tma_store(const TensorMap& to, u32 from, int column, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&to), "r"(from),
      "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
// Among the 128 threads of a group of consumers.
__device__ __forceinline__ void group_sync(int group) { asm volatile("bar.sync %0, 128;" ::"r"(1 + group) : "memory"); }

// Describes an operand of wgmma in shared memory, swizzled in 128-byte rows: 8 rows every 1024 bytes, and for an operand whose
// columns are contiguous (V) the next 64 of them `leading` bytes on. Addresses may be added to it in units of 16 bytes.
__device__ __forceinline__ u64 operand(u32 address, u32 leading) {
  return (u64)(address >> 4) | (u64)(leading >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62;
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits for all but the last n groups of wgmma.
template <int n>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
}
// Keeps the compiler from moving uses of registers that wgmma writes across the fence or wait beside this.
template <int n>
__device__ __forceinline__ void pin(float (&x)[n]) {
#pragma unroll
  for (int i = 0; i < n; i++) asm volatile("" : "+f"(x[i])::"memory");
}

__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ u32 pack(float low, float high) {
  u32 x;
  if (BF16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
  return x;
}
// Over the four lanes that share a row.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// s = a b^T, or s += a b^T, for 64 rows of a tile of queries and BN keys.
__device__ __forceinline__ void multiply_keys(float (&s)[BN / 2], u64 a, u64 b, bool add) {
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    int within = k % 4 * 2;  // 16 columns are 32 bytes
    WGMMA_SS(s, a + k / 4 * (Q_HALF >> 4) + within, b + k / 4 * (KV_HALF >> 4) + within, add || k > 0);
  }
}
// acc = p v, or acc += p v, for 64 rows of probabilities and BN values.
__device__ __forceinline__ void multiply_values(float (&acc)[D / 2], u32 (&p)[BN / 4], u64 v, bool add) {
#pragma unroll
  for (int k = 0; k < BN / 16; k++)
    WGMMA_RS(acc, p[4 * k], p[4 * k + 1], p[4 * k + 2], p[4 * k + 3], v + k * (16 * 128 >> 4), add || k > 0);
}

template <bool x>
struct Constant {
  static constexpr bool value = x;
};

// What a persistent block works on.
struct Work {
  int tile, head, batch;
  __device__ __forceinline__ Work(int index, int tiles, int heads)
      : tile(index % tiles), head(index / tiles % heads), batch(index / tiles / heads) {}
};

// In registers, following wgmma's layout of an accumulator: element i of a row-tile belongs to row lane / 4 + 8 * (i / 2 % 2)
// of the warp's 16 and to column i / 4 * 8 + lane % 4 * 2 + i % 2.
#define ROW(i) ((i) / 2 % 2)

extern "C" __global__ void __launch_bounds__(128 * (GROUPS + 1), 1)
    attention(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
              const __grid_constant__ TensorMap q_dot, const __grid_constant__ TensorMap k_dot,
              const __grid_constant__ TensorMap v_dot, const __grid_constant__ TensorMap out,
              const __grid_constant__ TensorMap out_dot, float* lse, float* lse_dot, int queries,
              int keys, int heads, int works, float scale, float* wide_out,
              i64 wide_b, i64 wide_s, i64 wide_n) {
  extern __shared__ char memory[];
  __shared__ Barriers bars;
  const u32 q_at = (shared_address(memory) + 1023) & ~1023u, kv_at = q_at + QUERY_BUFFERS * QUERY_BYTES;
  const u32 results_at = kv_at + STAGES * STAGE_BYTES;
  const int q_tiles = (queries + BM - 1) / BM, kv_tiles = (keys + BN - 1) / BN;
  if (threadIdx.x == 0) {
    for (int i = 0; i < GROUPS * QUERY_BUFFERS; i++) {
      barrier_init(bars.q_full[0][i], 1);
      barrier_init(bars.q_empty[0][i], QUERY_BUFFERS == 2 ? 1 : 4);
    }
    for (int i = 0; i < STAGES; i++) {
      barrier_init(bars.k_full[i], 1);
      barrier_init(bars.v_full[i], 1);
      barrier_init(bars.k_empty[i], CONSUMER_WARPS);
      barrier_init(bars.v_empty[i], CONSUMER_WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();

  if (threadIdx.x < 128) {  // the producers: warp 0 loads keys and values, warp 1 + g the queries of group g
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(GROUPS == 2 ? 24 : 32));
    const int group = threadIdx.x / 32 - 1;
    if (threadIdx.x % 32 > 0 || group >= GROUPS) return;
    int stage = 0;
    u32 phase = 0;
#pragma unroll 1
    for (int index = blockIdx.x; index < works; index += gridDim.x) {
      const Work work(index, q_tiles, heads);
      if (group >= 0) {
        const int row = work.tile * BM + group * 64;
        u64& full = bars.q_full[group][stage];
        barrier_wait(bars.q_empty[group][stage], phase ^ 1);
        barrier_expect(full, QUERY_BYTES / GROUPS);
        for (int h = 0; h < HALVES; h++) {
          const u32 at = q_at + stage * QUERY_BYTES + h * Q_HALF + group * 64 * 128;
          tma_load(at, q, full, h * 64, row, work.head, work.batch);
          if (TANGENT) tma_load(at + Q_BYTES, q_dot, full, h * 64, row, work.head, work.batch);
        }
        if (++stage == QUERY_BUFFERS) stage = 0, phase ^= 1;
        continue;
      }
#pragma unroll 1  // the producers have few registers
      for (int j = 0; j < kv_tiles; j++) {
        const u32 k_at = kv_at + stage * STAGE_BYTES, v_at = k_at + K_BYTES;
        barrier_wait(bars.k_empty[stage], phase ^ 1);
        barrier_expect(bars.k_full[stage], K_BYTES);
        for (int h = 0; h < HALVES; h++) {
          tma_load(k_at + h * KV_HALF, k, bars.k_full[stage], h * 64, j * BN, work.head, work.batch);
          if (K_TANGENT)
            tma_load(k_at + KV_BYTES + h * KV_HALF, k_dot, bars.k_full[stage], h * 64, j * BN, work.head, work.batch);
        }
        barrier_wait(bars.v_empty[stage], phase ^ 1);
        barrier_expect(bars.v_full[stage], V_BYTES);
        for (int h = 0; h < HALVES; h++) {
          tma_load(v_at + h * KV_HALF, v, bars.v_full[stage], h * 64, j * BN, work.head, work.batch);
          if (V_TANGENT)
            tma_load(v_at + KV_BYTES + h * KV_HALF, v_dot, bars.v_full[stage], h * 64, j * BN, work.head, work.batch);
        }
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
    }
    return;
  }

  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(GROUPS == 2 ? 240 : 160));
  const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
  const int row_of_warp = threadIdx.x / 32 % 4 * 16, row_in_group = row_of_warp + lane / 4, first_column = lane % 4 * 2;
  const bool leader = threadIdx.x % 128 == 0;
  const float scale_log2 = scale * 1.4426950408889634f;
  int stage = 0, q_buffer = 0;
  u32 phase = 0, q_phase = 0;
  float S[BN / 2], S_dot[BN / 2];
  // Begins S of a tile, and as another group of wgmma S_dot.
  auto begin_scores = [&](bool loaded) {
    const u64 k_rows = operand(kv_at + stage * STAGE_BYTES, 0);
    const u64 q_rows = operand(q_at + q_buffer * QUERY_BYTES + group * 64 * 128, 0), q_dot_rows = q_rows + (Q_BYTES >> 4);
    if (!loaded) barrier_wait(bars.k_full[stage], phase);
    pin(S);
    if (TANGENT) pin(S_dot);
    wgmma_fence();
    multiply_keys(S, q_rows, k_rows, false);
    wgmma_commit();
    if (TANGENT) {
      multiply_keys(S_dot, q_dot_rows, k_rows, false);
      if (K_TANGENT) multiply_keys(S_dot, q_rows, k_rows + (KV_BYTES >> 4), true);
      wgmma_commit();
    }
  };
  if (QUERY_BUFFERS == 2) {
    barrier_wait(bars.q_full[group][0], 0);
    begin_scores(false);
    wgmma_wait<0>();
  }
  for (int index = blockIdx.x; index < works; index += gridDim.x) {
    float O[D / 2] = {}, T[D / 2] = {}, l[2] = {}, r[2] = {}, c[2] = {}, m[2] = {-INFINITY, -INFINITY};
    u32 P[BN / 4];

    // Begins O = P V and T = P V_dot, or adds to them.
    auto begin_values = [&](int from, u32 parity, bool add) {
      const u64 v_rows = operand(kv_at + from * STAGE_BYTES + K_BYTES, KV_HALF);
      barrier_wait(bars.v_full[from], parity);
      pin(O);
      if (TANGENT) pin(T);
      wgmma_fence();
      multiply_values(O, P, v_rows, add);
      if (V_TANGENT) multiply_values(T, P, v_rows + (KV_BYTES >> 4), add);
      wgmma_commit();
    };
    auto finish_values = [&]() {
      wgmma_wait<0>();
      pin(O);
      if (TANGENT) pin(T);
    };
    auto release = [&](u64& barrier) {
      if (lane == 0) barrier_arrive(barrier);
    };
    // The sum over this thread's columns of P S_dot.
    auto sum_of_tangents = [&](float(&sum)[2]) {
#pragma unroll
      for (int i = 0; i < BN / 2; i++) sum[ROW(i)] += S[i] * (S_dot[i] * scale);
    };
    // Turns S of tile j into P, taking care of m, l, c and what hangs on them. Waits for S; when m or c moves, for all else.
    // In the first tile nothing hangs on them yet, and c is for the caller.
    auto probabilities = [&](auto first, int j) {
      constexpr bool FIRST = decltype(first)::value;
      wgmma_wait<1>();  // what began after S: S_dot, or without tangents the values of the tile before
      pin(S);
      if (j == kv_tiles - 1 && keys % BN) {
#pragma unroll
        for (int i = 0; i < BN / 2; i++)
          if (j * BN + i / 4 * 8 + first_column + i % 2 >= keys) S[i] = -INFINITY;
      }
      // Pairs and fours first, here and in the sums below: a chain through all elements would be a chain of latencies.
      float highest[2] = {-INFINITY, -INFINITY};
#pragma unroll
      for (int i = 0; i < BN / 2; i += 8) {
#pragma unroll
        for (int h = 0; h < 4; h += 2)
          highest[h / 2] = fmaxf(highest[h / 2], fmaxf(fmaxf(S[i + h], S[i + h + 1]), fmaxf(S[i + h + 4], S[i + h + 5])));
      }
      bool rises = TANGENT && (j & (j - 1)) == 0 && (j & 0x11110) == j;  // 16, 256, 4096, 65536
#pragma unroll
      for (int i = 0; i < 2; i++) rises |= highest[i] * scale_log2 > m[i] + MAX_RISE;
      const bool move = FIRST || __any_sync(~0u, rises);
      float shrink[2] = {1, 1};
      if (move) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const float to = fmaxf(m[i], row_max(highest[i]) * scale_log2);
          shrink[i] = power_of_two(m[i] - to);
          m[i] = to;
          l[i] *= shrink[i];
          r[i] *= shrink[i];
        }
      }
      const float l_before[2] = {l[0], l[1]};
#pragma unroll
      for (int i = 0; i < BN / 2; i++) S[i] = power_of_two(S[i] * scale_log2 - m[ROW(i)]);
#pragma unroll
      for (int i = 0; i < BN / 2; i += 8) {
#pragma unroll
        for (int h = 0; h < 4; h += 2) l[h / 2] += (S[i + h] + S[i + h + 1]) + (S[i + h + 4] + S[i + h + 5]);
      }
      if (!TANGENT) finish_values();
      if (!FIRST && move) {
        float back[2] = {};
        if (TANGENT) {
          wgmma_wait<0>();
          pin(S_dot);
          float sum[2] = {};
          sum_of_tangents(sum);
#pragma unroll
          for (int i = 0; i < 2; i++) {
            const float to = (row_sum(sum[i] + r[i]) + c[i] * row_sum(l_before[i])) / row_sum(l[i]);
            back[i] = c[i] - to;
            c[i] = to;
            r[i] += back[i] * l_before[i];
          }
        }
#pragma unroll
        for (int i = 0; i < D / 2; i++) {
          O[i] *= shrink[ROW(i)];
          if (TANGENT) T[i] = T[i] * shrink[ROW(i)] + back[ROW(i)] * O[i];
        }
      }
#pragma unroll
      for (int i = 0; i < BN / 2; i += 2) P[i / 2] = pack(S[i], S[i + 1]);
    };
    // With tangents, from when scores have begun. The accumulators leave no registers for the scores of two tiles. While H is
    // computed, P V and P V_dot go on.
    auto tile = [&](auto first, int j) {
      constexpr bool FIRST = decltype(first)::value;
      probabilities(first, j);
      begin_values(stage, phase, !FIRST);
      wgmma_wait<1>();  // for S_dot
      pin(S_dot);
      release(bars.k_empty[stage]);
      if (QUERY_BUFFERS == 1 && j == kv_tiles - 1) release(bars.q_empty[group][0]);
      if (FIRST) {
        sum_of_tangents(c);
#pragma unroll
        for (int i = 0; i < 2; i++) c[i] = row_sum(c[i]) / row_sum(l[i]);
      }
      u32 H[BN / 4];
#pragma unroll
      for (int i = 0; i < BN / 2; i += 2) {
        const float a = S[i] * (S_dot[i] * scale - c[ROW(i)]), b = S[i + 1] * (S_dot[i + 1] * scale - c[ROW(i)]);
        r[ROW(i)] += a + b;
        H[i / 2] = pack(a, b);
      }
      wgmma_fence();
      multiply_values(T, H, operand(kv_at + stage * STAGE_BYTES + K_BYTES, KV_HALF), !FIRST || V_TANGENT);
      wgmma_commit();
      finish_values();
      release(bars.v_empty[stage]);
      if (++stage == STAGES) stage = 0, phase ^= 1;
    };

    if (QUERY_BUFFERS == 1) {
      barrier_wait(bars.q_full[group][0], q_phase);
      begin_scores(false);
    }
    if (TANGENT) {
      tile(Constant<true>(), 0);
      if (QUERY_BUFFERS == 2 && leader && index != blockIdx.x) {
        asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        barrier_arrive(bars.q_empty[group][q_buffer ^ 1]);
      }
#pragma unroll 1
      for (int j = 1; j < kv_tiles; j++) {
        begin_scores(false);
        tile(Constant<false>(), j);
      }
    } else {
      // The scores of tile j are computed, and turned into P, while P V of tile j - 1 goes on.
      wgmma_commit();  // an empty group, where the values of the tile before would be
      probabilities(Constant<true>(), 0);
#pragma unroll 1
      for (int j = 1; j < kv_tiles; j++) {
        const int before = stage;
        const u32 v_phase = phase;
        release(bars.k_empty[stage]);
        if (++stage == STAGES) stage = 0, phase ^= 1;
        begin_scores(false);
        begin_values(before, v_phase, true);
        probabilities(Constant<false>(), j);
        release(bars.v_empty[before]);
      }
      release(bars.k_empty[stage]);
      release(bars.q_empty[group][0]);
      begin_values(stage, phase, true);
      finish_values();
      release(bars.v_empty[stage]);
      if (++stage == STAGES) stage = 0, phase ^= 1;
    }

    // The scores of the next tile of queries are computed while this one's results leave. After the last, of what is there.
    const u32 done_at = q_at + q_buffer * QUERY_BYTES + group * 64 * 128;
    if (++q_buffer == QUERY_BUFFERS) q_buffer = 0, q_phase ^= 1;
    if (QUERY_BUFFERS == 2) {
      if (index + gridDim.x < works) {
        barrier_wait(bars.q_full[group][q_buffer], q_phase);
        barrier_wait(bars.k_full[stage], phase);
      }
      begin_scores(true);
    }
    const Work work(index, q_tiles, heads);
    const int first_of_group = work.tile * BM + group * 64;
    float inverse[2], rest[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int row = first_of_group + row_in_group + 8 * i;
      const float sum = row_sum(l[i]);
      inverse[i] = 1 / sum;
      rest[i] = row_sum(r[i]) * inverse[i];
      if (lane % 4 == 0 && row < queries) {
        const i64 to = ((i64)work.batch * heads + work.head) * queries + row;
        lse[to] = (m[i] + log2f(sum)) * 0.6931471805599453f;
        if (TANGENT) lse_dot[to] = c[i] + rest[i];
      }
    }
#pragma unroll
    for (int i = 0; i < D / 2; i++) {
      O[i] *= inverse[ROW(i)];
      if (TANGENT) T[i] = T[i] * inverse[ROW(i)] - rest[ROW(i)] * O[i];
    }
    // Through shared memory, from where TMA stores them while the next tile begins.
    auto store = [&](float(&x)[D / 2], const TensorMap& to, int buffer) {
      const u32 from = QUERY_BUFFERS == 2 ? done_at + buffer * Q_BYTES : results_at + (buffer * GROUPS + group) * RESULT_BYTES;
      if (QUERY_BUFFERS == 1 && (BUFFERS == 1 || buffer == 0)) {
        if (leader) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");  // the buffer is free
        group_sync(group);
      }
#pragma unroll
      for (int i = 0; i < D / 16; i++) {  // 16 columns of 16 rows a warp; every lane gives the address of 8 of them
        const u32 row = from + i / 4 * RESULT_HALF + row_of_warp * 128 + lane % 16 * 128;
        const u32 chunk = (i % 4 * 2 + lane / 16) ^ (lane % 8);  // of 16 bytes, swizzled
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row + chunk * 16),
                     "r"(pack(x[8 * i], x[8 * i + 1])), "r"(pack(x[8 * i + 2], x[8 * i + 3])),
                     "r"(pack(x[8 * i + 4], x[8 * i + 5])), "r"(pack(x[8 * i + 6], x[8 * i + 7]))
                     : "memory");
      }
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      group_sync(group);
      if (leader) {
        for (int h = 0; h < HALVES; h++)
          tma_store(to, from + h * RESULT_HALF, h * 64, first_of_group, work.head, work.batch);
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
      }
    };
    if (WIDE_OUT) {
      float* to = wide_out + work.batch * wide_b + work.head * wide_n + first_column;
#pragma unroll
      for (int i = 0; i < D / 2; i += 2) {
        const int row = first_of_group + row_in_group + 8 * ROW(i);
        if (row < queries) *(float2*)(to + row * wide_s + i / 4 * 8) = make_float2(O[i], O[i + 1]);
      }
    } else {
      store(O, out, 0);
    }
    if (TANGENT) store(T, out_dot, WIDE_OUT ? 0 : BUFFERS - 1);
    if (QUERY_BUFFERS == 2) wgmma_wait<0>();
  }
  if (leader) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
