// Matrix products with weights of 16, 8 and 4 bits on x86 processors with AVX2, F16C and FMA (those of 4 bits with
// AVX-512 VNNI too, where there is that), and the small operations between them that take long elsewhere; see avx2.py.
//
// A block of `kRows` outputs at a time: up to `kFew` tokens (of a format) are multiplied with the weights as they are
// stored, two tokens at a time, which reads memory once; for more, a part of the block becomes plain numbers in a cache
// first.
//
// What stands for an activation:
//   bf16, fp16, fp8  fp32
//   int8             16-bit integers and a scale per token, as many levels as leave no sum of 32 bits an overflow
//   int4             8-bit integers and a scale per 128 inputs (or per group of weights, where 128 does not divide)
//
// Dimension letters as in avx2.py: T tokens, N outputs, K inputs, G groups of inputs with a scale.

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <immintrin.h>
#include <omp.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using Vector = at::vec::Vectorized<float>;  // of 8, as compiled for AVX2

constexpr int kRows = 16;     // outputs of a block
constexpr int kTile = 4;      // of them, in registers at a time, with one, two or kTogether tokens
constexpr int64_t kBlocks = 4;   // of a task
constexpr int64_t kShared = 32;  // tokens up to which each thread has one task
constexpr int64_t kPart = 512;  // inputs that become plain numbers at a time
constexpr int64_t kWide = 128;  // inputs that share a scale of int8 activations
constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
constexpr int64_t kAhead = 1024;  // bytes that are asked of memory before they are needed, where it is read in order
constexpr int64_t kFurther = 2048;  // the same with AVX-512, whose loops are faster

__m256i load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
__m128i load_half(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
void prefetch(const void* from) { _mm_prefetch(static_cast<const char*>(from), _MM_HINT_T0); }

// Sums of kTile rows and T tokens; by loops that a compiler unrolls, which keeps them in registers.
template <class Vector, int T>
void clear(Vector (&sums)[kTile][T]) {
  for (int r = 0; r < kTile; ++r)
    for (int t = 0; t < T; ++t) sums[r][t] = Vector{};
}

float sum(__m256 v) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

__m256 in_fp32(__m128i bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16)); }

// The largest absolute value of x[0..count), or NaN if one of them is not finite.
float largest(const float* x, int64_t count) {
  const __m256 positive = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 most = _mm256_setzero_ps(), check = _mm256_setzero_ps();
  for (int64_t k = 0; k < count; k += 8) {
    const __m256 v = _mm256_and_ps(_mm256_loadu_ps(x + k), positive);
    most = _mm256_max_ps(most, v);
    check = _mm256_add_ps(check, _mm256_sub_ps(v, v));
  }
  float lanes[8];
  _mm256_storeu_ps(lanes, most);
  const float found = *std::max_element(lanes, lanes + 8);
  return sum(check) == 0 ? found : std::numeric_limits<float>::quiet_NaN();
}

// Activations [.., width] in fp32, bf16 or fp16, which are read and written as fp32.
enum Dtype : int64_t { kFp32, kBf16, kFp16 };

void read(const void* from, int64_t dtype, int64_t start, int64_t count, float* to) {
  if (dtype == kFp32) {
    std::copy_n(static_cast<const float*>(from) + start, count, to);
    return;
  }
  const uint16_t* words = static_cast<const uint16_t*>(from) + start;
  for (int64_t i = 0; i < count; i += 8)
    _mm256_storeu_ps(to + i, dtype == kBf16 ? in_fp32(load_half(words + i)) : _mm256_cvtph_ps(load_half(words + i)));
}

__m128i in_bf16(__m256 v) {  // to the nearest, ties to even; NaN stays one
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i words = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}

void write(void* to, int64_t dtype, int64_t start, int64_t count, const float* from) {
  if (dtype == kFp32) {
    std::copy_n(from, count, static_cast<float*>(to) + start);
    return;
  }
  uint16_t* words = static_cast<uint16_t*>(to) + start;
  for (int64_t i = 0; i < count; i += 8) {
    const __m256 v = _mm256_loadu_ps(from + i);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(words + i),
                     dtype == kBf16 ? in_bf16(v) : _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
}

// The weights [N, K] of a layer or of one expert.
struct Weights {
  const uint8_t* data;
  const void* scales;
  const uint8_t* zeros;
  int64_t n, k, groups, rows_of_scale, scale_dtype;
};

// What stands for tokens x [T, K], and their scales.
template <class Format>
struct Tokens {
  std::vector<typename Format::Number> numbers;  // [T, stride]
  std::vector<float> scales, sums;               // [T, G]; sums of a group, in what they mean
  int64_t k, stride, groups;
  const typename Format::Number* of(int64_t token) const { return numbers.data() + token * stride; }

  // A cache line between tokens: at a distance of a multiple of 2048 bytes they would displace each other from a cache.
  Tokens(const void* x, int64_t dtype, int64_t count, const Weights& w)
      : k(w.k), stride(w.k + 64 / sizeof(typename Format::Number)), groups(Format::groups(w)) {
    numbers.resize(count * stride);
    scales.resize(count * groups);
    sums.resize(Format::kHasZeros ? count * groups : 0);
#pragma omp parallel if (count > 4)
    {
      std::vector<float> plain(k);
#pragma omp for schedule(static)
      for (int64_t t = 0; t < count; ++t) {
        read(x, dtype, t * k, k, plain.data());
        Format::represent(plain.data(), w, numbers.data() + t * stride, scales.data() + t * groups,
                          Format::kHasZeros ? sums.data() + t * groups : nullptr);
      }
    }
  }
};

// ---- floating-point weights ----------------------------------------------------------------------------------------

template <class Loader>
struct Floating {
  using Number = float;
  static constexpr bool kHasZeros = false, kIsWide = false;
  static constexpr int64_t kFew = 12, kPlainPart = kPart / 2;
  static constexpr int kTogether = 3;

  static int64_t groups(const Weights& w) { return w.groups; }
  static void represent(const float* x, const Weights& w, float* numbers, float*, float*) {
    std::copy(x, x + w.k, numbers);
  }

  // rows [row, row + kTile) times T tokens
  template <int T>
  static void few(const Weights& w, int64_t row, const float (*scales)[kRows], int first, const float* const* x,
                  const float* const*, float (*out)[kRows]) {
    __m256 total[kTile][T];
    clear(total);
    const int64_t width = (w.groups > 1 ? kWide : w.k);
    for (int64_t g = 0; g * width < w.k; ++g) {
      __m256 part[kTile][T];
      clear(part);
      const int64_t end = std::min(w.k, (g + 1) * width);
      for (int64_t k = g * width; k < end; k += 16) {
        for (int r = 0; r < kTile; ++r) {
          __m256 low, high;
          Loader::load16(w.data, (row + r) * w.k + k, low, high);
          prefetch(w.data + ((row + r + kTile) * w.k + k) * Loader::kBytes);
          for (int t = 0; t < T; ++t) {
            part[r][t] = _mm256_fmadd_ps(low, _mm256_loadu_ps(x[t] + k), part[r][t]);
            part[r][t] = _mm256_fmadd_ps(high, _mm256_loadu_ps(x[t] + k + 8), part[r][t]);
          }
        }
      }
      for (int r = 0; r < kTile; ++r) {
        const __m256 scale = _mm256_set1_ps(scales[g][first + r]);
        for (int t = 0; t < T; ++t) total[r][t] = _mm256_fmadd_ps(part[r][t], scale, total[r][t]);
      }
    }
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < kTile; ++r) out[t][first + r] = sum(total[r][t]);
  }

  static void unpack(const Weights& w, int64_t row, const float (*scales)[kRows], int64_t from, int64_t count,
                     float* plain) {
    for (int r = 0; r < kRows; ++r)
      for (int64_t k = 0; k < count; k += 16) {
        __m256 low, high;
        Loader::load16(w.data, (row + r) * w.k + from + k, low, high);
        const __m256 scale = _mm256_set1_ps(scales[w.groups > 1 ? (from + k) / kWide : 0][r]);
        _mm256_storeu_ps(plain + r * count + k, _mm256_mul_ps(low, scale));
        _mm256_storeu_ps(plain + r * count + k + 8, _mm256_mul_ps(high, scale));
      }
  }

  template <int T>
  static void many(int first, const float* plain, int64_t count, const float* const* x, float* const* out) {
    __m256 acc[kTile][T];
    clear(acc);
    for (int64_t k = 0; k < count; k += 8) {
      __m256 of[T];
      for (int t = 0; t < T; ++t) of[t] = _mm256_loadu_ps(x[t] + k);
      for (int r = 0; r < kTile; ++r) {
        const __m256 weight = _mm256_loadu_ps(plain + (first + r) * count + k);
        for (int t = 0; t < T; ++t) acc[r][t] = _mm256_fmadd_ps(weight, of[t], acc[r][t]);
      }
    }
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < kTile; ++r) out[t][first + r] += sum(acc[r][t]);
  }

  static void finish(const Weights&, const float (*)[kRows], const float (*)[kRows], const float*, const float*,
                     float*) {}
};

