// The passes of select_muted over scores. Compiled without contraction, as the gates are.
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "../exact_math.h"
#include "kernels.h"

namespace neumuter::cpu {
namespace NEUMUTER_CAPABILITY {

int32_t collect_below(const float* scores, int32_t n, float cut, bool inclusive, int32_t* positions) {
  int32_t count = 0, i = 0;
#if defined(__AVX512F__)
  __m512i position = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 limit = _mm512_set1_ps(cut);
  for (; i + 16 <= n; i += 16, position = _mm512_add_epi32(position, _mm512_set1_epi32(16))) {
    const __m512 score = _mm512_loadu_ps(scores + i);
    const __mmask16 chosen = inclusive ? _mm512_cmp_ps_mask(score, limit, _CMP_LE_OQ)
                                       : _mm512_cmp_ps_mask(score, limit, _CMP_LT_OQ);
    if (chosen == 0) continue;  // the common case: few neurons are muted
    // A whole register is stored, which fits since count <= i; the next store overwrites the rest.
    _mm512_storeu_si512(positions + count, _mm512_maskz_compress_epi32(chosen, position));
    count += __builtin_popcount(chosen);
  }
#endif
  for (; i < n; ++i) {
    positions[count] = i;  // without a branch: count grows or the slot is written again
    count += inclusive ? scores[i] <= cut : scores[i] < cut;
  }
  return count;
}

void evaluation_gates(float* scores, int64_t n, float gamma, float zeta) {
  for (int64_t i = 0; i < n; ++i) scores[i] = evaluation_gate(scores[i], gamma, zeta);
}

}  // namespace NEUMUTER_CAPABILITY
}  // namespace neumuter::cpu
