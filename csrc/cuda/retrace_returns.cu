#include "scan_launch.cuh"

namespace fastrl::cuda {

FASTRL_LAUNCH_SCANS(RetraceReturns)
FASTRL_LAUNCH_SCANS(RetraceBackward)

}  // namespace fastrl::cuda
