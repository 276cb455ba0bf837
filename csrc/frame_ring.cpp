#include "frame_ring.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <new>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the ring's layout is little-endian"
#endif

namespace turboserve {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

constexpr std::array<std::uint32_t, 256> make_crc_table() {
  std::array<std::uint32_t, 256> table{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1U) ? 0xEDB88320U : 0U);
    table[byte] = value;
  }
  return table;
}
constexpr auto kCrcTable = make_crc_table();

[[noreturn]] void fail_errno(const char* what) {
  throw RingError("PoolExhausted", std::string(what) + ": " + std::strerror(errno));
}

[[noreturn]] void fail_corrupt(const std::string& what) { throw RingError("CorruptState", "frame ring: " + what); }

void check_capacity(std::uint64_t capacity) {
  if (capacity < kControlBytes || capacity > kCapacityMax || capacity % kRecordAlign != 0) {
    throw RingError("ConfigError", "frame ring capacity " + std::to_string(capacity) +
                                       " B; expected a multiple of 64 from 4096 B to 1 TiB");
  }
}

}  // namespace

std::uint32_t crc32(const void* data, std::size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(data);
  std::uint32_t crc = 0xFFFFFFFFU;
  for (std::size_t i = 0; i < bytes; ++i) crc = (crc >> 8) ^ kCrcTable[(crc ^ at[i]) & 0xFFU];
  return crc ^ 0xFFFFFFFFU;
}

std::uint64_t record_bytes(std::uint64_t payload_bytes) {
  return (sizeof(RecordHeader) + payload_bytes + kRecordAlign - 1) / kRecordAlign * kRecordAlign;
}

