#include "large_memory.h"

#include <mutex>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__linux__) && defined(MADV_FREE) && defined(MADV_HUGEPAGE)

// Of the stable ABI since torch 2.11; null under 2.10, where tensors come from malloc.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* tensor,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* context);

namespace fastrl {
namespace {

constexpr size_t kPage = size_t{2} << 20;

struct Mapping {
  void* data = nullptr;
  size_t bytes = 0;
};

Mapping map_pages(size_t bytes) {
  char* raw = static_cast<char*>(
      mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (raw == MAP_FAILED) return {};
  const size_t head = (kPage - reinterpret_cast<uintptr_t>(raw) % kPage) % kPage;
  if (head) munmap(raw, head);
  if (kPage - head) munmap(raw + head + bytes, kPage - head);
  madvise(raw + head, bytes, MADV_HUGEPAGE);
  return {raw + head, bytes};
}

// Mappings whose tensors were freed, the oldest first. Their pages are the system's to take back
// whenever it is short of memory; until then writing to them again costs nothing.
// Never destroyed: a tensor may outlive this file's statics.
std::mutex& spares_mutex = *new std::mutex;
std::vector<Mapping>& spares = *new std::vector<Mapping>;
constexpr size_t kSpares = 4;                      // as many as one op has outputs
constexpr size_t kSpareBytes = size_t{256} << 20;  // or one mapping, however large

Mapping take(size_t bytes) {
  {
    const std::lock_guard<std::mutex> lock(spares_mutex);
    for (auto spare = spares.begin(); spare != spares.end(); ++spare) {
      if (spare->bytes < bytes || spare->bytes > bytes + bytes / 2) continue;
      const Mapping taken = *spare;
      spares.erase(spare);
      return taken;
    }
  }
  return map_pages(bytes);
}

void give_back(void* data, void* context) {
  const Mapping freed{data, reinterpret_cast<size_t>(context)};
  madvise(freed.data, freed.bytes, MADV_FREE);
  const std::lock_guard<std::mutex> lock(spares_mutex);
  spares.push_back(freed);
  size_t total = 0;
  for (const Mapping& spare : spares) total += spare.bytes;
  while (spares.size() > 1 && (spares.size() > kSpares || total > kSpareBytes)) {
    total -= spares.front().bytes;
    munmap(spares.front().data, spares.front().bytes);
    spares.erase(spares.begin());
  }
}

}  // namespace

void release_memory() {
  const std::lock_guard<std::mutex> lock(spares_mutex);
  for (const Mapping& spare : spares) munmap(spare.data, spare.bytes);
  spares.clear();
}

torch::stable::Tensor large_empty(const std::vector<int64_t>& shape,
                                  const std::vector<int64_t>& strides, int32_t dtype,
                                  size_t bytes) {
  if (!torch_from_blob) return {};
  const Mapping mapping = take((bytes + kPage - 1) / kPage * kPage);
  if (!mapping.data) return {};  // torch's own allocation then says how much is missing
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(
      mapping.data, static_cast<int64_t>(shape.size()), shape.data(), strides.data(), 0, dtype,
      aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
      &give_back, reinterpret_cast<void*>(mapping.bytes)));
  return torch::stable::Tensor(handle);
}

}  // namespace fastrl

#else

namespace fastrl {
torch::stable::Tensor large_empty(const std::vector<int64_t>&, const std::vector<int64_t>&, int32_t,
                                  size_t) {
  return {};
}
void release_memory() {}
}  // namespace fastrl

#endif