struct LoadBf16 {
  static constexpr int64_t kBytes = 2;
  static void load16(const uint8_t* data, int64_t index, __m256& low, __m256& high) {
    const __m256i words = load(data + 2 * index);
    low = in_fp32(_mm256_castsi256_si128(words));
    high = in_fp32(_mm256_extracti128_si256(words, 1));
  }
};

struct LoadFp16 {
  static constexpr int64_t kBytes = 2;
  static void load16(const uint8_t* data, int64_t index, __m256& low, __m256& high) {
    const __m256i words = load(data + 2 * index);
    low = _mm256_cvtph_ps(_mm256_castsi256_si128(words));
    high = _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1));
  }
};

// e4m3fn: its bits are those of an fp16 number 2^8 times smaller, which its scales make up for.
struct LoadFp8 {
  static constexpr int64_t kBytes = 1;
  static void load16(const uint8_t* data, int64_t index, __m256& low, __m256& high) {
    const __m256i bytes = _mm256_cvtepu8_epi16(load_half(data + index));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(bytes, _mm256_set1_epi16(0x80)), 8);
    const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(bytes, _mm256_set1_epi16(0x7f)), 7);
    const __m256i half = _mm256_or_si256(sign, rest);
    low = _mm256_cvtph_ps(_mm256_castsi256_si128(half));
    high = _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
  }
};

template <class Loader>
struct Unscaled : Floating<Loader> {
  static void scales_of(const Weights&, int64_t, float (*scales)[kRows], float (*)[kRows]) {
    std::fill(scales[0], scales[0] + kRows, 1.0f);
  }
};

struct Fp8 : Floating<LoadFp8> {
  static void scales_of(const Weights& w, int64_t row, float (*scales)[kRows], float (*)[kRows]) {
    const float* stored = static_cast<const float*>(w.scales);
    for (int64_t g = 0; g < w.groups; ++g)
      for (int r = 0; r < kRows; ++r) scales[g][r] = 256 * stored[(row + r) / w.rows_of_scale * w.groups + g];
  }
};

// ---- weights in int8 -----------------------------------------------------------------------------------------------

struct Int8 {
  using Number = int16_t;
  static constexpr bool kHasZeros = false, kIsWide = false;
  static constexpr int64_t kFew = 24, kPlainPart = kPart;
  static constexpr int kTogether = 2;

  static int64_t groups(const Weights&) { return 1; }
  static __m256i load16(const uint8_t* data, int64_t index) { return _mm256_cvtepi8_epi16(load_half(data + index)); }

  static void represent(const float* x, const Weights& w, int16_t* numbers, float* scale, float*) {
    const float most = largest(x, w.k);
    const float levels = std::min<int64_t>(32767, std::numeric_limits<int32_t>::max() / (128 * w.k));
    *scale = most / levels;
    const __m256 times = _mm256_set1_ps(most > 0 ? levels / most : 0);
    for (int64_t k = 0; k < w.k; k += 16) {
      const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k), times));
      const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k + 8), times));
      const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(numbers + k), both);
    }
  }

  static void scales_of(const Weights& w, int64_t row, float (*scales)[kRows], float (*)[kRows]) {
    std::copy_n(static_cast<const float*>(w.scales) + row, kRows, scales[0]);
  }

  static float sum32(__m256i v) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    return static_cast<float>(_mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1))));
  }

  template <int T>
  static void few(const Weights& w, int64_t row, const float (*scales)[kRows], int first, const int16_t* const* x,
                  const float* const* x_scales, float (*out)[kRows]) {
    __m256i acc[kTile][T];
    clear(acc);
    for (int64_t k = 0; k < w.k; k += 16) {
      for (int r = 0; r < kTile; ++r) {
        const int64_t index = (row + r) * w.k + k;
        prefetch(w.data + index + kTile * w.k);
        const __m256i weight = load16(w.data, index);
        for (int t = 0; t < T; ++t)
          acc[r][t] = _mm256_add_epi32(acc[r][t], _mm256_madd_epi16(weight, load(x[t] + k)));
      }
    }
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < kTile; ++r) out[t][first + r] = sum32(acc[r][t]) * scales[0][first + r] * x_scales[t][0];
  }

  static void unpack(const Weights& w, int64_t row, const float (*)[kRows], int64_t from, int64_t count,
                     int16_t* plain) {
    for (int r = 0; r < kRows; ++r)
      for (int64_t k = 0; k < count; k += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(plain + r * count + k),
                            load16(w.data, (row + r) * w.k + from + k));
  }

  template <int T>
  static void many(int first, const int16_t* plain, int64_t count, const int16_t* const* x, float* const* out) {
    __m256i acc[kTile][T];
    clear(acc);
    for (int64_t k = 0; k < count; k += 16) {
      __m256i of[T];
      for (int t = 0; t < T; ++t) of[t] = load(x[t] + k);
      for (int r = 0; r < kTile; ++r) {
        const __m256i weight = load(plain + (first + r) * count + k);
        for (int t = 0; t < T; ++t) acc[r][t] = _mm256_add_epi32(acc[r][t], _mm256_madd_epi16(weight, of[t]));
      }
    }
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < kTile; ++r) out[t][first + r] += sum32(acc[r][t]);
  }

  // After `many`, whose sums are of levels.
  static void finish(const Weights&, const float (*scales)[kRows], const float (*)[kRows], const float* x_scales,
                     const float*, float* out) {
    for (int r = 0; r < kRows; ++r) out[r] *= scales[0][r] * x_scales[0];
  }
};

// ---- weights in int4 -----------------------------------------------------------------------------------------------

// Activations for them: integers of 8 bits, with a scale and a sum of what they mean for each group of weights; groups
// within kWide share one scale.
struct Int4Activations {
  using Number = int8_t;
  static constexpr bool kHasZeros = true;

  static int64_t groups(const Weights& w) { return w.groups; }

  static void represent(const float* x, const Weights& w, int8_t* numbers, float* scales, float* sums) {
    const int64_t group = w.k / w.groups;
    const int64_t width = w.k % kWide == 0 && kWide % group == 0 ? kWide : group;
    for (int64_t from = 0; from < w.k; from += width) {
      const float most = largest(x + from, width), scale = most / 127;
      const __m256 times = _mm256_set1_ps(most > 0 ? 127 / most : 0);
      for (int64_t k = from; k < from + width; k += group) {
        __m256i total = _mm256_setzero_si256();
        for (int64_t i = k; i < k + group; i += 8) {
          const __m256i level = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), times));
          total = _mm256_add_epi32(total, level);
          const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(level), _mm256_extracti128_si256(level, 1));
          _mm_storel_epi64(reinterpret_cast<__m128i*>(numbers + i), _mm_packs_epi16(words, words));
        }
        scales[k / group] = scale;
        sums[k / group] = Int8::sum32(total) * scale;
      }
    }
  }
};

