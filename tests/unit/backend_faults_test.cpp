// Every reservation of a run made to fail, one after the other: the reason arrives as it was given,
// nothing stays allocated, and the run goes on from its checkpoint as if nothing had happened.
#include <doctest/doctest.h>

#include <set>

#include "tests/unit/failing_backend.h"
#include "tests/unit/small_run.h"

using namespace nibble;
using namespace nibble::test;

namespace {

std::unique_ptr<FailingBackend> make_backend(std::size_t fail_at = 0) {
  return std::make_unique<FailingBackend>(cpu::make_cpu_backend(three_threads()), fail_at);
}

}  // namespace

TEST_CASE("any reservation may fail: said as it is, nothing leaks, the run can go on") {
  const Scratch scratch;
  const SmallRunFiles wanted = undisturbed(scratch, [] { return make_backend(); });
  std::set<std::string> refused, refused_on_host;
  for (std::size_t fail_at = 1;; ++fail_at) {
    CAPTURE(fail_at);
    const RunDirectory directory(scratch / ("run" + std::to_string(fail_at)),
                                 RunDirectory::Open::fresh);
    put(directory.file(kSecondStep), wanted.second);
    const auto backend = make_backend(fail_at);
    try {
      small_run(*backend, directory);
      CHECK(backend->reservations().size() == fail_at - 1);
      CHECK(files_of(directory).at(kFourthStep) == wanted.fourth);
      break;
    } catch (const OutOfMemory& e) {
      REQUIRE(backend->reservations().size() == fail_at);
      const FailingBackend::Reservation& last = backend->reservations().back();
      CHECK(e.what() == last.purpose + ": " + std::to_string(last.bytes) + " bytes were refused");
      CHECK(e.kind == last.kind);
      CHECK_FALSE(last.purpose.empty());
      (last.kind == MemoryKind::host ? refused_on_host : refused).insert(last.purpose);
    }
    CHECK(backend->allocated_bytes() == 0);
    CHECK(backend->host_allocated_bytes() == 0);
    CHECK(files_of(directory) == std::map<std::string, std::string>{{kSecondStep, wanted.second}});
    small_run(*backend, directory);  // the fault happens once
    CHECK(files_of(directory).at(kFourthStep) == wanted.fourth);
    CHECK(files_of(directory).at(kSecondStep) == wanted.second);
  }
  CHECK(refused == std::set<std::string>{"weights", "masters", "adapters", "gradients",
                                         "first moments", "second moments", "optimizer blocks",
                                         "arena", "inputs", "states"});
  CHECK(refused_on_host == std::set<std::string>{"input embedding", "streamed weights", "masters",
                                                 "first moments", "second moments", "pages"});
}

TEST_CASE("a limit is kept on both sides and names what did not fit") {
  const auto backend =
      cpu::make_cpu_backend({.isa = {}, .memory_limit = 1000, .host_memory_limit = 500});
  const auto held = backend->allocate(600, "weights");
  const auto message = [&](auto reserve) -> std::string {
    try {
      reserve();
    } catch (const OutOfMemory& e) {
      return (e.kind == MemoryKind::host ? "host: " : "device: ") + std::string(e.what());
    }
    return "nothing was thrown";
  };
  CHECK(message([&] { backend->allocate(401, "arena"); }) ==
        "device: arena: 401 bytes do not fit; 600 of 1000 are in use");
  CHECK(message([&] { backend->allocate_host(501, "pages"); }) ==
        "host: pages: 501 bytes do not fit; 0 of 500 are in use");
  CHECK(backend->allocated_bytes() == 600);
  CHECK(backend->host_allocated_bytes() == 0);
}
