// A plan run on memory that shows every misuse.
//
// Each leaf and the arena lie between guard zones, at an address that is a multiple of the
// backend's alignment and of nothing larger. Before a run the arena (outputs, scratch and the gaps
// between them) and all guards hold 0xFF bytes: NaN in every floating point type, -1 in the integer
// ones. A value read before it was written, or beyond its end, therefore shows in the results; a
// byte written where none belongs shows in damage().
//
// Weights of plane types are laid out with the backend's plane alignment.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/backend.h"
#include "engine/plan.h"

namespace nibble::registry {

class GuardedRun {
 public:
  // `leaves`: contents by node id, as encode() makes them; empty for op nodes. The plan and the
  // backend must outlive the run.
  GuardedRun(Backend& backend, const Plan& plan, std::vector<std::vector<std::byte>> leaves);

  // Restores all leaves and poisons everything else.
  void reset();
  // Replaces one leaf's contents, now and for later resets.
  void set_leaf(std::int32_t node, std::vector<std::byte> contents);
  void run() { executable_->run(); }

  // A value that the plan gave a place, and the present contents of a leaf.
  std::vector<std::byte> value(Ref ref) const;
  std::vector<std::byte> leaf(std::int32_t node) const;

  // Empty, or what was overwritten: a guard, a byte of the arena that belongs to no value and no
  // scratch, or a leaf that no op of the plan may write.
  std::string damage() const;

 private:
  struct Region {
    std::unique_ptr<Buffer> buffer;
    std::int64_t bytes = 0;
    std::byte* body() const;
    std::int64_t front = 0;
  };
  Region make_region(std::int64_t bytes, const std::string& purpose) const;
  void poison(const Region& region) const;
  std::vector<std::byte> download(const std::byte* from, std::int64_t bytes) const;
  bool guards_intact(const Region& region) const;
  std::vector<bool> writable_leaves() const;

  Backend& backend_;
  const Plan& plan_;
  std::vector<std::vector<std::byte>> contents_;
  std::vector<Region> leaves_;  // by node id
  Region arena_;
  std::unique_ptr<Executable> executable_;
};

}  // namespace nibble::registry
