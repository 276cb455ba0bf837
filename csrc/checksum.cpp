#include "checksum.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace turboserve {
namespace {

constexpr std::uint64_t kMultiplier = 0x9E3779B97F4A7C15ULL;

constexpr std::array<std::uint64_t, kChecksumBlockWords> make_keys() {
  std::array<std::uint64_t, kChecksumBlockWords> keys{};
  std::uint64_t state = 0;
  for (auto& key : keys) {
    state += kMultiplier;
    std::uint64_t mixed = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9ULL;
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EBULL;
    key = (mixed ^ (mixed >> 31)) | 1U;
  }
  return keys;
}
constexpr auto kKeys = make_keys();

std::uint64_t word_at(const unsigned char* at) {
  std::uint64_t word;
  std::memcpy(&word, at, sizeof word);
  return word ^ (word >> 32);
}

// Four sums side by side: a multiplication takes three cycles and one can begin in each.
std::uint64_t block_sum(const unsigned char* at, std::size_t words) {
  std::uint64_t sums[4] = {};
  std::size_t j = 0;
  for (; j + 4 <= words; j += 4, at += 32) {
    sums[0] += word_at(at) * kKeys[j];
    sums[1] += word_at(at + 8) * kKeys[j + 1];
    sums[2] += word_at(at + 16) * kKeys[j + 2];
    sums[3] += word_at(at + 24) * kKeys[j + 3];
  }
  for (; j < words; ++j, at += 8) sums[0] += word_at(at) * kKeys[j];
  return sums[0] + sums[1] + sums[2] + sums[3];
}

std::uint64_t fold(std::uint64_t state, std::uint64_t value) {
  state = (state ^ value) * kMultiplier;
  return state ^ (state >> 29);
}

}  // namespace

void Checksum64::update(const void* data, std::uint64_t bytes) {
  if (bytes == 0) return;
  const auto* at = static_cast<const unsigned char*>(data);
  bytes_ += bytes;
  if (left_bytes_ > 0) {
    const std::size_t taken = std::min<std::uint64_t>(kChecksumBlockBytes - left_bytes_, bytes);
    std::memcpy(left_ + left_bytes_, at, taken);
    left_bytes_ += taken;
    at += taken;
    bytes -= taken;
    if (left_bytes_ < kChecksumBlockBytes) return;
    state_ = fold(state_, block_sum(left_, kChecksumBlockWords));
    left_bytes_ = 0;
  }
  for (; bytes >= kChecksumBlockBytes; at += kChecksumBlockBytes, bytes -= kChecksumBlockBytes) {
    state_ = fold(state_, block_sum(at, kChecksumBlockWords));
  }
  std::memcpy(left_, at, bytes);
  left_bytes_ = bytes;
}

std::uint64_t Checksum64::value() const {
  std::uint64_t state = state_;
  if (left_bytes_ > 0) {
    unsigned char padded[kChecksumBlockBytes] = {};
    std::memcpy(padded, left_, left_bytes_);
    state = fold(state, block_sum(padded, (left_bytes_ + 7) / 8));
  }
  return fold(state, bytes_);
}

}  // namespace turboserve
