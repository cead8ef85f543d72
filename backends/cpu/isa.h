// The instruction sets of the CPU backend, and how a kernel is written once and built for each.
//
// Every file in `isa_sources` of meson.build is compiled once per set, with -DNIBBLE_ISA=portable,
// avx2 or avx512 and -DNIBBLE_ISA_LEVEL=0, 1 or 2. Its code lives in namespace
// nibble::cpu::NIBBLE_ISA, takes its vector type from vec.h and exports plain functions. A file
// compiled once declares those with NIBBLE_PER_ISA and takes the one to call with NIBBLE_PICK:
//
//   NIBBLE_PER_ISA(void scale(const float* x, float* y, std::int64_t count);)
//   NIBBLE_PICK(isa, scale)(x, y, count);
//
// Rules for such files. Helpers are `static`, in an unnamed namespace or in NIBBLE_ISA: an inline
// function that two sets share is kept once by the linker, maybe in the version the machine lacks.
// -ffp-contract stays off, so that a value does not depend on what the optimizer fused; where a
// fused multiply-add is wanted, fma() of vec.h says so.
//
// portable is what the compiler targets by default; avx2 means AVX2 + FMA + F16C; avx512 means
// AVX-512 F + BW + VL + DQ and all of avx2. Hosts other than x86-64 have portable alone.
#pragma once

#if defined(__x86_64__)
#define NIBBLE_X86 1
#else
#define NIBBLE_X86 0
#endif

namespace nibble::cpu {

enum class Isa { Portable, Avx2, Avx512 };

bool is_supported(Isa isa);  // by this machine and this build
Isa best_isa();              // the widest supported one
const char* name(Isa isa);   // "portable", "avx2", "avx512"

#if NIBBLE_X86
#define NIBBLE_PER_ISA(...) \
  namespace portable {      \
  __VA_ARGS__               \
  }                         \
  namespace avx2 {          \
  __VA_ARGS__               \
  }                         \
  namespace avx512 {        \
  __VA_ARGS__               \
  }
#define NIBBLE_PICK(isa, function)                                       \
  ((isa) == ::nibble::cpu::Isa::Avx512 ? ::nibble::cpu::avx512::function \
   : (isa) == ::nibble::cpu::Isa::Avx2 ? ::nibble::cpu::avx2::function   \
                                       : ::nibble::cpu::portable::function)
#else
#define NIBBLE_PER_ISA(...) \
  namespace portable {      \
  __VA_ARGS__               \
  }
#define NIBBLE_PICK(isa, function) (static_cast<void>(isa), ::nibble::cpu::portable::function)
#endif

}  // namespace nibble::cpu
