// Decodes a small batch in CPU memory through the C interface, and compares with attention written out in double: in
// one piece, and merged from two. Then makes mistakes, and reads what the library says. C99.

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "flash_mla/c_api.h"

enum { BATCH = 3, HEADS = 4, PAGE_SIZE = 16, MAX_PAGES = 3, NUM_PAGES = BATCH * MAX_PAGES, DIM = 576, DIM_V = 512 };

static const int32_t kSeqlens[BATCH] = {37, 0, 16};

static uint16_t q[BATCH][HEADS][DIM];
static uint16_t k_cache[NUM_PAGES][PAGE_SIZE][DIM];
static int32_t block_table[BATCH][MAX_PAGES];
static int32_t cache_seqlens[BATCH];
static uint16_t out[BATCH][HEADS][DIM_V];
static float lse[BATCH][HEADS];

static int failures = 0;

static void expect(int condition, const char* what) {
  if (condition) return;
  fprintf(stderr, "failed: %s; the last error is \"%s\"\n", what, flash_mla_last_error());
  ++failures;
}

static double from_bfloat16(uint16_t bits) {
  const uint32_t wide = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &wide, sizeof(value));
  return value;
}

/// A value between -scale and scale.
static uint16_t random_bfloat16(float scale) {
  const float value = scale * (2.0F * (float)rand() / (float)RAND_MAX - 1.0F);
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return (uint16_t)(bits >> 16);
}

static void fill(void) {
  for (int b = 0; b < BATCH; ++b) {
    cache_seqlens[b] = kSeqlens[b];
    for (int i = 0; i < MAX_PAGES; ++i) block_table[b][i] = NUM_PAGES - 1 - (i * BATCH + b);
    for (int h = 0; h < HEADS; ++h) {
      for (int d = 0; d < DIM; ++d) q[b][h][d] = random_bfloat16(8.0F);
    }
  }
  for (int p = 0; p < NUM_PAGES; ++p) {
    for (int t = 0; t < PAGE_SIZE; ++t) {
      for (int d = 0; d < DIM; ++d) k_cache[p][t][d] = random_bfloat16(0.1F);
    }
  }
}

static flash_mla_tensor tensor(void* data, flash_mla_dtype dtype, int rank, int64_t e0, int64_t e1, int64_t e2,
                               int64_t e3) {
  flash_mla_tensor t = {0};
  t.data = data;
  t.dtype = dtype;
  t.device_type = FLASH_MLA_CPU;
  t.rank = rank;
  t.shape[0] = e0;
  t.shape[1] = e1;
  t.shape[2] = e2;
  t.shape[3] = e3;
  expect(flash_mla_set_contiguous_strides(&t) == FLASH_MLA_OK, "strides of a contiguous tensor");
  return t;
}

static flash_mla_dense_decode_arguments make_arguments(void) {
  flash_mla_dense_decode_arguments args = {0};
  args.struct_size = sizeof(args);
  args.q = tensor(q, FLASH_MLA_BFLOAT16, 4, BATCH, 1, HEADS, DIM);
  args.k_cache = tensor(k_cache, FLASH_MLA_BFLOAT16, 4, NUM_PAGES, PAGE_SIZE, 1, DIM);
  args.block_table = tensor(block_table, FLASH_MLA_INT32, 2, BATCH, MAX_PAGES, 0, 0);
  args.cache_seqlens = tensor(cache_seqlens, FLASH_MLA_INT32, 1, BATCH, 0, 0, 0);
  args.out = tensor(out, FLASH_MLA_BFLOAT16, 4, BATCH, 1, HEADS, DIM_V);
  args.lse = tensor(lse, FLASH_MLA_FLOAT32, 3, BATCH, HEADS, 1, 0);
  return args;
}

static const uint16_t* key(int b, int token) { return k_cache[block_table[b][token / PAGE_SIZE]][token % PAGE_SIZE]; }

static int is_close(double got, double want, double absolute, double relative) {
  return fabs(got - want) <= fmax(absolute, relative * fabs(want));
}

/// Compares one row with attention over its keys: softmax(q.k / 24) v.
static void check_row(int b, int h) {
  double weights[MAX_PAGES * PAGE_SIZE];
  double sum = 0;
  for (int t = 0; t < kSeqlens[b]; ++t) {
    double score = 0;
    for (int d = 0; d < DIM; ++d) score += from_bfloat16(q[b][h][d]) * from_bfloat16(key(b, t)[d]);
    weights[t] = exp(score / 24);
    sum += weights[t];
  }
  const double want_lse = kSeqlens[b] > 0 ? log(sum) : INFINITY;
  expect(isinf(want_lse) ? isinf(lse[b][h]) && lse[b][h] > 0 : is_close(lse[b][h], want_lse, 1e-6, 8.01 / 65536),
         "lse is the log of the sum of the weights");
  for (int d = 0; d < DIM_V; ++d) {
    double want = 0;
    for (int t = 0; t < kSeqlens[b]; ++t) want += weights[t] / sum * from_bfloat16(key(b, t)[d]);
    if (is_close(from_bfloat16(out[b][h][d]), want, 8e-4, 2.01 / 128)) continue;
    fprintf(stderr, "out[%d][%d][%d] is %g, not %g\n", b, h, d, from_bfloat16(out[b][h][d]), want);
    expect(0, "out is the weighted mean of the values");
    return;
  }
}

