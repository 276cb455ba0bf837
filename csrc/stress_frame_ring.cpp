// A stress run of the ring for the sanitizers: one thread pushes, one pops, both check every byte.
//
// Both ends share one mapping, because ThreadSanitizer knows memory by its address and would see two mappings of
// one ring as unrelated. `make sanitize` builds and runs this; the process tests cover separate mappings.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "frame_ring.h"

namespace {

using namespace turboserve;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "stress_frame_ring: %s\n", what);
  std::exit(1);
}

std::vector<unsigned char> payload_of(std::uint64_t index) {
  std::mt19937_64 random(index);
  std::vector<unsigned char> bytes(random() % 9000);
  for (auto& byte : bytes) byte = static_cast<unsigned char>(random());
  return bytes;
}

RecordHeader header_of(std::uint64_t index) {
  RecordHeader header{};
  header.magic = kRecordMagic;
  header.version = static_cast<std::uint16_t>(kLayoutVersion);
  header.chunk_index = index;
  return header;
}

void produce(const std::shared_ptr<Mapping>& mapping, std::uint64_t records) {
  // Every thousand records a successor takes over, as after the death of a worker.
  auto producer = std::make_unique<RingProducer>(mapping, 1);
  for (std::uint64_t index = 0; index < records; ++index) {
    const auto payload = payload_of(index);
    const RecordHeader header = header_of(index);
    while (!producer->push(&header, payload.data(), payload.size())) std::this_thread::yield();
    if (index % 1000 == 999) producer = std::make_unique<RingProducer>(mapping, index);
  }
}

void consume(const std::shared_ptr<Mapping>& mapping, std::uint64_t records) {
  auto consumer = std::make_unique<RingConsumer>(mapping);
  std::vector<unsigned char> taken;
  for (std::uint64_t index = 0; index < records; ++index) {
    auto header = consumer->peek();
    for (; !header; header = consumer->peek()) std::this_thread::yield();
    const auto expected = payload_of(index);
    require(header->chunk_index == index, "a record out of order");
    require(header->payload_bytes == expected.size(), "a wrong length");
    taken.assign(expected.size(), 0);
    consumer->take(*header, taken.data());
    require(taken == expected, "wrong bytes");
    if (index % 700 == 699) consumer = std::make_unique<RingConsumer>(mapping);
  }
  require(consumer->used_now() == 0, "bytes left over");
}

// Random bytes over the whole memory, counters included: every answer is a typed error or a record that verifies.
void consume_garbage(std::uint64_t rounds) {
  std::mt19937_64 random(11);
  for (std::uint64_t round = 0; round < rounds; ++round) {
    const int fd = create_ring(8192);
    {
      auto mapping = std::make_shared<Mapping>(fd);
      RingProducer producer(mapping, 1);
      const auto payload = payload_of(round);
      const RecordHeader header = header_of(round);
      if (record_bytes(payload.size()) <= 8192) producer.push(&header, payload.data(), payload.size());
      for (int i = 0; i < 4; ++i) {
        // The control page's counters and the first record's header are hit most often.
        const auto at = static_cast<off_t>(random() % 3 ? (random() % 2 ? 64 + random() % 136 : 4096 + random() % 192)
                                                        : 64 + random() % (4096 + 8192 - 64));
        const auto byte = static_cast<unsigned char>(random());
        require(pwrite(fd, &byte, 1, at) == 1, "pwrite");
      }
      try {
        RingConsumer consumer(mapping);
        if (const auto found = consumer.peek()) {
          std::vector<unsigned char> taken(found->payload_bytes);
          consumer.take(*found, taken.data());
        }
        consumer.discard();
        producer.push(&header, payload.data(), payload.size());
      } catch (const RingError&) {
      }
    }
    close(fd);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::uint64_t records = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 20000;
  const int fd = create_ring(64 * 1024);
  auto mapping = std::make_shared<Mapping>(fd);
  close(fd);  // a mapping needs its descriptor only while it is made
  std::thread producer(produce, mapping, records);
  consume(mapping, records);
  producer.join();
  consume_garbage(records / 10);
  std::printf("stress_frame_ring: %llu records, %llu garbled rings: fine\n",
              static_cast<unsigned long long>(records), static_cast<unsigned long long>(records / 10));
  return 0;
}
