#include "backends/cpu/fail.h"

#include <cstdarg>
#include <cstdio>

#include "engine/error.h"

namespace nibble::cpu {

void fail(const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  throw Error(message);
}

}  // namespace nibble::cpu
