// engine/os.h for POSIX systems, with Linux's /proc, /sys and cgroup files where they exist.
//
// Every system call that can be interrupted is repeated, every short write continued, and fsync
// and close are checked: a full disk may be reported as late as that. Limits of the machine are
// the smallest of what the hardware, the affinity mask and any enclosing cgroup (v1 or v2) allow.
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <limits>
#include <memory>
#include <set>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "engine/error.h"
#include "engine/os.h"

namespace nibble::os {
namespace {

constexpr std::size_t kBufferBytes = std::size_t{1} << 20;

[[noreturn]] void fail(const std::string& what, int code) {
  throw DeviceError(what + ": " + std::generic_category().message(code), code);
}

// What a user can do about the usual reasons for a refused write.
[[noreturn]] void fail_write(const std::string& path, int code) {
  std::string advice;
  if (code == ENOSPC || code == EDQUOT) advice = "; free some space or choose another place";
  if (code == EACCES || code == EPERM || code == EROFS) advice = "; choose a writable place";
  if (code == ENOENT) advice = "; create the directory first";
  if (code == EFBIG) advice = "; raise the file size limit (ulimit -f) or choose another place";
  throw DeviceError("cannot write " + path + ": " + std::generic_category().message(code) + advice,
                    code);
}

// A descriptor that closes itself; close() reports what the last writes may still say.
class Descriptor {
 public:
  explicit Descriptor(int file) : file_(file) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (file_ >= 0) ::close(file_);
  }
  int get() const { return file_; }
  int close() { return ::close(std::exchange(file_, -1)); }

 private:
  int file_;
};

int open_file(const std::string& path, int flags, mode_t mode = 0666) {
  int file;
  do {
    file = ::open(path.c_str(), flags | O_CLOEXEC, mode);
  } while (file < 0 && errno == EINTR);
  return file;
}

void write_all(int file, const char* data, std::size_t size, const std::string& path) {
  while (size > 0) {
    const ssize_t count = ::write(file, data, size);
    if (count < 0) {
      if (errno == EINTR) continue;
      fail_write(path, errno);
    }
    data += count;
    size -= static_cast<std::size_t>(count);
  }
}

std::string directory_of(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

// The file behind a symbolic link, so that renaming replaces the file and keeps the link.
std::string resolve_link(const std::string& path) {
  struct stat status;
  if (::lstat(path.c_str(), &status) != 0 || !S_ISLNK(status.st_mode)) return path;
  char* resolved = ::realpath(path.c_str(), nullptr);
  if (resolved == nullptr) return path;
  std::string target(resolved);
  std::free(resolved);
  return target;
}

// The text of a small system file, empty when it cannot be read.
std::string system_text(const std::string& path) {
  const Descriptor file(open_file(path, O_RDONLY));
  std::string text;
  char chunk[4096];
  for (ssize_t count; file.get() >= 0 && (count = ::read(file.get(), chunk, sizeof chunk)) > 0;) {
    text.append(chunk, static_cast<std::size_t>(count));
  }
  return text;
}

// The calling process's directory in the cgroup hierarchy of `controller` ("" is version 2), from
// lines "ID:CONTROLLERS:PATH" of /proc/self/cgroup.
std::string cgroup_path(const std::string& controller) {
  const std::string text = system_text("/proc/self/cgroup");
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    const std::string line = text.substr(begin, end - begin);
    begin = end + 1;
    const std::size_t first = line.find(':');
    const std::size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string list = line.substr(first + 1, second - first - 1);
    const bool mine = controller.empty()
                          ? list.empty()
                          : ("," + list + ",").find("," + controller + ",") != std::string::npos;
    if (mine) return line.substr(second + 1);
  }
  return "/";
}

// Texts of `name` in the process's cgroup and all that enclose it. A container may not show its
// own path below the mount point, but its root directory always carries its limits.
std::vector<std::string> cgroup_texts(const std::string& mount, const std::string& controller,
                                      const std::string& name) {
  std::vector<std::string> texts;
  std::string path = cgroup_path(controller);
  while (true) {
    if (path == "/") path.clear();
    const std::string text = system_text(mount + path + "/" + name);
    if (!text.empty()) texts.push_back(text);
    if (path.empty()) return texts;
    const std::size_t slash = path.rfind('/');
    path.resize(slash == std::string::npos ? 0 : slash);
  }
}

// CPUs that the cgroup's time quota is worth, infinite without one.
double cgroup_cpus() {
  double cpus = std::numeric_limits<double>::infinity();
  const auto limit = [&](double quota, double period) {
    if (quota > 0 && period > 0) cpus = std::min(cpus, quota / period);
  };
  for (const std::string& text : cgroup_texts("/sys/fs/cgroup", "", "cpu.max")) {
    char* rest = nullptr;
    const double quota = std::strtod(text.c_str(), &rest);  // "max 100000" reads as 0
    limit(quota, std::strtod(rest, nullptr));
  }
  const auto quotas = cgroup_texts("/sys/fs/cgroup/cpu", "cpu", "cpu.cfs_quota_us");
  const auto periods = cgroup_texts("/sys/fs/cgroup/cpu", "cpu", "cpu.cfs_period_us");
  for (std::size_t i = 0; i < std::min(quotas.size(), periods.size()); ++i) {
    limit(std::strtod(quotas[i].c_str(), nullptr), std::strtod(periods[i].c_str(), nullptr));
  }
  return cpus;
}

// Cores, not hardware threads, in the affinity mask; 0 when that is not known.
int cores_in_mask() {
#ifdef __linux__
  cpu_set_t mask;
  CPU_ZERO(&mask);
  if (::sched_getaffinity(0, sizeof mask, &mask) != 0) return 0;
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &mask)) continue;
    const std::string siblings = system_text("/sys/devices/system/cpu/cpu" + std::to_string(cpu) +
                                             "/topology/thread_siblings_list");
    cores.insert(siblings.empty() ? "cpu" + std::to_string(cpu) : siblings);
  }
  return static_cast<int>(cores.size());
