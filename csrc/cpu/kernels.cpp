#include "kernels.h"

#include <cstring>
#include <initializer_list>

namespace fastrl {
namespace {

bool runs_avx512() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

bool runs_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

const KernelTable* widest() {
  if (runs_avx512()) return kernels_avx512();
  if (runs_avx2()) return kernels_avx2();
  return kernels_plain();
}

const KernelTable* selected = widest();

}  // namespace

const KernelTable& kernels() { return *selected; }

bool select_kernels(const char* name) {
  for (const KernelTable* table : {runs_avx512() ? kernels_avx512() : nullptr,
                                   runs_avx2() ? kernels_avx2() : nullptr, kernels_plain()}) {
    if (table && std::strcmp(table->name, name) == 0) {
      selected = table;
      return true;
    }
  }
  return false;
}

}  // namespace fastrl