// 32 bytes hold 64 inputs of a row: the first 32 in their lower halves; groups of 32 the same with 16 bytes. Those of
// kTile rows lie side by side, so that memory is read in its order.
struct Int4 : Int4Activations {
  static constexpr bool kIsWide = false;
  static constexpr int64_t kFew = kAny;  // as fast as what would become plain numbers first

  // scales as in memory [N / kRows, G, kRows] in bf16 or fp16, zero points likewise in bytes
  static void scales_of(const Weights& w, int64_t row, float (*scales)[kRows], float (*zeros)[kRows]) {
    const uint16_t* stored = static_cast<const uint16_t*>(w.scales) + row * w.groups;
    const uint8_t* points = w.zeros + row * w.groups;
    for (int64_t g = 0; g < w.groups; ++g)
      for (int r = 0; r < kRows; r += 8) {
        const __m128i words = load_half(stored + g * kRows + r);
        const __m256 scale = w.scale_dtype == kFp16 ? _mm256_cvtph_ps(words) : in_fp32(words);
        const __m128i point = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(points + g * kRows + r));
        _mm256_storeu_ps(scales[g] + r, scale);
        _mm256_storeu_ps(zeros[g] + r, _mm256_mul_ps(scale, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(point))));
      }
  }

  static bool has_small_groups(const Weights& w) { return w.k / w.groups == 32; }

  template <int T>
  static void few(const Weights& w, int64_t row, const float (*scales)[kRows], int first, const int8_t* const* x,
                  const float* const* x_scales, float (*out)[kRows]) {
    has_small_groups(w) ? few_in<T, 16>(w, row, scales, first, x, x_scales, out)
                        : few_in<T, 32>(w, row, scales, first, x, x_scales, out);
  }

  template <int T, int64_t kBytes>
  static void few_in(const Weights& w, int64_t row, const float (*scales)[kRows], int first, const int8_t* const* x,
                     const float* const* x_scales, float (*out)[kRows]) {
    const __m256i lower = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const int64_t group = w.k / w.groups;
    const uint8_t* from = w.data + row * w.k / 2;
    __m256 total[kTile][T];
    clear(total);
    for (int64_t g = 0; g < w.groups; ++g) {
      __m256i part[kTile][T];
      clear(part);
      for (int64_t k = g * group; k < (g + 1) * group; k += 2 * kBytes) {
        prefetch(from + kAhead);
        if (kBytes == 32) prefetch(from + kAhead + 64);
        for (int r = 0; r < kTile; ++r, from += kBytes) {
          if constexpr (kBytes == 16) {
            const __m128i bytes = load_half(from);
            const __m256i weight = _mm256_and_si256(
                _mm256_inserti128_si256(_mm256_castsi128_si256(bytes), _mm_srli_epi16(bytes, 4), 1), lower);
            for (int t = 0; t < T; ++t)
              part[r][t] = _mm256_add_epi16(part[r][t], _mm256_maddubs_epi16(weight, load(x[t] + k)));
          } else {
            const __m256i bytes = load(from);
            const __m256i low = _mm256_and_si256(bytes, lower);
            const __m256i high = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), lower);
            for (int t = 0; t < T; ++t) {
              const __m256i both = _mm256_add_epi16(_mm256_maddubs_epi16(low, load(x[t] + k)),
                                                    _mm256_maddubs_epi16(high, load(x[t] + k + 32)));
              part[r][t] = _mm256_add_epi16(part[r][t], both);
            }
          }
        }
      }
      for (int t = 0; t < T; ++t) {
        const __m256 x_scale = _mm256_broadcast_ss(x_scales[t] + g);
        for (int r = 0; r < kTile; ++r) {
          const __m256 scale = _mm256_mul_ps(_mm256_broadcast_ss(scales[g] + first + r), x_scale);
          total[r][t] =
              _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(part[r][t], ones)), scale, total[r][t]);
        }
      }
    }
    for (int t = 0; t < T; ++t)
      for (int r = 0; r < kTile; ++r) out[t][first + r] = sum(total[r][t]);
  }

  // Take away what the zero points stand for.
  static void finish(const Weights& w, const float (*)[kRows], const float (*zeros)[kRows], const float*,
                     const float* sums, float* out) {
    __m256 low = _mm256_loadu_ps(out), high = _mm256_loadu_ps(out + 8);
    for (int64_t g = 0; g < w.groups; ++g) {
      const __m256 of = _mm256_set1_ps(sums[g]);
      low = _mm256_fnmadd_ps(_mm256_loadu_ps(zeros[g]), of, low);
      high = _mm256_fnmadd_ps(_mm256_loadu_ps(zeros[g] + 8), of, high);
    }
    _mm256_storeu_ps(out, low);
    _mm256_storeu_ps(out + 8, high);
  }
};

// ---- weights in int4, with AVX-512 VNNI ----------------------------------------------------------------------------

#define WITH_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))

// Of a block of kRows outputs, 64 bytes hold 8 inputs of each: the first 4 in their lower halves. Blocks follow each
// other, and in each its inputs, so that memory is read in its order.
struct Int4Vnni : Int4Activations {
  static constexpr bool kIsWide = true;
  static constexpr int kTogether = 8;  // tokens whose sums are in registers
  static constexpr int kInOrder = 4;   // for so many tokens memory is what takes time, and is read in its order

  // to[r] [T, kRows] = x [T, K] times block r of those that begin with `row`
  template <int R, int T>
  WITH_VNNI static void multiply(const Weights& w, int64_t row, const int8_t* const* x, const float* const* x_scales,
                                 const float* const* x_sums, float* const* to) {
    constexpr int kChains = R * T < 3 ? 4 : R * T < 5 ? 2 : 1;  // of sums, so that none waits for the one before
    const __m512i lower = _mm512_set1_epi8(15);
    const int64_t group = w.k / w.groups;
    const uint8_t* from[R];
    for (int r = 0; r < R; ++r) from[r] = w.data + (row + r * kRows) * w.k / 2;
    __m512 total[R][T];
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) total[r][t] = _mm512_setzero_ps();
    for (int64_t g = 0; g < w.groups; ++g) {
      __m512i part[R][T][kChains];
      for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t)
          for (int c = 0; c < kChains; ++c) part[r][t][c] = _mm512_setzero_si512();
      for (int64_t k = g * group; k < (g + 1) * group; k += 16) {
        __m512i weight[R][4];  // of 4 inputs each
        for (int r = 0; r < R; ++r)
          for (int i = 0; i < 4; i += 2, from[r] += 64) {
            if (T <= kInOrder) prefetch(from[r] + kFurther);
            const __m512i bytes = _mm512_loadu_si512(from[r]);
            weight[r][i] = _mm512_and_si512(bytes, lower);
            weight[r][i + 1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), lower);
          }
        for (int i = 0; i < 4; ++i)
          for (int t = 0; t < T; ++t) {
            int32_t four;
            std::memcpy(&four, x[t] + k + 4 * i, 4);
            const __m512i inputs = _mm512_set1_epi32(four);
            for (int r = 0; r < R; ++r)
              part[r][t][i % kChains] = _mm512_dpbusd_epi32(part[r][t][i % kChains], weight[r][i], inputs);
          }
      }
      for (int r = 0; r < R; ++r) {
        const int64_t place = (row + r * kRows) * w.groups + g * kRows;
        const __m256i words = load(static_cast<const uint16_t*>(w.scales) + place);
        const __m512 scale = w.scale_dtype == kFp16
                                 ? _mm512_cvtph_ps(words)
                                 : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
        const __m512i point = _mm512_cvtepu8_epi32(load_half(w.zeros + place));
        const __m512 zero = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(point));
        for (int t = 0; t < T; ++t) {
          __m512i sum = part[r][t][0];
          for (int c = 1; c < kChains; ++c) sum = _mm512_add_epi32(sum, part[r][t][c]);
          const __m512 x_scale = _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[t][g]));
          total[r][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), x_scale, total[r][t]);
          total[r][t] = _mm512_fnmadd_ps(zero, _mm512_set1_ps(x_sums[t][g]), total[r][t]);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t) _mm512_storeu_ps(to[r] + t * kRows, total[r][t]);
  }

  // The same for `count` tokens, T at the most.
  template <int R, int T = kTogether>
  static void some(const Weights& w, int64_t row, const int8_t* const* x, const float* const* x_scales,
                   const float* const* x_sums, int64_t count, float* const* to) {
    if (count == T)
      multiply<R, T>(w, row, x, x_scales, x_sums, to);
    else if constexpr (T > 1)
      some<R, T - 1>(w, row, x, x_scales, x_sums, count, to);
  }
};