#else
  return 0;
#endif
}

volatile std::sig_atomic_t interrupt_seen = 0;

extern "C" void nibble_on_interrupt(int) {
  if (interrupt_seen != 0) ::_exit(130);
  interrupt_seen = 1;
}

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  const Descriptor file(open_file(path, O_RDONLY));
  if (file.get() < 0) fail("cannot open " + path, errno);
  struct stat status;
  if (::fstat(file.get(), &status) != 0) fail("cannot read " + path, errno);
  if (S_ISDIR(status.st_mode)) fail("cannot read " + path, EISDIR);
  if (!S_ISREG(status.st_mode)) {
    throw DeviceError("cannot map " + path + ": it is not a regular file; copy it to one", ENODEV);
  }
  if (status.st_size == 0) return;
  size_ = static_cast<std::size_t>(status.st_size);
  void* address = ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file.get(), 0);
  if (address == MAP_FAILED && errno == ENOMEM) {
    throw OutOfMemory("cannot map " + path + ": " + std::to_string(size_) +
                          " bytes of address space are not to be had; raise the limit (ulimit -v, "
                          "vm.max_map_count)",
                      MemoryKind::host, static_cast<std::int64_t>(size_), 0);
  }
  if (address == MAP_FAILED) fail("cannot map " + path, errno);
  data_ = static_cast<const std::byte*>(address);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

void forget(std::span<const std::byte> bytes) {
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<std::uintptr_t>(bytes.data());
  const std::uintptr_t first = (begin + page - 1) / page * page;
  const std::uintptr_t last = (begin + bytes.size()) / page * page;
  // A hint: a refusal only means that the pages stay.
  if (first < last) ::madvise(reinterpret_cast<void*>(first), last - first, MADV_DONTNEED);
}

