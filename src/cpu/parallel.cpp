#include "cpu/parallel.h"

#include <cstdlib>
#include <string>

#include "flash_mla/error.h"

namespace flash_mla::cpu {

std::int64_t max_num_threads() {
  const char* const text = std::getenv("FLASH_MLA_NUM_THREADS");
  if (text == nullptr || *text == '\0') return std::max(1U, std::thread::hardware_concurrency());
  char* end = nullptr;
  const long value = std::strtol(text, &end, 10);
  if (*end != '\0' || value < 1) {
    throw InvalidArgument(std::string("FLASH_MLA_NUM_THREADS: expected a whole number above 0, got ") + text);
  }
  return value;
}

}  // namespace flash_mla::cpu
