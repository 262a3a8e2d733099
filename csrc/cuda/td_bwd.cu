#include "scan_launch.cuh"

namespace fastrl::cuda {

FASTRL_LAUNCH_SCANS(TdBackward)

}  // namespace fastrl::cuda
