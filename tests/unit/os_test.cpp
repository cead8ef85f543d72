// Files that are whole or not there at all, and what the machine says about itself.
#include "engine/os.h"

#include <doctest/doctest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <vector>

#include "engine/error.h"
#include "tests/unit/scratch.h"

using namespace nibble;
using test::get;
using test::put;
using test::Scratch;

namespace {

// Runs `body` with files limited to `bytes`, as on a full disk.
template <typename Body>
void with_file_limit(rlim_t bytes, Body body) {
  struct rlimit before;
  REQUIRE(::getrlimit(RLIMIT_FSIZE, &before) == 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  struct rlimit limit = before;
  limit.rlim_cur = bytes;
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &limit) == 0);
  body();
  REQUIRE(::setrlimit(RLIMIT_FSIZE, &before) == 0);
  std::signal(SIGXFSZ, handler);
}

std::string text_of(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

}  // namespace

TEST_CASE("a directory's entries, sorted, hidden ones too") {
  const Scratch scratch;
  CHECK(os::directory_entries(scratch.path()).empty());
  for (const char* name : {"b", ".hidden", "a"}) put(scratch / name, "");
  CHECK(os::directory_entries(scratch.path()) == std::vector<std::string>{".hidden", "a", "b"});
  CHECK_THROWS_WITH_AS(os::directory_entries(scratch / "none"), doctest::Contains("cannot read"),
                       DeviceError);
}

TEST_CASE("an atomic file appears whole, in any pieces, and leaves nothing beside it") {
  const Scratch scratch;
  const std::string path = scratch / "out";
  std::string wanted;
  os::AtomicFile file(path);
  for (const std::size_t size : {0u, 1u, 1000u, 1u << 20, (1u << 20) + 7, 3u, 3u << 20}) {
    const std::string piece(size, static_cast<char>('a' + wanted.size() % 26));
    file.write(piece);
    wanted += piece;
    CHECK(file.position() == wanted.size());
  }
  file.write_at(1, std::as_bytes(std::span("ZY", 2)));
  wanted.replace(1, 2, "ZY");
  file.write("end");
  wanted += "end";
  CHECK_FALSE(std::filesystem::exists(path));
  file.commit();
  CHECK(get(path) == wanted);
  CHECK(os::read_file(path) == wanted);
  CHECK(scratch.entries() == 1);
}

TEST_CASE("without commit the old file stays") {
  const Scratch scratch;
  const std::string path = scratch / "out";
  put(path, "old");
  {
    os::AtomicFile file(path);
    file.write("new and longer");
  }
  CHECK(get(path) == "old");
  CHECK(scratch.entries() == 1);
  ::chmod(path.c_str(), 0640);
  os::write_file(path, "new");
  CHECK(get(path) == "new");
  struct stat status;
  REQUIRE(::stat(path.c_str(), &status) == 0);
  CHECK((status.st_mode & 0777) == 0640);
}

TEST_CASE("a link is written through, not replaced") {
  const Scratch scratch;
  put(scratch / "target", "old");
  std::filesystem::create_symlink(scratch / "target", scratch / "link");
  os::write_file(scratch / "link", "new");
  CHECK(get(scratch / "target") == "new");
  CHECK(std::filesystem::is_symlink(scratch / "link"));
}

TEST_CASE("a full disk leaves the old file intact and says so") {
  const Scratch scratch;
  const std::string path = scratch / "out";
  put(path, "old");
  with_file_limit(2 << 20, [&] {
    // Large pieces fail in write(), small ones when the buffer is flushed in commit().
    CHECK_THROWS_AS(os::write_file(path, std::string(3 << 20, 'x')), DeviceError);
    os::AtomicFile file(path);
    const std::string piece(1000, 'x');
    const auto fill = [&] {
      for (int i = 0; i < 3000; ++i) file.write(piece);
      file.commit();
    };
    CHECK_THROWS_WITH_AS(fill(), doctest::Contains(path.c_str()), DeviceError);
  });
  CHECK(get(path) == "old");
  CHECK(scratch.entries() == 1);
  if (std::filesystem::exists("/dev/full")) {
    CHECK_THROWS_WITH_AS(os::write_file("/dev/full", "x"),
                         doctest::Contains("No space left on device"), DeviceError);
    CHECK(std::filesystem::is_character_file("/dev/full"));
  }
}

