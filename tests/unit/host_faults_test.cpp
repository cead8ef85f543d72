// The host's own memory made to fail under a run: operator new, replaced in this program, and the
// mapping of files, by the linker's --wrap. Whatever fails, the run ends in an exception that says
// memory ran out, frees what it took and leaves whole files only.
//
// A run makes many thousand allocations, so the sweep tries evenly spaced ones: each alone, and
// some of them with all that come after, as it is when memory is really gone. It begins when the
// model's headers are read: the destructor of nlohmann::json allocates, and ends the process when
// that fails.
#include <doctest/doctest.h>
#include <sys/mman.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <new>

#include "engine/error.h"
#include "engine/parallel.h"
#include "tests/unit/failing_backend.h"
#include "tests/unit/small_run.h"

namespace {

// Counts what several threads do; number `at` fails, with `lasting` all later ones as well.
class Fault {
 public:
  void arm(std::int64_t at, bool lasting) {
    seen_ = 0;
    lasting_ = lasting;
    at_ = at;
  }
  // Returns how many there were.
  std::int64_t disarm() {
    at_ = 0;
    return seen_;
  }
  bool hits() {
    const std::int64_t at = at_;
    if (at == 0) return false;
    const std::int64_t number = ++seen_;
    return number == at || (lasting_ && number > at);
  }

 private:
  std::atomic<std::int64_t> at_ = 0, seen_ = 0;
  std::atomic<bool> lasting_ = false;
};

constinit Fault new_fault, map_fault;
constinit std::atomic<std::int64_t> live = 0;  // blocks from operator new

void* allocate(std::size_t size, std::size_t alignment) {
  if (new_fault.hits()) throw std::bad_alloc();
  void* block = alignment == 0
                    ? std::malloc(size)
                    : std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
  if (block == nullptr) throw std::bad_alloc();
  ++live;
  return block;
}

void release(void* block) {
  if (block != nullptr) --live;
  std::free(block);
}

}  // namespace

// The array forms call these, or in a sanitized program those of the sanitizer.
void* operator new(std::size_t size) { return allocate(size, 0); }
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  try {
    return allocate(size, 0);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
void* operator new(std::size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<std::size_t>(alignment));
}
void operator delete(void* block) noexcept { release(block); }
void operator delete(void* block, const std::nothrow_t&) noexcept { release(block); }
void operator delete(void* block, std::size_t) noexcept { release(block); }
void operator delete(void* block, std::align_val_t) noexcept { release(block); }
void operator delete(void* block, std::size_t, std::align_val_t) noexcept { release(block); }

extern "C" {
void* __real_mmap64(void*, std::size_t, int, int, int, off_t);
void* __wrap_mmap64(void* address, std::size_t size, int protection, int flags, int file,
                    off_t offset) {
  if (map_fault.hits()) {
    errno = ENOMEM;
    return MAP_FAILED;
  }
  return __real_mmap64(address, size, protection, flags, file, offset);
}
}

using namespace nibble;
using namespace nibble::test;

namespace {

std::unique_ptr<Backend> make_backend() {
  return std::make_unique<FailingBackend>(cpu::make_cpu_backend(three_threads()));
}

struct Outcome {
  std::string error;  // empty: none
  bool out_of_memory = false;
  std::int64_t seen = 0, leaked = 0;
};

enum class Begins { with_headers, behind_headers };

// A small run under `fault`.
Outcome run_under(Fault& fault, Begins begins, std::int64_t at, bool lasting,
                  const RunDirectory& directory) {
  static char text[512];  // an exception's message outlives neither the catch nor a lasting fault
  text[0] = '\0';
  Outcome outcome;
  const std::int64_t before = live;
  try {
    const auto backend = make_backend();
    if (begins == Begins::with_headers) fault.arm(at, lasting);
    auto base = open_checkpoint(kSmallModel);
    if (begins == Begins::behind_headers) fault.arm(at, lasting);
    small_run(*backend, std::move(base), directory);
  } catch (const std::exception& e) {
    std::snprintf(text, sizeof text, "%s", e.what());
    outcome.out_of_memory = dynamic_cast<const OutOfMemory*>(&e) != nullptr ||
                            dynamic_cast<const std::bad_alloc*>(&e) != nullptr;
  }
  outcome.seen = fault.disarm();
  outcome.leaked = live - before;
  outcome.error = text;
  return outcome;
}

// A run that has a checkpoint of its second step, ready to go on.
RunDirectory second_step(const Scratch& scratch, const SmallRunFiles& wanted) {
  RunDirectory directory(scratch / "run", RunDirectory::Open::overwrite);
  put(directory.file(kSecondStep), wanted.second);
  return directory;
}

// No file is half written or left over: the checkpoint of the fourth step is whole, or not there.
void check_files(const RunDirectory& directory, const SmallRunFiles& wanted) {
  std::map<std::string, std::string> files = files_of(directory);
  CHECK(files.at(kSecondStep) == wanted.second);
  if (files.contains(kFourthStep)) CHECK(files.at(kFourthStep) == wanted.fourth);
  files.erase(kSecondStep);
  files.erase(kFourthStep);
  CHECK(files.empty());
}

void check_goes_on(const RunDirectory& directory, const SmallRunFiles& wanted) {
  std::filesystem::remove(directory.file(kFourthStep));
  small_run(*make_backend(), directory);
  CHECK(files_of(directory).at(kFourthStep) == wanted.fourth);
}

}  // namespace

