// commit_kv: see lvspec.reference.commit_kv.
//
// Which rows move is worked out once; then every layer, sequence and head moves its own. A path
// that `accept` returns increases, so no row is written before it has been read if rows go one by
// one, in order: row i takes its bits from row path[i] >= i, and what has been written by then are
// rows below i. Where a path has path[i] < i all its rows are copied aside first.
#pragma once

#include "types.h"

namespace lvspec::LVSPEC_ARCH {

struct RowMove {
  int64_t source, target;  // positions in the cache
};

struct KvMoves {
  const CommitKv& a;
  const RowMove* moves;  // [B, S], of which the first `counts` of a sequence
  const int64_t* counts;
  const uint8_t* is_in_order;  // [B]
};

template <class Unit>
static void copy_units(const char* from, int64_t from_stride, char* to, int64_t to_stride,
                       int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    Unit unit;
    std::memcpy(&unit, from + i * from_stride, sizeof unit);
    std::memcpy(to + i * to_stride, &unit, sizeof unit);
  }
}

// `count` numbers of `size` bytes; strides in bytes.
static inline void copy_row(int64_t size, const char* from, int64_t from_stride, char* to,
                            int64_t to_stride, int64_t count) {
  if (from_stride == size && to_stride == size) {
    std::memcpy(to, from, size_t(count * size));
    return;
  }
  switch (size) {
    case 1: copy_units<uint8_t>(from, from_stride, to, to_stride, count); return;
    case 2: copy_units<uint16_t>(from, from_stride, to, to_stride, count); return;
    case 4: copy_units<uint32_t>(from, from_stride, to, to_stride, count); return;
    case 8: copy_units<uint64_t>(from, from_stride, to, to_stride, count); return;
    default:
      for (int64_t i = 0; i < count; ++i)
        std::memcpy(to + i * to_stride, from + i * from_stride, size_t(size));
  }
}

// The rows of one layer, sequence and head, which begin at `rows`.
static void move_rows(const KvMoves& m, char* rows, int64_t sequence, int64_t row_stride,
                      int64_t column_stride) {
  static thread_local Scratch<char> scratch;
  const int64_t size = m.a.element_size, width = m.a.head_dim, bytes = width * size;
  const RowMove* moves = m.moves + sequence * m.a.num_slots;
  const int64_t count = m.counts[sequence];
  row_stride *= size;
  column_stride = width == 1 ? size : column_stride * size;
  if (m.is_in_order[sequence]) {
    for (int64_t i = 0; i < count; ++i)
      copy_row(size, rows + moves[i].source * row_stride, column_stride,
               rows + moves[i].target * row_stride, column_stride, width);
    return;
  }
  char* aside = scratch.get(count * bytes);
  for (int64_t i = 0; i < count; ++i)
    copy_row(size, rows + moves[i].source * row_stride, column_stride, aside + i * bytes, size,
             width);
  for (int64_t i = 0; i < count; ++i)
    copy_row(size, aside + i * bytes, size, rows + moves[i].target * row_stride, column_stride,
             width);
}

static void commit_heads(int64_t begin, int64_t end, void* context) {
  const KvMoves& m = *static_cast<const KvMoves*>(context);
  const CommitKv& a = m.a;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t head = i % a.num_kv_heads, sequence = i / a.num_kv_heads % a.batch_size;
    const int64_t layer = i / a.num_kv_heads / a.batch_size;
    if (m.counts[sequence] == 0) continue;
    const int64_t *k = a.k_stride, *v = a.v_stride;
    char* k_rows = static_cast<char*>(a.k_cache) +
                   (layer * k[0] + sequence * k[1] + head * k[2]) * a.element_size;
    char* v_rows = static_cast<char*>(a.v_cache) +
                   (layer * v[0] + sequence * v[1] + head * v[2]) * a.element_size;
    move_rows(m, k_rows, sequence, k[3], k[4]);
    move_rows(m, v_rows, sequence, v[3], v[4]);
  }
}

static void commit_kv(const CommitKv& a) {
  static thread_local Scratch<RowMove> moves_scratch;
  static thread_local Scratch<int64_t> counts_scratch;
  static thread_local Scratch<uint8_t> order_scratch;
  RowMove* moves = moves_scratch.get(a.batch_size * a.num_slots);
  int64_t* counts = counts_scratch.get(a.batch_size);
  uint8_t* is_in_order = order_scratch.get(a.batch_size);
  int64_t most = 0;
  for (int64_t b = 0; b < a.batch_size; ++b) {
    counts[b] = 0;
    is_in_order[b] = 1;
    const int64_t length = a.kv_len[b];
    for (int64_t i = 0; i <= a.num_accepted[b] && i < a.num_slots; ++i) {
      const int64_t slot = a.path[b * a.num_slots + i];
      // A chain moves nothing at all. What lies outside of the cache is nobody's row.
      if (slot == i || slot < 0 || length < 0) continue;
      if (length + slot >= a.capacity || length + i >= a.capacity) continue;
      moves[b * a.num_slots + counts[b]++] = {length + slot, length + i};
      if (slot < i) is_in_order[b] = 0;
    }
    most = counts[b] > most ? counts[b] : most;
  }
  if (most == 0) return;
  KvMoves m = {a, moves, counts, is_in_order};
  const int64_t cost = most * (40 + a.head_dim * a.element_size / 8);  // nanoseconds
  a.parallel_for(a.num_layers * a.batch_size * a.num_kv_heads, 1 + 20000 / cost, commit_heads, &m);
}

}  // namespace lvspec::LVSPEC_ARCH
