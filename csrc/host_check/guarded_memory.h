// Memory between two pages that fault, so that an access beside it is an error, not a wrong number.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>
#include <stdexcept>

namespace host_check {

class GuardedMemory {
 public:
  // Filled with 0xFF, NaN in every floating-point type. Ends `shift` bytes before the page behind it, or begins as many
  // behind the page before it.
  GuardedMemory(size_t bytes, bool at_end, size_t shift) : bytes_(bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    inner_bytes_ = (bytes + shift + page - 1) / page * page;
    mapped_bytes_ = inner_bytes_ + 2 * page;
    mapped_ = mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped_ == MAP_FAILED) throw std::runtime_error("no memory for a tensor");
    inner_ = static_cast<char*>(mapped_) + page;
    allow_writes(true);
    data_ = inner_ + (at_end ? inner_bytes_ - bytes - shift : shift);
    memset(inner_, 0xFF, inner_bytes_);
  }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;
  ~GuardedMemory() { munmap(mapped_, mapped_bytes_); }

  void allow_writes(bool allowed) { mprotect(inner_, inner_bytes_, allowed ? PROT_READ | PROT_WRITE : PROT_READ); }

  // Whether the rest of the pages is as it was made: writes there do not fault.
  bool intact() const {
    for (const char* p = inner_; p < inner_ + inner_bytes_; ++p) {
      if ((p < data_ || p >= data_ + bytes_) && *p != static_cast<char>(0xFF)) return false;
    }
    return true;
  }

  char* data() { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_, inner_bytes_, mapped_bytes_;
  void* mapped_;
  char *inner_, *data_;
};

}  // namespace host_check
