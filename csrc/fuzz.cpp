// Calls every kernel of every instruction set with random sizes, strides and values, and compares.
//
//   fuzz [rounds] [seed]      a failure names the seed that repeats it: fuzz 1 SEED
//
// Meant for the sanitizers (make sanitize): every array ends where its data ends. A kernel must
// give the same bits however its work is divided, write all of its results, and agree with the
// other instruction sets: in ids and paths exactly, in numbers up to rounding. What results mean is
// tested in Python.
#define LVSPEC_ARCH fuzz

#include "fuzz.h"
#include "fuzz_packed.h"

#include "rule.h"

namespace {

// Arguments are as lvspec.ops lets them through.

void fuzz_verify_attention(Random& random) {
  lvspec::VerifyAttention a{};
  a.type = any_float(random);
  a.stored = random.one_in(5) ? Type::f8_e4m3 : a.type;
  a.batch_size = random.between(1, 3);
  a.num_kv_heads = random.between(1, 3);
  a.num_q_heads = a.num_kv_heads * random.between(1, 4);
  a.num_slots = any_size(random, 64);
  a.head_dim = any_size(random, 130);
  a.scale = 1 / std::sqrt(double(a.head_dim));
  const bool is_paged = random.one_in(3), is_scattered = random.one_in(2);
  Array q = numbers(random, a.type, {a.batch_size, a.num_q_heads, a.num_slots, a.head_dim},
                    is_scattered, 1, false);
  Shape cache_shape = {a.batch_size, a.num_kv_heads, a.num_slots + random.between(0, 150),
                       a.head_dim};
  a.capacity = cache_shape[2];
  if (is_paged) {
    a.page_size = cache_shape[2] = any_size(random, 40);
    a.max_pages = (a.num_slots + a.page_size - 1) / a.page_size + random.between(0, 4);
    a.num_pages = cache_shape[0] = random.between(1, 9);
    a.capacity = a.page_size * a.max_pages;
  }
  Array k = numbers(random, a.stored, cache_shape, is_scattered, 1, false);
  Array v = numbers(random, a.stored, cache_shape, is_scattered && random.one_in(2), 1, false);
  // Of a table all entries are brought into range, so garbage is harmless.
  Array table = integers<int32_t>(random, {a.batch_size, a.max_pages}, false, -2, 12);
  Array kv_len = integers<int32_t>(random, {a.batch_size}, false, -1, a.capacity + 1);
  Array ancestors(random, 8, {a.batch_size, a.num_slots}, false);
  int64_t slot = 0;
  ancestors.each([&](int64_t i) {
    const uint64_t others = random.next() & random.next();
    ancestors.as<int64_t>()[i] = int64_t(others | uint64_t(1) << slot++ % a.num_slots);
  });
  if (random.one_in(8)) ancestors.as<int64_t>()[0] = 0;
  Array visual = integers<uint8_t>(random, {a.batch_size, a.capacity}, false, 0, 2);
  a.num_pieces = random.between(1, 6);
  const Shape plan_shape = {a.batch_size, a.num_pieces};
  Array start = integers<int32_t>(random, plan_shape, false, 0, a.capacity);
  Array end = integers<int32_t>(random, plan_shape, false, 0, a.capacity);
  Array kind = integers<int32_t>(random, plan_shape, false, -1, 2);
  const int64_t scales = random.one_in(2) ? a.batch_size : 1;
  Array k_scale = numbers(random, Type::f32, {scales, a.num_kv_heads}, false, 1, false);
  Array v_scale = numbers(random, Type::f32, {scales, a.num_kv_heads}, false, 1, false);
  a.k_scale_stride = a.v_scale_stride = scales > 1 ? a.num_kv_heads : 0;
  const auto bind = [&] {
    a.q = q.as<void>(), a.k_cache = k.as<void>(), a.v_cache = v.as<void>();
    q.copy_strides(a.q_stride), k.copy_strides(a.k_stride), v.copy_strides(a.v_stride);
  };
  a.kv_len = kv_len.as<int32_t>();
  a.ancestors = ancestors.as<int64_t>(), a.visual = visual.as<uint8_t>();
  if (is_paged) a.block_table = table.as<int32_t>();
  if (random.one_in(2)) {
    a.plan_start = start.as<int32_t>(), a.plan_end = end.as<int32_t>();
    a.plan_kind = kind.as<int32_t>();
  }
  if (a.stored != a.type || random.one_in(4)) {
    a.k_scale = k_scale.as<float>();
    if (random.one_in(2)) a.v_scale = v_scale.as<float>();
  }
  const int64_t rows = a.batch_size * a.num_q_heads * a.num_slots;
  const Type statistics = accumulate(a.type);
  std::vector<Output> outputs = {rounded(a.out, a.type, rows * a.head_dim),
                                 rounded(a.lse, statistics, rows)};
  if (random.one_in(2)) {
    outputs.push_back(rounded(a.mass, statistics, rows));
    outputs.push_back(rounded(a.peak, statistics, rows));
  }
  run("verify_attention", &Kernels::verify_attention, a, outputs, {&q, &k, &v}, bind);
}

int64_t any_vocabulary(Random& random) {
  return random.one_in(3) ? random.between(1, 2600) : random.between(1, 40);
}

void fuzz_logit_stats(Random& random) {
  lvspec::LogitStats a{};
  a.type = any_float(random);
  a.batch_size = random.between(0, 3), a.num_slots = random.between(0, 5);
  a.vocabulary = any_vocabulary(random);
  a.top_k = random.between(1, a.vocabulary < 16 ? a.vocabulary : 16);
  const int64_t rows = a.batch_size * a.num_slots;
  Array logits = numbers(random, a.type, {a.batch_size, a.num_slots, a.vocabulary},
                         random.one_in(2), 3, true);
  const auto bind = [&] { a.logits = logits.as<void>(), logits.copy_strides(a.stride); };
  Output top_logits = rounded(a.top_logits, accumulate(a.type), rows * a.top_k);
  top_logits.comparison = Output::exact;
  run("logit_stats", &Kernels::logit_stats, a,
      {exact(a.top_ids, rows * a.top_k), top_logits, rounded(a.lse, accumulate(a.type), rows),
       rounded(a.entropy, accumulate(a.type), rows)},
      {&logits}, bind);
}

void fuzz_expand_tree(Random& random) {
  lvspec::ExpandTree a{};
  a.type = any_float(random);
  a.batch_size = random.between(0, 3), a.num_nodes = any_size(random, 20);
  a.vocabulary = any_vocabulary(random);
  a.top_k = random.between(1, a.vocabulary < 16 ? a.vocabulary : 16);
  a.width = random.between(1, a.num_nodes * a.top_k);
  const Shape nodes = {a.batch_size, a.num_nodes};
  Array logits = numbers(random, a.type, {a.batch_size, a.num_nodes, a.vocabulary},
                         random.one_in(2), 3, true);
  Array log_probs = numbers(random, accumulate(a.type), nodes, random.one_in(2), 2, true);
  Array slots = integers<int32_t>(random, nodes, random.one_in(2), 0, 63);
  const auto bind = [&] {
    a.logits = logits.as<void>(), a.log_probs = log_probs.as<void>();
    a.slots = slots.as<int32_t>();
    logits.copy_strides(a.logits_stride);
    log_probs.copy_strides(a.log_probs_stride), slots.copy_strides(a.slots_stride);
  };
  const int64_t count = a.batch_size * a.width;
  Output tokens = exact(a.out_tokens, count), parents = exact(a.out_parents, count);
  tokens.comparison = parents.comparison = Output::left_to_caller;
  const Type type = accumulate(a.type);
  const auto results = run("expand_tree", &Kernels::expand_tree, a,
                           {rounded(a.out_log_probs, type, count), tokens, parents},
                           {&logits, &log_probs, &slots}, bind);
  // Rounding may swap two children whose log-probabilities are nearly equal.
  for (int64_t i = 0; i < count; ++i) {
    const double here = number(type, results[0][0].data(), i);
    const bool is_first = i % a.width == 0, is_last = i % a.width == a.width - 1;
    const double above = is_first ? INFINITY : number(type, results[0][0].data(), i - 1);
    const double below = is_last ? here : number(type, results[0][0].data(), i + 1);
    if (!(above - here > 0.01 && here - below > 0.01)) continue;
    for (const std::vector<Bytes>& other : results)
      require(std::memcmp(&results[0][1][size_t(8 * i)], &other[1][size_t(8 * i)], 8) == 0 &&
                  std::memcmp(&results[0][2][size_t(4 * i)], &other[2][size_t(4 * i)], 4) == 0,
              "expand_tree: child %d differs", int(i));
  }
}

void fuzz_commit_kv(Random& random) {
  lvspec::CommitKv a{};
  a.element_size = int64_t(1) << random.between(0, 3);
  a.num_layers = random.between(1, 3), a.batch_size = random.between(1, 3);
  a.num_kv_heads = random.between(1, 3), a.head_dim = any_size(random, 70);
  a.num_slots = any_size(random, 64), a.capacity = a.num_slots + random.between(0, 40);
  const Shape shape = {a.num_layers, a.batch_size, a.num_kv_heads, a.capacity, a.head_dim};
  Array k(random, a.element_size, shape, random.one_in(2));
  Array v(random, a.element_size, shape, random.one_in(2));
  for (char& byte : k.bytes) byte = char(random.next());
  for (char& byte : v.bytes) byte = char(random.next());
  Array kv_len = integers<int32_t>(random, {a.batch_size}, false, -1, a.capacity + 1);
  Array path = integers<int32_t>(random, {a.batch_size, a.num_slots}, false, -1, a.num_slots + 1);
  if (random.one_in(2)) {  // as `accept` returns it
    int64_t slot = 0;
    path.each([&](int64_t i) {
      slot = i % a.num_slots == 0 ? 0 : slot + random.between(1, 3);
      path.as<int32_t>()[i] = slot < a.num_slots ? int32_t(slot) : -1;
    });
  }
  Array num_accepted = integers<int32_t>(random, {a.batch_size}, false, -1, a.num_slots + 1);
  a.kv_len = kv_len.as<int32_t>(), a.path = path.as<int32_t>();
  a.num_accepted = num_accepted.as<int32_t>();
  k.copy_strides(a.k_stride), v.copy_strides(a.v_stride);
  run("commit_kv", &Kernels::commit_kv, a, {in_place(a.k_cache, k), in_place(a.v_cache, v)},
      {}, [] {});
}

void fuzz_visual_importance(Random& random) {
  lvspec::VisualImportance a{};
  a.type = any_float(random);
  a.batch_size = random.between(1, 3), a.num_kv_heads = random.between(1, 3);
  a.num_q_heads = a.num_kv_heads * random.between(1, 4);
  a.num_rows = any_size(random, 40), a.head_dim = any_size(random, 130);
  a.capacity = random.between(1, 200);
  a.scale = 1 / std::sqrt(double(a.head_dim));
  Array q = numbers(random, a.type, {a.batch_size, a.num_q_heads, a.num_rows, a.head_dim},
                    random.one_in(2), 1, false);
  Array k = numbers(random, a.type, {a.batch_size, a.num_kv_heads, a.capacity, a.head_dim},
                    random.one_in(2), 1, false);
  Array lse = numbers(random, accumulate(a.type), {a.batch_size, a.num_q_heads, a.num_rows}, false,
                      1, false);
  Array visual = integers<uint8_t>(random, {a.batch_size, a.capacity}, false, 0, 2);
  Array kv_len = integers<int32_t>(random, {a.batch_size}, false, -1, a.capacity + 1);
  a.lse = lse.as<void>();
  a.visual = visual.as<uint8_t>(), a.kv_len = kv_len.as<int32_t>();
  const auto bind = [&] {
    a.q = q.as<void>(), a.k_cache = k.as<void>();
    q.copy_strides(a.q_stride), k.copy_strides(a.k_stride);
  };
  run("visual_importance", &Kernels::visual_importance, a,
      {rounded(a.out, accumulate(a.type), a.batch_size * a.capacity)}, {&q, &k}, bind);
}

// The numbers of a policy, most of them off.
void any_rule(Random& random, int64_t kept, float* rule) {
  using namespace lvspec::column;
  const auto put = [&](int column, double value, double off) {
    rule[column] = float(random.one_in(12) ? value : off);
  };
  put(kAnchorThreshold, random.normal(), random.one_in(3) ? -INFINITY : INFINITY);
  put(kAnchorRegret, random.uniform(), -INFINITY);
  put(kMaxRegret, 4 * random.uniform(), INFINITY);
  rule[kTopK] = float(random.one_in(6) ? random.between(1, kept) : 0);
  put(kMinLogProb, -4 * random.uniform(), -INFINITY);
  put(kTypicalLogEps, -4 * random.uniform(), -INFINITY);
  rule[kTypicalLogDelta] = float(random.normal());
  put(kMinEntropy, random.uniform(), -INFINITY);
  rule[kEntropyTop] = float(random.between(1, kept));
  rule[kShiftWindow] = float(random.one_in(9) ? 63 : random.between(0, 4));
  put(kShiftRegret, 4 * random.uniform(), INFINITY);
  rule[kWindow] = float(random.one_in(6) ? random.between(0, 3) : 0);
  rule[kMaxRun] = float(random.one_in(6) ? random.between(1, 3) : 63);
  put(kRegretBudget, 9 * random.uniform(), INFINITY);
  rule[kRegretRate] = float(random.one_in(4) ? random.uniform() : 0);
  rule[kPathRegret] = float(random.between(0, 2));
  rule[kGateRows] = float(random.one_in(4) ? 0 : random.between(1, 40));
  rule[kRandomShare] = -1, rule[kRandomSeed] = 0;
}

void fuzz_gate(Random& random) {
  lvspec::Gate a{};
  a.batch_size = random.between(0, 4), a.num_rows = any_size(random, 64);
  const bool is_scattered = random.one_in(2);
  a.relevance_type = random.one_in(2) ? Type::f32 : Type::f64;
  Array relevance = numbers(random, a.relevance_type, {a.batch_size, a.num_rows}, is_scattered, 0.1,
                            true);
  Array num_slots = integers<int32_t>(random, {a.batch_size}, is_scattered,
                                     random.one_in(2) ? -1 : a.num_rows, a.num_rows + 1);
  Array seen = integers<int32_t>(random, {a.batch_size, lvspec::kGateBins}, is_scattered, 0, 9);
  Array rule(random, 4, {a.batch_size, lvspec::column::kCount}, false);
  for (int64_t b = 0; b < a.batch_size; ++b)
    any_rule(random, 4, rule.as<float>() + b * lvspec::column::kCount);
  const auto bind = [&] {
    a.relevance = relevance.as<void>(), a.num_slots = num_slots.as<int32_t>();
    a.rule = rule.as<float>(), a.seen = seen.as<int32_t>();
    relevance.copy_strides(a.relevance_stride), num_slots.copy_strides(&a.num_slots_stride);
    a.rule_stride = lvspec::column::kCount, a.rule_stride_column = 1;
    a.seen_stride = seen.stride[0], a.seen_stride_bin = seen.stride[1];
  };
  run("gate", &Kernels::gate, a,
      {exact(a.new_rule, a.batch_size * lvspec::column::kCount),
       exact(a.new_seen, a.batch_size * lvspec::kGateBins)},
      {&relevance, &num_slots, &seen}, bind);
}

void fuzz_accept(Random& random) {
  lvspec::Accept a{};
  a.type = any_float(random);
  const Type statistics = accumulate(a.type);
  a.batch_size = random.between(0, 4), a.num_rows = any_size(random, 64);
  a.vocabulary = random.one_in(2) ? random.between(1, 4) : any_vocabulary(random);
  a.kept = random.between(1, a.vocabulary < 16 ? a.vocabulary : 16);
  const Shape slots = {a.batch_size, a.num_rows}, best = {a.batch_size, a.num_rows, a.kept};
  const bool is_scattered = random.one_in(2);
  Array logits = numbers(random, a.type, {a.batch_size, a.num_rows, a.vocabulary}, is_scattered, 2,
                         true);
  Array top_ids(random, 4, best, false), top_logits(random, size_of(statistics), best, false);
  Array lse(random, size_of(statistics), slots, false), entropy = lse;
  lvspec::LogitStats stats{};
  stats.type = a.type, stats.logits = logits.as<void>(), stats.top_ids = top_ids.as<int32_t>();
  stats.top_logits = top_logits.as<void>();
  stats.lse = lse.as<void>(), stats.entropy = entropy.as<void>();
  stats.batch_size = a.batch_size, stats.num_slots = a.num_rows;
  stats.vocabulary = a.vocabulary, stats.top_k = a.kept;
  logits.copy_strides(stats.stride);
  stats.parallel_for = all_at_once;
  lvspec::portable_kernels().logit_stats(stats);

  Array num_slots = integers<int32_t>(random, {a.batch_size}, is_scattered,
                                     random.one_in(2) ? -1 : a.num_rows, a.num_rows + 1);
  Array parents = integers<int32_t>(random, slots, is_scattered, -1, a.num_rows);
  Array tokens = integers<int64_t>(random, slots, is_scattered, -1, a.vocabulary);
  const int64_t keenness = random.between(1, 4), reach = random.one_in(2) ? 1 : a.num_rows;
  for (int64_t b = 0; b < a.batch_size; ++b)
    for (int64_t t = 1; t < a.num_rows; ++t) {  // most of them as a draft makes them
      if (random.one_in(20)) continue;
      const int64_t parent = random.between(t - reach < 0 ? 0 : t - reach, t - 1);
      const int64_t rank = random.one_in(keenness) ? random.between(0, a.kept - 1) : 0;
      parents.as<int32_t>()[b * parents.stride[0] + t * parents.stride[1]] = int32_t(parent);
      tokens.as<int64_t>()[b * tokens.stride[0] + t * tokens.stride[1]] =
          top_ids.as<int32_t>()[b * top_ids.stride[0] + parent * top_ids.stride[1] +
                                rank * top_ids.stride[2]];
    }
  a.relevance_type = random.one_in(2) ? Type::f32 : Type::f64;
  a.regret_used_type = random.one_in(2) ? Type::f32 : Type::f64;
  Array relevance = numbers(random, a.relevance_type, slots, is_scattered, 1, true);
  Array used = numbers(random, a.regret_used_type, {a.batch_size}, is_scattered, 1, true);
  a.num_strict_ids = random.between(0, 2), a.num_eos_ids = random.between(0, 2);
  Array strict = integers<int64_t>(random, {a.batch_size, a.num_strict_ids}, false, -1,
                                   3 * a.vocabulary);
  Array eos = integers<int64_t>(random, {a.num_eos_ids}, false, 0, 9 * a.vocabulary);
  const bool has_relevance = !random.one_in(4), has_used = random.one_in(2);
  a.strict_ids = strict.as<int64_t>(), a.eos_ids = eos.as<int64_t>();
  Array rule(random, 4, {a.batch_size, lvspec::column::kCount}, false);
  a.rule_stride = lvspec::column::kCount;
  for (int64_t b = 0; b < a.batch_size; ++b)
    any_rule(random, a.kept, rule.as<float>() + b * a.rule_stride);
  const auto bind = [&] {
    a.logits = logits.as<void>(), a.tokens = tokens.as<int64_t>();
    a.parents = parents.as<int32_t>(), a.num_slots = num_slots.as<int32_t>();
    a.top_ids = top_ids.as<int32_t>(), a.top_logits = top_logits.as<void>();
    a.lse = lse.as<void>(), a.entropy = entropy.as<void>();
    a.rule = rule.as<float>();
    if (has_relevance) a.relevance = relevance.as<void>();
    if (has_used) a.regret_used = used.as<void>();
    logits.copy_strides(a.logits_stride), tokens.copy_strides(a.tokens_stride);
    parents.copy_strides(a.parents_stride), num_slots.copy_strides(&a.num_slots_stride);
    top_ids.copy_strides(a.top_ids_stride), top_logits.copy_strides(a.top_logits_stride);
    lse.copy_strides(a.lse_stride), entropy.copy_strides(a.entropy_stride);
    relevance.copy_strides(a.relevance_stride), used.copy_strides(&a.regret_used_stride);
  };
  const int64_t count = a.batch_size * a.num_rows;
  Output regret = rounded(a.regret, statistics, a.batch_size);
  regret.comparison = Output::exact;
  run("accept", &Kernels::accept, a,
      {exact(a.path, count), exact(a.num_accepted, a.batch_size), exact(a.bonus_id, a.batch_size),
       exact(a.kind, count), regret},
      {&logits, &tokens, &parents, &num_slots, &relevance, &used}, bind);
}

void fuzz_accept_sampled(Random& random) {
  lvspec::AcceptSampled a{};
  a.type = any_float(random), a.draft_type = any_float(random);
  a.batch_size = random.between(0, 4), a.num_rows = any_size(random, 64);
  a.vocabulary = any_vocabulary(random);
  a.draft_vocabulary = random.one_in(2) ? a.vocabulary : any_vocabulary(random);
  const bool is_scattered = random.one_in(2);
  const double spread = random.one_in(2) ? 0.3 : 2;
  Array logits = numbers(random, a.type, {a.batch_size, a.num_rows, a.vocabulary}, is_scattered,
                         spread, true);
  Array draft = numbers(random, a.draft_type, {a.batch_size, a.num_rows - 1, a.draft_vocabulary},
                        is_scattered, spread, true);
  const Shape slots = {a.batch_size, a.num_rows};
  Array tokens = integers<int64_t>(random, slots, is_scattered, -1, a.vocabulary);
  Array num_slots = integers<int32_t>(random, {a.batch_size}, is_scattered, -1, a.num_rows + 1);
  Array uniforms(random, 4, slots, is_scattered);
  const double bound = random.one_in(2) ? 1 : 0.1;
  uniforms.each([&](int64_t i) { uniforms.as<float>()[i] = float(bound * random.uniform()); });
  const bool is_sampled = !random.one_in(3);
  a.temperature = random.one_in(8) ? 1e-30 : random.one_in(8) ? 1e30 : 0.3 + random.uniform();
  const auto bind = [&] {
    a.logits = logits.as<void>(), a.tokens = tokens.as<int64_t>();
    if (is_sampled) a.draft_logits = draft.as<void>();
    a.num_slots = num_slots.as<int32_t>(), a.uniforms = uniforms.as<float>();
    logits.copy_strides(a.logits_stride), draft.copy_strides(a.draft_stride);
    tokens.copy_strides(a.tokens_stride), uniforms.copy_strides(a.uniforms_stride);
    num_slots.copy_strides(&a.num_slots_stride);
  };
  const int64_t count = a.batch_size * a.num_rows;
  Output bonus = exact(a.bonus_id, a.batch_size);
  // In float32 a uniform is within rounding of some token's bound, if there are many of them.
  if (a.type != Type::f64 && a.vocabulary > 40) bonus.comparison = Output::left_to_caller;
  const auto results =
      run("accept_sampled", &Kernels::accept_sampled, a,
          {bonus, exact(a.path, count), exact(a.num_accepted, a.batch_size), exact(a.kind, count),
           rounded(a.regret, accumulate(a.type), a.batch_size)},
          {&logits, &draft, &tokens, &num_slots, &uniforms}, bind);
  for (const std::vector<Bytes>& result : results)
    for (int64_t b = 0; b < a.batch_size; ++b) {
      int64_t id;
      std::memcpy(&id, &result[0][size_t(8 * b)], sizeof id);
      require(id >= 0 && id < a.vocabulary, "accept_sampled: no token");
    }
}

void fuzz_linear(Random& random) {
  lvspec::Linear a{};
  a.rows = any_size(random, 70), a.inputs = any_size(random, 400);
  a.outputs = any_size(random, 100);
  Array x = numbers(random, Type::f32, {a.rows, a.inputs}, false, 1, false);
  Array weight = numbers(random, Type::f32, {a.outputs, a.inputs}, false, 1, false);
  Array bias = numbers(random, Type::f32, {a.outputs}, false, 1, false);
  a.x = x.as<float>(), a.weight = weight.as<float>();
  if (random.one_in(2)) a.bias = bias.as<float>();
  run("linear", &Kernels::linear, a, {numbers_of(a.y, a.rows * a.outputs)}, {}, [] {});
}

void fuzz_scaled_linear(Random& random) {
  lvspec::ScaledLinear a{};
  a.type = Type(random.between(0, 2));
  a.scale_type = any_float(random), a.bias_type = any_float(random);
  a.is_float8 = random.one_in(2);
  a.rows = any_size(random, 70), a.inputs = any_size(random, 400);
  a.outputs = any_size(random, 100);
  Array x = numbers(random, a.type, {a.rows, a.inputs}, false, 0.1, false);
  Array bytes = integers<int8_t>(random, {a.outputs, a.inputs}, false, -128, 127);
  if (a.is_float8) bytes = numbers(random, Type::f8_e4m3, {a.outputs, a.inputs}, false, 1, false);
  Array scale = numbers(random, a.scale_type, {a.outputs}, false, 0.01, false);
  Array bias = numbers(random, a.bias_type, {a.outputs}, false, 1, false);
  a.x = x.as<void>(), a.weight = bytes.as<void>(), a.scale = scale.as<void>();
  if (random.one_in(2)) a.bias = bias.as<void>();
  run("scaled_linear", &Kernels::scaled_linear, a, {rounded(a.y, a.type, a.rows * a.outputs)}, {},
      [] {});
}

void fuzz_gated_linear(Random& random) {
  lvspec::GatedLinear a{};
  a.rows = any_size(random, 70), a.inputs = any_size(random, 400);
  a.outputs = any_size(random, 100);
  Array x = numbers(random, Type::f32, {a.rows, a.inputs}, false, 1, false);
  Array gate = numbers(random, Type::f32, {a.outputs, a.inputs}, false, 0.3, false);
  Array up = numbers(random, Type::f32, {a.outputs, a.inputs}, false, 0.3, false);
  a.x = x.as<float>(), a.gate = gate.as<float>(), a.up = up.as<float>();
  run("gated_linear", &Kernels::gated_linear, a, {numbers_of(a.y, a.rows * a.outputs)}, {}, [] {});
}

void fuzz_silu_multiply(Random& random) {
  lvspec::SiluMultiply a{};
  a.count = any_size(random, 3000);
  Array gate = numbers(random, Type::f32, {a.count}, false, 30, false);
  Array up = numbers(random, Type::f32, {a.count}, false, 1, false);
  a.gate = gate.as<float>(), a.up = up.as<float>();
  run("silu_multiply", &Kernels::silu_multiply, a, {numbers_of(a.y, a.count)}, {}, [] {});
}

void fuzz_rms_norm(Random& random) {
  lvspec::RmsNorm a{};
  a.rows = any_size(random, 70), a.size = any_size(random, 400);
  a.eps = 1e-6;
  Array x = numbers(random, Type::f32, {a.rows, a.size}, false, 3, false);
  Array weight = numbers(random, Type::f32, {a.size}, false, 1, false);
  a.x = x.as<float>(), a.weight = weight.as<float>();
  run("rms_norm", &Kernels::rms_norm, a, {numbers_of(a.y, a.rows * a.size)}, {}, [] {});
}

// An array whose last dimension is not scattered.
Array heads(Random& random, Type type, Shape shape) {
  const int64_t last = shape.back();
  shape.back() += random.between(0, 3);
  Array x = numbers(random, type, std::move(shape), false, 1, false);
  x.shape.back() = last;
  x.bytes.resize(x.bytes.size() - size_t(x.stride[2] - last) * size_t(x.element));
  x.bytes.shrink_to_fit();
  return x;
}

void fuzz_rotary(Random& random) {
  lvspec::RotaryAngles a{};
  a.batch_size = random.between(1, 3), a.num_slots = any_size(random, 40);
  const int64_t half = random.between(0, 60), position_rows = random.between(1, 3);
  a.head_dim = 2 * half;
  Array dimensions = integers<int32_t>(random, {half}, false, 0, position_rows - 1);
  Array positions = integers<int64_t>(random, {position_rows, a.batch_size, a.num_slots}, random.one_in(2), 0,
                                      5000);
  Array frequencies = numbers(random, Type::f32, {half}, false, 0.1, false);
  a.frequencies = frequencies.as<float>(), a.dimensions = dimensions.as<int32_t>();
  a.scaling = 1 + random.uniform();
  const auto bind = [&] {
    a.positions = positions.as<int64_t>(), positions.copy_strides(a.positions_stride);
  };
  const int64_t count = a.batch_size * a.num_slots * a.head_dim;
  run("rotary_angles", &Kernels::rotary_angles, a,
      {numbers_of(a.cos, count), numbers_of(a.sin, count)}, {&positions}, bind);

  lvspec::Rotate r{};
  r.batch_size = a.batch_size, r.num_slots = a.num_slots, r.head_dim = a.head_dim;
  r.num_heads = random.between(1, 4);
  const Shape angles = {r.batch_size, r.num_slots, r.head_dim};
  Array cos = numbers(random, Type::f32, angles, false, 1, false);
  Array sin = numbers(random, Type::f32, angles, false, 1, false);
  Array x = heads(random, Type::f32, {r.batch_size, r.num_heads, r.num_slots, r.head_dim});
  r.cos = cos.as<float>(), r.sin = sin.as<float>();
  run("rotate", &Kernels::rotate, r, {numbers_of(r.y, count * r.num_heads)}, {&x},
      [&] { r.x = x.as<float>(), x.copy_strides(r.x_stride); });
}

void fuzz_write_kv(Random& random) {
  lvspec::WriteKv a{};
  const Type type = any_float(random);
  a.element_size = size_of(type);
  a.batch_size = random.between(1, 3), a.num_kv_heads = random.between(1, 3);
  a.num_slots = any_size(random, 20), a.head_dim = any_size(random, 70);
  a.capacity = a.num_slots + random.between(0, 30);
  Array kv_len = integers<int32_t>(random, {a.batch_size}, false, -25, a.capacity + 5);
  const Shape slots = {a.batch_size, a.num_kv_heads, a.num_slots, a.head_dim};
  const Shape rows = {a.batch_size, a.num_kv_heads, a.capacity, a.head_dim};
  Array k = heads(random, type, slots), v = heads(random, type, slots);
  Array k_cache = numbers(random, type, rows, false, 1, false);
  Array v_cache = numbers(random, type, rows, false, 1, false);
  a.kv_len = kv_len.as<int32_t>();
  k_cache.copy_strides(a.k_cache_stride), v_cache.copy_strides(a.v_cache_stride);
  const auto bind = [&] {
    a.k = k.as<void>(), a.v = v.as<void>();
    k.copy_strides(a.k_stride), v.copy_strides(a.v_stride);
  };
  run("write_kv", &Kernels::write_kv, a,
      {in_place(a.k_cache, k_cache), in_place(a.v_cache, v_cache)}, {&k, &v}, bind);
}

void fuzz_append(Random& random) {
  lvspec::Append a{};
  a.type = random.one_in(3) ? Type::f64 : Type::f32;
  a.batch_size = random.between(1, 4), a.num_slots = any_size(random, 64);
  const int64_t most = random.between(1, 40);  // output tokens
  a.width = most + a.num_slots, a.num_eos_ids = random.between(0, 3);
  a.no_nan = -1, a.bonus_kind = 3;
  const Shape each = {a.batch_size}, slots = {a.batch_size, a.num_slots};
  const Shape out = {a.batch_size, a.width};
  Array out_ids = integers<int64_t>(random, out, false, 0, 9);
  Array out_kinds = integers<uint8_t>(random, out, false, 0, 3);
  Array out_relevance = numbers(random, Type::f32, out, false, 1, false);
  Array num_out = integers<int32_t>(random, each, false, 0, most);
  Array max_new = integers<int32_t>(random, {1}, false, most, most);
  Array last_two = integers<int64_t>(random, {a.batch_size, 2}, false, 0, 9);
  Array regret_used = numbers(random, a.type, each, false, 1, false);
  Array finished = integers<uint8_t>(random, each, false, 0, 1);
  Array eos_ids = integers<int64_t>(random, {a.num_eos_ids}, false, 0, 9);
  Array kv_len = integers<int32_t>(random, each, false, 0, 99);
  Array tokens = integers<int64_t>(random, slots, false, 0, 9);
  Array path = integers<int32_t>(random, slots, false, -1, a.num_slots - 1);
  Array num_accepted = integers<int32_t>(random, each, false, 0, a.num_slots - 1);
  Array bonus_id = integers<int64_t>(random, each, false, 0, 9);
  Array kind = integers<uint8_t>(random, slots, false, 0, 2);
  Array regret = numbers(random, a.type, each, false, 1, false);
  Array lse = numbers(random, a.type, slots, false, 1, true);
  Array relevance = numbers(random, Type::f32, slots, false, 1, false);
  a.max_new = max_new.as<int32_t>(), a.eos_ids = eos_ids.as<int64_t>();
  Array drafted_slots = integers<int32_t>(random, each, false, 1, a.num_slots);
  a.drafted_slots = drafted_slots.as<int32_t>();
  a.tokens = tokens.as<int64_t>(), a.path = path.as<int32_t>();
  a.num_accepted = num_accepted.as<int32_t>(), a.bonus_id = bonus_id.as<int64_t>();
  a.kind = kind.as<uint8_t>(), a.regret = regret.as<void>(), a.lse = lse.as<void>();
  a.relevance = random.one_in(2) ? relevance.as<float>() : nullptr;
  run("append", &Kernels::append, a,
      {in_place(a.out_ids, out_ids), in_place(a.out_kinds, out_kinds),
       in_place(a.out_relevance, out_relevance), in_place(a.num_out, num_out),
       in_place(a.last_two, last_two), in_place(a.regret_used, regret_used),
       in_place(a.finished, finished), in_place(a.kv_len, kv_len),
       exact(a.report, (lvspec::kReportHead + a.num_slots) * a.batch_size)},
      {}, [] {});
}

void (*const kOperations[])(Random&) = {
    fuzz_verify_attention,  fuzz_logit_stats,   fuzz_expand_tree,    fuzz_commit_kv,
    fuzz_visual_importance, fuzz_accept, fuzz_gate, fuzz_accept_sampled, fuzz_linear,
    fuzz_gated_linear,      fuzz_silu_multiply, fuzz_rms_norm,       fuzz_rotary,
    fuzz_write_kv,          fuzz_append,        fuzz_packed_linear,  fuzz_scaled_linear,
};

}  // namespace

int main(int count, char** arguments) {
  const long rounds = count > 1 ? std::atol(arguments[1]) : 300;
  const long seed = count > 2 ? std::atol(arguments[2]) : 1;
  for (long i = 0; i < rounds; ++i) {
    current_seed = uint64_t(seed + i);
    for (const auto operation : kOperations) {
      Random random{current_seed};
      operation(random);
    }
  }
  const int operations = int(sizeof kOperations / sizeof *kOperations);
  std::printf("%ld rounds of %d operations:", rounds, operations);
  for (const Kernels* kernels : instruction_sets()) std::printf(" %s", kernels->name);
  std::puts("");
}
