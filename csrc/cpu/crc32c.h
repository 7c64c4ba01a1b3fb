// CRC-32C (Castagnoli, reflected polynomial 0x82F63B78, initial and final value 0xFFFFFFFF; RFC 3720, B.4).
// The paths with SSE 4.2 and with VPCLMULQDQ are chosen at run time and give the same bits as the tables.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/isa.h"

#ifdef GAUGEKIT_X86
#include <immintrin.h>
#define GAUGEKIT_CRC32C_SSE42 1
#endif

namespace gaugekit::rans {

using CrcTables = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][b]: the register after byte b and k zero bytes, from a register of zero.
constexpr CrcTables make_crc_tables() {
  CrcTables t{};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t c = b;
    for (int bit = 0; bit < 8; ++bit) c = (c >> 1) ^ ((c & 1) ? 0x82F63B78u : 0u);
    t[0][b] = c;
  }
  for (int k = 1; k < 8; ++k)
    for (uint32_t b = 0; b < 256; ++b) t[k][b] = (t[k - 1][b] >> 8) ^ t[0][t[k - 1][b] & 255];
  return t;
}

inline constexpr CrcTables kCrcTables = make_crc_tables();

inline uint32_t crc32c_tables(const uint8_t* p, size_t n, uint32_t c) {
  const CrcTables& t = kCrcTables;
  for (; n >= 8; p += 8, n -= 8) {
    const uint32_t low = c ^ (p[0] | p[1] << 8 | p[2] << 16 | uint32_t(p[3]) << 24);
    c = t[7][low & 255] ^ t[6][low >> 8 & 255] ^ t[5][low >> 16 & 255] ^ t[4][low >> 24] ^ t[3][p[4]] ^
        t[2][p[5]] ^ t[1][p[6]] ^ t[0][p[7]];
  }
  for (; n; ++p, --n) c = (c >> 8) ^ t[0][(c ^ *p) & 255];
  return c;
}

// What kLane zero bytes do to a register, as four tables by byte: the register is linear over GF(2).
class CrcShift {
 public:
  static constexpr size_t kLane = 1024;
  CrcShift() {
    static constexpr uint8_t zeros[kLane] = {};
    for (int k = 0; k < 4; ++k) {
      uint32_t column[8];
      for (int bit = 0; bit < 8; ++bit) column[bit] = crc32c_tables(zeros, kLane, 1u << (8 * k + bit));
      for (int b = 0; b < 256; ++b) {
        table_[k][b] = 0;
        for (int bit = 0; bit < 8; ++bit)
          if (b >> bit & 1) table_[k][b] ^= column[bit];
      }
    }
  }
  uint32_t operator()(uint32_t c) const {
    return table_[0][c & 255] ^ table_[1][c >> 8 & 255] ^ table_[2][c >> 16 & 255] ^ table_[3][c >> 24];
  }

 private:
  uint32_t table_[4][256];
};

inline const CrcShift& crc_shift() {
  static const CrcShift shift;
  return shift;
}

// The checksum of kBytes bytes a little at a time, in four lanes, for kernels that have cycles left beside
// it.
struct CrcLanes {
  static constexpr size_t kLanes = 4, kBytes = kLanes * CrcShift::kLane, kStep = 32;
  uint64_t lane[kLanes];

  void begin(uint32_t crc) {
    for (uint64_t& c : lane) c = 0;
    lane[0] = ~crc;
  }
  uint32_t end() const {
    uint32_t c = uint32_t(lane[0]);
    for (size_t i = 1; i < kLanes; ++i) c = crc_shift()(c) ^ uint32_t(lane[i]);
    return ~c;
  }
};

#ifdef GAUGEKIT_CRC32C_SSE42