// A target that is a device or a pipe (/dev/stdout) cannot be renamed onto; it is written directly
// and temporary_ stays empty.
AtomicFile::AtomicFile(const std::string& path) : path_(resolve_link(path)) {
  buffer_.reserve(kBufferBytes);
  struct stat status;
  const bool exists = ::stat(path_.c_str(), &status) == 0;
  if (exists && S_ISDIR(status.st_mode)) fail_write(path_, EISDIR);
  if (exists && !S_ISREG(status.st_mode)) {
    file_ = open_file(path_, O_WRONLY);
    if (file_ < 0) fail_write(path_, errno);
  } else {
    if (exists && ::faccessat(AT_FDCWD, path_.c_str(), W_OK, AT_EACCESS) != 0) {
      fail_write(path_, errno);
    }
    const std::string name = path_.substr(path_.rfind('/') + 1);
    const std::string stem =
        directory_of(path_) + "/." + name + ".tmp-" + std::to_string(::getpid()) + "-";
    for (int attempt = 0; file_ < 0; ++attempt) {
      temporary_ = stem + std::to_string(attempt);
      file_ = open_file(temporary_, O_RDWR | O_CREAT | O_EXCL);
      if (file_ < 0 && errno != EEXIST) fail_write(path_, errno);
    }
    if (exists && ::fchmod(file_, status.st_mode & 07777) != 0) {
      // The new file keeps the default mode, as on file systems that have no modes.
    }
  }
}

