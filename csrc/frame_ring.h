// A bounded ring of video chunks in shared memory, from one worker process to the gateway.
//
// One producer, one consumer, records of any length. Positions are byte counts that only grow; a position's place
// in the data area is `position % capacity`, so a record may wrap and no byte is lost to padding. The producer
// writes header and payload first and moves `head` last (release): one that is killed at any byte has shown
// nothing. The consumer copies a header out before it believes it, so a peer cannot change a length after the check.
//
// turboserve/runtime/frame_ring_twin.py reads and writes the same layout; change both or neither.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

namespace turboserve {

constexpr std::uint32_t kLayoutVersion = 1;
constexpr std::uint64_t kRingMagic = 0x31474e4952465354ULL;  // "TSFRING1" in memory order
constexpr std::uint32_t kRecordMagic = 0x52465354U;          // "TSFR"
constexpr std::uint64_t kControlBytes = 4096;
constexpr std::uint64_t kRecordAlign = 64;
constexpr std::uint64_t kCapacityMax = 1ULL << 40;

// The first page of the memory. `geometry_crc` covers the bytes before it; they are written once, by create_ring.
// Each counter has a cache line of its own, because each is written by another process.
struct RingControl {
  std::uint64_t magic;
  std::uint32_t version;
  std::uint32_t control_bytes;
  std::uint64_t capacity;
  std::uint32_t header_bytes;
  std::uint32_t geometry_crc;
  alignas(64) std::atomic<std::uint64_t> head;            // written by the producer
  alignas(64) std::atomic<std::uint64_t> tail;            // written by the consumer
  alignas(64) std::atomic<std::uint64_t> producer_epoch;  // a producer with a lower one is a zombie
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free, "processes share these counters");
static_assert(offsetof(RingControl, geometry_crc) == 28 && offsetof(RingControl, head) == 64 &&
              offsetof(RingControl, tail) == 128 && offsetof(RingControl, producer_epoch) == 192);

// In front of every payload. The ring itself reads magic, version, payload_bytes, position and header_crc only.
struct RecordHeader {
  std::uint32_t magic;
  std::uint16_t version;
  std::uint16_t kind;
  std::uint64_t payload_bytes;
  std::uint64_t worker_epoch;
  std::uint64_t session_epoch;
  std::uint64_t chunk_index;
  std::uint32_t frames, height, width, steps;
  std::uint64_t prompt_version;
  char session_id[26];
  std::uint16_t reserved_a;
  std::uint32_t flags;
  std::uint8_t digest[32];       // the stream's digest chain after this chunk
  std::uint8_t digest_prev[32];  // and before it
  std::uint64_t position;        // where in the ring's life it stands: an old lap's record is not mistaken for it
  std::uint8_t reserved_b[20];
  std::uint32_t header_crc;  // CRC-32 (zlib's) of the bytes before it
};
static_assert(sizeof(RecordHeader) == 192 && offsetof(RecordHeader, session_id) == 64 &&
              offsetof(RecordHeader, flags) == 92 && offsetof(RecordHeader, digest) == 96 &&
              offsetof(RecordHeader, position) == 160 && offsetof(RecordHeader, header_crc) == 188);

// What went wrong, by the name of the exception in turboserve/errors.py that Python gets.
struct RingError : std::runtime_error {
  RingError(const char* type, const std::string& message) : std::runtime_error(message), python_type(type) {}
  const char* python_type;
};

std::uint32_t crc32(const void* data, std::size_t bytes);
std::uint64_t record_bytes(std::uint64_t payload_bytes);

// A new ring: a sealed memfd (its size can never change under a reader) whose memory is reserved here, so that
// shortage is an error of the launcher and not a bus error in a worker. Returns the descriptor; the caller owns it.
int create_ring(std::uint64_t capacity);

// The mapped memory of one ring. It needs the descriptor only while it is made.
class Mapping {
 public:
  explicit Mapping(int fd);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  RingControl& control() const { return *static_cast<RingControl*>(base_); }
  std::uint64_t capacity() const { return capacity_; }
  void copy_in(std::uint64_t position, const void* source, std::uint64_t bytes) const;
  void copy_out(std::uint64_t position, void* target, std::uint64_t bytes) const;
  // Bytes between tail and head; throws when the two cannot both be true.
  std::uint64_t used(std::uint64_t head, std::uint64_t tail) const;
  // The same for an onlooker of a ring in motion, whose two readings are of two moments: bounded, never an error.
  std::uint64_t used_now() const;

 private:
  unsigned char* data() const { return static_cast<unsigned char*>(base_) + kControlBytes; }
  void* base_ = nullptr;
  std::uint64_t capacity_ = 0;
};

class RingProducer {
 public:
  // Takes the ring over from producers with lower epochs and goes on behind the last record that was committed.
  RingProducer(std::shared_ptr<Mapping> mapping, std::uint64_t worker_epoch);
  // False when the ring has no room now. `header` is 192 bytes; position and checksum are filled in here.
  bool push(const void* header, const void* payload, std::uint64_t payload_bytes);
  std::uint64_t used_now() const { return mapping_->used_now(); }
  std::uint64_t capacity() const { return mapping_->capacity(); }
  std::uint64_t worker_epoch() const { return worker_epoch_; }

 private:
  void check_not_fenced() const;
  std::shared_ptr<Mapping> mapping_;
  std::uint64_t worker_epoch_;
  std::uint64_t head_;
};

class RingConsumer {
 public:
  explicit RingConsumer(std::shared_ptr<Mapping> mapping);
  // The next record's checked header, without taking it; nothing when the ring is empty.
  std::optional<RecordHeader> peek() const;
  // Copies the payload of the record that `peek` returned, then frees its bytes.
  void take(const RecordHeader& header, void* payload);
  // Forgets everything unread and returns its bytes: the way on after a corrupt record, whose length means nothing.
  std::uint64_t discard();
  std::uint64_t used_now() const { return mapping_->used_now(); }
  std::uint64_t capacity() const { return mapping_->capacity(); }

 private:
  std::uint64_t available() const;  // committed and not taken
  std::shared_ptr<Mapping> mapping_;
  std::uint64_t tail_;
};

}  // namespace turboserve
