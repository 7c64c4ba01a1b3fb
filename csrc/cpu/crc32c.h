// CRC-32C (Castagnoli, reflected polynomial 0x82F63B78, initial and final value 0xFFFFFFFF; RFC 3720, B.4).
// The SSE 4.2 path is chosen at run time and gives the same bits as the tables.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <nmmintrin.h>
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

#endif

// The checksum of data[0, n); `crc` continues the checksum of what came before it.
inline uint32_t crc32c(const uint8_t* data, size_t n, uint32_t crc = 0) {
#ifdef GAUGEKIT_CRC32C_SSE42
  static const bool fast = __builtin_cpu_supports("sse4.2");
  if (fast) return ~crc32c_sse42(data, n, ~crc);
#endif
  return ~crc32c_tables(data, n, ~crc);
}

}  // namespace gaugekit::rans