int create_ring(std::uint64_t capacity) {
  check_capacity(capacity);
  const int fd = memfd_create("turboserve-frame-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) fail_errno("frame ring: memfd_create");
  try {
    const auto bytes = static_cast<off_t>(kControlBytes + capacity);
    if (ftruncate(fd, bytes) != 0) fail_errno("frame ring: setting the size");
    if (const int error = posix_fallocate(fd, 0, bytes); error != 0) {
      errno = error;
      fail_errno("frame ring: reserving memory");
    }
    alignas(RingControl) unsigned char page[sizeof(RingControl)] = {};
    auto* control = new (page) RingControl{};
    control->magic = kRingMagic;
    control->version = kLayoutVersion;
    control->control_bytes = static_cast<std::uint32_t>(kControlBytes);
    control->capacity = capacity;
    control->header_bytes = sizeof(RecordHeader);
    control->geometry_crc = crc32(page, offsetof(RingControl, geometry_crc));
    if (pwrite(fd, page, sizeof page, 0) != static_cast<ssize_t>(sizeof page)) fail_errno("frame ring: writing");
    if (fcntl(fd, F_ADD_SEALS, kSeals) != 0) fail_errno("frame ring: sealing the size");
  } catch (...) {
    close(fd);
    throw;
  }
  return fd;
}

Mapping::Mapping(int fd) {
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    throw RingError("ConfigError", "descriptor " + std::to_string(fd) + " is no frame ring; expected a sealed memfd");
  }
  struct stat info {};
  if (fstat(fd, &info) != 0) fail_errno("frame ring: fstat");
  unsigned char page[offsetof(RingControl, geometry_crc) + sizeof(std::uint32_t)] = {};
  if (pread(fd, page, sizeof page, 0) != static_cast<ssize_t>(sizeof page)) fail_corrupt("no control page");
  std::uint64_t magic = 0;
  std::uint32_t version = 0, control_bytes = 0, header_bytes = 0, geometry_crc = 0;
  std::memcpy(&magic, page + offsetof(RingControl, magic), sizeof magic);
  std::memcpy(&version, page + offsetof(RingControl, version), sizeof version);
  std::memcpy(&control_bytes, page + offsetof(RingControl, control_bytes), sizeof control_bytes);
  std::memcpy(&capacity_, page + offsetof(RingControl, capacity), sizeof capacity_);
  std::memcpy(&header_bytes, page + offsetof(RingControl, header_bytes), sizeof header_bytes);
  std::memcpy(&geometry_crc, page + offsetof(RingControl, geometry_crc), sizeof geometry_crc);
  if (magic != kRingMagic || geometry_crc != crc32(page, offsetof(RingControl, geometry_crc))) {
    fail_corrupt("the control page does not verify");
  }
  if (version != kLayoutVersion || control_bytes != kControlBytes || header_bytes != sizeof(RecordHeader)) {
    throw RingError("LayoutMismatch", "frame ring layout " + std::to_string(version) + "; expected " +
                                          std::to_string(kLayoutVersion) + "; restart all processes of one version");
  }
  check_capacity(capacity_);
  if (static_cast<std::uint64_t>(info.st_size) != kControlBytes + capacity_) {
    fail_corrupt("the memory is " + std::to_string(info.st_size) + " B, not control page + capacity");
  }
  base_ = mmap(nullptr, kControlBytes + capacity_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
  if (base_ == MAP_FAILED) fail_errno("frame ring: mmap");
}

Mapping::~Mapping() { munmap(base_, kControlBytes + capacity_); }

void Mapping::copy_in(std::uint64_t position, const void* source, std::uint64_t bytes) const {
  if (bytes == 0) return;  // memcpy takes no null pointer, not even for nothing
  const std::uint64_t at = position % capacity_;
  const std::uint64_t first = std::min(bytes, capacity_ - at);
  std::memcpy(data() + at, source, first);
  if (bytes > first) std::memcpy(data(), static_cast<const unsigned char*>(source) + first, bytes - first);
}

void Mapping::copy_out(std::uint64_t position, void* target, std::uint64_t bytes) const {
  if (bytes == 0) return;
  const std::uint64_t at = position % capacity_;
  const std::uint64_t first = std::min(bytes, capacity_ - at);
  std::memcpy(target, data() + at, first);
  if (bytes > first) std::memcpy(static_cast<unsigned char*>(target) + first, data(), bytes - first);
}

std::uint64_t Mapping::used(std::uint64_t head, std::uint64_t tail) const {
  const std::uint64_t bytes = head - tail;  // wraps to a huge number when tail is past head
  if (bytes > capacity_ || head % kRecordAlign != 0 || tail % kRecordAlign != 0) {
    fail_corrupt("head " + std::to_string(head) + " and tail " + std::to_string(tail) +
                 " do not fit a capacity of " + std::to_string(capacity_) + " B");
  }
  return bytes;
}

std::uint64_t Mapping::used_now() const {
  const std::uint64_t tail = control().tail.load(std::memory_order_acquire);  // first, so that head is not behind it
  return std::min(control().head.load(std::memory_order_acquire) - tail, capacity_);
}

RingProducer::RingProducer(std::shared_ptr<Mapping> mapping, std::uint64_t worker_epoch)
    : mapping_(std::move(mapping)), worker_epoch_(worker_epoch) {
  RingControl& control = mapping_->control();
  std::uint64_t current = control.producer_epoch.load(std::memory_order_acquire);
  do {
    if (worker_epoch <= current) {
      throw RingError("Conflict", "frame ring belongs to worker epoch " + std::to_string(current) +
                                      "; expected a higher one than " + std::to_string(worker_epoch));
    }
  } while (!control.producer_epoch.compare_exchange_weak(current, worker_epoch, std::memory_order_acq_rel));
  head_ = control.head.load(std::memory_order_acquire);
  mapping_->used(head_, control.tail.load(std::memory_order_acquire));
}

void RingProducer::check_not_fenced() const {
  const RingControl& control = mapping_->control();
  const std::uint64_t current = control.producer_epoch.load(std::memory_order_acquire);
  if (current != worker_epoch_ || control.head.load(std::memory_order_relaxed) != head_) {
    throw RingError("Conflict", "frame ring was taken over by worker epoch " + std::to_string(current) +
                                    "; epoch " + std::to_string(worker_epoch_) + " must stop");
  }
}

bool RingProducer::push(const void* header, const void* payload, std::uint64_t payload_bytes) {
  check_not_fenced();
  const std::uint64_t capacity = mapping_->capacity();
  if (payload_bytes > capacity || record_bytes(payload_bytes) > capacity) {
    throw RingError("ConfigError", "a record of " + std::to_string(payload_bytes) + " payload B never fits a ring of " +
                                       std::to_string(capacity) + " B; make the ring larger");
  }
  RingControl& control = mapping_->control();
  const std::uint64_t bytes = record_bytes(payload_bytes);
  const std::uint64_t used_bytes = mapping_->used(head_, control.tail.load(std::memory_order_acquire));
  if (bytes > capacity - used_bytes) return false;

  RecordHeader filled;
  std::memcpy(&filled, header, sizeof filled);
  filled.payload_bytes = payload_bytes;
  filled.position = head_;
  filled.header_crc = crc32(&filled, offsetof(RecordHeader, header_crc));
  mapping_->copy_in(head_, &filled, sizeof filled);
  mapping_->copy_in(head_ + sizeof filled, payload, payload_bytes);
  // A worker that was stopped during the copy may have been replaced meanwhile. The check narrows that window; what
  // closes it is the launcher, which hands a ring on only when it has reaped the old process.
  check_not_fenced();
  head_ += bytes;
  control.head.store(head_, std::memory_order_release);
  return true;
}

RingConsumer::RingConsumer(std::shared_ptr<Mapping> mapping) : mapping_(std::move(mapping)) {
  tail_ = mapping_->control().tail.load(std::memory_order_acquire);
  available();
}

std::uint64_t RingConsumer::available() const {
  return mapping_->used(mapping_->control().head.load(std::memory_order_acquire), tail_);
}

std::optional<RecordHeader> RingConsumer::peek() const {
  const std::uint64_t committed = available();
  if (committed == 0) return std::nullopt;
  RecordHeader header;
  if (committed < sizeof header) fail_corrupt("less than a header is left before the head");
  mapping_->copy_out(tail_, &header, sizeof header);
  if (header.magic != kRecordMagic || header.header_crc != crc32(&header, offsetof(RecordHeader, header_crc))) {
    fail_corrupt("the record header at " + std::to_string(tail_) + " does not verify");
  }
  if (header.version != kLayoutVersion) fail_corrupt("record version " + std::to_string(header.version));
  if (header.position != tail_) fail_corrupt("the record at " + std::to_string(tail_) + " is of another lap");
  if (header.payload_bytes > committed || record_bytes(header.payload_bytes) > committed) {
    fail_corrupt("a record of " + std::to_string(header.payload_bytes) + " B reaches past the head");
  }
  return header;
}

void RingConsumer::take(const RecordHeader& header, void* payload) {
  mapping_->copy_out(tail_ + sizeof header, payload, header.payload_bytes);
  tail_ += record_bytes(header.payload_bytes);
  mapping_->control().tail.store(tail_, std::memory_order_release);
}

std::uint64_t RingConsumer::discard() {
  const std::uint64_t head = mapping_->control().head.load(std::memory_order_acquire);
  const std::uint64_t bytes = mapping_->used(head, tail_);
  tail_ = head;
  mapping_->control().tail.store(tail_, std::memory_order_release);
  return bytes;
}

}  // namespace turboserve
