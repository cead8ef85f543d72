// Work that runs side by side: kernels on one stream, copies from and to host memory on two others.
//
// Tasks are given in program order, each with the memory it touches. Tasks of one stream run in
// that order; across streams a task waits for the last earlier one of each other stream that
// touches the same bytes, unless both only read. So every result is that of running them one after
// the other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace nibble {

enum class Stream : std::uint8_t { compute, copy_in, copy_out };
inline constexpr std::size_t kStreams = 3;

struct Access {
  const std::byte* begin;
  std::int64_t bytes;
  bool writes;
};

struct StreamTask {
  Stream stream = Stream::compute;
  std::vector<Access> accesses;
};

// By task: the earlier tasks of other streams that it waits for, at most one of each stream. A wait
// that an earlier task of the same stream has already done is left out.
std::vector<std::vector<std::size_t>> stream_waits(std::span<const StreamTask> tasks);

}  // namespace nibble
