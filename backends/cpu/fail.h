// How a kernel refuses its data. The throw is compiled once: a kernel file that built strings
// itself would leave copies of std::string's functions compiled for its instruction set, and the
// linker may keep one of those for the whole program.
#pragma once

namespace nibble::cpu {

// Throws Error with a message made like printf's.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace nibble::cpu