// ---- products ------------------------------------------------------------------------------------------------------

// Memory of a thread for one block of outputs.
template <class Format>
struct Workplace {
  std::vector<float> scales, zeros, out;  // [G, kRows], [G, kRows], of each block [T, kRows]
  std::vector<typename Format::Number> plain;

  // Block first + i of out [T, kRows] = tokens [T, K] times the rows of block i of `blocks`, which begin with `row`.
  void multiply(const Weights& w, int64_t row, int64_t blocks, const Tokens<Format>& tokens, const int64_t* chosen,
                int64_t count, int64_t first = 0) {
    out.resize(std::max<size_t>(out.size(), (first + blocks) * count * kRows));
    float* const to = out.data() + first * count * kRows;
    if constexpr (Format::kIsWide) {
      const int64_t pairs = count > Format::kInOrder ? blocks / 2 : 0;
      for (int64_t i = 0; i < pairs; ++i)
        multiply_wide<2>(w, row + 2 * i * kRows, tokens, chosen, count, to + 2 * i * count * kRows);
      for (int64_t i = 2 * pairs; i < blocks; ++i)
        multiply_wide<1>(w, row + i * kRows, tokens, chosen, count, to + i * count * kRows);
    } else {
      for (int64_t i = 0; i < blocks; ++i)
        multiply_narrow(w, row + i * kRows, tokens, chosen, count, to + i * count * kRows);
    }
  }

  template <int R>
  void multiply_wide(const Weights& w, int64_t row, const Tokens<Format>& tokens, const int64_t* chosen, int64_t count,
                     float* out) {
    constexpr int most = Format::kTogether;
    const typename Format::Number* x[most];
    const float *x_scales[most], *x_sums[most];
    for (int64_t t = 0; t < count; t += most) {
      const int64_t together = std::min<int64_t>(most, count - t);
      for (int64_t i = 0; i < together; ++i) {
        const int64_t token = chosen[t + i];
        x[i] = tokens.of(token);
        x_scales[i] = &tokens.scales[token * tokens.groups];
        x_sums[i] = &tokens.sums[token * tokens.groups];
      }
      float* to[R];
      for (int r = 0; r < R; ++r) to[r] = out + (r * count + t) * kRows;
      Format::template some<R>(w, row, x, x_scales, x_sums, together, to);
    }
  }

  void multiply_narrow(const Weights& w, int64_t row, const Tokens<Format>& tokens, const int64_t* chosen,
                       int64_t count, float* out) {
    scales.resize(std::max<int64_t>(w.groups, 1) * kRows);
    zeros.resize(Format::kHasZeros ? scales.size() : 0);
    auto* s = reinterpret_cast<float(*)[kRows]>(scales.data());
    auto* z = reinterpret_cast<float(*)[kRows]>(zeros.data());
    Format::scales_of(w, row, s, z);
    const int64_t groups = tokens.groups;
    if (count <= Format::kFew) {
      for (int first = 0; first < kRows; first += kTile)
        for (int64_t t = 0; t < count; t += 2) {
          const int64_t a = chosen[t], b = chosen[std::min(t + 1, count - 1)];
          const typename Format::Number* x[2] = {tokens.of(a), tokens.of(b)};
          const float* x_scales[2] = {&tokens.scales[a * groups], &tokens.scales[b * groups]};
          auto* to = reinterpret_cast<float(*)[kRows]>(out + t * kRows);
          if (t + 1 < count)
            Format::template few<2>(w, row + first, s, first, x, x_scales, to);
          else
            Format::template few<1>(w, row + first, s, first, x, x_scales, to);
        }
      if (Format::kHasZeros) finish(w, s, z, tokens, chosen, count, out);
    } else if constexpr (Format::kFew != kAny) {
      multiply_many(w, row, s, tokens, chosen, count, out);
      finish(w, s, z, tokens, chosen, count, out);
    }
  }

  void multiply_many(const Weights& w, int64_t row, const float (*s)[kRows], const Tokens<Format>& tokens,
                     const int64_t* chosen, int64_t count, float* out) {
    std::fill_n(out, count * kRows, 0.0f);
    plain.resize(kRows * Format::kPlainPart);
    for (int64_t from = 0; from < w.k; from += Format::kPlainPart) {
      const int64_t part = std::min(Format::kPlainPart, w.k - from);
      Format::unpack(w, row, s, from, part, plain.data());
      constexpr int most = Format::kTogether;
      for (int64_t t = 0; t < count; t += most) {
        const typename Format::Number* x[most];
        float* to[most];
        const int64_t together = std::min<int64_t>(most, count - t);
        for (int64_t i = 0; i < together; ++i) {
          x[i] = tokens.of(chosen[t + i]) + from;
          to[i] = out + (t + i) * kRows;
        }
        for (int first = 0; first < kRows; first += kTile) {
          if (together == most)
            Format::template many<most>(first, plain.data(), part, x, to);
          else
            for (int64_t i = 0; i < together; ++i)
              Format::template many<1>(first, plain.data(), part, x + i, to + i);
        }
      }
    }
  }

  void finish(const Weights& w, const float (*s)[kRows], const float (*z)[kRows], const Tokens<Format>& tokens,
              const int64_t* chosen, int64_t count, float* out) {
    for (int64_t t = 0; t < count; ++t)
      Format::finish(w, s, z, &tokens.scales[chosen[t] * tokens.groups],
                     Format::kHasZeros ? &tokens.sums[chosen[t] * tokens.groups] : nullptr, out + t * kRows);
  }
};

// Weights [E, N, K] of all experts.
struct Stack {
  Weights first;
  int64_t data_bytes, scale_bytes, zero_bytes;  // of an expert
  Weights of(int64_t expert) const {
    Weights one = first;
    one.data += expert * data_bytes;
    one.scales = static_cast<const uint8_t*>(one.scales) + expert * scale_bytes;
    one.zeros = one.zeros + expert * zero_bytes;
    return one;
  }
};

// Calls take(matrix, block, blocks) for all of `blocks` blocks of outputs of each of `matrices`, by the threads of the
// parallel region around it, all of which have to come here, and wait at its end. With few tokens each has one share, in
// the order in which it lies in memory, which is read faster so, and takes `most` blocks at a time; with many, whose
// products take unlike times, who is free takes kBlocks.
template <class Take>
void share(int64_t matrices, int64_t blocks, int64_t tokens, int64_t most, Take take) {
  if (tokens > kShared) {
    const int64_t tasks = (blocks + kBlocks - 1) / kBlocks;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < matrices * tasks; ++task) {
      const int64_t block = task % tasks * kBlocks;
      take(task / tasks, block, std::min(kBlocks, blocks - block));
    }
    return;
  }
  const int64_t threads = omp_get_num_threads(), mine = omp_get_thread_num(), all = matrices * blocks;
  for (int64_t at = all * mine / threads, end = all * (mine + 1) / threads; at < end;) {
    const int64_t block = at % blocks, count = std::min({most, blocks - block, end - at});
    take(at / blocks, block, count);
    at += count;
  }
