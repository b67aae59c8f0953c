// Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
#pragma once

#include <cstdint>

namespace neumuter {

// Replaces N counters, word w of counter i at words[w][i], by their 128 random bits.
template <int N>
inline void philox_4x32(uint32_t (&words)[4][N], uint64_t key) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    for (int i = 0; i < N; ++i) {
      const uint64_t a = static_cast<uint64_t>(words[0][i]) * 0xD2511F53u;
      const uint64_t b = static_cast<uint64_t>(words[2][i]) * 0xCD9E8D57u;
      words[0][i] = static_cast<uint32_t>(b >> 32) ^ words[1][i] ^ k0;
      words[2][i] = static_cast<uint32_t>(a >> 32) ^ words[3][i] ^ k1;
      words[1][i] = static_cast<uint32_t>(b);
      words[3][i] = static_cast<uint32_t>(a);
    }
  }
}

}  // namespace neumuter