AtomicFile::~AtomicFile() {
  if (file_ >= 0) ::close(file_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void AtomicFile::flush() {
  write_all(file_, buffer_.data(), buffer_.size(), path_);
  buffer_.clear();
}

void AtomicFile::write(std::span<const std::byte> bytes) {
  const auto* data = reinterpret_cast<const char*>(bytes.data());
  if (buffer_.size() + bytes.size() > kBufferBytes) flush();
  if (bytes.size() >= kBufferBytes) {
    write_all(file_, data, bytes.size(), path_);
  } else {
    buffer_.append(data, bytes.size());
  }
  position_ += bytes.size();
}

void AtomicFile::write(const std::string& text) { write(std::as_bytes(std::span(text))); }

void AtomicFile::write_at(std::uint64_t offset, std::span<const std::byte> bytes) {
  flush();
  while (!bytes.empty()) {
    const ssize_t count = ::pwrite(file_, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (count < 0) {
      if (errno == EINTR) continue;
      fail_write(path_, errno);
    }
    offset += static_cast<std::uint64_t>(count);
    bytes = bytes.subspan(static_cast<std::size_t>(count));
  }
}

void AtomicFile::commit() {
  flush();
  if (!temporary_.empty() && ::fsync(file_) != 0) fail_write(path_, errno);
  if (::close(std::exchange(file_, -1)) != 0) fail_write(path_, errno);
  if (temporary_.empty()) return;
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) fail_write(path_, errno);
  temporary_.clear();
  sync_directory(directory_of(path_));
}

void write_file(const std::string& path, const std::string& text) {
  AtomicFile file(path);
  file.write(text);
  file.commit();
}

void append_file(const std::string& path, const std::string& text) {
  Descriptor file(open_file(path, O_WRONLY | O_CREAT | O_APPEND));
  if (file.get() < 0) fail_write(path, errno);
  write_all(file.get(), text.data(), text.size(), path);
  if (file.close() != 0) fail_write(path, errno);
}

std::string read_file(const std::string& path) {
  const Descriptor file(open_file(path, O_RDONLY));
  if (file.get() < 0) fail("cannot open " + path, errno);
  std::string text;
  struct stat status;
  if (::fstat(file.get(), &status) == 0 && S_ISREG(status.st_mode) && status.st_size > 0) {
    text.reserve(static_cast<std::size_t>(status.st_size));
  }
  std::vector<char> chunk(std::size_t{1} << 16);
  while (true) {
    const ssize_t count = ::read(file.get(), chunk.data(), chunk.size());
    if (count == 0) return text;
    if (count > 0) {
      text.append(chunk.data(), static_cast<std::size_t>(count));
    } else if (errno != EINTR) {
      fail("cannot read " + path, errno);
    }
  }
}

void sync_directory(const std::string& path) {
  const Descriptor directory(open_file(path, O_RDONLY | O_DIRECTORY));
  if (directory.get() < 0) {
    // A directory that may be written but not read has its entries flushed by the system later.
    if (errno == EACCES) return;
    fail("cannot open " + path, errno);
  }
  if (::fsync(directory.get()) != 0 && errno != EINVAL && errno != EROFS) {
    fail("cannot flush " + path, errno);
  }
}

std::vector<std::string> directory_entries(const std::string& path) {
  const std::unique_ptr<DIR, int (*)(DIR*)> directory(::opendir(path.c_str()), ::closedir);
  if (directory == nullptr) fail("cannot read " + path, errno);
  std::vector<std::string> names;
  while (true) {
    errno = 0;
    const dirent* entry = ::readdir(directory.get());
    if (entry == nullptr && errno != 0) fail("cannot read " + path, errno);
    if (entry == nullptr) break;
    const std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

int physical_cores() {
  int cores = cores_in_mask();
  if (cores == 0) cores = static_cast<int>(std::thread::hardware_concurrency());
  const double quota = std::ceil(cgroup_cpus());
  if (quota < cores) cores = static_cast<int>(quota);
  return std::max(cores, 1);
}

std::int64_t memory_bytes() {
  std::int64_t bytes = static_cast<std::int64_t>(::sysconf(_SC_PHYS_PAGES)) *
                       static_cast<std::int64_t>(::sysconf(_SC_PAGESIZE));
  std::vector<std::string> limits = cgroup_texts("/sys/fs/cgroup", "", "memory.max");
  for (std::string& text :
       cgroup_texts("/sys/fs/cgroup/memory", "memory", "memory.limit_in_bytes")) {
    limits.push_back(std::move(text));
  }
  for (const std::string& text : limits) {
    const long long limit = std::strtoll(text.c_str(), nullptr, 10);  // "max" reads as 0
    if (limit > 0) bytes = std::min<std::int64_t>(bytes, limit);
  }
  return bytes;
}

std::int64_t peak_resident_bytes() {
  // getrusage counts what the process was before exec; VmHWM belongs to this program alone.
  const std::string status = system_text("/proc/self/status");
  const std::size_t at = status.find("VmHWM:");
  if (at != std::string::npos) return std::strtoll(status.c_str() + at + 6, nullptr, 10) * 1024;
  struct rusage usage;
  if (::getrusage(RUSAGE_SELF, &usage) != 0) return 0;
#ifdef __APPLE__
  return usage.ru_maxrss;
#else
  return std::int64_t{usage.ru_maxrss} * 1024;
#endif
}

double seconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(now).count();
}

bool is_terminal(int descriptor) { return ::isatty(descriptor) == 1; }

int terminal_columns(int descriptor) {
  struct winsize size;
  const bool known = ::ioctl(descriptor, TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
  return known ? size.ws_col : 80;
}

void catch_interrupt() {
  struct sigaction action = {};
  action.sa_handler = nibble_on_interrupt;
  action.sa_flags = SA_RESTART;  // output that is being written goes on
  ::sigemptyset(&action.sa_mask);
  for (const int signal : {SIGINT, SIGTERM}) {
    if (::sigaction(signal, &action, nullptr) != 0) fail("cannot catch signals", errno);
  }
}

bool interrupted() { return interrupt_seen != 0; }

Library::Library(std::span<const std::string> names) {
  for (const std::string& name : names) {
    handle_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle_ != nullptr) return;
    // A path that does not exist says less than the reason why one that does cannot be loaded.
    const char* reason = dlerror();
    const bool absent = name.find('/') != std::string::npos && access(name.c_str(), F_OK) != 0;
    if (reason != nullptr && (error_.empty() || !absent)) error_ = reason;
  }
}

Library::~Library() {
  if (handle_ != nullptr) dlclose(handle_);
}

void* Library::symbol(const char* name) const {
  return handle_ == nullptr ? nullptr : dlsym(handle_, name);
}

std::string executable_directory() {
  std::error_code error;
  const std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe", error);
  return error ? std::string() : program.parent_path().string();
}

}  // namespace nibble::os