#pragma omp barrier
}

template <class Format>
void linear(const Stack& stack, const void* x, int64_t dtype, int64_t count, void* out) {
  const Weights& w = stack.first;
  const Tokens<Format> tokens(x, dtype, count, w);
  std::vector<int64_t> all(count);
  std::iota(all.begin(), all.end(), 0);
#pragma omp parallel
  {
    Workplace<Format> place;
    share(1, w.n / kRows, count, kBlocks, [&](int64_t, int64_t block, int64_t blocks) {
      place.multiply(w, block * kRows, blocks, tokens, all.data(), count);
      for (int64_t t = 0; t < count; ++t)
        for (int64_t i = 0; i < blocks; ++i)
          write(out, dtype, t * w.n + (block + i) * kRows, kRows, &place.out[(i * count + t) * kRows]);
    });
  }
}

// The picks of T tokens by expert, without those of weight 0.
struct Picks {
  std::vector<int64_t> starts, token, place;  // [E + 1]; [picks] by expert; [T * P] where each is, or -1
  std::vector<float> weight;                  // [picks]
  std::vector<int64_t> used;                  // experts that have any
  bool is_right = true;
  int64_t count() const { return starts.back(); }

  Picks(const int32_t* ids, const float* weights, int64_t tokens, int64_t per_token, int64_t experts)
      : starts(experts + 1), place(tokens * per_token, -1) {
    for (size_t p = 0; p < place.size(); ++p) {
      if (weights[p] == 0) continue;
      if (ids[p] < 0 || ids[p] >= experts) {
        is_right = false;
        return;
      }
      ++starts[ids[p] + 1];
    }
    for (int64_t e = 0; e < experts; ++e) {
      if (starts[e + 1]) used.push_back(e);
      starts[e + 1] += starts[e];
    }
    token.resize(count());
    weight.resize(count());
    std::vector<int64_t> next(starts.begin(), starts.end() - 1);
    for (size_t p = 0; p < place.size(); ++p) {
      if (weights[p] == 0) continue;
      place[p] = next[ids[p]]++;
      token[place[p]] = p / per_token;
      weight[place[p]] = weights[p];
    }
  }
};

constexpr int64_t kTokens = 2048;   // whose picks are computed together, so that what is kept of them stays small
constexpr int64_t kFewPicks = 512;  // whose results are kept each before they are summed up

// to [size] += weight * from [size]
void add_scaled(float* to, float weight, const float* from, int64_t size) {
  for (int64_t i = 0; i < size; i += 8)
    (Vector::loadu(to + i) + Vector(weight) * Vector::loadu(from + i)).store(to + i);
}

// out [T, H] = of each token the weighted sum of what its experts make of it
template <class Format>
bool experts(const Stack& w13, const Stack& w2, int64_t number, const void* x, int64_t dtype, int64_t count,
             const int32_t* ids, const float* weights, int64_t per_token, void* out) {
  const Picks picks(ids, weights, count, per_token, number);
  if (!picks.is_right) return false;
  const int64_t width = w2.first.k, hidden = w2.first.n, used = picks.used.size();
  std::vector<float> inner(picks.count() * width);
  {
    const Tokens<Format> tokens(x, dtype, count, w13.first);
#pragma omp parallel
    {
      Workplace<Format> place;
      share(used, width / kRows, count, kAny, [&](int64_t index, int64_t block, int64_t blocks) {
        const int64_t expert = picks.used[index], row = block * kRows;
        const int64_t from = picks.starts[expert], size = picks.starts[expert + 1] - from;
        place.multiply(w13.of(expert), row, blocks, tokens, &picks.token[from], size);
        place.multiply(w13.of(expert), width + row, blocks, tokens, &picks.token[from], size, blocks);
        for (int64_t b = 0; b < blocks; ++b)
          for (int64_t i = 0; i < size * kRows; i += 8) {
            const Vector gate = Vector::loadu(&place.out[b * size * kRows + i]),
                         up = Vector::loadu(&place.out[(blocks + b) * size * kRows + i]);
            (gate / (Vector(1) + gate.neg().exp()) * up)
                .store(&inner[(from + i / kRows) * width + row + b * kRows + i % kRows]);
          }
      });
    }
  }
  const Tokens<Format> tokens(inner.data(), kFp32, picks.count(), w2.first);
  std::vector<int64_t> all(picks.count());
  std::iota(all.begin(), all.end(), 0);
  const bool is_few = picks.count() <= kFewPicks;
  std::vector<float> each(is_few ? picks.count() * hidden : 0), sums(is_few ? 0 : count * hidden);
#pragma omp parallel
  {
    Workplace<Format> place;
    // of `blocks` from `row` of an expert, for its picks
    const auto multiply = [&](int64_t expert, int64_t row, int64_t blocks, auto take) {
      const int64_t from = picks.starts[expert], size = picks.starts[expert + 1] - from;
      place.multiply(w2.of(expert), row, blocks, tokens, &all[from], size);
      for (int64_t p = 0; p < size; ++p)
        for (int64_t b = 0; b < blocks; ++b) take(from + p, row + b * kRows, &place.out[(b * size + p) * kRows]);
    };
    if (is_few) {
      share(used, hidden / kRows, count, kBlocks, [&](int64_t index, int64_t block, int64_t blocks) {
        multiply(picks.used[index], block * kRows, blocks,
                 [&](int64_t p, int64_t h, const float* found) { std::copy_n(found, kRows, &each[p * hidden + h]); });
      });
    } else {
#pragma omp for schedule(dynamic, 1)
      for (int64_t row = 0; row < hidden; row += kBlocks * kRows)
        for (const int64_t expert : picks.used)
          multiply(expert, row, std::min(kBlocks, (hidden - row) / kRows),
                   [&](int64_t p, int64_t h, const float* found) {
                     add_scaled(&sums[picks.token[p] * hidden + h], picks.weight[p], found, kRows);
                   });
    }
    std::vector<float> total(is_few ? hidden : 0);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < count; ++t) {
      if (is_few) {
        std::fill(total.begin(), total.end(), 0.0f);
        for (int64_t p = t * per_token; p < (t + 1) * per_token; ++p) {
          const int64_t from = picks.place[p];
          if (from >= 0) add_scaled(total.data(), picks.weight[from], &each[from * hidden], hidden);
        }
      }
      write(out, dtype, t * hidden, hidden, is_few ? total.data() : &sums[t * hidden]);
    }
  }
  return true;
}

// ---- router --------------------------------------------------------------------------------------------------------

// What a router takes of E experts in `groups` of neighbors: `picks` of the `open` groups whose two best rank highest.
struct Rule {
  int64_t experts, groups, open, picks;
  bool normalizes;
  float scale;
};

// The `count` largest of values [size] first in `order` [size]; of equal ones those with smaller numbers.
void best(const float* values, int64_t size, int64_t count, int64_t* order) {
  std::iota(order, order + size, 0);
  std::partial_sort(order, order + count, order + size, [values](int64_t a, int64_t b) {
    return values[a] > values[b] || (values[a] == values[b] && a < b);
  });
}

// Memory of a thread for one token.
struct Router {
  std::vector<float> scores, ranking, of_groups, in_open;
  std::vector<int64_t> order, open;

  explicit Router(const Rule& rule)
      : scores(rule.experts),
        ranking(rule.experts),
        of_groups(rule.groups),
        in_open(rule.experts),
        order(std::max(rule.experts, rule.groups)),
        open(rule.experts) {}