TEST_CASE("operator new may fail anywhere: one exception, no leak, whole files only") {
  const Scratch scratch;
  const SmallRunFiles wanted = undisturbed(scratch, make_backend);
  const std::int64_t all =
      run_under(new_fault, Begins::behind_headers, INT64_MAX, false, second_step(scratch, wanted))
          .seen;
  MESSAGE(all << " allocations of a run");
  constexpr std::int64_t kPoints = 1000, kLastingEvery = 4;
  REQUIRE(all > kPoints);
  int failed = 0, saved = 0;
  for (std::int64_t point = 0; point <= kPoints; ++point) {
    const std::int64_t at = 1 + point * (all - 1) / kPoints;
    const bool lasting = point % kLastingEvery == 0;
    CAPTURE(at);
    CAPTURE(lasting);
    const RunDirectory directory = second_step(scratch, wanted);
    const Outcome outcome = run_under(new_fault, Begins::behind_headers, at, lasting, directory);
    CAPTURE(outcome.error);
    CHECK(outcome.leaked == 0);
    // A thread more or less, or an advice that could not be composed, is no failure of the run.
    if (!outcome.error.empty()) {
      ++failed;
      CHECK(outcome.out_of_memory);
    }
    saved += std::filesystem::exists(directory.file(kFourthStep)) ? 1 : 0;
    check_files(directory, wanted);
    if (point % 50 == 0) check_goes_on(directory, wanted);
  }
  MESSAGE(failed << " of " << kPoints + 1 << " faults ended the run, " << saved
                 << " after its checkpoint");
  CHECK(failed > kPoints * 9 / 10);
  CHECK(saved < kPoints / 2);
}

TEST_CASE("a backend whose threads cannot be started leaves none behind") {
  for (std::int64_t at = 1;; ++at) {
    const std::int64_t before = live;
    bool refused = false;
    new_fault.arm(at, false);
    try {
      make_backend();
    } catch (const std::bad_alloc&) {
      refused = true;
    }
    const std::int64_t seen = new_fault.disarm();
    CHECK(live == before);
    if (refused) continue;
    CHECK(seen == at - 1);
    CHECK(at > 4);  // the backend, the pool's list, two threads
    break;
  }
}

TEST_CASE("tasks are done by the threads that there are, each once, and their exception arrives") {
  for (std::int64_t at = 1;; ++at) {
    std::array<std::atomic<int>, 9> done{};
    const std::int64_t before = live;
    new_fault.arm(at, false);
    parallel_for(4, std::ssize(done), [&](std::int64_t task, int thread) {
      done[static_cast<std::size_t>(task)] += thread < 4 ? 1 : 100;
    });
    const std::int64_t seen = new_fault.disarm();
    CHECK(live == before);
    for (const std::atomic<int>& count : done) CHECK(count == 1);
    if (seen >= at) continue;
    CHECK(at > 3);  // three threads
    break;
  }
  std::atomic<int> begun = 0;
  CHECK_THROWS_WITH_AS(parallel_for(4, 1000,
                                    [&](std::int64_t task, int) {
                                      ++begun;
                                      if (task == 2) throw Error("the third");
                                    }),
                       "the third", Error);
  CHECK(begun >= 3);
}

TEST_CASE("a file that cannot be mapped is named with its size") {
  const Scratch scratch;
  const SmallRunFiles wanted = undisturbed(scratch, make_backend);
  const RunDirectory directory = second_step(scratch, wanted);
  std::vector<std::string> refused;
  for (std::int64_t at = 1;; ++at) {
    const Outcome outcome = run_under(map_fault, Begins::with_headers, at, false, directory);
    CHECK(outcome.leaked == 0);
    if (outcome.error.empty()) {
      CHECK(outcome.seen == at - 1);
      break;
    }
    CHECK(outcome.out_of_memory);
    CHECK(outcome.error.find("bytes of address space are not to be had") != std::string::npos);
    CHECK(files_of(directory).size() == 1);
    refused.push_back(outcome.error);
  }
  REQUIRE(refused.size() == 2);
  CHECK(refused[0].starts_with("cannot map " + std::string(kSmallModel) + "/model.safetensors: "));
  CHECK(refused[1].starts_with("cannot map " + directory.file(kSecondStep) + ": " +
                               std::to_string(wanted.second.size()) + " bytes"));
  check_goes_on(directory, wanted);
}
