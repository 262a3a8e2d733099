#include "scan_launch.cuh"

namespace fastrl::cuda {

FASTRL_LAUNCH_SCANS(DiscountedReturns)

}  // namespace fastrl::cuda
