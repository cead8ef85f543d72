// A plan whose memory another process took: planned once more, with what is there, or refused.
#include "tools/replan.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <sstream>

#include "engine/error.h"
#include "tests/unit/failing_backend.h"
#include "tests/unit/scratch.h"
#include "tools/text.h"

using namespace nibble;
using test::FailingBackend;

namespace {

Recipe recipe(const std::string& memory) {
  Recipe r;
  r.model = "tiny";
  r.data = {"models/tiny/instructions.jsonl"};
  r.where.name = "cpu";
  r.where.threads = 2;
  r.rank = 4;
  r.batch = 16;
  r.steps = 1;
  r.memory = memory;
  return r;
}

// The setup of `asked` on a backend whose reservation `fail_at` fails.
struct Prepared {
  Prepared(const Recipe& asked, std::size_t fail_at, std::int64_t there) {
    std::ostringstream quiet;
    setup = set_up(asked, quiet);
    auto failing = std::make_unique<FailingBackend>(std::move(setup.backend), fail_at, there);
    backend = failing.get();
    const std::int64_t context = setup.decoder->context();
    setup.backend = std::move(failing);
    setup.recipe.storage = asked.storage;
    plan_model(setup, context);
  }
  ~Prepared() { setup.release(); }
  FinetuneSetup setup;
  FailingBackend* backend;  // until it is planned again
  std::ostringstream log;
};

}  // namespace

TEST_CASE("a plan that can be reserved stays as it is") {
  const Recipe asked = recipe("");
  Prepared p(asked, 0, 0);
  const Recipe planned = reserve_or_replan(p.setup, asked, p.log);
  CHECK(p.log.str().empty());
  CHECK(planned.memory.empty());
  CHECK_FALSE(p.setup.replanned);
  CHECK(p.backend->allocated_bytes() == p.setup.fit.total_bytes());
}

TEST_CASE("what another process took is planned around, once, whatever could not be reserved") {
  for (const char* memory : {"", "64M"}) {
    const Recipe asked = recipe(memory);
    std::size_t reservations = 0;
    FitReport before;
    {
      Prepared p(asked, 0, 0);
      before = p.setup.fit;
      reserve(p.setup);
      reservations = p.backend->reservations().size();
    }
    REQUIRE(reservations > 5);
    CHECK(before.storage == "store");
    // Of what is there 8 tenths are planned with.
    const std::int64_t left = before.total_bytes() * 8 / 10;
    for (std::size_t fail_at = 1; fail_at <= reservations; ++fail_at) {
      CAPTURE(fail_at);
      Prepared p(asked, fail_at, left * 10 / 8);
      const Recipe planned = reserve_or_replan(p.setup, asked, p.log);
      const FitReport& now = p.setup.fit;
      const std::string line = p.log.str();
      CHECK(line.starts_with("re-planned: "));
      CHECK(line.find(" bytes were refused (" + size_text(before.total_bytes()) +
                      " with storage store were planned, now " + size_text(now.total_bytes()) +
                      " with storage " + now.storage) != std::string::npos);
      CHECK(std::count(line.begin(), line.end(), '\n') == 1);
      CHECK(p.setup.replanned);
      CHECK(now.fits());
      CHECK(now.total_bytes() <= left);
      CHECK(now.storage != before.storage);
      CHECK(parse_size(planned.memory, "--memory") <= left);
      CHECK(p.setup.recipe.memory == memory);
      CHECK(p.setup.backend->allocated_bytes() == now.total_bytes());
      CHECK(p.setup.backend->host_allocated_bytes() == now.pinned_bytes());
      read_weights(p.setup, {});
    }
  }
}

TEST_CASE("what is left may be too little: nothing is reserved, the plan says by how much") {
  const Recipe asked = recipe("");
  Prepared p(asked, 2, 1 << 20);
  const Recipe planned = reserve_or_replan(p.setup, asked, p.log);
  CHECK(p.log.str().starts_with("re-planned: "));
  CHECK_FALSE(p.setup.fit.fits());
  CHECK(p.setup.fit.budget_bytes == (1 << 20) / 10 * 8);
  CHECK(planned.memory == std::to_string((1 << 20) / 10 * 8));
  CHECK(p.setup.backend->allocated_bytes() == 0);
}

TEST_CASE("host memory that cannot be page-locked is no matter of planning") {
  Recipe asked = recipe("");
  asked.storage = "store,offload:inputs";
  std::size_t pages = 0;
  {
    Prepared p(asked, 0, 0);
    reserve(p.setup);
    for (const FailingBackend::Reservation& r : p.backend->reservations()) {
      ++pages;
      if (r.kind == MemoryKind::host) break;
    }
  }
  Prepared p(asked, pages, 0);
  CHECK_THROWS_WITH_AS(reserve_or_replan(p.setup, asked, p.log), doctest::Contains("pages: "),
                       OutOfMemory);
  CHECK(p.log.str().empty());
  p.setup.decoder.reset();
  p.setup.trainer.reset();
  p.setup.loaded.reset();
  CHECK(p.backend->allocated_bytes() == 0);
  CHECK(p.backend->host_allocated_bytes() == 0);
}
