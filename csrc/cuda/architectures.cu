// Which GPU architectures this binary holds code for. nvcc itself lists them.
#include <string>

namespace fastrl {

std::string cuda_architectures() {
  const int built[] = {__CUDA_ARCH_LIST__};
  std::string names;
  for (const int arch : built) {
    names += names.empty() ? "" : ", ";
    names += "sm_" + std::to_string(arch / 10);
  }
  return names;
}

}  // namespace fastrl