  void choose(const Rule& rule, const float* logits, const float* bias, float* weights, int32_t* ids) {
    float check = 0;
    for (int64_t e = 0; e < rule.experts; ++e) {
      scores[e] = 1 / (1 + std::exp(-logits[e]));
      ranking[e] = scores[e] + bias[e];
      check += ranking[e];
    }
    if (!std::isfinite(check)) {  // nothing can be ranked, and the result shall tell it
      std::iota(ids, ids + rule.picks, 0);
      std::fill(weights, weights + rule.picks, std::numeric_limits<float>::quiet_NaN());
      return;
    }
    const int64_t size = rule.experts / rule.groups;
    for (int64_t g = 0; g < rule.groups; ++g) {
      float first = -std::numeric_limits<float>::infinity(), second = first;
      for (int64_t e = g * size; e < (g + 1) * size; ++e) {
        second = std::max(second, std::min(first, ranking[e]));
        first = std::max(first, ranking[e]);
      }
      of_groups[g] = first + second;
    }
    best(of_groups.data(), rule.groups, rule.open, order.data());
    std::sort(order.begin(), order.begin() + rule.open);
    int64_t count = 0;
    for (int64_t i = 0; i < rule.open; ++i)
      for (int64_t e = order[i] * size; e < (order[i] + 1) * size; ++e, ++count) {
        open[count] = e;
        in_open[count] = ranking[e];
      }
    best(in_open.data(), count, rule.picks, order.data());
    float total = 0;
    for (int64_t p = 0; p < rule.picks; ++p) {
      ids[p] = static_cast<int32_t>(open[order[p]]);
      weights[p] = scores[ids[p]];
      total += weights[p];
    }
    const float times = rule.normalizes ? rule.scale / (total + 1e-20f) : rule.scale;
    for (int64_t p = 0; p < rule.picks; ++p) weights[p] *= times;
  }
};

// ---- norms of queries and keys, and their rotation -----------------------------------------------------------------

// x [size] = x / rms(x) * weight, its first 2 * half rotated by angles with these cosines and sines.
void norm_and_rotate(float* x, int64_t size, float eps, const float* weight, const float* cosines, const float* sines,
                     int64_t half) {
  __m256 squares = _mm256_setzero_ps();
  for (int64_t i = 0; i < size; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
    squares = _mm256_fmadd_ps(v, v, squares);
  }
  const __m256 factor = _mm256_set1_ps(1 / std::sqrt(sum(squares) / size + eps));
  for (int64_t i = 0; i < size; i += 8)
    _mm256_storeu_ps(x + i, _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(x + i), factor), _mm256_loadu_ps(weight + i)));
  for (int64_t i = 0; i < half; i += 8) {
    const __m256 first = _mm256_loadu_ps(x + i), second = _mm256_loadu_ps(x + half + i);
    const __m256 cosine = _mm256_loadu_ps(cosines + i), sine = _mm256_loadu_ps(sines + i);
    _mm256_storeu_ps(x + i, _mm256_fmsub_ps(first, cosine, _mm256_mul_ps(second, sine)));
    _mm256_storeu_ps(x + half + i, _mm256_fmadd_ps(second, cosine, _mm256_mul_ps(first, sine)));
  }
}

}  // namespace

// ---- operations of PyTorch, which avx2.py declares -----------------------------------------------------------------

namespace {

using at::Tensor;
using Maybe = std::optional<Tensor>;

constexpr int64_t kSome = 96;         // tokens for which the kernels above are faster than a product in fp32
constexpr int64_t kWidened = 1 << 19;  // numbers of a weight that become fp32 at a time for more

int64_t dtype_of(const Tensor& x) {
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf,
              "activations are ", x.scalar_type());
  return x.scalar_type() == at::kFloat ? kFp32 : x.scalar_type() == at::kBFloat16 ? kBf16 : kFp16;
}

// A stack of weights as `Weights` of avx2.py describes it, and the number of experts.
std::pair<Stack, int64_t> stack_of(const Tensor& data, const Maybe& scales, const Maybe& zeros, int64_t rows) {
  const bool is_wide = data.dim() == 4, is_int4 = data.scalar_type() == at::kByte;
  TORCH_CHECK((is_wide ? data.size(3) == 64 : data.dim() == 3) && data.is_contiguous() &&
                  (!scales || scales->is_contiguous()) && (!zeros || zeros->is_contiguous()),
              "weights have to be contiguous");
  const int64_t experts = data.size(0), n = data.size(1) * (is_wide ? kRows : 1),
                k = data.size(2) * (is_wide ? 8 : is_int4 ? 2 : 1);
  TORCH_CHECK(n % kRows == 0 && k % 32 == 0, "no multiples of ", kRows, " and 32: ", n, ", ", k);
  const auto bytes = [](const Maybe& one) { return one && one->size(0) ? one->nbytes() / one->size(0) : 0; };
  Weights first{static_cast<const uint8_t*>(data.const_data_ptr()),
                scales ? scales->const_data_ptr() : nullptr,
                zeros ? static_cast<const uint8_t*>(zeros->const_data_ptr()) : nullptr,
                n,
                k,
                scales && scales->dim() > 2 ? scales->size(2) : 1,
                rows,
                scales ? dtype_of(*scales) : kFp32};
  return {{first, static_cast<int64_t>(bytes(data)), static_cast<int64_t>(bytes(scales)),
           static_cast<int64_t>(bytes(zeros))},
          experts};
}

template <class Call>
void with_format(const Tensor& data, Call call) {
  const at::ScalarType dtype = data.scalar_type();
  if (data.dim() == 4) {
    TORCH_CHECK(__builtin_cpu_supports("avx512vnni") && dtype == at::kByte,
                "weights that lie so are of 4 bits, for processors with AVX-512 VNNI");
    return call(Int4Vnni());
  }
  switch (dtype) {
    case at::kBFloat16: return call(Unscaled<LoadBf16>());
    case at::kHalf: return call(Unscaled<LoadFp16>());
    case at::kFloat8_e4m3fn: return call(Fp8());
    case at::kChar: return call(Int8());
    case at::kByte: return call(Int4());
    default: TORCH_CHECK(false, "weights are ", dtype);
  }
}

Tensor avx2_linear(const Tensor& x, const Tensor& data, const Maybe& scales, const Maybe& zeros, int64_t rows,
                   const Maybe& bias) {
  const Stack stack = stack_of(data, scales, zeros, rows).first;
  TORCH_CHECK(x.size(-1) == stack.first.k, x.size(-1), " inputs for weights of ", stack.first.k);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = stack.first.n;
  const Tensor from = (bias ? x.to(at::kFloat) : x).contiguous();  // so that the sum is rounded once
  const Tensor result = from.new_empty(shape);
  with_format(data, [&](auto format) {
    linear<decltype(format)>(stack, from.const_data_ptr(), dtype_of(from), from.numel() / stack.first.k,
                             result.mutable_data_ptr());
  });
  return bias ? result.add_(*bias).to(x.scalar_type()) : result;
}

Tensor avx2_plain_linear(const Tensor& x, const Tensor& weight, const Maybe& bias) {
  const int64_t k = x.size(-1), count = x.numel() / k, n = weight.size(0);
  if (count <= kSome) return avx2_linear(x, weight.unsqueeze(0), {}, {}, 1, bias);
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = n;
  const Tensor from = x.reshape({count, k}).to(at::kFloat), result = x.new_empty({count, n});
  const int64_t together = std::min(n, std::max<int64_t>(1, kWidened / k));
  const Tensor part = from.new_empty({together, k});
  for (int64_t start = 0; start < n; start += together) {
    const int64_t stop = std::min(n, start + together);
    const Tensor sums = from.mm(part.slice(0, 0, stop - start).copy_(weight.slice(0, start, stop)).t());
    result.slice(1, start, stop).copy_(bias ? sums.add_(bias->slice(0, start, stop)) : sums);
  }
  return result.view(shape);
}

