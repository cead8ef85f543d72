// Which instruction sets this machine has.
#include "backends/cpu/isa.h"

#include <initializer_list>

namespace nibble::cpu {

bool is_supported(Isa isa) {
#if NIBBLE_X86
  // The builtins also check that the operating system saves the wide registers.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  switch (isa) {
    case Isa::Portable:
      return true;
    case Isa::Avx2:
      return avx2;
    case Isa::Avx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  return false;
#else
  return isa == Isa::Portable;
#endif
}

Isa best_isa() {
  for (const Isa isa : {Isa::Avx512, Isa::Avx2}) {
    if (is_supported(isa)) return isa;
  }
  return Isa::Portable;
}

const char* name(Isa isa) {
  return isa == Isa::Avx512 ? "avx512" : isa == Isa::Avx2 ? "avx2" : "portable";
}

}  // namespace nibble::cpu
