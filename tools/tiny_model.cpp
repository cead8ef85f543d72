#include "tools/tiny_model.h"

#include <cstddef>
#include <span>

// The file itself, put into the program by the assembler.
asm(R"(
  .section .rodata
  .balign 64
  .global nibble_tiny_model_begin
  .global nibble_tiny_model_end
nibble_tiny_model_begin:
  .incbin ")" NIBBLE_TINY_MODEL R"("
nibble_tiny_model_end:
  .byte 0
  .text
)");

extern "C" const std::byte nibble_tiny_model_begin[], nibble_tiny_model_end[];

namespace nibble {

std::unique_ptr<Checkpoint> open_model_source(const std::string& source, std::uint64_t seed) {
  if (source != "tiny") return open_checkpoint(source, seed);
  return open_gguf_checkpoint("tiny", {nibble_tiny_model_begin, nibble_tiny_model_end});
}

}  // namespace nibble
