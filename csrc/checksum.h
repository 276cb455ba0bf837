// A fast 64-bit checksum against torn, stale and flipped bytes; not against an attacker.
// turboserve/runtime/checksum.py says how it is defined and computes the same.
#pragma once

#include <cstddef>
#include <cstdint>

namespace turboserve {

constexpr std::size_t kChecksumBlockWords = 1024;
constexpr std::size_t kChecksumBlockBytes = 8 * kChecksumBlockWords;

// The checksum of bytes that come in pieces.
class Checksum64 {
 public:
  void update(const void* data, std::uint64_t bytes);
  std::uint64_t value() const;

 private:
  std::uint64_t state_ = 0x9E3779B97F4A7C15ULL;
  std::uint64_t bytes_ = 0;
  std::size_t left_bytes_ = 0;
  unsigned char left_[kChecksumBlockBytes] = {};
};

}  // namespace turboserve