void avx2_experts(const Tensor& output, const Tensor& x, const Tensor& data13, const Maybe& scales13,
                  const Maybe& zeros13, int64_t rows13, const Tensor& data2, const Maybe& scales2, const Maybe& zeros2,
                  int64_t rows2, const Tensor& topk_weights, const Tensor& topk_ids) {
  const auto [w13, number] = stack_of(data13, scales13, zeros13, rows13);
  const Stack w2 = stack_of(data2, scales2, zeros2, rows2).first;
  TORCH_CHECK(data13.scalar_type() == data2.scalar_type() && data13.dim() == data2.dim(),
              "both matrices of experts have to be of one format");
  TORCH_CHECK(output.is_contiguous() && output.scalar_type() == x.scalar_type() && output.sizes() == x.sizes() &&
                  x.size(1) == w13.first.k && w2.first.n == w13.first.k && w13.first.n == 2 * w2.first.k,
              "sizes of experts do not fit");
  const Tensor from = x.contiguous(), weights = topk_weights.to(at::kFloat).contiguous(),
               ids = topk_ids.to(at::kInt).contiguous();
  const int64_t count = x.size(0), hidden = x.size(1), per_token = ids.size(1), size = x.element_size();
  bool is_right = true;
  for (int64_t start = 0; start < count; start += kTokens) {
    const auto at = [&](const Tensor& one) {
      return static_cast<const uint8_t*>(one.const_data_ptr()) + start * hidden * size;
    };
    with_format(data13, [&](auto format) {
      is_right &= experts<decltype(format)>(
          w13, w2, number, at(from), dtype_of(x), std::min(kTokens, count - start),
          ids.const_data_ptr<int32_t>() + start * per_token, weights.const_data_ptr<float>() + start * per_token,
          per_token, const_cast<uint8_t*>(at(output)));
    });
  }
  TORCH_CHECK_VALUE(is_right, "a router picked an expert that is none of ", number);
}

std::tuple<Tensor, Tensor> avx2_route(const Tensor& logits, const Tensor& bias, int64_t groups, int64_t open,
                                      int64_t picks, bool normalizes, double scale) {
  const int64_t count = logits.size(0), experts = logits.size(1);
  TORCH_CHECK(groups > 0 && experts % groups == 0 && 0 < open && open <= groups && 0 < picks &&
                  picks <= open * (experts / groups) && bias.numel() == experts,
              "no ", picks, " picks of ", open, " of ", groups, " groups of ", experts, " experts");
  const Rule rule{experts, groups, open, picks, normalizes, static_cast<float>(scale)};
  const Tensor from = logits.to(at::kFloat).contiguous(), added = bias.to(at::kFloat).contiguous();
  const Tensor weights = from.new_empty({count, picks}), 
               ids = from.new_empty({count, picks}, from.options().dtype(at::kInt));
#pragma omp parallel if (count > 8)
  {
    Router router(rule);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < count; ++t)
      router.choose(rule, from.const_data_ptr<float>() + t * experts, added.const_data_ptr<float>(),
                    weights.mutable_data_ptr<float>() + t * picks, ids.mutable_data_ptr<int32_t>() + t * picks);
  }
  return {weights, ids};
}

void avx2_qk_norm_rope(const Tensor& qkv, int64_t q_heads, int64_t k_heads, int64_t size, double eps,
                       const Tensor& q_weight, const Tensor& k_weight, const Tensor& cos_sin, const Tensor& positions) {
  const int64_t half = cos_sin.size(1) / 2, count = qkv.size(0), heads = q_heads + k_heads;
  TORCH_CHECK(qkv.is_contiguous() && qkv.size(1) >= heads * size && q_weight.numel() == size &&
                  k_weight.numel() == size && size % 8 == 0 && half % 8 == 0 && 2 * half <= size &&
                  cos_sin.is_contiguous() && positions.numel() == count,
              "sizes of queries and keys do not fit");
  const Tensor at = positions.to(at::kLong).contiguous();
  std::vector<float> of[2] = {std::vector<float>(size), std::vector<float>(size)};
  for (int i = 0; i < 2; ++i) {
    const Tensor weight = (i ? k_weight : q_weight).contiguous();
    read(weight.const_data_ptr(), dtype_of(weight), 0, size, of[i].data());
  }
  const int64_t dtype = dtype_of(qkv), angles = dtype_of(cos_sin), bytes = qkv.element_size(), rows = cos_sin.size(0);
  uint8_t* data = static_cast<uint8_t*>(qkv.mutable_data_ptr());
  const int64_t* places = at.const_data_ptr<int64_t>();
  TORCH_CHECK(std::all_of(places, places + count, [rows](int64_t p) { return 0 <= p && p < rows; }),
              "positions are none of ", rows);
#pragma omp parallel if (count > 4)
  {
    std::vector<float> x(size), turns(2 * half);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < count; ++t) {
      read(cos_sin.const_data_ptr(), angles, places[t] * 2 * half, 2 * half, turns.data());
      for (int64_t h = 0; h < heads; ++h) {
        uint8_t* head = data + (t * qkv.size(1) + h * size) * bytes;
        read(head, dtype, 0, size, x.data());
        norm_and_rotate(x.data(), size, static_cast<float>(eps), of[h >= q_heads].data(), turns.data(),
                        turns.data() + half, half);
        write(head, dtype, 0, size, x.data());
      }
    }
  }
}

// ---- attention: operations of vLLM, without Python between them ----------------------------------------------------

// An operation of vLLM's, called by the names of its arguments: versions of vLLM have them in different places.
class Operation {
 public:
  Operation(const char* name, const std::vector<std::string>& given)
      : handle_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "")) {
    size_t taken = 0;
    for (const c10::Argument& argument : handle_.schema().arguments()) {
      const auto found = std::find(given.begin(), given.end(), argument.name());
      TORCH_CHECK(found != given.end() || argument.default_value(), name, " wants ", argument.name());
      taken += found != given.end();
      places_.push_back(found == given.end() ? -1 : found - given.begin());
    }
    TORCH_CHECK(taken == given.size(), name, " takes other arguments");
  }

  void operator()(const std::vector<c10::IValue>& values) const {
    std::vector<c10::IValue> stack;
    for (size_t i = 0; i < places_.size(); ++i)
      stack.push_back(places_[i] < 0 ? *handle_.schema().arguments()[i].default_value() : values[places_[i]]);
    handle_.callBoxed(&stack);
  }

 private:
  c10::OperatorHandle handle_;
  std::vector<int64_t> places_;  // of each argument among those given, or -1 for its default
};

// What layers of one group of the KV cache share in a forward pass, as vLLM's `CPUAttentionMetadata` has it.
struct Metadata {
  Maybe slots;
  Tensor starts, lengths, blocks, schedule;
  Maybe dynamic_causal;
  bool causal;
  int64_t tokens;
  std::string isa;
};

struct AttentionLayer {
  Tensor cache;  // [B, K, S, 2 D]
  std::shared_ptr<const Metadata> metadata;
};

// Those of the model whose forward pass runs, none between passes: caches and metadata are vLLM's to free.
std::vector<AttentionLayer> attention_layers;
bool attends = false;  // else there is nothing to attend to, as when memory is measured

void avx2_begin_attention(int64_t layers, bool attends_) {
  attention_layers.assign(layers, {});
  attends = attends_;
}