// The instruction takes 3 cycles and starts every cycle, so three lanes of kLane bytes run side by side.
__attribute__((target("sse4.2"))) inline uint32_t crc32c_sse42(const uint8_t* p, size_t n, uint32_t c) {
  const CrcShift& shift = crc_shift();
  constexpr size_t lane = CrcShift::kLane;
  for (; n >= 3 * lane; p += 3 * lane, n -= 3 * lane) {
    uint64_t a = c, b = 0, d = 0;
    for (size_t i = 0; i < lane; i += 8) {
      uint64_t x, y, z;
      std::memcpy(&x, p + i, 8);
      std::memcpy(&y, p + lane + i, 8);
      std::memcpy(&z, p + 2 * lane + i, 8);
      a = _mm_crc32_u64(a, x);
      b = _mm_crc32_u64(b, y);
      d = _mm_crc32_u64(d, z);
    }
    c = shift(shift(uint32_t(a)) ^ uint32_t(b)) ^ uint32_t(d);
  }
  uint64_t wide = c;
  for (; n >= 8; p += 8, n -= 8) {
    uint64_t x;
    std::memcpy(&x, p, 8);
    wide = _mm_crc32_u64(wide, x);
  }
  c = uint32_t(wide);
  for (; n; ++p, --n) c = _mm_crc32_u8(c, *p);
  return c;
}

// x^n modulo the polynomial as a factor of a carry-less product: bit 63 - k stands for x^k.
constexpr uint64_t crc_power(int n) {
  uint32_t c = 0x80000000u;
  for (; n; --n) c = (c >> 1) ^ ((c & 1) ? 0x82F63B78u : 0u);
  return uint64_t(c) << 32;
}

// The two factors that move 128 bits over `bits` bits: of the first 64 of them, and of the others. The
// product of two reflected numbers is short of a factor x.
template <int bits>
struct CrcFold {
  static constexpr uint64_t first = crc_power(bits + 63), other = crc_power(bits - 1);
};

#define GAUGEKIT_CLMUL __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,vpclmulqdq,pclmul,sse4.2")))

// `behind` plus `x` moved over so many bits, in each 128 bits.
template <int bits>
GAUGEKIT_CLMUL GAUGEKIT_INLINE __m512i crc_fold(__m512i x, __m512i behind) {
  using F = CrcFold<bits>;
  const __m512i factors =
      _mm512_set_epi64(F::other, F::first, F::other, F::first, F::other, F::first, F::other, F::first);
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(x, factors, 0x00),
                                   _mm512_clmulepi64_epi128(x, factors, 0x11), behind, 0x96);
}

// Four registers side by side, n >= kCrcWide; what is left over is for crc32c_sse42.
constexpr size_t kCrcWide = 256;

GAUGEKIT_CLMUL inline uint32_t crc32c_clmul(const uint8_t* p, size_t n, uint32_t c) {
  __m512i x[4];
  for (int i = 0; i < 4; ++i) x[i] = _mm512_loadu_si512(p + 64 * i);
  x[0] = _mm512_xor_si512(x[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128(int(c))));
  for (p += kCrcWide, n -= kCrcWide; n >= kCrcWide; p += kCrcWide, n -= kCrcWide)
    for (int i = 0; i < 4; ++i) x[i] = crc_fold<8 * kCrcWide>(x[i], _mm512_loadu_si512(p + 64 * i));
  for (int i = 1; i < 4; ++i) x[0] = crc_fold<512>(x[0], x[i]);
  alignas(64) uint64_t part[8];
  _mm512_store_si512(part, x[0]);
  __m512i last = _mm512_zextsi128_si512(_mm_load_si128(reinterpret_cast<const __m128i*>(part)));
  for (int i = 2; i < 8; i += 2)
    last = crc_fold<128>(last,
                         _mm512_zextsi128_si512(_mm_load_si128(reinterpret_cast<const __m128i*>(part + i))));
  _mm512_store_si512(part, last);
  return crc32c_sse42(p, n, uint32_t(_mm_crc32_u64(_mm_crc32_u64(0, part[0]), part[1])));
}

#endif

// The checksum of data[0, n); `crc` continues the checksum of what came before it.
inline uint32_t crc32c(const uint8_t* data, size_t n, uint32_t crc = 0) {
#ifdef GAUGEKIT_CRC32C_SSE42
  if (n >= kCrcWide && isa() >= Isa::vbmi2) return ~crc32c_clmul(data, n, ~crc);
  static const bool fast = __builtin_cpu_supports("sse4.2");
  if (fast) return ~crc32c_sse42(data, n, ~crc);
#endif
  return ~crc32c_tables(data, n, ~crc);
}

}  // namespace gaugekit::rans