static void check_rows(void) {
  for (int b = 0; b < BATCH; ++b) {
    for (int h = 0; h < HEADS; ++h) check_row(b, h);
  }
}

static void check_results(void) {
  const flash_mla_dense_decode_arguments args = make_arguments();
  size_t bytes = 1;
  memset(out, 0xff, sizeof(out));  // NaN
  expect(flash_mla_dense_decode_workspace_size(&args, &bytes) == FLASH_MLA_OK && bytes == 0, "the CPU's workspace");
  expect(flash_mla_dense_decode_max_workspace_size(&args, &bytes) == FLASH_MLA_OK && bytes > 0, "a GPU's workspace");
  expect(flash_mla_dense_decode(&args, NULL, 0, NULL) == FLASH_MLA_OK, "a decode on the CPU");
  check_rows();
}

/// Two devices' work: one has each request's first page, the other has the rest, which is nothing for two requests.
static void check_merge(void) {
  static uint16_t part_out[2][BATCH][HEADS][DIM_V];
  static float part_lse[2][BATCH][HEADS];
  int32_t part_seqlens[2][BATCH];
  flash_mla_tensor outs[2], lses[2];
  flash_mla_merge_states_arguments merge = {0};
  for (int part = 0; part < 2; ++part) {
    flash_mla_dense_decode_arguments args = make_arguments();
    for (int b = 0; b < BATCH; ++b) {
      const int32_t first = kSeqlens[b] < PAGE_SIZE ? kSeqlens[b] : PAGE_SIZE;
      part_seqlens[part][b] = part == 0 ? first : kSeqlens[b] - first;
    }
    args.block_table = tensor(&block_table[0][part], FLASH_MLA_INT32, 2, BATCH, part == 0 ? 1 : MAX_PAGES - 1, 0, 0);
    args.block_table.strides[0] = MAX_PAGES;
    args.cache_seqlens = tensor(part_seqlens[part], FLASH_MLA_INT32, 1, BATCH, 0, 0, 0);
    args.out = outs[part] = tensor(part_out[part], FLASH_MLA_BFLOAT16, 4, BATCH, 1, HEADS, DIM_V);
    args.lse = lses[part] = tensor(part_lse[part], FLASH_MLA_FLOAT32, 3, BATCH, HEADS, 1, 0);
    expect(flash_mla_dense_decode(&args, NULL, 0, NULL) == FLASH_MLA_OK, "a decode of some of the tokens");
  }
  merge.struct_size = sizeof(merge);
  merge.outs = outs;
  merge.lses = lses;
  merge.num_states = 2;
  merge.out = make_arguments().out;
  merge.lse = make_arguments().lse;
  memset(out, 0xff, sizeof(out));  // NaN
  memset(lse, 0xff, sizeof(lse));
  expect(flash_mla_merge_states(&merge, NULL) == FLASH_MLA_OK, "a merge on the CPU");
  check_rows();

  lses[1].dtype = FLASH_MLA_BFLOAT16;
  expect(flash_mla_merge_states(&merge, NULL) == FLASH_MLA_INVALID_TYPE, "a wrong dtype of a state");
  expect(strcmp(flash_mla_last_error(), "lses[1]: expected dtype float32, got bfloat16") == 0, "its name");
}

static void check_plan(void) {
  int32_t metadata[8], num_splits[BATCH + 1];
  int64_t num_sm_parts = 0;
  const flash_mla_tensor lengths = tensor(cache_seqlens, FLASH_MLA_INT32, 1, BATCH, 0, 0, 0);
  const flash_mla_tensor splits = tensor(num_splits, FLASH_MLA_INT32, 1, BATCH + 1, 0, 0, 0);
  expect(flash_mla_dense_decode_num_sm_parts(HEADS, 1, FLASH_MLA_CPU, 0, &num_sm_parts) == FLASH_MLA_OK,
         "num_sm_parts");
  expect(num_sm_parts == 1, "the CPU is one part");
  const flash_mla_tensor parts = tensor(metadata, FLASH_MLA_INT32, 2, num_sm_parts, 8, 0, 0);
  expect(flash_mla_plan_dense_decode(&lengths, HEADS, &parts, &splits, NULL) == FLASH_MLA_OK, "a plan on the CPU");
  for (int b = 0; b <= BATCH; ++b) expect(num_splits[b] == b, "one split for each request");
}

static void check_errors(void) {
  flash_mla_dense_decode_arguments args = make_arguments();
  args.q.dtype = FLASH_MLA_FLOAT32;
  expect(flash_mla_dense_decode(&args, NULL, 0, NULL) == FLASH_MLA_INVALID_TYPE, "a wrong dtype");
  expect(strcmp(flash_mla_last_error(), "q: expected dtype bfloat16 or float16, got float32") == 0, "its message");
  expect(flash_mla_last_cuda_error() == 0, "no error of CUDA");
  expect(flash_mla_dense_decode(NULL, NULL, 0, NULL) == FLASH_MLA_INVALID_ARGUMENT, "no arguments");
  expect(strstr(flash_mla_last_error(), "arguments: ") == flash_mla_last_error(), "the name of what is missing");
}

int main(void) {
  fill();
  expect(strlen(flash_mla_last_error()) == 0, "no error at the start");
  expect(strchr(flash_mla_version(), '.') != NULL, "a version with a dot");
  check_results();
  check_merge();
  check_plan();
  check_errors();
  printf("flash_mla %s from C: %d failures\n", flash_mla_version(), failures);
  return failures == 0 ? 0 : 1;
}