TEST_CASE("places that cannot be written are named") {
  const Scratch scratch;
  const std::string inside = scratch / "missing/out";
  CHECK_THROWS_WITH_AS(os::write_file(inside, "x"), doctest::Contains(inside.c_str()), DeviceError);
  CHECK_THROWS_WITH_AS(os::write_file(scratch.path(), "x"), doctest::Contains("directory"),
                       DeviceError);
  CHECK_THROWS_AS(os::append_file(inside, "x"), DeviceError);
  CHECK_THROWS_AS(os::read_file(inside), DeviceError);
  CHECK_THROWS_AS(os::MappedFile{inside}, DeviceError);
  CHECK_THROWS_AS(os::MappedFile{scratch.path()}, DeviceError);
}

TEST_CASE("a directory that may not be written keeps its old file") {
  const Scratch scratch;
  const std::string path = scratch / "out";
  put(path, "old");
  ::chmod(scratch.path().c_str(), 0555);
  const uid_t user = ::geteuid();  // root may write anywhere, so it steps down for a moment
  if (user == 0) REQUIRE(::seteuid(65534) == 0);
  CHECK_THROWS_WITH_AS(os::write_file(path, "x"), doctest::Contains("Permission denied"),
                       DeviceError);
  CHECK_THROWS_WITH_AS(os::write_file(scratch / "new", "x"), doctest::Contains("/new: "),
                       DeviceError);
  if (user == 0) REQUIRE(::seteuid(0) == 0);
  ::chmod(scratch.path().c_str(), 0755);
  CHECK(get(path) == "old");
  CHECK(scratch.entries() == 1);
}

TEST_CASE("a mapping shows the file, moves, and survives being forgotten") {
  const Scratch scratch;
  const std::string path = scratch / "data";
  std::string wanted(100'000, '\0');
  for (std::size_t i = 0; i < wanted.size(); ++i) wanted[i] = static_cast<char>(i * 7);
  put(path, wanted);
  os::MappedFile first(path);
  os::MappedFile second(std::move(first));
  CHECK(first.bytes().empty());
  first = std::move(second);
  CHECK(text_of(first.bytes()) == wanted);
  os::forget(first.bytes());
  os::forget(first.bytes().subspan(5000, 10));
  os::forget({});
  CHECK(text_of(first.bytes()) == wanted);
  put(scratch / "empty", "");
  CHECK(os::MappedFile(scratch / "empty").bytes().empty());
}

TEST_CASE("append adds to the end") {
  const Scratch scratch;
  os::append_file(scratch / "log", "one\n");
  os::append_file(scratch / "log", "two\n");
  CHECK(get(scratch / "log") == "one\ntwo\n");
  os::sync_directory(scratch.path());
}

TEST_CASE("figures of the machine are sane") {
  CHECK(os::physical_cores() >= 1);
  CHECK(os::memory_bytes() > (std::int64_t{1} << 24));
  const std::int64_t before = os::peak_resident_bytes();
  CHECK(before > 0);
  std::vector<char> block(std::size_t{256} << 20);
  std::memset(block.data(), 1, block.size());
  CHECK(os::peak_resident_bytes() >= before);
  CHECK(os::peak_resident_bytes() >= static_cast<std::int64_t>(block.size()));
  CHECK(os::peak_resident_bytes() <= os::memory_bytes());
  const double start = os::seconds();
  CHECK(os::seconds() >= start);
  CHECK(os::terminal_columns(-1) == 80);
  CHECK_FALSE(os::is_terminal(-1));
}

TEST_CASE("the first interrupt sets a flag, the second ends with 130") {
  for (const int signal : {SIGINT, SIGTERM}) {
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      os::catch_interrupt();
      if (os::interrupted()) ::_exit(1);
      ::raise(signal);
      if (!os::interrupted()) ::_exit(2);
      ::raise(signal);
      ::_exit(3);
    }
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    REQUIRE(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 130);
  }
}
