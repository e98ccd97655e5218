// write_kv: the slots' keys and values of one layer into the rows of the cache behind kv_len. Rows that
// the cache does not have are not written.
#pragma once

#include "types.h"

namespace lvspec::LVSPEC_ARCH {

static void write_kv(const WriteKv& a) {
  const auto range = [](int64_t begin, int64_t end, void* context) {
    const WriteKv& s = *static_cast<const WriteKv*>(context);
    const size_t size = size_t(s.element_size);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t t = row % s.num_slots, h = row / s.num_slots % s.num_kv_heads;
      const int64_t b = row / s.num_slots / s.num_kv_heads;
      const int64_t place = s.kv_len[b] + t;
      if (place < 0 || place >= s.capacity) continue;
      const auto copy = [&](const void* from, const int64_t* stride, void* to,
                            const int64_t* to_stride) {
        const int64_t source = b * stride[0] + h * stride[1] + t * stride[2];
        const int64_t offset = b * to_stride[0] + h * to_stride[1] + place * to_stride[2];
        const char* first = static_cast<const char*>(from) + source * s.element_size;
        char* row_of_cache = static_cast<char*>(to) + offset * s.element_size;
        if (to_stride[3] == 1) {
          std::memcpy(row_of_cache, first, size_t(s.head_dim) * size);
          return;
        }
        for (int64_t d = 0; d < s.head_dim; ++d)
          std::memcpy(row_of_cache + d * to_stride[3] * s.element_size, first + d * size, size);
      };
      copy(s.k, s.k_stride, s.k_cache, s.k_cache_stride);
      copy(s.v, s.v_stride, s.v_cache, s.v_cache_stride);
    }
  };
  const int64_t rows = a.batch_size * a.num_kv_heads * a.num_slots;
  a.parallel_for(rows, 1 + (1 << 15) / (a.head_dim + 1), range, const_cast<WriteKv*>(&a));
}

}  // namespace lvspec::LVSPEC_ARCH