void avx2_hand_over(const std::vector<int64_t>& layers, const std::vector<Tensor>& caches, const Maybe& slots,
                    const Tensor& starts, const Tensor& lengths, const Tensor& blocks, const Tensor& schedule,
                    const Maybe& dynamic_causal, bool causal, int64_t tokens, const std::string& isa) {
  const auto metadata = std::make_shared<const Metadata>(
      Metadata{slots, starts, lengths, blocks, schedule, dynamic_causal, causal, tokens, isa});
  for (size_t i = 0; i < layers.size(); ++i) attention_layers.at(layers[i]) = {caches.at(i), metadata};
}

Tensor avx2_attention(const Tensor& qkv, int64_t q_heads, int64_t k_heads, int64_t size, double eps,
                      const Tensor& q_weight, const Tensor& k_weight, const Tensor& cos_sin, const Tensor& positions,
                      double scale, int64_t place) {
  static const Operation write("_C::cpu_attn_reshape_and_cache",
                               {"key", "value", "key_cache", "value_cache", "slot_mapping", "isa"});
  static const Operation attend(
      "_C::cpu_attention_with_kv_cache",
      {"query", "key_cache", "value_cache", "output", "query_start_loc", "seq_lens", "scale", "causal", "alibi_slopes",
       "sliding_window_size", "block_table", "softcap", "scheduler_metadata", "s_aux", "dynamic_causal"});
  TORCH_CHECK(place < static_cast<int64_t>(attention_layers.size()), "attention outside of a forward pass");
  const AttentionLayer& layer = attention_layers[place];
  TORCH_CHECK(layer.metadata || !attends, "attention layer ", place, " got nothing to attend to");
  const int64_t count = qkv.size(0);
  const Tensor output = qkv.new_zeros({count, q_heads, size});
  avx2_qk_norm_rope(qkv, q_heads, k_heads, size, eps, q_weight, k_weight, cos_sin, positions);
  if (layer.metadata) {
    const Metadata& of = *layer.metadata;
    const Tensor heads = qkv.view({count, -1, size}), queries = heads.narrow(1, 0, q_heads),
                 keys = heads.narrow(1, q_heads, k_heads), values = heads.narrow(1, q_heads + k_heads, k_heads);
    const int64_t slots = layer.cache.size(2);
    const Tensor both = layer.cache.view({layer.cache.size(0), layer.cache.size(1), 2 * slots, size});
    const Tensor key_cache = both.narrow(2, 0, slots), value_cache = both.narrow(2, slots, slots);
    const c10::IValue none;
    if (of.slots) write({keys, values, key_cache, value_cache, of.slots, of.isa});
    attend({queries.narrow(0, 0, of.tokens), key_cache, value_cache, output.narrow(0, 0, of.tokens), of.starts,
            of.lengths, scale, of.causal, none, int64_t{-1}, of.blocks, 0.0, of.schedule, none, of.dynamic_causal});
  }
  return output.view({count, q_heads * size});
}

// ---- halves of a decoder layer -------------------------------------------------------------------------------------

// A matrix, or those of experts, as `Weights` of avx2.py: data, and scales and zero points where it has them.
using Matrix = at::TensorList;

Maybe at_place(Matrix matrix, size_t place) { return matrix.size() > place ? Maybe(matrix[place]) : Maybe(); }

Tensor multiplied(const Tensor& x, Matrix matrix, int64_t rows) {
  return avx2_linear(x, matrix[0], at_place(matrix, 1), at_place(matrix, 2), rows, {});
}

Tensor of_experts(const Tensor& x, Matrix w13, int64_t rows13, Matrix w2, int64_t rows2, const Tensor& weights,
                  const Tensor& ids) {
  const Tensor result = x.new_empty(x.sizes());
  avx2_experts(result, x, w13[0], at_place(w13, 1), at_place(w13, 2), rows13, w2[0], at_place(w2, 1), at_place(w2, 2),
               rows2, weights, ids);
  return result;
}

// x [T, H] + residual, normed and as it is.
std::pair<Tensor, Tensor> normed(const Tensor& x, const Maybe& residual, const Tensor& weight, double eps) {
  const int64_t size = x.size(1), count = x.size(0), dtype = dtype_of(x);
  TORCH_CHECK(size % 8 == 0 && weight.numel() == size && weight.is_contiguous() && x.is_contiguous() &&
                  (!residual || (residual->is_contiguous() && residual->scalar_type() == x.scalar_type() &&
                                 residual->sizes() == x.sizes())),
              "sizes of a norm do not fit");
  const Tensor norm = x.new_empty(x.sizes()), total = x.new_empty(x.sizes());
  std::vector<float> scales(size);
  read(weight.const_data_ptr(), dtype_of(weight), 0, size, scales.data());
#pragma omp parallel if (count > 4)
  {
    std::vector<float> row(size), added(size);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < count; ++t) {
      read(x.const_data_ptr(), dtype, t * size, size, row.data());
      if (residual) {
        read(residual->const_data_ptr(), dtype, t * size, size, added.data());
        add_scaled(row.data(), 1, added.data(), size);
      }
      write(total.mutable_data_ptr(), dtype, t * size, size, row.data());
      norm_and_rotate(row.data(), size, static_cast<float>(eps), scales.data(), nullptr, nullptr, 0);
      write(norm.mutable_data_ptr(), dtype, t * size, size, row.data());
    }
  }
  return {norm, total};
}

std::tuple<Tensor, Tensor> avx2_attention_half(const Tensor& x, const Maybe& residual, const Tensor& norm, double eps,
                                               Matrix qkv, int64_t rows, int64_t q_heads, int64_t k_heads,
                                               int64_t size, double qk_eps, const Tensor& q_weight,
                                               const Tensor& k_weight, const Tensor& cos_sin, const Tensor& positions,
                                               double scale, int64_t place) {
  const auto [hidden, total] = normed(x, residual, norm, eps);
  const Tensor heads = avx2_attention(multiplied(hidden, qkv, rows), q_heads, k_heads, size, qk_eps, q_weight,
                                      k_weight, cos_sin, positions, scale, place);
  return {heads, total};
}

std::tuple<Tensor, Tensor> avx2_moe_half(const Tensor& heads, const Tensor& residual, Matrix dense, const Tensor& norm,
                                         double eps, const Tensor& gate, const Tensor& bias, int64_t groups,
                                         int64_t open, int64_t picks, bool normalizes, double scale, Matrix w13,
                                         Matrix w2, Matrix shared13, Matrix shared2,
                                         at::IntArrayRef rows /* of the five matrices, in this order */) {
  const auto [hidden, total] = normed(multiplied(heads, dense, rows[0]), residual, norm, eps);
  const Tensor logits = avx2_plain_linear(hidden.to(at::kFloat), gate, {});
  const auto [weights, ids] = avx2_route(logits, bias, groups, open, picks, normalizes, scale);
  const Tensor result = of_experts(hidden, w13, rows[1], w2, rows[2], weights, ids);
  if (!shared13.empty()) {  // one expert, which all tokens pick
    const int64_t count = hidden.size(0);
    result.add_(of_experts(hidden, shared13, rows[3], shared2, rows[4], weights.new_ones({count, 1}),
                           ids.new_zeros({count, 1})));
  }
  return {result, total};
}

}  // namespace

TORCH_LIBRARY_IMPL(vllm_bailing, CPU, m) {
  m.impl("avx2_linear", &avx2_linear);
  m.impl("avx2_plain_linear", &avx2_plain_linear);
  m.impl("avx2_experts", &avx2_experts);
  m.impl("avx2_route", &avx2_route);
  m.impl("avx2_qk_norm_rope", &avx2_qk_norm_rope);
  m.impl("avx2_attention", &avx2_attention);
  m.impl("avx2_attention_half", &avx2_attention_half);
  m.impl("avx2_moe_half", &avx2_moe_half);
}

TORCH_LIBRARY_IMPL(vllm_bailing, CompositeExplicitAutograd, m) {
  m.impl("avx2_begin_attention", &avx2_begin_attention);
  m.impl("avx2_hand_over", &avx2_hand_over);
}
